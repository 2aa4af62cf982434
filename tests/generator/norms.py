"""Norms of every kind, activations with parameters, and statistics across channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import Made, Shape, Then, along, axis_of, divisor, idiom, vector
from .convs import ACTS


@idiom("any", how=tuple(ACTS))
def activation(shape: Shape, o: Any) -> Made:
    return ACTS[o.how](), shape


@idiom("image", affine=(True, False), stats=(True, False))
def batch_norm(shape: Shape, o: Any) -> Made:
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape.space) - 1]
    stats = o.stats or shape.places == 1  # one sample of one place has no variance
    return kind(shape.channels, affine=o.affine, track_running_stats=stats), shape


@idiom("image", affine=(True, False), stats=(False, True))
def instance_norm(shape: Shape, o: Any) -> Made:
    if shape.places == 1:
        return nn.Identity(), shape
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(shape.space) - 1]
    return kind(shape.channels, affine=o.affine, track_running_stats=o.stats), shape


@idiom("image", groups=(1, 2, 3, 4, 12), affine=(True, False))
def group_norm(shape: Shape, o: Any) -> Made:
    groups = divisor(shape.channels, o.groups)
    if shape.places * shape.channels // groups == 1:
        return nn.Identity(), shape
    return nn.GroupNorm(groups, shape.channels, affine=o.affine), shape


def rms(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * m.weight


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class ByHand(nn.Module):
    """A layer norm over axis 1, written out."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.weight, self.bias, self.rank = vector(channels), vector(channels), rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        view = (-1, *(1,) * self.rank)
        return self.weight.view(view) * x + self.bias.view(view)


@idiom("tokens", how=("layer", "plain", "no bias", "rms", "rms by hand"))
def token_norm(shape: Shape, o: Any) -> Made:
    c = shape.channels
    made = {
        "layer": lambda: nn.LayerNorm(c),
        "plain": lambda: nn.LayerNorm(c, elementwise_affine=False),
        "no bias": lambda: nn.LayerNorm(c, bias=False),
        "rms": lambda: nn.RMSNorm(c, eps=1e-5),
        "rms by hand": lambda: Then(rms, weight=vector(c)),
    }
    return made[o.how](), shape


@idiom("image", how=("channels", "all", "by hand", "l2", "grn"))
def image_norm(shape: Shape, o: Any) -> Made:
    c = shape.channels
    made = {
        "channels": lambda: LayerNorm2d(c),
        "all": lambda: nn.LayerNorm((c, *shape.space)),
        "by hand": lambda: ByHand(c, len(shape.space)),
        "l2": lambda: Then(
            lambda m, x: F.normalize(x, dim=1) * m.gain, gain=nn.Parameter(torch.ones(1))
        ),
        "grn": lambda: Then(response, gain=vector(c), shift=vector(c), view=along(shape)),
    }
    return made[o.how](), shape


def response(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Global response normalisation."""
    norm = x.flatten(2).norm(dim=2).view(*x.shape[:2], *m.view[1:])
    norm = norm / (norm.mean(1, keepdim=True) + 1e-6)
    return x + m.gain.view(m.view) * (x * norm) + m.shift.view(m.view)


@idiom("image", each=(True, False))
def prelu(shape: Shape, o: Any) -> Made:
    return nn.PReLU(shape.channels if o.each else 1), shape


@idiom("any", how=("softmax", "log_softmax", "centre", "standardise", "amax", "logsumexp"))
def statistic(shape: Shape, o: Any) -> Made:
    """A value is taken across channels."""
    axis = axis_of(shape)
    made = {
        "softmax": lambda m, x: x.softmax(axis) * 3,
        "log_softmax": lambda m, x: F.log_softmax(x, axis),
        "centre": lambda m, x: x - x.mean(axis, keepdim=True),
        "standardise": lambda m, x: x / (x.std(axis, keepdim=True) + 0.1),
        "amax": lambda m, x: x - x.amax(axis, keepdim=True),
        "logsumexp": lambda m, x: x - x.logsumexp(axis, keepdim=True),
    }
    return Then(made[o.how]), shape


@idiom("any", how=("cumsum", "sort", "conv over channels", "topk", "unknown"))
def barrier(shape: Shape, o: Any) -> Made:
    """Channels are mixed or ordered: what comes in must stay."""
    axis = axis_of(shape)
    made = {
        "cumsum": lambda m, x: x.cumsum(axis) * 0.5,
        "sort": lambda m, x: x.sort(axis)[0],
        "topk": lambda m, x: x.topk(m.most, axis)[0],
        "unknown": lambda m, x: x.renorm(2, axis, 3.0),
        "conv over channels": lambda m, x: m.layer(x.movedim(axis, -1).flatten(1, -2)).view(
            x.movedim(axis, -1).shape
        ).movedim(-1, axis),
    }  # fmt: skip
    parts: dict[str, Any] = {"most": shape.channels}
    if o.how == "conv over channels":
        parts["layer"] = nn.Conv1d(shape.places, shape.places, 3, padding=1)
    return Then(made[o.how], **parts), shape
