"""First-order Taylor importance."""

from __future__ import annotations

import torch
from torch import nn

from ..groups import Groups
from .base import (
    Accumulated,
    Importance,
    Scores,
    gradient_of,
    held_tensors,
    made_by,
    per_channel,
    require_gradients,
)


def taylor(*, multivariable: bool = True) -> Importance:
    """|sum of w * dL/dw| over a channel's weights (`multivariable`), or the sum of |w * dL/dw|.

    The first is the change of the loss to first order when the channel goes; source: Molchanov et
    al., "Importance Estimation for Neural Network Pruning" (CVPR 2019). Mean over the members that
    make the channel.

    Raises `MissingGradient` where a group has no gradient.
    """
    return Accumulated(
        lambda model, groups: _scores(model, groups, multivariable), needs_gradient=True
    )


def _scores(model: nn.Module, groups: Groups, multivariable: bool) -> Scores:
    tensors = held_tensors(model)
    require_gradients(tensors, groups)
    result = {}
    for group in groups:
        total, members = torch.zeros(group.size, dtype=torch.float64), 0
        for member in made_by(group):
            gradient = gradient_of(member.tensor, tensors)
            if gradient is None:
                continue
            change = tensors[member.tensor].detach() * gradient
            value = per_channel(change if multivariable else change.abs(), member, group.size)
            total += value.abs().cpu()
            members += 1
        result[group.name] = total / max(members, 1)
    return result
