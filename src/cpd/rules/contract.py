"""Contractions: products summed over an axis. Outer channels stay, contracted ones unite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..labels import Labels, Layer, reshape
from ._copies import copied
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


@rule("addmm", "addmv", "addr", "baddbmm", "addbmm")
def addmm(call: Call) -> Labels:
    """y[n, o] = b[n, o] + sum_i x[n, i] w[i, o], also for vectors and batches."""
    b, first, second = call.args["self"], *_factors(call)
    names = {
        "addmm": (["n", "i"], ["i", "o"], ["n", "o"]),
        "addmv": (["n", "i"], ["i"], ["n"]),
        "addr": (["n"], ["o"], ["n", "o"]),
        "baddbmm": (["z", "n", "i"], ["z", "i", "o"], ["z", "n", "o"]),
        "addbmm": (["z", "n", "i"], ["z", "i", "o"], ["n", "o"]),
    }
    left, right, out = names[call.op.rstrip("_")]
    if "i" in right:
        _consume(call, second, right.index("i"))
    operands = [(first, left), (second, right), (b, out[len(out) - len(b.shape) :])]
    zero = lambda flags: (flags.get(0, False) or flags.get(1, False)) and flags.get(2, False)  # noqa: E731
    y = align(call, operands, out, call.shape, zero=zero)
    summed = [(first, k) for k, name in enumerate(left) if name not in out]
    call.cost(1, [*((y, k) for k in range(len(out))), *summed])
    return y


def _factors(call: Call) -> list[Labels]:
    pairs = (("mat1", "mat2"), ("mat", "vec"), ("vec1", "vec2"), ("batch1", "batch2"))
    return next([call.args[a], call.args[b]] for a, b in pairs if a in call.args)


@rule("outer", "ger", "inner", "kron")
def outer(call: Call) -> Labels:
    """y[i, j] = a[i] b[j]; inner sums over the last axes; kron merges the pairs of axes."""
    a, b = call.args["self"], call.args["vec2" if "vec2" in call.args else "other"]
    if call.op == "inner" and a.shape and b.shape:
        left, right = _batch(len(a.shape) - 1), [f"c{k}" for k in range(len(b.shape) - 1)]
        call.cost(1, [(a, k) for k in range(len(a.shape))] + [(b, k) for k in range(len(right))])
        return align(call, [(a, [*left, "k"]), (b, [*right, "k"])], [*left, *right], call.shape)
    left, right = [f"a{k}" for k in range(len(a.shape))], [f"b{k}" for k in range(len(b.shape))]
    if call.op != "kron":
        return align(call, [(a, left), (b, right)], [*left, *right], call.shape)
    if len(left) != len(right):
        call.freeze_all(a, "kron of different ranks")
        call.freeze_all(b, "kron of different ranks")
        return Labels(call.shape)
    names = [name for pair in zip(left, right, strict=True) for name in pair]
    apart = tuple(n for pair in zip(a.shape, b.shape, strict=True) for n in pair)
    y = align(call, [(a, left), (b, right)], names, apart)
    return reshape(y, call.shape, call.channels)


@rule("tensordot")
def tensordot(call: Call) -> Labels:
    """A sum over the axes named; those left of a come first, then those of b."""
    a, b = call.args["self"], call.args["other"]
    left, right = [f"a{k}" for k in range(len(a.shape))], [f"b{k}" for k in range(len(b.shape))]
    for i, j in zip(call.args["dims_self"], call.args["dims_other"], strict=True):
        left[i] = right[j] = f"k{i % len(left)}"
    out = [name for name in (*left, *right) if name[0] != "k"]
    y = align(call, [(a, left), (b, right)], out, call.shape)
    rest = [(b, k) for k, name in enumerate(right) if name[0] == "b"]
    call.cost(1, [*((a, k) for k in range(len(left))), *rest])
    return y


@rule("bilinear")
def bilinear(call: Call) -> Labels:
    """y[n, o] = sum_ij x[n, i] w[o, i, j] z[n, j] + b[o]."""
    x, z, w, b = (call.args.get(k) for k in ("input1", "input2", "weight", "bias"))
    assert isinstance(x, Labels)
    assert isinstance(z, Labels)
    assert isinstance(w, Labels)
    lead = [f"n{k}" for k in range(len(x.shape) - 1)]
    _consume(call, w, 1)
    _consume(call, w, 2)
    operands = [(x, [*lead, "i"]), (z, [*lead, "j"]), (w, ["o", "i", "j"])]
    if b is not None:
        operands.append((b, ["o"]))
    zero = _zero_affine(2, 3 if b is not None else None)
    y = align(call, operands, [*lead, "o"], call.shape, zero=zero)
    call.cost(1, [*((y, k) for k in range(len(y.shape))), (w, 1), (w, 2)])
    return y


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_mm(call: Call) -> Labels:
    """y[n, o] = sum_i x[n, i] w[e(n), i, o]: the rows of x are sorted by e, which is data."""
    x, w = list(call.args.values())[:2]
    for value in list(call.args.values())[2:]:
        if isinstance(value, Labels):
            call.freeze_all(value, "offsets are data")
    if len(x.shape) != 2 or len(w.shape) != 3 or call.args.get("bias") is not None:
        call.freeze_all(x, "grouped in another way than rows by matrices")
        call.freeze_all(w, "grouped in another way than rows by matrices")
        return Labels(call.shape)
    call.freeze_axis(w, 0, "chosen by data")
    _consume(call, w, 1)
    for labels, axis in ((x, 1), (w, 1), (w, 2)):
        layer = labels.at(axis, call.channels)
        if layer is not None:  # the kernel, which runs where it can, wants rows of 16 bytes
            call.channels.keep_multiple(layer.ids, 8, "grouped products take multiples of 8")
    inner = tuple(e for e in w.layers if 0 not in e.axes)
    for layer in (e for e in w.layers if len(e.axes) > 1 and 0 in e.axes):
        call.freeze(layer.ids, "chosen by data")
    y = align(
        call, [(x, ["n", "i"]), (replace(w, layers=inner), ["e", "i", "o"])], ["n", "o"], call.shape
    )
    call.cost(1, [(y, 0), (y, 1), (x, 1)])
    return y


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
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
    """Any einsum, two operands at a time from the left; an axis repeated in one of them freezes."""
    tensors = call.args["tensors"]
    terms, out = _terms(call.args["equation"], [len(t.shape) for t in tensors])
    if any(len(set(term)) != len(term) for term in terms):
        for tensor in tensors:
            call.freeze_all(tensor, "einsum along a diagonal")
        return Labels(call.shape)
    sizes: dict[str, int] = {}
    for tensor, term in zip(tensors, terms, strict=True):
        for name, size in zip(term, tensor.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    left, names = tensors[0], terms[0]
    for k in range(1, len(tensors)):
        wanted = {*out, *(name for term in terms[k + 1 :] for name in term)}
        kept = [name for name in dict.fromkeys((*names, *terms[k])) if name in wanted]
        kept = out if k + 1 == len(tensors) else kept
        shape = tuple(sizes[name] for name in kept)
        _product_cost(call, (left, names), (tensors[k], terms[k]))
        left = align(call, [(left, names), (tensors[k], terms[k])], kept, shape)
        names = kept
    return align(call, [(left, names)], out, call.shape) if len(tensors) == 1 else left


def _product_cost(call: Call, *pair: tuple[Labels, list[str]]) -> None:
    axes = {name: (t, k) for t, term in pair for k, name in enumerate(term) if t.shape[k] > 1}
    call.cost(1, list(axes.values()))


def _terms(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Return the axes' names of the operands and of the result; those of an ellipsis count from the
    right.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [n - len(t.replace("...", "")) for n, t in zip(ranks, terms, strict=True)]
    batch = [f"...{k}" for k in range(max(hidden), 0, -1)]
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        right = "..." + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))

    def named(term: str, count: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(batch[len(batch) - count :] if dots else ()), *after]

    found = [named(term, n) for term, n in zip(terms, hidden, strict=True)]
    return found, named(right, len(batch))


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
    x, w = _before(call, x, len(x.shape) - rank), _before(call, w, 2)
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


def _before(call: Call, labels: Labels, first: int) -> Labels:
    """Forget the axes from `first` on: what is coupled to them is alive where its row is."""
    layers: dict[int, Layer] = {}
    for layer in labels.layers:
        outer = [axis for axis in layer.axes if axis < first]
        kept = labels.at_layer(layer, outer[-1], call.channels) if outer else None
        if kept is None:
            continue
        other = layers.setdefault(kept.owner, kept)
        if other.axes == kept.axes:
            call.channels.unite(other.ids, kept.ids)
        else:
            call.freeze(kept.ids, "an axis is coupled to two different ones")
            call.freeze(other.ids, "an axis is coupled to two different ones")
    return replace(labels, layers=tuple(layers.values()))


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
    if call.args.get("enable_gqa") and q.shape[-3] != k.shape[-3]:
        copies = q.shape[-3] // k.shape[-3]
        k, v = (copied(call, t, len(t.shape) - 3, copies) for t in (k, v))
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
