"""Each rule alone: cutting what goes into an op, and out of it, is the op on what is left.

A case is one line: the op, and the shapes of what it gets. A negative size is an axis of channels that may go,
a positive one is fixed; the batch axis comes in front by itself. `W(...)` is a parameter. What the op puts out
is multiplied by a parameter and summed up to numbers, so every channel that it may lose is there to be lost.

Every case runs twice: with inputs that are zero where a channel is gone, and with inputs that are not (after a
sigmoid); and each with `exact=True` (against zeroing) and without (against statistics over what is kept).
"""

# ruff: noqa: E501 - one op, one line

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd import rules
from cpd.comb import comb
from cpd.trace import trace
from laws import CutGraph, difference, prove, random_plans, randomised, removed, run, zeroed

BATCH, MIX, READ = 3, 4, 3


class W(tuple):
    """The shape of a parameter among the arguments of a case."""

    def __new__(cls, *shape: int) -> W:
        return super().__new__(cls, shape)


class X(tuple):
    """The shape of an activation among the arguments of a case."""

    def __new__(cls, *shape: int) -> X:
        return super().__new__(cls, shape)


class Single(nn.Module):
    """inputs -> activations with ids -> one op -> numbers."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], *, alive: bool) -> None:
        super().__init__()
        self.function, self.args, self.alive = function, args, alive
        self.made = nn.ParameterList()
        for shape in args:
            if isinstance(shape, W):
                self.made.append(nn.Parameter(torch.empty(shape, dtype=torch.float64)))
            else:
                full = (MIX, *(-s if s < 0 else 1 for s in shape))
                self.made.append(nn.Parameter(torch.empty(full, dtype=torch.float64)))
        self.read = nn.ParameterList()
        sample = self.results(*[self.example(s) for s in args if isinstance(s, X)])
        for y in sample:
            self.read.append(nn.Parameter(torch.empty(READ, *y.shape[1:], dtype=torch.float64)))

    @staticmethod
    def example(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(BATCH, MIX, *(1 if s < 0 else s for s in shape), dtype=torch.float64)

    def results(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        given, left = [], iter(inputs)
        for shape, made in zip(self.args, self.made, strict=True):
            if isinstance(shape, W):
                given.append(made)
            else:
                x = (next(left) * made).sum(1)
                given.append(torch.sigmoid(x) + 0.2 if self.alive else x)
        out = self.function(*given)
        found = list(out) if isinstance(out, tuple | list) else [out]
        return [y for y in found if y.is_floating_point()]

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        numbers = []
        for y, weight in zip(self.results(*inputs), self.read, strict=True):
            product = y.unsqueeze(1) * weight
            numbers.append(product.sum(list(range(2, product.ndim))))
        return numbers


@dataclass
class Case:
    """`free`: whether anything may be removed at all without `exact`, and with it."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    free: tuple[bool, bool] = (True, True)


def case(name: str, function: Callable[..., Any], *args: Any, free: Any = True) -> Case:
    return Case(name, function, args, free if isinstance(free, tuple) else (free, free))


def inplace_slice(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, :, 1:3] = 2.0 * y[:, :, 1:3]
    return y


def inplace_channels(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0:2] = x[:, 2:4] * 3.0
    return y


def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A concatenation along the last axis, as keys are made: one part may be the same in each row."""
    z = x.new_empty(*x.shape[:-1], x.shape[-1] + y.shape[-1])
    z[..., : x.shape[-1]].copy_(x)
    z[..., x.shape[-1] :] = y
    return z


def written_between(x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(BATCH, 9, 4, 5)
    y[:, 2:8] = x
    return y * 0.7 + 1.1


def written_in_part(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.clone()
    z[:, 1:4][:, :, :2] += y
    return z


def written_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.new_empty(BATCH, 2, 5, 6)
    z[:, 0] = x
    z[:, 1].copy_(y)
    return z


def written_every_second(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = torch.zeros_like(x)
    z[:, :, ::2] = y
    return z + x


def written_then_filled(x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(BATCH, 6, 7, 5)
    y[:, :, 1:5] = x
    y[:, :, 5:] = 1.5
    return y


def read_before(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What is computed before a write does not see it."""
    z = x * 1.5
    before = z[:, 0:3] + 1.0
    z[:, 0:3] = y
    return torch.cat([before, z], 1)


