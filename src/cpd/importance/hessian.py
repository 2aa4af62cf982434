"""The paper's importance."""

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


def hessian() -> Importance:
    r"""Score of "Comb, Prune, Distill" (arXiv 2408.03046): an estimate of the Hessian's diagonal.

    For a parameter p whose rows make the channels c of a group, after every backward pass:

        S_p[c] += (sum_{w in p[c, ...]} w * dL/dw)^2 / A_p

    with A_p the elements of the activation that the layer puts out, per sample, times the channels
    still there. The group's score is the mean over its members, divided by the number of members
    and followers (the tensors that read the channels). Gradients are those of the whole mini-batch.
    Shapes: one vector (size,) per group.

    Raises `MissingGradient` where a group has no gradient.
    """
    return Accumulated(_scores, needs_gradient=True)


def _scores(model: nn.Module, groups: Groups) -> Scores:
    tensors = held_tensors(model)
    require_gradients(tensors, groups)
    result = {}
    for group in groups:
        total, members = torch.zeros(group.size, dtype=torch.float64), 0
        for member in made_by(group):
            gradient = gradient_of(member.tensor, tensors)
            if gradient is None:
                continue
            moved = per_channel(tensors[member.tensor].detach() * gradient, member, group.size)
            kept = max(int((moved != 0).sum()), 1)
            total += (moved.square() / (member.activation * kept)).cpu()
            members += 1
        followers = len(group.members) - len(made_by(group))
        result[group.name] = total / max(members, 1) / max(members + followers, 1)
    return result
