"""Weight magnitude."""

from __future__ import annotations

import torch
from torch import nn

from .._numbers import positive
from ..groups import CouplingGroup, Groups
from ._aggregate import aggregated, check_aggregate
from ._members import Tensors, check_members, held_tensors, parameters_of, per_channel
from .base import Accumulated, Importance, Scores


def magnitude(*, p: float = 2.0, aggregate: str = "mean", members: str = "all") -> Importance:
    """Sum of |w|^p over a channel's weights (p = 1: L1, p = 2: L2), joined by `aggregate`.

    Over all parameters that make or read it, or with `members` "out" or "in" over those that do one
    of both. Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017); group mean as
    in DepGraph (CVPR 2023).
    """
    positive("p", p)
    check_aggregate(aggregate)
    check_members(members)

    def one(group: CouplingGroup, tensors: Tensors) -> torch.Tensor:
        found = []
        for member in parameters_of(group, tensors, members):
            powers = tensors[member.tensor].detach().abs().double().pow(p)
            found.append((member, per_channel(powers, member, group.size)))
        return aggregated(found, group.size, aggregate)

    def scores(model: nn.Module, groups: Groups) -> Scores:
        tensors = held_tensors(model)
        return {group.name: one(group, tensors) for group in groups}

    return Accumulated(scores, needs_gradient=False)
