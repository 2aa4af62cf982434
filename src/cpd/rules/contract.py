"""Contractions: products summed over an axis. Outer channels stay, contracted ones unite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..labels import Labels, reshape
from .base import Call, Pin, align, rule


def _zero_affine(weight: int, bias: int | None) -> Any:
    """The output of weight x input + bias is zero where the weight's row and the bias are."""

    def zero(flags: dict[int, bool]) -> bool:
        return flags.get(weight, False) and (bias is None or flags.get(bias, False))

    return zero


def _consume(call: Call, labels: Labels, axis: int) -> None:
    """Remember that `axis` of a weight reads channels that another tensor makes."""
    layer = labels.owned(axis)
    if layer is not None:
        call.consumed.append(layer.ids)


@rule("linear")
def linear(call: Call) -> Labels:
    """y[..., o] = sum_i x[..., i] w[o, i] + b[o]."""
    x, w, b = call.args["input"], call.args["weight"], call.args.get("bias")
    lead = [f"n{k}" for k in range(len(x.shape) - 1)]
    _consume(call, w, len(w.shape) - 1)
    if len(w.shape) == 1:
        return align(call, [(x, [*lead, "i"]), (w, ["i"])], lead, call.shape)
    operands = [(x, [*lead, "i"]), (w, ["o", "i"])]
    if b is not None:
        operands.append((b, ["o"]))
    zero = _zero_affine(1, 2 if b is not None else None)
    y = align(call, operands, [*lead, "o"], call.shape, zero=zero)
    call.cost(1, [(y, axis) for axis in range(len(y.shape))] + [(w, 1)])
    return y


@rule("addmm")
def addmm(call: Call) -> Labels:
    """y[n, o] = b[o] + sum_i x[n, i] w[i, o]."""
    b, x, w = call.args["self"], call.args["mat1"], call.args["mat2"]
    bias = ["n", "o"][2 - len(b.shape) :]
    _consume(call, w, 0)
    operands = [(x, ["n", "i"]), (w, ["i", "o"]), (b, bias)]
    y = align(call, operands, ["n", "o"], call.shape, zero=_zero_affine(1, 2))
    call.cost(1, [(y, 0), (y, 1), (x, 1)])
    return y


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(call: Call) -> Labels:
    """Batched product over the last axis of a and the last but one of b; batch axes broadcast."""
    a = call.args["self"]
    b = next(call.args[name] for name in ("other", "mat2", "vec", "tensor") if name in call.args)
    names_a = [*_batch(len(a.shape) - 2), "m", "k"] if len(a.shape) > 1 else ["k"]
    names_b = [*_batch(len(b.shape) - 2), "k", "n"] if len(b.shape) > 1 else ["k"]
    rank = max(len(a.shape), len(b.shape)) - 2
    out = [*_batch(rank), *(["m"] if "m" in names_a else []), *(["n"] if "n" in names_b else [])]
    _consume(call, b, names_b.index("k"))
    y = align(call, [(a, names_a), (b, names_b)], out, call.shape)
    call.cost(1, [(y, axis) for axis in range(len(y.shape))] + [(a, len(a.shape) - 1)])
    return y


def _batch(count: int) -> list[str]:
    return [f"b{k}" for k in range(count, 0, -1)]


@rule("einsum")
def einsum(call: Call) -> Labels:
    """Any einsum with explicit, unrepeated axes; others freeze what they touch."""
    equation, tensors = call.args["equation"].replace(" ", ""), call.args["tensors"]
    left, _, right = equation.partition("->")
    terms = left.split(",")
    plain = "->" in equation and "." not in equation and len(terms) == len(tensors) <= 2
    if not plain or any(len(set(term)) != len(term) for term in terms):
        for tensor in tensors:
            call.freeze_all(
                tensor, "einsum with implicit, repeated or more than two operands' axes"
            )
        return Labels(call.shape)
    y = align(call, list(zip(tensors, terms, strict=True)), right, call.shape)
    axes = {
        name: (t, k) for t, term in zip(tensors, terms, strict=True) for k, name in enumerate(term)
    }
    call.cost(1, list(axes.values()))
    return y


