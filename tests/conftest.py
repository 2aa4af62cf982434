"""What every test starts from: one thread, one seed, torchvision importable where installed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from cpd import _torchvision

torch.set_num_threads(1)
_torchvision.ensure()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test read the global generator
    torch.manual_seed(0)
