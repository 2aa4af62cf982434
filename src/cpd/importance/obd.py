"""Optimal Brain Damage by channels, with the empirical Fisher information as curvature."""

from __future__ import annotations

import torch
from torch import nn

from ..groups import CouplingGroup, Groups
from ._aggregate import aggregated, check_aggregate
from ._members import (
    Tensors,
    check_members,
    gradient_of,
    held_tensors,
    parameters_of,
    per_channel,
    require_gradients,
)
from .base import Accumulated, Importance, Scores


def obd(*, aggregate: str = "sum", members: str = "all") -> Importance:
    """1/2 * sum of w^2 * h over a channel's weights, with h = (dL/dw)^2 of each backward pass.

    The change of the loss to second order when all these weights go, cross terms left out; source:
    LeCun et al., "Optimal Brain Damage" (NIPS 1989), summed over structures. Near a minimum the
    expected square of the gradient is the curvature. `members` says whose weights count: those that
    make the channel ("out"), read it ("in"), or both ("all"). Added up over backward passes: the
    square is taken of each one's gradient.

    Raises `MissingGradient` where a group has no gradient.
    """
    check_aggregate(aggregate)
    check_members(members)

    def one(group: CouplingGroup, tensors: Tensors) -> torch.Tensor:
        found = []
        for member in parameters_of(group, tensors, members):
            gradient = gradient_of(member.tensor, tensors)
            if gradient is not None:
                change = (tensors[member.tensor].detach() * gradient).square()
                found.append((member, per_channel(change, member, group.size) / 2))
        return aggregated(found, group.size, aggregate)

    def scores(model: nn.Module, groups: Groups) -> Scores:
        tensors = held_tensors(model)
        require_gradients(tensors, groups)
        return {group.name: one(group, tensors) for group in groups}

    return Accumulated(scores, needs_gradient=True)
