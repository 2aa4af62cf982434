"""LAMP: layer-adaptive magnitude."""

from __future__ import annotations

import torch
from torch import nn

from ..groups import CouplingGroup, Groups
from ._aggregate import aggregated, check_aggregate
from ._members import Tensors, check_members, held_tensors, parameters_of, per_channel
from .base import Accumulated, Importance, Scores


def lamp(*, aggregate: str = "mean", members: str = "all") -> Importance:
    """m[c] / (sum of m[v] over channels v with m[v] >= m[c]), with m the sum of squared weights.

    The share that a channel has in what would be left if all weaker ones of its group had gone
    first: 1 for the strongest, so that no group is ever emptied. Source: Lee et al., "Layer-
    adaptive Sparsity for the Magnitude-based Pruning" (ICLR 2021), by channels instead of weights.
    """
    check_aggregate(aggregate)
    check_members(members)

    def one(group: CouplingGroup, tensors: Tensors) -> torch.Tensor:
        found = []
        for member in parameters_of(group, tensors, members):
            squares = tensors[member.tensor].detach().double().square()
            found.append((member, per_channel(squares, member, group.size)))
        return shares(aggregated(found, group.size, aggregate))

    def scores(model: nn.Module, groups: Groups) -> Scores:
        tensors = held_tensors(model)
        return {group.name: one(group, tensors) for group in groups}

    return Accumulated(scores, needs_gradient=False)


def shares(masses: torch.Tensor) -> torch.Tensor:
    """Return m[c] / sum of all m[v] >= m[c], shape (size,); equal masses get equal shares."""
    ordered, order = masses.sort(descending=True)
    total = ordered.cumsum(0)
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1
    return torch.zeros_like(masses).scatter_(0, order, ordered / total[last].clamp_min(1e-300))