def seen_by_a_view(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 1.5
    half = z[:, 2:]
    z[:, 0:3] = y
    return z.sum() + half * 2.0


def seen_by_a_transpose(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 1.5
    z.transpose(1, 2)[:, :, 0:3] = y.transpose(1, 2)
    return z


def seen_by_a_dropout(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """In evaluation, dropout returns what it is given."""
    z = x * 1.5
    same = F.dropout(z, 0.5, training=False)
    z[:, 0:3] = y
    return same * 2.0 + z


def inplace_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 1.5
    z.add_(y)
    return z * x


def inplace_zeros(x: torch.Tensor, *where: slice) -> torch.Tensor:
    y = x.clone()
    y[where].zero_()
    return y * x


@torch.library.custom_op("cpdtest::grouped_mm_fallback", mutates_args=())
def grouped_mm_fallback(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Rows of x up to each offset by a matrix of their own, as mixtures of experts have it."""
    ends = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ m for a, b, m in zip(ends, ends[1:], w, strict=False)])


@grouped_mm_fallback.register_fake
def _(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


def state(x: torch.Tensor, layers: int, width: int) -> torch.Tensor:
    return torch.zeros(layers, BATCH, width, dtype=torch.float64)


def lstm(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    zero = state(x, 1, 4)
    return torch.lstm(x, (zero, zero), w, True, 1, 0.0, False, False, True)


def lstm_deep(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    zero = state(x, 4, 3)
    return torch.lstm(x, (zero, zero), w, False, 2, 0.0, False, True, True)


def lstm_narrow(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.lstm(x, (state(x, 1, 2), state(x, 1, 5)), w, False, 1, 0.0, False, False, True)


def gru(x: torch.Tensor, h: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.gru(x, h.transpose(0, 1), w, True, 1, 0.0, False, False, True)


def scattered(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    places = torch.tensor([2, 0, 1, 2, 3])[:, None].expand(BATCH, 5, 6)
    return torch.scatter(x, 1, places, y)


IMAGE = X(-6, 4, 5)
TOKENS = X(5, -6)
HEADS = X(-3, 5, -4)

# fmt: off
CASES = [
    # pointwise
    case("relu", F.relu, IMAGE),
    case("gelu", F.gelu, TOKENS),
    case("sigmoid", torch.sigmoid, IMAGE),
    case("exp", torch.exp, IMAGE),
    case("cos", torch.cos, IMAGE),
    case("elu+1", lambda x: F.elu(x) + 1, IMAGE),
    case("add", torch.add, IMAGE, X(-6, 4, 5)),
    case("add broadcast", torch.add, IMAGE, X(-6, 1, 1)),
    case("add other axis", torch.add, X(-6, -6), X(1, -6)),
    case("add rank", lambda x, w: x + w, TOKENS, W(6)),
    case("add fixed", torch.add, IMAGE, X(6, 4, 5), free=False),
    case("mul gate", lambda x, y: x * torch.sigmoid(y), IMAGE, X(-6, 1, 1)),
    case("div", lambda x, y: x / (y.square() + 1), IMAGE, IMAGE),
    case("where", lambda x, y: torch.where(x > 0, x, y), IMAGE, IMAGE),
    case("maximum", torch.maximum, IMAGE, IMAGE),
    case("max other", lambda x, y: torch.max(x, y), IMAGE, IMAGE),
    case("clamp", lambda x: x.clamp(-0.5, 0.5), IMAGE),
    case("masked_fill", lambda x: x.masked_fill(x > 0.3, -2.0), IMAGE),
    case("prelu one", F.prelu, IMAGE, W(1)),
    case("prelu", F.prelu, IMAGE, W(6)),
    case("prelu 2d", F.prelu, X(-6), W(6)),
    case("glu", lambda x: F.glu(x, 1), X(-8, 3)),
    case("dropout", lambda x: F.dropout(x, 0.5, training=False), IMAGE),
    case("dropout2d", lambda x: F.dropout2d(x, 0.5, training=False), IMAGE),
    case("alpha_dropout", lambda x: F.alpha_dropout(x, 0.5, training=False), IMAGE),
    case("clone", torch.clone, IMAGE),
    case("contiguous", lambda x: x.transpose(1, 2).contiguous(), IMAGE),
    case("to", lambda x: x.to(torch.float32).double().to(torch.float64), IMAGE),
    case("type_as", lambda x, y: x.type_as(y), IMAGE, IMAGE),
    case("detach", lambda x: x.detach(), IMAGE),
    case("lerp", lambda x, y: torch.lerp(x, y, 0.3), IMAGE, IMAGE),
    case("addcmul", lambda x, y: torch.addcmul(x, x, y), IMAGE, IMAGE),
    case("pow", lambda x: x.square().pow(1.5), IMAGE),
    case("fill", lambda x: torch.fill(x, 2.0), IMAGE),
    case("copy", lambda x, y: torch.ops.aten.copy.default(x, y), IMAGE, IMAGE),
    case("hardswish", F.hardswish, IMAGE),
    case("alias", torch.ops.aten.alias.default, IMAGE),
    case("native_dropout", lambda x: torch.ops.aten.native_dropout.default(x, 0.5, False)[0], IMAGE),
    # in place
    case("relu_", lambda x: F.relu_(x * 2.0) * x, IMAGE),
    case("add_", inplace_add, IMAGE, IMAGE),
    case("mul_ then view", lambda x: (x * 2.0).mul_(3.0).flatten(1), IMAGE),
    case("copy_ into space", inplace_slice, IMAGE),
    case("copy_ into channels", inplace_channels, IMAGE),
    case("written channels", written, TOKENS, X(5, -4)),
    case("written heads", lambda x, y: written(x.unflatten(-1, (3, 4)).transpose(1, 2), y.expand(-1, 3, -1, -1)).transpose(1, 2).flatten(2), X(5, -12), X(1, 5, -2)),
    case("written between zeros", written_between, IMAGE),
    case("written in part", written_in_part, IMAGE, X(-3, 2, 5)),
    case("written rows", written_rows, TOKENS, TOKENS),
    case("written every second", written_every_second, IMAGE, X(-6, 2, 5)),
    case("written every second channel", lambda x, y: written_every_second(x.movedim(1, 2), y.movedim(1, 2)), IMAGE, X(-3, 4, 5), free=False),
    case("written then filled", written_then_filled, IMAGE),
    case("read before it is written", read_before, IMAGE, X(-3, 4, 5)),
    case("seen by a view", seen_by_a_view, IMAGE, X(-3, 4, 5), free=False),
    case("seen by a transpose", seen_by_a_transpose, IMAGE, X(-3, 4, 5), free=False),
    case("seen by a dropout", seen_by_a_dropout, IMAGE, X(-3, 4, 5), free=False),
    case("fill_", lambda x: (x * 1.0).fill_(2.0) * x, IMAGE),
    case("zero_", lambda x: (x * 1.0).zero_() + x, IMAGE),
    case("zero_ in space", lambda x: inplace_zeros(x, slice(None), slice(None), slice(1, 3)), IMAGE),
    case("zero_ of half", lambda x: inplace_zeros(x, slice(None), slice(x.shape[1] // 2)), IMAGE),
    case("masked_fill_", lambda x: (x * 1.0).masked_fill_(x > 0, 3.0), IMAGE),
    case("dropout_", lambda x: F.dropout(x * 1.0, 0.5, training=False, inplace=True), IMAGE),
    # made on the spot
    case("zeros_like", lambda x: torch.zeros_like(x) + x, IMAGE),
    case("ones_like", lambda x: torch.ones_like(x) * x, IMAGE),
    case("full_like", lambda x: torch.full_like(x, 0.7) + x, IMAGE),
    case("ones_like alone", lambda x: torch.cat([torch.ones_like(x), x], 1), X(-4, 3)),
    case("new_ones", lambda x: x.new_ones(6, 1, 1) + x, IMAGE),
    case("zeros", lambda x: torch.zeros(4, 5, dtype=torch.float64) + x, IMAGE),
    case("full", lambda x: torch.full((6, 1, 1), 2.0, dtype=torch.float64) * x, IMAGE),
    case("ones", lambda x: x + torch.ones(6, 1, 1, dtype=torch.float64), IMAGE),
    case("ones alone", lambda x: torch.cat([torch.ones(BATCH, 2, 3, dtype=torch.float64), x], 1), X(-4, 3)),
    case("ones in rows", lambda x: (x.unflatten(2, (3, 4)) + torch.ones(4, dtype=torch.float64)).flatten(2), X(5, -12)),
    case("new_full", lambda x: x + x.new_full((4, 5), 0.5), IMAGE),
    case("new_zeros", lambda x: x + x.new_zeros(5), IMAGE),
    case("scalar_tensor", lambda x: x * torch.scalar_tensor(2.0, dtype=torch.float64), IMAGE),
    case("arange", lambda x: torch.arange(5, dtype=torch.float64) + x, IMAGE),
    case("arange channels", lambda x: torch.arange(6, dtype=torch.float64) + x, TOKENS, free=False),
    case("linspace", lambda x: torch.linspace(0, 1, 5, dtype=torch.float64) * x, IMAGE),
    case("eye", lambda x: x + torch.eye(6, dtype=torch.float64), X(6, -6), free=False),
    # moves
    case("view", lambda x: x.view(BATCH, 3, 2, 4, 5), IMAGE),
    case("flatten", lambda x: x.flatten(1), IMAGE),
    case("reshape merge", lambda x: x.reshape(BATCH, -1), X(4, -6)),
    case("reshape two", lambda x: x.reshape(BATCH, -1), X(-4, -6)),
    case("reshape across", lambda x: x.reshape(BATCH, 3, 8), X(-4, -6), free=False),
    case("reshape heads and back", lambda x: x.reshape(BATCH, 5, 3, 2).reshape(BATCH, 5, 6), TOKENS),
    case("nest", lambda x: x.reshape(BATCH, 5, 3, 4).transpose(2, 3).flatten(2), X(5, -12)),
    case("shuffle", lambda x: x.view(BATCH, 3, 2, 4, 5).transpose(1, 2).reshape(BATCH, 6, 4, 5), IMAGE),
    case("shuffle deep", lambda x: x.view(BATCH, 2, 2, 3).permute(0, 3, 1, 2).reshape(BATCH, 12), X(-12), free=False),
    case("unflatten", lambda x: x.unflatten(1, (3, 2)), IMAGE),
    case("squeeze", lambda x: x.unsqueeze(1).squeeze(1), IMAGE),
    case("squeeze all", lambda x: x.unsqueeze(3).squeeze(), IMAGE),
    case("view_as", lambda x, y: x.view_as(y) + y, X(-6, 4, 5), X(-6, 4, 5)),
    case("reshape_as", lambda x, y: x.reshape_as(y) + y, X(-6), X(-3, -2)),
    case("permute", lambda x: x.permute(0, 2, 3, 1), IMAGE),
    case("transpose", lambda x: x.transpose(1, 2), TOKENS),
    case("mT", lambda x: x.mT, TOKENS),
    case("t", lambda x, w: x @ w.t(), TOKENS, W(7, 6)),
    case("T", lambda x, w: x @ w.T, TOKENS, W(7, 6)),
    case("adjoint", lambda x: x.adjoint(), TOKENS),
    case("H", lambda x, w: x @ w.H, TOKENS, W(7, 6)),
    case("swapaxes", lambda x: x.swapaxes(1, 2), TOKENS),
    case("swapaxes of others than the last", lambda x: x.swapaxes(-2, -3), X(3, -6, 2)),
    case("movedim", lambda x: x.movedim(1, 3), IMAGE),
    case("movedim three", lambda x: x.movedim((1, 2), (2, 3)), IMAGE),
    case("movedim one", lambda x: torch.movedim(x, 3, 1), IMAGE),
    case("expand", lambda x: x.expand(-1, -1, 4, 5), X(-6, 1, 1)),
    case("expand front", lambda x: x.expand(2, BATCH, 5, 6).transpose(0, 1), TOKENS),
    case("expand_as", lambda x, y: x.expand_as(y) * y, X(-6, 1, 1), IMAGE),
    case("expand to channels", lambda x: x.expand(-1, 6, -1), X(1, -5)),
    case("mqa expand", lambda x: x.expand(-1, 6, -1, -1), X(1, 5, -4)),
    case("mqa repeat", lambda x: x.repeat(1, 6, 1, 1), X(1, 5, -4)),
    case("gqa expand", lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, 6, 5, 4), HEADS),
    case("broadcast_to", lambda x: torch.broadcast_to(x, (BATCH, 6, 4, 5)), X(-6, 1, 1)),
    case("cat", lambda x, y: torch.cat([x, y], 1), IMAGE, X(-3, 4, 5)),
    case("cat space", lambda x, y: torch.cat([x, y], 2), IMAGE, X(-6, 2, 5)),
    case("cat fixed", lambda x, y: torch.cat([x, y], 1), IMAGE, X(2, 4, 5)),
    case("cat tokens", lambda x, y: torch.cat([x, y], 1), TOKENS, X(1, -6)),
    case("cat of cats", lambda x, y: torch.cat([torch.cat([x, y], 1), y, x], 1), X(-3, 2), X(-2, 2)),
    case("cat rows", lambda x, y: torch.cat([x.unflatten(1, (3, 2)), y.unflatten(1, (3, 2))], 2).flatten(1), X(-6), X(-6)),
    case("cat rows read alike", lambda x, y: torch.cat([x.unflatten(1, (3, 2)), y.unflatten(1, (3, 2))], 2), X(-6), X(-6), free=False),
    case("cat heads", lambda x, y: torch.cat([x, y], 1), HEADS, X(-2, 5, -4)),
    case("cat dims", lambda x, y: torch.cat([x, y], 3), HEADS, X(-3, 5, -2)),
    case("cat dims of rows", lambda x, y: torch.cat([x.unflatten(1, (3, 2)), y], 2).flatten(1), X(-6), X(-3, -2)),
    case("cat dims of rows fixed", lambda x, y: torch.cat([x.unflatten(1, (3, 2)), y], 2).flatten(1), X(-6), X(3, -2)),
    case("cat negated half", lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1), HEADS),
    case("cat tokens fixed", lambda x, y: torch.cat([x, y], 1), TOKENS, X(1, 6), free=False),
    case("concat", lambda x, y: torch.ops.aten.concat.default([x, y], 1), IMAGE, IMAGE),
    case("concatenate", lambda x, y: torch.ops.aten.concatenate.default([x, y], 1), IMAGE, IMAGE),
    case("stack", lambda x, y: torch.stack([x, y], 1), IMAGE, IMAGE),
    case("stack last", lambda x, y: torch.stack([x, y], -1), TOKENS, TOKENS),
    case("stack then flatten", lambda x, y: torch.stack([x, y], 2).flatten(1), X(-6), X(-6)),
    case("split", lambda x: x.split(2, 1), IMAGE),
    case("split uneven", lambda x: x.split(4, 1), IMAGE, free=False),
    case("split sizes", lambda x: x.split([1, 2, 3], 1), IMAGE),
    case("chunk", lambda x: x.chunk(3, 1), IMAGE),
    case("chunk uneven", lambda x: x.chunk(4, 1), X(-7, 3), free=False),
    case("chunk product", lambda x: torch.mul(*x.chunk(2, 1)), IMAGE),
    case("tensor_split", lambda x: x.tensor_split(3, 1), IMAGE),
    case("unsafe_chunk", lambda x: x.unsafe_chunk(3, 1), IMAGE),
    case("unsafe_split", lambda x: x.unsafe_split(2, 1), IMAGE),
    case("slice", lambda x: x[:, 1:4], IMAGE),
    case("slice step", lambda x: x[:, ::2], IMAGE),
    case("slice step both", lambda x: torch.stack([x[..., 1::2] * -1.0, x[..., ::2]], -1).flatten(-2) + x, TOKENS),
    case("slice step uneven", lambda x: x[:, ::2], X(-5, 3), free=False),
    case("slice step part", lambda x: x[:, 2::2], IMAGE, free=False),
    case("slice step heads", lambda x: x[:, ::2], HEADS),
    case("slice space", lambda x: x[:, :, ::2], IMAGE),
    case("slice heads", lambda x: x[:, 1:], HEADS),
    case("slice of rows", lambda x: (x.unflatten(2, (3, 4))[..., :2] * 1.5).flatten(2), X(5, -12)),
    case("slice of rows, one", lambda x: (x.unflatten(2, (3, 4))[..., :1] * 1.5).flatten(2), X(5, -12)),
    case("split of rows", lambda x: [y.flatten(2) for y in x.unflatten(2, (3, 6)).split([2, 4], 3)], X(5, -18)),
    case("split of rows, one", lambda x: [y.flatten(2) for y in x.unflatten(2, (3, 4)).split([1, 3], 3)], X(5, -12)),
    case("slice both", lambda x: x[:, :4] * x[:, 2:], IMAGE),
    case("narrow", lambda x: x.narrow(1, 2, 3), IMAGE),
    case("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 1, 2, 4), IMAGE, X(-2, 4, 5)),
    case("slice_scatter all", lambda x, y: torch.slice_scatter(x, y, 1), IMAGE, IMAGE),
    case("slice_scatter space", lambda x, y: torch.slice_scatter(x, y, 2, 1, 3), IMAGE, X(-6, 2, 5)),
    case("slice_scatter heads", lambda x, y: torch.slice_scatter(x.unflatten(2, (3, 4)), y, 3, 2).flatten(2), X(5, -12), X(5, -3, -2)),
    case("slice_scatter zeros", lambda x: torch.slice_scatter(x.new_zeros(BATCH, 8, 4, 5), x, 1, 1, 7), IMAGE),
    case("slice_scatter step", lambda x, y: torch.slice_scatter(x, y, 1, 0, 6, 2), IMAGE, X(-3, 4, 5), free=False),
    case("slice_scatter space step", lambda x, y: torch.slice_scatter(x, y, 2, 0, 4, 2), IMAGE, X(-6, 2, 5)),
    case("slice_scatter fixed", lambda x, y: torch.slice_scatter(x, y, 1, 2, 4), IMAGE, X(2, 4, 5)),
    case("select_scatter", lambda x, y: torch.select_scatter(x, y, 2, 1), IMAGE, X(-6, 5)),
    case("select_scatter channels", lambda x, y: torch.select_scatter(x, y, 1, 1), IMAGE, X(4, 5), free=False),
    case("select_scatter heads", lambda x, y: torch.select_scatter(x, y, 1, 1), X(3, 5, -4), X(5, -4)),
    case("select", lambda x: x[:, 2], IMAGE, free=False),
    case("select space", lambda x: x[:, :, 0], IMAGE),
    case("select last space", lambda x: x[..., -1], IMAGE),
    case("select head dim", lambda x: x[:, 1], HEADS),
    case("unbind", lambda x: x.unbind(1), X(3, -4), ),
    case("unbind rows", lambda x: x.unflatten(1, (3, 2)).unbind(1), IMAGE),
    case("index space", lambda x: x[:, :, torch.tensor([0, 2, 2])], IMAGE),
    case("index channels", lambda x: x[:, torch.tensor([0, 2, 4])], IMAGE, free=False),
    case("index two", lambda x: x[:, :, torch.tensor([0, 2]), torch.tensor([1, 3])], IMAGE),
    case("index apart", lambda x: x[torch.tensor([0, 2, 1]), :, torch.tensor([1, 3, 0])], IMAGE),
    case("index table", lambda x, w: x + w[:, torch.tensor([0, 3, 2, 1, 1])], X(-6, 5), W(6, 4)),
    case("index_select", lambda x: x.index_select(2, torch.tensor([0, 2])), IMAGE),
    case("index_select channels", lambda x: x.index_select(1, torch.tensor([0, 2])), IMAGE, free=False),
    case("embedding", lambda x, w: x + F.embedding(torch.tensor([0, 3, 2, 1, 1]), w), TOKENS, W(9, 6)),
    case("index_put space", lambda x: torch.ops.aten.index_put.default(x, [None, None, torch.tensor([0, 2])], torch.tensor(2.0).double()), IMAGE),
    case("index_put rows", lambda x, w: torch.ops.aten.index_put.default(x, [None, torch.tensor([0, 3])], w), TOKENS, W(2, 6)),
    case("index_put added", lambda x, y: torch.ops.aten.index_put.default(x, [None, torch.tensor([0, 3])], y, True), TOKENS, X(2, -6)),
    case("index_put channels", lambda x: torch.ops.aten.index_put.default(x, [None, torch.tensor([0, 2])], torch.tensor(2.0).double()), IMAGE, free=False),
    case("index_copy", lambda x, y: x.index_copy(1, torch.tensor([0, 3]), y), TOKENS, X(2, -6)),
    case("index_add", lambda x, y: x.index_add(1, torch.tensor([0, 3]), y), TOKENS, X(2, -6)),
    case("index_fill", lambda x: x.index_fill(1, torch.tensor([0, 3]), 2.0), TOKENS),
    case("index_fill channels", lambda x: x.index_fill(2, torch.tensor([0, 3]), 2.0), TOKENS, free=False),
    case("gather", lambda x: x.gather(1, torch.tensor([0, 3])[:, None].expand(BATCH, 2, 6)), TOKENS),
    case("gather by data", lambda x, y: x.gather(1, (y > 0).long()), TOKENS, TOKENS),
    case("gather part", lambda x: x.gather(1, torch.zeros(BATCH, 2, 4, dtype=torch.long)), TOKENS, free=False),
    case("gather channels", lambda x: x.gather(2, torch.tensor([0, 3]).expand(BATCH, 5, 2)), TOKENS, free=False),
    case("take_along_dim", lambda x: x.take_along_dim(torch.tensor([0, 3])[:, None].expand(BATCH, 2, 6), 1), TOKENS),
    case("scatter", scattered, TOKENS, TOKENS),
    case("scatter value", lambda x: x.scatter(1, torch.tensor([0, 3])[:, None].expand(BATCH, 2, 6), 2.0), TOKENS),
    case("scatter_add", lambda x, y: x.scatter_add(1, torch.tensor([0, 3])[:, None].expand(BATCH, 2, 6), y), TOKENS, X(2, -6)),
    case("scatter_reduce", lambda x, y: x.scatter_reduce(1, torch.tensor([0, 3])[:, None].expand(BATCH, 2, 6), y, "amax"), TOKENS, X(2, -6)),
    case("embedding_bag", lambda x, w: x + F.embedding_bag(torch.tensor([0, 3, 2, 1, 1]), w, torch.tensor([0, 1, 3])), X(-6), W(9, 6)),
    case("grid_sampler", lambda x: F.grid_sample(x, torch.linspace(-1, 1, 2).double().expand(BATCH, 3, 2, 2), align_corners=False), IMAGE),
    case("grid_sampler by data", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), IMAGE, X(3, 2, 2)),
    case("grid_sampler volume", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), X(-4, 2, 2, 2), X(3, 2, 2, 3)),
    case("meshgrid", lambda x, a, b: x + sum(torch.meshgrid(a, b, indexing="ij")), X(-6, -5), W(6), W(5)),
    case("meshgrid xy", lambda x, a, b: x * torch.meshgrid(a, b, indexing="xy")[0], X(-5, -6), W(6), W(5)),
    case("unfold windows", lambda x: x.unfold(2, 2, 1), IMAGE),
    case("unfold channels", lambda x: x.unfold(1, 2, 1), IMAGE, free=False),
    case("fold", lambda x: F.fold(x, (3, 3), 2), X(-12, 4)),
    case("channel_shuffle", lambda x: F.channel_shuffle(x, 2), IMAGE),
    case("native_channel_shuffle", lambda x: F.native_channel_shuffle(x, 3), IMAGE),
    case("fliplr", lambda x: x.fliplr(), IMAGE),
    case("flipud", lambda w: w.flipud(), IMAGE),
    case("swapdims", lambda x: x.swapdims(1, 2), TOKENS),
    case("moveaxis", lambda x: x.moveaxis(1, 3), IMAGE),
    case("mH", lambda x: x.mH, TOKENS),
    case("complex pairs", lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j), TOKENS),
    case("real and imaginary", lambda x, y: torch.complex(x, y).real + torch.polar(x, y).imag, IMAGE, IMAGE),
    case("floor_divide", lambda x: x.floor_divide(0.3), IMAGE),
    case("and", lambda x, y: x * ((x > 0) & (y > 0)) * ((x > 0) | (y > 0)) * ((x > 0) ^ (y > 0)), IMAGE, IMAGE),
    case("and int", lambda x: x * torch.ops.aten.__and__.Scalar((x * 9).long(), 3) * torch.ops.aten.__or__.Scalar((x * 9).long(), 3) * torch.ops.aten.__xor__.Scalar((x * 9).long(), 3), IMAGE),
    case("where number", lambda x: torch.where(x > 0, x, 2.0), IMAGE),
    case("pad space", lambda x: F.pad(x, (1, 2)), IMAGE),
    case("pad space value", lambda x: F.pad(x, (1, 2), value=1.5), IMAGE),
    case("pad crop", lambda x: F.pad(x, (-1, 0)), IMAGE),
    case("pad channels", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), IMAGE),
    case("pad channels value", lambda x: F.pad(x, (0, 0, 0, 0, 0, 2), value=1.5), IMAGE),
    case("pad channels add", lambda x, y: F.pad(x, (0, 0, 1, 1)) + y, X(-3, 4), X(-5, 4)),
    case("pad channels reflect", lambda x: F.pad(x, (1, 1), mode="reflect"), X(3, -6), free=False),
    case("pad heads", lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), HEADS),
    case("pad head dims", lambda x: F.pad(x, (0, 1)), HEADS),
    case("pad head dims value", lambda x: F.pad(x, (1, 2), value=1.5), HEADS),
    case("pad circular", lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), IMAGE),
    case("reflection_pad3d", lambda x: torch.ops.aten.reflection_pad3d.default(x, [1] * 6), X(-3, 2, 2, 2)),
    case("replication_pad1d", lambda x: torch.ops.aten.replication_pad1d.default(x, [1, 1]), X(-6, 4)),
    case("replication_pad3d", lambda x: torch.ops.aten.replication_pad3d.default(x, [1] * 6), X(-3, 2, 2, 2)),
    case("pad shift", lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), IMAGE, free=False),
    case("pad reflect", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), IMAGE),
    case("pad reflect 1d", lambda x: F.pad(x, (1, 1), mode="reflect"), X(-6, 4)),
    case("pad replicate", lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), IMAGE),
    case("constant_pad_nd", lambda x: torch.ops.aten.constant_pad_nd.default(x, [1, 1]), IMAGE),
    case("reflection_pad1d", lambda x: torch.ops.aten.reflection_pad1d.default(x, [1, 1]), X(-6, 4)),
    case("reflection_pad2d", lambda x: torch.ops.aten.reflection_pad2d.default(x, [1, 1, 0, 1]), IMAGE),
    case("replication_pad2d", lambda x: torch.ops.aten.replication_pad2d.default(x, [1, 1, 0, 1]), IMAGE),
    case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), X(-12, 2, 3)),
    case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), X(-3, 4, 6)),
    case("flip channels", lambda x: x.flip(1), IMAGE),
    case("flip space", lambda x: x.flip((2, 3)), IMAGE),
    case("roll space", lambda x: x.roll((1, 2), (2, 3)), IMAGE),
    case("roll channels", lambda x: x.roll(2, 1), IMAGE),
    case("roll channels back", lambda x: x.roll(-1, 1), IMAGE),
    case("roll channels twice", lambda x: x.roll((1, 2), (1, 1)), IMAGE),
    case("roll channels far", lambda x: x.roll(7, 1), IMAGE, free=False),
    case("roll onto itself", lambda x: x + x.roll(1, 1), IMAGE, free=False),
    case("roll flat", lambda x: x.roll(2), IMAGE, free=False),
    case("roll heads", lambda x: x.roll(1, 1), HEADS),
    case("rot90", lambda x: x.rot90(1, (2, 3)), IMAGE),
    case("rot90 channels", lambda x: x.rot90(1, (1, 2)), IMAGE, free=False),
    case("repeat", lambda x: x.repeat(1, 2, 1, 1), IMAGE),
    case("tile", lambda x: x.tile(1, 2, 1, 1), IMAGE),
    case("repeat_interleave", lambda x: x.repeat_interleave(2, 1), IMAGE),
    case("repeat_interleave heads", lambda x: x.repeat_interleave(2, 1), HEADS),
    case("repeat then mul", lambda x, y: x.repeat(1, 2, 1, 1) * y, X(-3, 4, 5), IMAGE),
    case("unfold", lambda x: F.unfold(x, 2), IMAGE),
    case("diagonal", lambda x: x.diagonal(dim1=2, dim2=3), X(-6, 4, 4)),
    case("diagonal channels", lambda x: x.diagonal(dim1=1, dim2=2), X(-4, 4, 5), free=False),
    case("tril", torch.tril, X(-6, 4, 4)),
    case("tril channels", torch.tril, X(4, -6), free=False),
    case("triu", torch.triu, X(-6, 4, 4)),
    # contractions
    case("linear", F.linear, TOKENS, W(7, 6), W(7)),
    case("linear no bias", F.linear, TOKENS, W(7, 6)),
    case("linear vector", lambda x, w: F.linear(x, w), TOKENS, W(6)),
    case("addmm", lambda x, w, b: torch.addmm(b, x, w), X(-6), W(6, 7), W(7)),
    case("matmul", torch.matmul, TOKENS, W(6, 7)),
    case("matmul two", torch.matmul, X(-5, -6), X(-6, -7)),
    case("matmul heads", torch.matmul, HEADS, X(-3, -4, 6)),
    case("matmul broadcast heads", torch.matmul, HEADS, X(1, -4, 6)),
    case("matmul vector", torch.matmul, TOKENS, W(6)),
    case("bmm", torch.bmm, X(-5, -6), X(-6, 7)),
    case("mm", lambda x, w: torch.mm(x, w), X(-6), W(6, 7)),
    case("mv", lambda x, w: torch.mv(x, w).unsqueeze(1), X(-6), W(6)),
    case("dot", lambda x, w: x * torch.dot(w, w), X(-6), W(6)),
    case("einsum", lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), HEADS, X(-3, 6, -4)),
    case("einsum one", lambda x: torch.einsum("bhqd->bqhd", x), HEADS),
    case("einsum outer", lambda x, y: torch.einsum("bi,bj->bij", x, y), X(-5), X(-6)),
    case("einsum sum", lambda x, y: torch.einsum("bci,bcj->bij", x, y), X(-5, 3), X(-5, 4)),
    case("einsum implicit", lambda x, y: torch.einsum("zi,zj", x, y)[None], X(-5), X(-6)),
    case("einsum implicit order", lambda x, w: torch.einsum("bta,oa", x, w), TOKENS, W(7, 6)),
    case("einsum ellipsis", lambda x, y: torch.einsum("...qd,...kd->...qk", x, y), HEADS, X(-3, 6, -4)),
    case("einsum ellipsis implicit", lambda x, w: torch.einsum("...i,ij", x, w), TOKENS, W(6, 7)),
    case("einsum ellipsis broadcast", lambda x, y: torch.einsum("...qd,...kd->...qk", x, y), HEADS, X(6, -4)),
    case("einsum three", lambda x, u, v: torch.einsum("bti,ir,ro->bto", x, u, v), TOKENS, W(6, 4), W(4, 7)),
    case("einsum diagonal", lambda x: torch.einsum("bii->bi", x), X(-4, -4), free=False),
    case("einsum no batch", lambda x, w: x + torch.einsum("ij,ij->j", w, w), TOKENS, W(4, 6)),
    case("conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=1), X(-6, 5), W(8, 6, 3), W(8)),
    case("conv2d", lambda x, w, b: F.conv2d(x, w, b, padding=1), IMAGE, W(8, 6, 3, 3), W(8)),
    case("conv2d no bias", lambda x, w: F.conv2d(x, w, stride=2), IMAGE, W(8, 6, 3, 3)),
    case("conv2d same", lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, W(8, 6, 3, 3)),
    case("conv2d grouped", lambda x, w, b: F.conv2d(x, w, b, groups=2), IMAGE, W(8, 3, 3, 3), W(8)),
    case("conv2d grouped 3", lambda x, w: F.conv2d(x, w, groups=3), IMAGE, W(6, 2, 1, 1)),
    case("conv2d narrow out", lambda x, w: F.conv2d(x, w, groups=3), IMAGE, W(3, 2, 1, 1)),
    case("conv2d one in", lambda x, w: F.conv2d(x, w, groups=6), IMAGE, W(12, 1, 2, 2)),
    case("depthwise", lambda x, w, b: F.conv2d(x, w, b, groups=6), IMAGE, W(6, 1, 3, 3), W(6)),
    case("conv3d", lambda x, w, b: F.conv3d(x, w, b), X(-4, 3, 4, 3), W(5, 4, 2, 2, 2), W(5)),
    case("conv_transpose1d", lambda x, w, b: F.conv_transpose1d(x, w, b, 2), X(-6, 4), W(6, 5, 3), W(5)),
    case("conv_transpose2d", lambda x, w, b: F.conv_transpose2d(x, w, b, 2), IMAGE, W(6, 5, 2, 2), W(5)),
    case("conv_transpose2d grouped", lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2), IMAGE, W(6, 4, 2, 2), W(8)),
    case("conv_transpose2d depthwise", lambda x, w: F.conv_transpose2d(x, w, groups=6), IMAGE, W(6, 1, 2, 2)),
    case("conv_transpose3d", lambda x, w: F.conv_transpose3d(x, w), X(-3, 2, 2, 2), W(3, 4, 2, 2, 2)),
    case("conv over channels", lambda x, w: F.conv1d(x.unsqueeze(1), w, padding=1), X(-6), W(1, 1, 3), free=False),
    case("sdpa", F.scaled_dot_product_attention, HEADS, X(-3, 6, -4), X(-3, 6, -5), free=True),
    case("sdpa scale", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), HEADS, X(-3, 6, -4), X(-3, 6, -5)),
    case("sdpa mask", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3), HEADS, HEADS, HEADS, X(-3, 5, 5)),
    case("sdpa mask all heads", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3), HEADS, HEADS, HEADS, X(1, 5, 5)),
    case("sdpa causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2), HEADS, HEADS, HEADS),
    case("sdpa three axes", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0), X(5, -4), X(5, -4), X(5, -4)),
    case("sdpa gqa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), X(-4, 5, -4), X(-2, 5, -4), X(-2, 5, -3)),
    case("sdpa gqa scale", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True), X(-6, 5, -4), X(-2, 5, -4), X(-2, 5, -3)),
    case("sdpa gqa one", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True), HEADS, X(1, 5, -4), X(1, 5, -4)),
    case("attention by hand", lambda q, k, v: (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v, HEADS, HEADS, HEADS),
    case("linear attention", lambda q, k, v: q @ (k.transpose(-1, -2) @ v), HEADS, HEADS, HEADS),
    case("bmm stacked", lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), X(5, -6), W(5, 6, 7)),
    case("baddbmm", lambda x, w, b: torch.baddbmm(b, x.transpose(0, 1), w).transpose(0, 1), X(5, -6), W(5, 6, 7), W(5, 1, 7)),
    case("addbmm", lambda x, w, b: torch.addbmm(b, x.transpose(0, 1), w)[:, None], X(5, -6), W(5, 6, 7), W(7)),
    case("addmv", lambda x, w, b: torch.addmv(b, x, w)[:, None], X(-6), W(6), W(1)),
    case("addr", lambda x, a, b, c: x + torch.addr(c, a, b), X(-6, -5), W(6), W(5), W(6, 5)),
    case("outer", lambda x, a, b: x + torch.outer(a, b), X(-6, -5), W(6), W(5)),
    case("inner", lambda x, w: torch.inner(x, w), TOKENS, W(7, 6)),
    case("kron", lambda x, a, b: x + torch.kron(a, b), X(6, -12), W(2, 3), W(3, 4)),
    case("tensordot", lambda x, w: torch.tensordot(x, w, ([2, 1], [1, 0])), X(-5, -6), W(5, 6, 7)),
    case("vdot", lambda x, w: x * torch.vdot(w, w), X(-6), W(6)),
    case("bilinear", F.bilinear, X(-6), X(-5), W(7, 6, 5), W(7)),
    case("bilinear no bias", F.bilinear, X(4, -6), X(4, -5), W(7, 6, 5)),
    case("grouped_mm", lambda x, w: grouped_mm_fallback(x, w, torch.tensor([1, 3])), X(-16), W(2, 16, 24)),
    case("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, -1), TOKENS, TOKENS),
    case("cosine over tokens", lambda x, y: F.cosine_similarity(x, y, 1), TOKENS, TOKENS),
    case("cdist", torch.cdist, TOKENS, X(4, -6)),
    # recurrent layers
    case("lstm", lstm, TOKENS, W(16, 6), W(16, 4), W(16), W(16)),
    case("lstm deep", lstm_deep, TOKENS, *[W(12, 6), W(12, 3)] * 4),
    case("lstm projected", lstm_narrow, TOKENS, W(20, 6), W(20, 2), W(2, 5)),
    case("gru", gru, TOKENS, X(1, -4), W(12, 6), W(12, 4), W(12), W(12)),
    case("rnn_tanh", lambda x, *w: torch.rnn_tanh(x, state(x, 1, 4), w, True, 1, 0.0, False, False, True), TOKENS, W(4, 6), W(4, 4), W(4), W(4)),
    case("rnn_relu", lambda x, *w: torch.rnn_relu(x, state(x, 2, 4), w, False, 1, 0.0, False, True, True), TOKENS, *[W(4, 6), W(4, 4)] * 2),
    case("lstm_cell", lambda x, h, *w: torch.lstm_cell(x, (h, h), *w), X(-6), X(-4), W(16, 6), W(16, 4), W(16), W(16)),
    case("gru_cell", torch.gru_cell, X(-6), X(-4), W(12, 6), W(12, 4), W(12), W(12)),
    case("rnn_tanh_cell", torch.rnn_tanh_cell, X(-6), X(-4), W(4, 6), W(4, 4)),
    case("rnn_relu_cell", torch.rnn_relu_cell, X(-6), X(-4), W(4, 6), W(4, 4)),
    # norms
    case("_weight_norm", lambda x, v, g: F.linear(x, torch._weight_norm(v, g, 0)), TOKENS, W(7, 6), W(7, 1)),
    case("_weight_norm other", lambda x, v, g: F.linear(x, torch._weight_norm(v, g, 1)), TOKENS, W(7, 6), W(1, 6)),
    case("batch_norm", lambda x, m, v, w, b: F.batch_norm(x, m.detach(), v.detach().abs() + 0.1, w, b), IMAGE, W(6), W(6), W(6), W(6)),
    case("batch_norm plain", lambda x, m, v: F.batch_norm(x, m.detach(), v.detach().abs() + 0.1), IMAGE, W(6), W(6)),
    case("batch_norm of a weight", lambda x, w, g: F.conv1d(x, F.batch_norm(w.reshape(1, 7, -1), None, None, g, training=True).reshape(w.shape)), X(-6, 4), W(7, 6, 2), W(7)),
    case("instance_norm of a weight", lambda x, w: F.conv1d(x, F.instance_norm(w.reshape(1, 7, -1)).reshape(w.shape)), X(-6, 4), W(7, 6, 2)),
    case("instance_norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), IMAGE, W(6), W(6)),
    case("instance_norm plain", lambda x: F.instance_norm(x), IMAGE),
    case("layer_norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b), TOKENS, W(6), W(6), free=(True, False)),
    case("layer_norm plain", lambda x: F.layer_norm(x, (x.shape[-1],)), TOKENS, free=(True, False)),
    case("layer_norm chw", lambda x, w, b: F.layer_norm(x, w.shape, w, b), IMAGE, W(6, 4, 5), W(6, 4, 5), free=(True, False)),
    case("layer_norm tokens", lambda x: F.layer_norm(x, x.shape[-2:]), TOKENS, free=(True, False)),
    case("layer_norm heads", lambda x, w, b: F.layer_norm(x, w.shape, w, b), HEADS, W(4), W(4)),
    case("rms_norm", lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), TOKENS, W(6), free=(True, False)),
    case("group_norm", lambda x, w, b: F.group_norm(x, 3, w, b), IMAGE, W(6), W(6)),
    case("group_norm 2", lambda x, w, b: F.group_norm(x, 2, w, b), IMAGE, W(6), W(6)),
    case("group_norm 1", lambda x, w, b: F.group_norm(x, 1, w, b), IMAGE, W(6), W(6), free=(True, False)),
    case("group_norm each", lambda x, w, b: F.group_norm(x, 6, w, b), IMAGE, W(6), W(6)),
    case("group_norm plain", lambda x: F.group_norm(x, 3), IMAGE),
    case("softmax channels", lambda x: x.softmax(1), IMAGE, free=(True, False)),
    case("softmax space", lambda x: x.softmax(2), IMAGE),
    case("softmax heads", lambda x: x.softmax(-1), HEADS),
    case("log_softmax", lambda x: x.log_softmax(1), IMAGE, free=(True, False)),
    case("softmin", lambda x: F.softmin(x, 2), IMAGE),
    case("normalize", lambda x: F.normalize(x, dim=-1), TOKENS),
    case("normalize heads", lambda x: F.normalize(x, dim=-1), HEADS),
    case("weight norm", lambda x, v, g: F.linear(x, g * v / v.norm(dim=1, keepdim=True)), TOKENS, W(7, 6), W(7, 1), free=(True, False)),
    case("standardised", lambda x, w: F.linear(x, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1)), TOKENS, W(7, 6)),
    # reductions
    case("mean space", lambda x: x.mean((2, 3)), IMAGE),
    case("mean channels", lambda x: x.mean(1), IMAGE, free=(True, False)),
    case("mean keepdim", lambda x: x - x.mean(1, keepdim=True), IMAGE, free=(True, False)),
    case("mean all", lambda x: x - x.mean(), IMAGE, free=(True, False)),
    case("mean heads", lambda x: x.mean(1), HEADS),
    case("mean dims", lambda x: x.mean(3), HEADS),
    case("sum channels", lambda x: x.sum(1), IMAGE),
    case("sum space", lambda x: x.sum((2, 3), keepdim=True), IMAGE),
    case("sum heads", lambda x: x.sum(1), HEADS),
    case("sum of exp", lambda x: x.exp().sum(1), IMAGE, free=(True, False)),
    case("amax channels", lambda x: x.amax(1), IMAGE, free=(True, False)),
    case("amax space", lambda x: x.amax((2, 3)), IMAGE),
    case("amin", lambda x: x.amin(1, keepdim=True), IMAGE, free=(True, False)),
    case("max dim", lambda x: x.max(2)[0], IMAGE),
    case("max channels", lambda x: x.max(1)[0], IMAGE, free=(True, False)),
    case("min dim", lambda x: x.min(2)[0], IMAGE),
    case("median", lambda x: x.median(2)[0], IMAGE),
    case("argmax space", lambda x: x * x.argmax(2, keepdim=True), IMAGE),
    case("argmax channels", lambda x: x * x.argmax(1, keepdim=True), IMAGE, free=(True, False)),
    case("argmin", lambda x: x * x.argmin(2, keepdim=True), IMAGE),
    case("any", lambda x: x * (x > 0.2).any(2, keepdim=True), IMAGE),
    case("all", lambda x: x * (x > -2).all(2, keepdim=True), IMAGE),
    case("var", lambda x: x.var(2), IMAGE),
    case("var channels", lambda x: x.var(1), IMAGE, free=(True, False)),
    case("std", lambda x: x.std(2), IMAGE),
    case("var_mean", lambda x: torch.var_mean(x, 2), IMAGE),
    case("var_mean channels", lambda x: torch.var_mean(x, 1), IMAGE, free=(True, False)),
    case("std_mean", lambda x: torch.std_mean(x, 2), IMAGE),
    case("norm", lambda x: x.norm(dim=1), IMAGE),
    case("norm minus", lambda x: x.norm(p=-1, dim=1), IMAGE, free=(True, False)),
    case("norm p1", lambda x: x.norm(p=1, dim=2), IMAGE),
    case("vector_norm", lambda x: torch.linalg.vector_norm(x, dim=1), IMAGE),
    case("norm scalar", lambda x: x * torch.ops.aten.norm.ScalarOpt_dim(x, 2, [2], True), IMAGE),
    case("logsumexp", lambda x: x.logsumexp(1), IMAGE, free=(True, False)),
    case("prod", lambda x: x.prod(2), IMAGE),
    case("prod channels", lambda x: x.prod(1), IMAGE, free=(True, False)),
    case("avg_pool1d", lambda x: F.avg_pool1d(x, 2), X(-6, 4)),
    case("avg_pool2d", lambda x: F.avg_pool2d(x, 2), IMAGE),
    case("avg_pool3d", lambda x: F.avg_pool3d(x, 2), X(-4, 2, 4, 2)),
    case("max_pool1d", lambda x: F.max_pool1d(x, 2), X(-6, 4)),
    case("max_pool2d", lambda x: F.max_pool2d(x, 2, padding=1), IMAGE),
    case("max_pool3d", lambda x: F.max_pool3d(x, 2), X(-4, 2, 4, 2)),
    case("max_pool2d indices", lambda x: F.max_pool2d(x, 2, return_indices=True)[0], IMAGE),
    case("pool over channels", lambda x: F.max_pool1d(x, 2), TOKENS, free=False),
    case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 2), X(-6, 4)),
    case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE),
    case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 1), X(-4, 2, 4, 2)),
    case("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 2), X(-6, 4)),
    case("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
    case("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 1), X(-4, 2, 4, 2)),
    case("nearest1d", lambda x: F.interpolate(x, scale_factor=2), X(-6, 4)),
    case("nearest2d", lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    case("nearest3d", lambda x: F.interpolate(x, size=(3, 3, 3)), X(-4, 2, 4, 2)),
    case("linear1d", lambda x: F.interpolate(x, size=7, mode="linear"), X(-6, 4)),
    case("bilinear", lambda x: F.interpolate(x, size=(7, 7), mode="bilinear"), IMAGE),
    case("bicubic", lambda x: F.interpolate(x, size=(7, 7), mode="bicubic"), IMAGE),
    case("trilinear", lambda x: F.interpolate(x, size=(3, 3, 3), mode="trilinear"), X(-4, 2, 4, 2)),
    case("bilinear aa", lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True), IMAGE),
    case("bicubic aa", lambda x: F.interpolate(x, size=(3, 3), mode="bicubic", antialias=True), IMAGE),
    case("nearest exact 1d", lambda x: F.interpolate(x, size=7, mode="nearest-exact"), X(-6, 4)),
    case("nearest exact 3d", lambda x: F.interpolate(x, size=(3, 3, 3), mode="nearest-exact"), X(-4, 2, 4, 2)),
    case("nearest exact", lambda x: F.interpolate(x, size=(7, 7), mode="nearest-exact"), IMAGE),
    # barriers
    case("cumsum", lambda x: x.cumsum(1), IMAGE, free=False),
    case("cumsum space", lambda x: x.cumsum(2), IMAGE),
    case("cumprod", lambda x: x.cumprod(2), IMAGE),
    case("logcumsumexp", lambda x: x.logcumsumexp(2), IMAGE),
    case("diff", lambda x: x.diff(dim=2), IMAGE),
    case("sort", lambda x: x.sort(2)[0], IMAGE),
    case("sort channels", lambda x: x.sort(1)[0], IMAGE, free=False),
    case("argsort", lambda x: x * x.argsort(2), IMAGE),
    case("cummax", lambda x: x.cummax(2)[0], IMAGE),
    case("cummin", lambda x: x.cummin(1)[0], IMAGE, free=False),
    case("kthvalue", lambda x: x.kthvalue(2, 2, True)[0], IMAGE),
    case("kthvalue gone", lambda x: x.kthvalue(2, 2)[0], IMAGE, free=False),
    case("mode", lambda x: x.mode(2, True)[0], IMAGE),
    case("msort", lambda x: x.transpose(0, 1).msort().transpose(0, 1), TOKENS),
    case("fft", lambda x: torch.fft.ifft(torch.fft.fft(x, dim=2) * 1j, dim=2).real, IMAGE),
    case("fft channels", lambda x: torch.fft.fft(x, dim=1).real, IMAGE, free=False),
    case("rfft", lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=2), dim=2), IMAGE),
    case("fft2", lambda x: torch.fft.ifft2(torch.fft.fft2(x) * 1j).real, IMAGE),
    case("rfft2", lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), IMAGE),
    case("fftn", lambda x: torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3)) * 1j, dim=(2, 3)).real, IMAGE),
    case("histc", lambda x: x + torch.histc(x, 5, 0.0, 1.0), IMAGE, free=False),
    case("one_hot", lambda x: F.one_hot((x > 0).long(), 3).double(), IMAGE, free=False),
    case("searchsorted", lambda x: x * torch.searchsorted(torch.linspace(0, 1, 5).double(), x), X(5), free=False),
    case("bucketize", lambda x: x * torch.bucketize(x, torch.linspace(0, 1, 5).double()), IMAGE, free=False),
    case("item of all", lambda x: x * x.sum().item(), IMAGE),
    case("item of a weight", lambda x, w: x * w.item(), IMAGE, W(1, 1)),
    case("topk", lambda x: x.topk(2, 2)[0], IMAGE),
    case("topk channels", lambda x: x.topk(2, 1)[0], IMAGE, free=False),
    # no rule: never a guess
    case("no rule", lambda x: torch.linalg.matrix_exp(x), X(-4, -4), free=False),
]
# fmt: on

# Why no line above reaches a rule.
UNREACHED = {
    "_native_batch_norm_legit_no_training": "only after decomposition",
    "_softmax": "only after decomposition",
    "_embedding_bag": "only after decomposition",
    "grid_sampler_2d": "only after decomposition",
    "grid_sampler_3d": "only after decomposition",
    "_grouped_mm": "another name of grouped_mm_fallback; knows no float64",
    "ger": "exported as outer",
    "_to_copy": "only after decomposition",
    "_unsafe_view": "only after decomposition",
    "softmin": "exported as a softmax of the negative",
    "lift_fresh": "exported as lift_fresh_copy",
    "pointwise": "the name of the rule itself; operators are found by their tag",
    **dict.fromkeys(("empty", "empty_like"), "values are whatever was there"),
    **dict.fromkeys(
        ("bernoulli", "rand", "rand_like", "randint", "randn", "randn_like", "randperm"),
        "other values in every run",
    ),
    **dict.fromkeys(("tril_indices", "triu_indices"), "whole numbers, only ever an index"),
}


def model_of(line: Case, *, alive: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    model = randomised(Single(line.function, line.args, alive=alive))
    return model, tuple(model.example(shape) for shape in line.args if isinstance(shape, X))


def names_of(line: Case) -> str:
    return line.name.replace(" ", "-")


@pytest.mark.parametrize("line", CASES, ids=names_of)
def test_cutting_commutes_with_the_op(line: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph on cut tensors computes what the whole graph computes on zeroed ones."""
    module = sys.modules["cpd.comb"]  # the name in the package is the function
    monkeypatch.setattr(module, "freeze_unfollowed", lambda *_: None)
    monkeypatch.setattr(module, "freeze_unheld", lambda *_: None)
    total = 0
    for alive in (False, True):
        model, inputs = model_of(line, alive=alive)
        groups = comb(model, inputs, exact=True, keep_class="strict")
        for plan in random_plans(groups, 2):
            total += removed(plan)
            small = cpd.cut(model, plan, verify=False)
            got = CutGraph(groups, plan, small).outputs(*inputs)
            worst = difference(got, run(zeroed(model, plan), inputs))
            assert worst <= 1e-9, f"differs by {worst:.1e}\n{groups}\n{plan}"
    assert (total > 0) == line.free[1], f"{total} removed\n{groups}"


@pytest.mark.parametrize("line", CASES, ids=names_of)
def test_what_comb_frees_can_be_cut(line: Case) -> None:
    """Whatever the network's code does with sizes: a plan of `comb` and `choose` cuts and verifies."""
    model, inputs = model_of(line, alive=True)
    _, total = prove(model, inputs, exact=False, count=2)
    assert line.free[0] or not total


def test_every_rule_is_proved() -> None:
    seen = set()
    for line in CASES:
        for node in trace(*model_of(line, alive=False)).graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is not None:
                seen.add(schema.name.split("::")[-1])
    left = {name for name in rules.known() if name not in seen and f"{name}_" not in seen}
    assert left == set(UNREACHED)
