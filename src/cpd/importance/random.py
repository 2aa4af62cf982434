"""Random importance: the baseline every other one has to beat."""

from __future__ import annotations

import torch
from torch import nn

from ..groups import Groups
from .base import Accumulated, Importance, Scores


def random(*, seed: int = 0) -> Importance:
    """Uniform numbers in [0, 1), the same for the same seed."""

    def scores(_: nn.Module, groups: Groups) -> Scores:
        generator = torch.Generator().manual_seed(seed)
        return {
            group.name: torch.rand(group.size, generator=generator, dtype=torch.float64)
            for group in groups
        }

    return Accumulated(scores, needs_gradient=False)
