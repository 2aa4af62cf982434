"""First-order Taylor importance."""

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


def taylor(
    *, multivariable: bool = True, aggregate: str = "mean", members: str = "out"
) -> Importance:
    """|sum of w * dL/dw| over a channel's weights (`multivariable`), or the sum of |w * dL/dw|.

    The first is the change of the loss to first order when the channel goes; source: Molchanov et
    al., "Importance Estimation for Neural Network Pruning" (CVPR 2019). `aggregate` joins the
    members that make the channel (`members="out"`), read it ("in") or both ("all"). Added up over
    backward passes; in units of the loss.

    Raises `MissingGradient` where a group has no gradient.
    """
    check_aggregate(aggregate)
    check_members(members)

    def one(group: CouplingGroup, tensors: Tensors) -> torch.Tensor:
        found = []
        for member in parameters_of(group, tensors, members):
            gradient = gradient_of(member.tensor, tensors)
            if gradient is not None:
                change = tensors[member.tensor].detach() * gradient
                value = per_channel(change if multivariable else change.abs(), member, group.size)
                found.append((member, value.abs()))
        return aggregated(found, group.size, aggregate)

    def scores(model: nn.Module, groups: Groups) -> Scores:
        tensors = held_tensors(model)
        require_gradients(tensors, groups)
        return {group.name: one(group, tensors) for group in groups}

    return Accumulated(scores, needs_gradient=True)
