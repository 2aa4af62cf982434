"""What every test starts from: one thread, one seed, torchvision importable where installed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

from cpd import _torchvision

torch.set_num_threads(1)
_torchvision.ensure()

# The same examples in every run, and no verdict by the clock of a busy machine.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test read the global generator
    torch.manual_seed(0)
