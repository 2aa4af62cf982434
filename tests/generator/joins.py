"""Blocks inside blocks: residual and dense connections, branches, sharing, down and up again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import (
    BODY,
    Made,
    Shape,
    Then,
    adapted,
    along,
    axis_of,
    conv,
    idiom,
    mapped,
    sequence,
    vector,
)

JOINS = ("add", "gate", "multiply", "subtract", "maximum", "scaled", "mean", "where")


def joined(how: str, axis: int) -> Any:
    """Return a function of (module, x, y) that joins two values of one shape."""
    made = {
        "add": lambda m, x, y: x + y,
        "gate": lambda m, x, y: x * torch.sigmoid(y),
        "multiply": lambda m, x, y: x * y,
        "subtract": lambda m, x, y: x - y,
        "maximum": lambda m, x, y: torch.maximum(x, y),
        "scaled": lambda m, x, y: x + m.gamma.view(m.view) * y,
        "mean": lambda m, x, y: torch.stack([x, y]).mean(0),
        "where": lambda m, x, y: torch.where(x > y, x, 0.5 * y),
    }
    return made[how]


@idiom("any", body=BODY, how=JOINS, act=(False, True))
def residual(shape: Shape, o: Any) -> Made:
    body, out = sequence(shape, o.body)
    fit = adapted(out, shape)
    join = joined(o.how, axis_of(shape))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = join(m, x, m.fit(m.body(x)))
        return F.relu(y) if m.act else y

    made = Then(
        run,
        body=body,
        fit=fit,
        gamma=vector(shape.channels) if o.how == "scaled" else None,
        view=along(shape),
        act=o.act,
    )
    return made, shape


@idiom("any", body=BODY, how=JOINS)
def projected_residual(shape: Shape, o: Any) -> Made:
    """The shortcut is brought to the shape of the body."""
    body, out = sequence(shape, o.body)
    short = nn.Sequential(adapted(shape, out), mapped(out, out.channels, bias=False))
    join = joined(o.how, axis_of(out))
    gamma = vector(out.channels) if o.how == "scaled" else None
    made = Then(
        lambda m, x: join(m, m.short(x), m.body(x)),
        body=body,
        short=short,
        gamma=gamma,
        view=along(out),
    )
    return made, out


@idiom("any", body=BODY, times=(1, 2, 3), width=(2, 3, 4), first=(True, False))
def dense(shape: Shape, o: Any) -> Made:
    """Everything made so far is the input of what comes next (DenseNet)."""
    axis, layers, now = axis_of(shape), nn.ModuleList(), shape
    times = o.times if shape.channels <= 12 else 1
    for _ in range(times):
        body, out = sequence(now, o.body)
        fit = adapted(out, now)
        layers.append(nn.Sequential(body, fit, mapped(now, o.width)))
        now = now.wide(now.channels + o.width)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in m.layers:
            x = torch.cat([x, layer(x)] if o.first else [layer(x), x], axis)
        return x

    return Then(run, layers=layers), now


@idiom(
    "any",
    body=BODY,
    other=BODY,
    how=("cat", "cat of cats", "add", "multiply", "attend", "stack", "weighted"),
)
def branches(shape: Shape, o: Any) -> Made:
    """Two ways side by side."""
    a, out = sequence(shape, o.body)
    b, second = sequence(shape, o.other)
    axis = axis_of(out)
    wide = second if o.how.startswith("cat") else out
    fit = adapted(second, out.wide(wide.channels))
    parts: dict[str, Any] = {"a": a, "b": b, "fit": fit}
    if o.how == "weighted":
        parts["mix"] = nn.Parameter(torch.ones(2))
    most = out.channels * 2 + wide.channels
    how = "add" if o.how.startswith("cat") and most > 40 else o.how
    if how != o.how:
        parts["fit"] = adapted(second, out)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x), m.fit(m.b(x))
        if how == "weighted":
            weights = m.mix.softmax(0)
            return weights[0] * a + weights[1] * b
        made = {
            "cat": lambda: torch.cat([a, b], axis),
            "cat of cats": lambda: torch.cat([torch.cat([b, a], axis), a.tanh()], axis),
            "add": lambda: a + b,
            "multiply": lambda: a * b,
            "attend": lambda: a * b.softmax(-1),
            "stack": lambda: torch.stack([a, b], axis).amax(axis),
        }
        return made[how]()

    width = {"cat": out.channels + wide.channels, "cat of cats": most}.get(how, out.channels)
    return Then(run, **parts), out.wide(width)


@idiom("any", body=BODY, times=(2, 3), how=("in a row", "on parts", "side by side"))
def shared(shape: Shape, o: Any) -> Made:
    """One module used several times."""
    axis = axis_of(shape)
    on_parts = o.how == "on parts" and shape.channels % 2 == 0
    inner = shape.wide(shape.channels // 2) if on_parts else shape
    body, out = sequence(inner, o.body)
    parts = {"body": body, "fit": adapted(out, inner)}

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        if on_parts:
            return torch.cat([m.fit(m.body(t)) for t in x.chunk(2, axis)], axis)
        if o.how == "side by side":
            return m.fit(m.body(x)) + 0.5 * m.fit(m.body(-x))
        for _ in range(o.times):
            x = torch.tanh(m.fit(m.body(x))) + x
        return x

    return Then(run, **parts), shape


@idiom("image", body=BODY, how=("cat", "add"), up=("nearest", "transposed"))
def down_and_up(shape: Shape, o: Any) -> Made:
    """Half the size, a body there, and back beside what was before (U-Net)."""
    if any(n % 2 for n in shape.space):
        body, out = sequence(shape, o.body)
        return nn.Sequential(body, adapted(out, shape)), shape
    low = Shape("image", shape.channels, tuple(n // 2 for n in shape.space))
    body, out = sequence(low, o.body)
    parts: dict[str, Any] = {"down": conv(shape, shape.channels, 3, stride=2), "body": body}
    parts["fit"] = adapted(out, low)
    if o.up == "transposed":
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(shape.space) - 1]
        parts["up"] = kind(shape.channels, shape.channels, 2, 2)
    else:
        parts["up"] = nn.Upsample(scale_factor=2)
    how = o.how if shape.channels <= 12 else "add"

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.up(m.fit(m.body(m.down(x))))
        return torch.cat([x, y], 1) if how == "cat" else x + y

    return Then(run, **parts), shape.wide(2 * shape.channels) if how == "cat" else shape


@idiom("any", body=BODY, other=BODY, share=("all", "conv", "transposed"))
def tied_weights(shape: Shape, o: Any) -> Made:
    """Two bodies, and one tensor that belongs to two layers."""
    body, out = sequence(shape, o.body)
    first = mapped(out, out.channels)
    second = mapped(out, out.channels)
    second.weight = first.weight
    if o.share == "all":
        second.bias = first.bias
    other, last = sequence(out, o.other)
    if o.share != "transposed" or out.kind == "image":
        return nn.Sequential(body, first, nn.GELU(), other, adapted(last, out), second), out
    run = lambda m, x: F.linear(m.rest(F.gelu(m.first(m.body(x)))), m.first.weight.t())  # noqa: E731
    rest = nn.Sequential(other, adapted(last, out))
    return Then(run, body=body, first=first, rest=rest), out


@idiom("any", body=BODY, share=(0.0, 0.3), path=(0.0, 0.2))
def regularised(shape: Shape, o: Any) -> Made:
    """Dropout, and a residual branch that is left out for some samples in training."""
    body, out = sequence(shape, o.body)
    rank = 1 + len(shape.space)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.drop(m.fit(m.body(x)))
        if m.training and m.path:
            keep = x.new_empty((len(x), *(1,) * rank)).bernoulli_(1 - m.path)
            y = y * keep / (1 - m.path)
        return x + y

    return Then(
        run, body=body, fit=adapted(out, shape), drop=nn.Dropout(o.share), path=o.path
    ), shape
