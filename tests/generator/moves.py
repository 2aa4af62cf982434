"""What is done to channels without computing with them: parts, orders, copies, joins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import (
    WIDTHS,
    Made,
    Shape,
    Then,
    along,
    axis_of,
    common,
    conv,
    divisor,
    idiom,
    mapped,
    vector,
)


@idiom(
    "any",
    width=WIDTHS,
    how=("chunk", "split", "slices", "glu", "view", "tensor_split"),
    order=(0, 1),
    act=("sigmoid", "tanh", "gelu"),
)
def halves(shape: Shape, o: Any) -> Made:
    """Two equal parts, one the gate of the other."""
    axis, half = axis_of(shape), o.width
    gate = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu}[o.act]

    def slices(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.narrow(axis, 0, m.half), x.narrow(axis, m.half, m.half)

    part = {
        "chunk": lambda m, x: x.chunk(2, axis),
        "split": lambda m, x: x.split(m.half, axis),
        "slices": slices,
        "view": lambda m, x: x.unflatten(axis, (2, -1)).unbind(axis),
        "tensor_split": lambda m, x: x.tensor_split(2, axis),
    }

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        if o.how == "glu":
            return F.glu(m.make(x), axis)
        parts = part[o.how](m, m.make(x))
        return parts[o.order] * gate(parts[1 - o.order])

    return Then(run, make=mapped(shape, 2 * half), half=half), shape.wide(half)


@idiom(
    "image",
    width=WIDTHS,
    parts=(2, 3, 4),
    how=("split", "chunk", "slices"),
    order=(0, 1, 2),
    each=(True, False),
)
def pieces(shape: Shape, o: Any) -> Made:
    """Parts of sizes of their own, some handled apart, put together in another order."""
    sizes = _uneven(o.width, o.parts) if o.how != "chunk" else _chunks(o.width, o.parts)
    turn = nn.ModuleList(conv(shape.wide(n), n, 3 if k == 0 else 1) for k, n in enumerate(sizes))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.make(x)
        if m.how == "split":
            parts = list(x.split(m.sizes, 1))
        elif m.how == "chunk":
            parts = list(x.chunk(m.count, 1))
        else:
            ends = [sum(m.sizes[: k + 1]) for k in range(len(m.sizes))]
            parts = [x[:, end - n : end] for n, end in zip(m.sizes, ends, strict=True)]
        parts = [
            t(p) if m.each or k == 0 else p
            for k, (t, p) in enumerate(zip(m.turn, parts, strict=True))
        ]
        parts = {0: parts, 1: parts[::-1], 2: parts[1:] + parts[:1]}[m.order]
        return torch.cat(parts, 1)

    parts = {"make": conv(shape, o.width), "turn": turn, "sizes": sizes, "count": o.parts}
    return Then(run, how=o.how, each=o.each, order=o.order, **parts), shape.wide(o.width)


def _uneven(width: int, parts: int) -> list[int]:
    sizes = []
    for left in range(parts, 1, -1):
        sizes.append(max(1, (width - sum(sizes)) // (left + 1)))
    return [*sizes, width - sum(sizes)]


def _chunks(width: int, parts: int) -> list[int]:
    return [len(x) for x in torch.arange(width).chunk(parts)]


@idiom("any", how=("cat", "add", "two"), first=(0, 1, 2), last=(0, 1))
def overlapping(shape: Shape, o: Any) -> Made:
    """Slices that share channels; `first`: where the second begins, `last`: where it ends early."""
    axis, c = axis_of(shape), shape.channels
    stop = max(2, 2 * c // 3)
    start = min(stop - 1, c // 3 + o.first)
    end = c - o.last if c - o.last > start else c

    def taken(x: torch.Tensor, a: int, b: int) -> torch.Tensor:
        return x[:, a:b] if axis == 1 else x[..., a:b]

    if o.how == "cat" or (o.how == "two" and c > 8):
        out = stop + end - start
        return Then(
            lambda m, x: torch.cat([taken(x, 0, stop), taken(x, start, end)], axis)
        ), shape.wide(out)
    a, b = mapped(shape.wide(stop), c), mapped(shape.wide(end - start), c)
    if o.how == "add":
        return Then(
            lambda m, x: m.a(taken(x, 0, stop)) + m.b(taken(x, start, end)), a=a, b=b
        ), shape

    def two(m: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = taken(x, 0, stop), taken(x, start, end)
        return torch.cat([m.a(first), second, m.b(second)], axis)

    return Then(two, a=a, b=b), shape.wide(2 * c + end - start)


@idiom(
    "any", how=("flip", "roll", "permute", "index", "index_select", "gather", "shift"), by=(1, 2, 3)
)
def reorder(shape: Shape, o: Any) -> Made:
    """Channels in another order."""
    axis, c = axis_of(shape), shape.channels
    order = torch.randperm(c, generator=torch.Generator().manual_seed(o.by))

    def index(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x[:, m.order] if axis == 1 else x[..., m.order]

    def gather(m: Any, x: torch.Tensor) -> torch.Tensor:
        shape = [1] * x.ndim
        shape[axis] = -1
        return x.gather(axis, m.order.view(shape).expand_as(x))

    by = o.by % c
    made = {
        "flip": lambda m, x: x.flip(axis),
        "roll": lambda m, x: x.roll(by, axis),
        "permute": lambda m, x: torch.stack(x.unbind(axis)[::-1], axis),
        "index": index,
        "index_select": lambda m, x: x.index_select(axis, m.order),
        "gather": gather,
        "shift": lambda m, x: torch.cat([x.narrow(axis, by, c - by), x.narrow(axis, 0, by)], axis),
    }
    return Then(made[o.how], order=order), shape


@idiom("image", groups=(2, 3, 4), how=("view", "module", "unflatten", "reshape only"))
def channel_shuffle(shape: Shape, o: Any) -> Made:
    groups = divisor(shape.channels, o.groups)
    if o.how == "module" and len(shape.space) == 2:
        return nn.ChannelShuffle(groups), shape

    def view(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, c, *space = x.shape
        return x.view(n, m.groups, c // m.groups, *space).transpose(1, 2).reshape(n, c, *space)

    def unflatten(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (m.groups, -1)).transpose(1, 2).flatten(1, 2)

    def only(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (m.groups, -1)).flatten(1, 2)

    made = {"unflatten": unflatten, "reshape only": only}
    return Then(made.get(o.how, view), groups=groups), shape


@idiom(
    "any",
    how=(
        "repeat",
        "expand",
        "interleave",
        "stack",
        "pad",
        "pad front",
        "stack sum",
        "cat self",
        "cat scaled",
    ),
    times=(2, 3),
)
def copies(shape: Shape, o: Any) -> Made:
    """Channels more than once, or zeros beside them."""
    axis, c = axis_of(shape), shape.channels
    times = o.times if c * o.times <= 24 else 1
    twice = 2 if c <= 12 else 1
    after = 0 if axis == 2 else len(shape.space)
    zeros = (0, 0) * after

    def expand(m: Any, x: torch.Tensor) -> torch.Tensor:
        size = list(x.unsqueeze(axis).shape)
        size[axis] = times
        return x.unsqueeze(axis).expand(size).flatten(axis, axis + 1)

    def repeat(m: Any, x: torch.Tensor) -> torch.Tensor:
        size = [1] * x.ndim
        size[axis] = times
        return x.repeat(size)

    def stack(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x.tanh()][:twice], axis + 1).flatten(axis, axis + 1)

    made = {
        "repeat": (repeat, c * times),
        "expand": (expand, c * times),
        "interleave": (lambda m, x: x.repeat_interleave(times, axis), c * times),
        "stack": (stack, c * twice),
        "stack sum": (lambda m, x: torch.stack([x, x.tanh(), -x], 1).sum(1), c),
        "pad": (lambda m, x: F.pad(x, (*zeros, 0, times)), c + times),
        "pad front": (lambda m, x: F.pad(x, (*zeros, 1, 1)), c + 2),
        "cat self": (lambda m, x: torch.cat([x] * twice, axis), c * twice),
        "cat scaled": (lambda m, x: torch.cat([x, -2 * x][:twice], axis), c * twice),
    }
    run, out = made[o.how]
    return Then(run), shape.wide(out)


@idiom("any", step=(2, 3), how=("take", "weave", "rows"))
def strided(shape: Shape, o: Any) -> Made:
    """Every n-th channel; all of them one after the other; or maxima over runs of channels."""
    axis, c = axis_of(shape), shape.channels
    step = divisor(c, o.step)

    def every(x: torch.Tensor, k: int) -> torch.Tensor:
        return x[:, k::step] if axis == 1 else x[..., k::step]

    if o.how == "take":
        return Then(lambda m, x: every(x, 0)), shape.wide(c // step)
    if o.how == "weave":
        return Then(lambda m, x: torch.cat([every(x, k) for k in range(step)], axis)), shape
    return Then(lambda m, x: x.unflatten(axis, (-1, step)).amax(axis + 1)), shape.wide(c // step)


@idiom("any", how=("buffer", "parameter", "constant", "both", "rows", "bias"), act=(True, False))
def per_channel(shape: Shape, o: Any) -> Made:
    """A buffer, a parameter or a plain tensor with an axis of channels."""
    view, c = along(shape), shape.channels
    gain = torch.linspace(0.5, 1.5, c, dtype=torch.float64)
    parts: dict[str, Any] = {"act": o.act}
    made = {
        "buffer": lambda m, x: x * m.gain.view(view),
        "parameter": lambda m, x: x * m.scale.view(view),
        "constant": lambda m, x: x * m.held[0].view(view).to(x.dtype),
        "both": lambda m, x: torch.addcmul(m.gain.view(view), x, m.scale.view(view)),
        "rows": lambda m, x: x * m.table[0].view(view) + m.table[1].view(view),
        "bias": lambda m, x: x + m.scale.view(view),
    }
    if o.how in ("buffer", "both"):
        parts["gain"] = gain.clone()
    if o.how in ("parameter", "both", "bias"):
        parts["scale"] = vector(c)
    if o.how == "constant":
        parts["held"] = [gain]
    if o.how == "rows":
        parts["table"] = nn.Parameter(torch.ones(2, c))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = made[o.how](m, x)
        return F.gelu(x) if m.act else x

    return Then(run, **parts), shape


@idiom("any", how=("relu_", "add_", "slice", "mul_ slice", "fill", "where"), width=WIDTHS)
def in_place(shape: Shape, o: Any) -> Made:
    """What writes into a tensor, or picks between two by their values."""
    axis, half = axis_of(shape), max(1, o.width // 2)

    def part(x: torch.Tensor) -> torch.Tensor:
        return x[:, :half] if axis == 1 else x[..., :half]

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.make(x)
        if o.how == "relu_":
            return F.relu_(x)
        if o.how == "where":
            return torch.where(x > 0.1, x, 0.3 * x)
        if o.how == "add_":
            return x.add_(x.sigmoid())
        x = x.clone()
        if o.how == "slice":
            x[(slice(None),) * axis + (slice(0, half),)] = part(x).tanh()
        elif o.how == "fill":
            part(x).fill_(0.25)
        else:
            part(x).mul_(0.5)
        return x

    return Then(run, make=mapped(shape, o.width)), shape.wide(o.width)


@idiom("image", width=WIDTHS, groups=(2, 3), how=("cat", "sum", "max"))
def group_apart(shape: Shape, o: Any) -> Made:
    """Runs of channels addressed as rows of one more axis, each through a layer of its own."""
    groups = common(o.width, o.width, o.groups)
    size = o.width // groups
    parts = nn.ModuleList(conv(shape.wide(size), size) for _ in range(groups))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.make(x).unflatten(1, (m.groups, -1))
        rows = [layer(x[:, k]) for k, layer in enumerate(m.parts)]
        if o.how == "cat":
            return torch.cat(rows, 1)
        rows = torch.stack(rows, 1)
        return rows.sum(1) if o.how == "sum" else rows.amax(1)

    made = Then(run, make=conv(shape, o.width), parts=parts, groups=groups)
    return made, shape.wide(o.width if o.how == "cat" else size)
