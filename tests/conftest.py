"""What every test starts from: one thread, one seed, torchvision importable where installed."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from cpd import _torchvision

torch.set_num_threads(1)
# What PyTorch notes of every trace, with the graphs in it, is kept by pytest until a test ends.
logging.getLogger("torch.__trace").propagate = False
_torchvision.ensure()

# The same examples in every run, and no verdict by the clock of a busy machine.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws while it is imported does not depend on the modules before it."""
    _seeded()


def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test read the global generator
    torch.manual_seed(0)


def switches() -> dict[str, object]:
    """What PyTorch keeps for the whole process: left changed, it decides the next test."""
    cuda = torch.backends.cuda
    return {
        "threads": torch.get_num_threads(),
        "flash attention": cuda.flash_sdp_enabled(),
        "mathematical attention": cuda.math_sdp_enabled(),
        "efficient attention": cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Start every test from the same seeds, and let none change what the next one stands on."""
    _seeded()
    before = switches()
    yield
    assert switches() == before
