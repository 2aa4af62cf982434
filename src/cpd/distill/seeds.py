"""Randomness as a function of place: (seed, stage, step), never of what ran before.

A step seeds the generators from its own address, so a run that goes on from a checkpoint draws the
same numbers as one that never stopped, and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive", "isolated", "seed_all"]


def derive(seed: int, *address: int | str) -> int:
    """A seed of 63 bits for one place of a run."""
    text = "/".join(str(part) for part in (seed, *address))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (what transforms of others draw from)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same numbers; that one formats the call stack for each device that is not there
        torch.default_generator.manual_seed(seed)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seeded and reproducible inside; the caller's random state and cuDNN flags afterwards."""
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002
    cudnn = torch.backends.cudnn
    with torch.random.fork_rng(), cudnn.flags(enabled=cudnn.enabled, deterministic=True):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
