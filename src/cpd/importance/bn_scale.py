"""The scale of the norm behind a channel."""

from __future__ import annotations

import torch
from torch import nn

from ..groups import CouplingGroup, Groups
from ._aggregate import aggregated, check_aggregate
from ._members import Tensors, covered_by, held_tensors, made_by, per_channel, scales_of
from .base import Accumulated, Importance, Scores


def bn_scale(*, aggregate: str = "mean") -> Importance:
    """|gamma|: the factor by which a norm, or a parameter like it, scales the channel.

    Any norm with a weight counts (batch, layer, group, RMS), and any other parameter of one axis
    that is multiplied with an activation, such as a layer scale. Source: Liu et al., "Learning
    Efficient Convolutional Networks through Network Slimming" (ICCV 2017). Channels that nothing
    scales get the Euclidean norm of the weights that make them: the factor they have on inputs of
    variance 1.
    """
    check_aggregate(aggregate)

    def one(group: CouplingGroup, tensors: Tensors, scales: set[str]) -> torch.Tensor:
        made = [m for m in made_by(group) if isinstance(tensors[m.tensor], nn.Parameter)]
        scaling = [m for m in made if m.tensor in scales]
        others = [m for m in made if m.tensor not in scales]
        gammas = [
            (m, per_channel(tensors[m.tensor].detach().abs(), m, group.size)) for m in scaling
        ]
        found = aggregated(gammas, group.size, aggregate)
        squares = [
            (m, per_channel(tensors[m.tensor].detach().double().square(), m, group.size))
            for m in others
        ]
        norms = aggregated(squares, group.size, "sum").sqrt().to(found.device)
        return torch.where(covered_by(scaling, group.size).to(found.device), found, norms)

    def scores(model: nn.Module, groups: Groups) -> Scores:
        tensors, scales = held_tensors(model), scales_of(groups)
        return {group.name: one(group, tensors, scales) for group in groups}

    return Accumulated(scores, needs_gradient=False)
