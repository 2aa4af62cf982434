"""Weight magnitude."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError
from ..groups import Groups
from .base import Accumulated, Importance, Scores, held_tensors, per_channel


def magnitude(*, p: float = 2.0) -> Importance:
    """Sum of |w|^p over a channel's weights, mean over all parameters that make or read it.

    Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017); group mean as in
    DepGraph (CVPR 2023).
    """
    if not p > 0:
        raise InputError(f"magnitude needs p > 0, got {p!r}")
    return Accumulated(lambda model, groups: _scores(model, groups, p), needs_gradient=False)


def _scores(model: nn.Module, groups: Groups, p: float) -> Scores:
    tensors = held_tensors(model)
    result = {}
    for group in groups:
        members = [m for m in group.members if isinstance(tensors[m.tensor], nn.Parameter)]
        total = torch.zeros(group.size, dtype=torch.float64)
        for member in members:
            powers = tensors[member.tensor].detach().abs().double().pow(p)
            total += per_channel(powers, member, group.size).cpu()
        result[group.name] = total / max(len(members), 1)
    return result