@rule("conv1d", "conv2d", "conv3d")
def conv(call: Call) -> Labels:
    """y[n, (g o), s] = sum_{i, k} x[n, (g i), s + k] w[(g o), i, k] + b[(g o)]."""
    x, w, b = call.args["input"], call.args["weight"], call.args.get("bias")
    groups = call.args.get("groups", 1)
    y = _conv(call, x, w, b, groups, transposed=False)
    kernel = [(w, axis) for axis in range(2, len(w.shape))]
    call.cost(1, [*((y, axis) for axis in range(len(y.shape))), (w, 1), *kernel])
    return y


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(call: Call) -> Labels:
    """y[n, (g o), s + k] += x[n, (g i), s] w[(g i), o, k]."""
    x, w, b = call.args["input"], call.args["weight"], call.args.get("bias")
    y = _conv(call, x, w, b, call.args.get("groups", 1), transposed=True)
    kernel = [(w, axis) for axis in range(2, len(w.shape))]
    call.cost(1, [*((x, axis) for axis in range(len(x.shape))), (w, 1), *kernel])
    return y


def _conv(
    call: Call, x: Labels, w: Labels, b: Labels | None, groups: int, *, transposed: bool
) -> Labels:
    rank = len(w.shape) - 2
    batched = len(x.shape) == rank + 2
    lead, kernel = (["n"] if batched else []), [f"k{k}" for k in range(rank)]
    space_in, space_out = [f"s{k}" for k in range(rank)], [f"t{k}" for k in range(rank)]
    for axis in range(len(x.shape) - rank, len(x.shape)):
        call.freeze_axis(x, axis, "convolution runs over this axis")
    for axis in range(2, rank + 2):
        call.freeze_axis(w, axis, "kernel axis, not a channel axis")
    x = replace(x, layers=tuple(e for e in x.layers if max(e.axes) < len(x.shape) - rank))
    w = replace(w, layers=tuple(e for e in w.layers if max(e.axes) < 2))
    _consume(call, w, 0 if transposed else 1)
    xg, wg = _split(call, x, len(lead), groups), _split(call, w, 0, groups)
    _same_groups(call, wg)
    row, column = ("i", "o") if transposed else ("o", "i")
    operands = [(xg, [*lead, "g", "i", *space_in]), (wg, ["g", row, column, *kernel])]
    if b is not None:
        operands.append((_split(call, b, 0, groups), ["g", "o"]))
    out_shape = call.shape
    at = len(lead)
    shape = (*out_shape[:at], groups, out_shape[at] // groups, *out_shape[at + 1 :])
    zero = _zero_affine(1, 2 if b is not None else None)
    y = align(call, operands, [*lead, "g", "o", *space_out], shape, zero=zero)
    if groups > 1:
        call.size("groups", None, groups, xg, at)
    return reshape(y, out_shape, call.channels)


def _same_groups(call: Call, weight: Labels) -> None:
    """The groups of a weight's inputs are the groups of its outputs."""
    blocks = [weight.at_layer(layer, 0, call.channels) for layer in weight.layers]
    found = [layer.ids for layer in blocks if layer is not None]
    for ids in found[1:]:
        call.channels.unite(found[0], ids)


def _split(call: Call, labels: Labels, axis: int, groups: int) -> Labels:
    shape = labels.shape
    parts = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    return reshape(labels, parts, call.channels)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Labels:
    """softmax(q k^T scale + mask) v; the default scale depends on the head dim and has to be
    pinned.
    """
    q, k, v = call.args["query"], call.args["key"], call.args["value"]
    mask = call.args.get("attn_mask")
    if call.args.get("enable_gqa"):
        for labels in (q, k, v):
            call.freeze_all(labels, "attention with enable_gqa")
        return Labels(call.shape)
    lead = _batch(len(q.shape) - 2)
    for labels, axis in ((q, -2), (k, -2), (v, -2)):
        call.freeze_axis(labels, len(labels.shape) + axis, "attention runs over this axis")
    if call.args.get("scale") is None:
        call.pins.append(Pin(q, len(q.shape) - 1))
    operands = [(q, [*lead, "l", "e"]), (k, [*lead, "s", "e"])]
    if mask is not None:
        operands.append((mask, [*lead, "l", "s"][len(lead) + 2 - len(mask.shape) :]))
    scores = align(call, operands, [*lead, "l", "s"], (*q.shape[:-1], k.shape[-2]))
    y = align(
        call, [(scores, [*lead, "l", "s"]), (v, [*lead, "s", "c"])], [*lead, "l", "c"], call.shape
    )
    head = [(y, axis) for axis in range(len(y.shape) - 1)]
    call.cost(1, [*head, (k, len(k.shape) - 2), (q, len(q.shape) - 1)])
    call.cost(1, [*head, (v, len(v.shape) - 2), (v, len(v.shape) - 1)])
    return y
