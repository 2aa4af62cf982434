"""Gates and attention over channels and places of an image."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import WIDTHS, Made, Shape, Then, along, axis_of, conv, divisor, idiom, mapped


def _space(shape: Shape) -> tuple[int, ...]:
    return tuple(range(2, 2 + len(shape.space))) if shape.kind == "image" else (1,)


@idiom("any", how=("conv", "linear", "softmax", "hard", "max and mean"), inner=(2, 3, 4))
def squeeze_excite(shape: Shape, o: Any) -> Made:
    """A gate for each channel from the mean over places."""
    places, view = _space(shape), along(shape)
    flat = Shape("tokens", shape.channels, (1,))
    layers = shape if o.how == "conv" else flat

    def gate(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.up(F.silu(m.down(x)))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        if o.how == "conv":
            return x * gate(m, x.mean(places, keepdim=True)).sigmoid()
        y = gate(m, x.mean(places))
        if o.how == "max and mean":
            y = y + gate(m, x.amax(places))
        scale = {"softmax": lambda: y.softmax(-1), "hard": lambda: F.hardsigmoid(y)}
        y = scale.get(o.how, y.sigmoid)()
        return x * (y.view(len(x), *view) if shape.kind == "image" else y.unsqueeze(1))

    return Then(
        run, down=mapped(layers, o.inner), up=mapped(layers.wide(o.inner), shape.channels)
    ), shape


@idiom("image", kernel=(3, 1))
def efficient_channel_attention(shape: Shape, o: Any) -> Made:
    layer = nn.Conv1d(1, 1, o.kernel, padding=o.kernel // 2, bias=False)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.layer(x.flatten(2).mean(2).unsqueeze(1)).squeeze(1)
        return x * y.sigmoid().view(*x.shape[:2], *(1,) * (x.ndim - 2))

    return Then(run, layer=layer), shape


@idiom("image", how=("conv", "mean and max", "parameter", "max"), kernel=(1, 3))
def gate_of_one(shape: Shape, o: Any) -> Made:
    """A gate of one channel: it goes over all of them."""
    wide = 2 if o.how == "mean and max" else shape.channels
    parts: dict[str, Any] = {"layer": conv(shape.wide(wide), 1, o.kernel)}
    if o.how == "parameter":
        parts = {"gain": nn.Parameter(torch.ones(1))}

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        if o.how == "parameter":
            return x * m.gain
        y = x
        if o.how == "mean and max":
            y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        y = m.layer(y)
        return torch.maximum(x, y) if o.how == "max" else x * y.sigmoid()

    return Then(run, **parts), shape


@idiom("image", heads=(1, 2, 3), how=("normalised", "plain", "fixed"), width=WIDTHS)
def channel_attention(shape: Shape, o: Any) -> Made:
    """Attention between the channels of a head, over places (XCA)."""
    heads = divisor(o.width, o.heads)
    parts: dict[str, Any] = {
        "qkv": conv(shape, 3 * o.width),
        "proj": conv(shape.wide(o.width), o.width),
    }
    parts["heat"] = nn.Parameter(torch.ones(heads, 1, 1))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, _, *space = x.shape
        q, k, v = m.qkv(x).flatten(2).chunk(3, 1)
        q, k, v = (t.reshape(n, m.heads, -1, t.shape[-1]) for t in (q, k, v))
        if o.how == "normalised":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-2, -1)
        scores = scores * (0.3 if o.how == "fixed" else m.heat)
        y = scores.softmax(-1) @ v
        return m.proj(y.flatten(1, 2).view(n, -1, *space))

    return Then(run, heads=heads, **parts), shape.wide(o.width)


@idiom("image", radix=(2, 3), width=WIDTHS, how=("softmax", "sigmoid"))
def split_attention(shape: Shape, o: Any) -> Made:
    """Several versions of each channel, weighted against each other (ResNeSt, SKNet)."""
    parts = {
        "make": conv(shape, o.width * o.radix, 3),
        "down": conv(shape.wide(o.width), 4),
        "up": conv(shape.wide(4), o.width * o.radix),
    }

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        n = len(x)
        y = m.make(x)
        y = y.view(n, m.radix, -1, *y.shape[2:])
        mean = y.sum(1).flatten(2).mean(2).view(n, -1, *(1,) * (x.ndim - 2))
        gate = m.up(m.down(mean).relu()).view(n, m.radix, -1, *(1,) * (x.ndim - 2))
        gate = gate.softmax(1) if o.how == "softmax" else gate.sigmoid()
        return (y * gate).sum(1)

    return Then(run, radix=o.radix, **parts), shape.wide(o.width)


@idiom("any", how=("add", "scale and shift"), inner=(3, 4))
def self_modulation(shape: Shape, o: Any) -> Made:
    """Every channel scaled and moved by a vector made of the whole value (FiLM)."""
    places, channels = _space(shape), axis_of(shape)
    times = 2 if o.how == "scale and shift" else 1
    parts = {
        "down": nn.Linear(shape.channels, o.inner),
        "up": nn.Linear(o.inner, times * shape.channels),
    }

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.up(m.down(x.mean(places)).tanh())
        y = y.view(len(x), *(1,) * (channels - 1), -1, *(1,) * (x.ndim - 1 - channels))
        if times == 1:
            return x + y
        scale, shift = y.chunk(2, channels)
        return x * (1 + scale) + shift

    return Then(run, **parts), shape


@idiom("plane", heads=(1, 2), how=("bmm", "einsum"), width=WIDTHS)
def non_local(shape: Shape, o: Any) -> Made:
    """Attention between places, with 1x1 convolutions around it."""
    parts = {name: conv(shape, o.width) for name in ("q", "k", "v")}
    parts["out"] = conv(shape.wide(o.width), shape.channels)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t(x).flatten(2) for t in (m.q, m.k, m.v))
        if o.how == "bmm":
            weights = torch.bmm(q.transpose(1, 2), k).div(math.sqrt(3)).softmax(-1)
            y = torch.bmm(v, weights.transpose(1, 2))
        else:
            weights = torch.einsum("ncp,ncq->npq", q, k).softmax(-1)
            y = torch.einsum("npq,ncq->ncp", weights, v)
        return x + m.out(y.view(*y.shape[:2], *x.shape[2:]))

    return Then(run, **parts), shape
