"""Parts: joining tensors along an axis, taking parts of one, and writing into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..labels import Labels, Layer, reshape, squeeze_constant
from .base import Call, Zero, align, positive, rule


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    """Ids of the parts one after the other; all other axes unite."""
    tensors = [x for x in call.args["tensors"] if 0 not in x.shape] or call.args["tensors"]
    return _concatenated(call, tensors, positive(call.args.get("dim", 0), len(call.shape)))


def _concatenated(call: Call, tensors: Sequence[Labels], axis: int) -> Labels:
    names = [f"d{k}" for k in range(len(call.shape))]
    operands = []
    for number, x in enumerate(tensors):
        own = [name if k != axis else f"part{number}" for k, name in enumerate(names)]
        operands.append((_beside(call, x, axis), own))
    rest = align(call, operands, names, call.shape, zero=_all_zero(len(tensors)))
    if not any(x.carries(axis) for x in tensors):
        return rest
    coupled = any(len(e.axes) > 1 and axis in e.axes for x in tensors for e in x.layers)
    joined = _joined_rows(call, tensors, axis) if coupled else _joined(call, tensors, axis)
    if joined is None:
        return rest
    kept = tuple(e for e in rest.layers if e.axes != joined.axes[:-1])  # its rows say it
    return replace(rest, layers=(*kept, joined))


def _all_zero(count: int) -> Zero:
    return lambda flags: len(flags) == count and all(flags.values())


def _beside(call: Call, labels: Labels, axis: int) -> Labels:
    """Forget the layers that one axis takes part in, which are joined apart, but for their rows."""
    layers = [e for e in labels.layers if axis not in e.axes]
    for layer in (e for e in labels.layers if e.owner == axis and len(e.axes) > 1):
        rows = labels.at_layer(layer, layer.axes[-2], call.channels)
        if rows is not None and labels.owned(rows.owner) is None:
            layers.append(rows)
    return replace(labels, layers=tuple(layers))


def _joined(call: Call, tensors: Sequence[Labels], axis: int) -> Layer:
    found = [x.owned(axis) for x in tensors]
    ids = []
    for x, layer in zip(tensors, found, strict=True):
        if layer is None:
            part = call.channels.new(x.shape[axis])
            call.freeze(part, "concatenated with channels of fixed number")
        else:
            part = layer.ids
        ids.append(part)
    zero = all(e.zero for e in found if e is not None)
    return Layer((axis,), np.concatenate(ids), zero)


def _joined_rows(call: Call, tensors: Sequence[Labels], axis: int) -> Layer | None:
    """Concatenate coupled axes: whole rows stay together, and each is a row of the parts' rows.

    A part without rows of its own is the same in every row.
    """
    found = [x.owned(axis) for x in tensors]
    deep = [e for e in found if e is not None and len(e.axes) > 1]
    outside = [e for x in tensors for e in x.layers if axis in e.axes[:-1]]
    outer = {e.axes[:-1] for e in deep}
    if outside or len(outer) != 1:
        for e in (*outside, *(e for e in found if e is not None)):
            call.freeze(e.ids, "concatenated with rows of another kind")
        return None
    rows = call.channels.rows(deep[0].ids)
    for e in deep[1:]:
        call.channels.unite(rows, call.channels.rows(e.ids))
    parts = []
    for x, layer in zip(tensors, found, strict=True):
        columns = call.channels.new(x.shape[axis]) if layer is None else layer.ids
        if layer is None:
            call.freeze(columns, "concatenated with channels of fixed number")
        parts.append(columns if columns.ndim > 1 else call.channels.product(rows, columns))
    ids = np.concatenate([part.reshape(*rows.shape, -1) for part in parts], axis=-1)
    call.channels.nest(ids)
    call.channels.unite(call.channels.rows(ids), rows)
    return Layer(deep[0].axes, ids, all(e is not None and e.zero for e in found))


@rule("stack")
def stack(call: Call) -> Labels:
    """A new axis; all others unite."""
    rank = len(call.shape)
    axis = positive(call.args.get("dim", 0), rank)
    names = [f"d{k}" for k in range(rank)]
    inner = [n for k, n in enumerate(names) if k != axis]
    tensors = call.args["tensors"]
    return align(
        call, [(x, inner) for x in tensors], names, call.shape, zero=_all_zero(len(tensors))
    )


def _slice(call: Call, x: Labels, axis: int, start: int, stop: int, step: int = 1) -> Labels:
    layers = []
    for layer in x.layers:
        if axis in layer.axes:
            position = layer.axes.index(axis)
            index = [slice(None)] * layer.ids.ndim
            index[position] = slice(start, stop, step)
            layer = squeeze_constant(layer.axes, layer.ids[tuple(index)], layer.zero)
            if not layer.axes:
                continue
            call.channels.nest(layer.ids)
        layers.append(layer)
    length = len(range(*slice(start, stop, step).indices(x.shape[axis])))
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return Labels(shape, tuple(layers), x.uniform)


@rule("slice", "narrow")
def slice_(call: Call) -> Labels:
    """A run of one axis. Its bounds are literal sizes that follow what is left before them."""
    x = call.args["self"]
    axis = positive(call.args.get("dim", 0), len(x.shape))
    size = x.shape[axis]
    if call.op == "narrow":
        start, step = call.args["start"] % size, 1
        stop = start + call.args["length"]
    else:
        given = (call.args.get("start"), call.args.get("end"), call.args.get("step", 1))
        start, stop, step = slice(*given).indices(size)
    if (start, stop, step) == (0, size, 1):
        return x
    if step != 1:
        return _strided(call, x, axis, (start, stop, step))
    out = _slice(call, x, axis, start, stop, step)
    _keep_one(call, x, axis, [(0, start), (start, stop), (stop, size)])
    if size in (2 * start, 2 * stop):
        _balance(call, x, axis, 2)  # code computes a half from the whole
    _bound(call, "start", start, x, axis)
    if call.op == "narrow":
        call.size("length", None, stop - start, out, axis)
    elif stop < size:
        _bound(call, "end", stop, x, axis)
    return out


def _strided(call: Call, x: Labels, axis: int, run: tuple[int, int, int]) -> Labels:
    """Every n-th index: where n at a time live and die together, every n-th of them is left."""
    start, stop, step = run
    size = x.shape[axis]
    layer = x.owned(axis)
    if layer is not None and size % step == 0 and start < step and stop + step > size + start:
        ids = layer.ids.reshape(*layer.ids.shape[:-1], size // step, step)
        call.channels.unite(ids, ids[..., :1])
    else:
        call.freeze_axis(x, axis, "every n-th channel is taken")
        call.freeze_indices(x, axis, "every n-th row is taken")
    return _slice(call, x, axis, start, stop, step)


def _bound(call: Call, arg: str, bound: int, x: Labels, axis: int) -> None:
    if bound > 0 and x.carries(axis):
        call.size(arg, None, bound, _slice(call, x, axis, 0, bound), axis)


def _keep_one(call: Call, x: Labels, axis: int, runs: Sequence[tuple[int, int]]) -> None:
    """Parts addressed one by one can shrink but never vanish; those of a row vanish with it."""
    layer = x.at(axis, call.channels)
    if layer is None:
        return
    parts = [layer.ids[..., start:stop] for start, stop in runs if stop > start]
    if layer.ids.ndim > 1 and any(part.shape[-1] == 1 for part in parts):
        call.channels.freeze_inner(layer.ids, "rows are addressed one by one")
        return
    for part in parts:
        call.channels.keep_one(part)
        if layer.ids.ndim > 1:
            call.channels.unite(call.channels.rows(part), call.channels.rows(layer.ids))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(call: Call) -> list[Labels]:
    """Parts of one axis. Parts of equal size stay equal, since code often computes them from the
    whole.
    """
    x = call.args["self"]
    axis = positive(call.args.get("dim", 0), len(x.shape))
    lengths = [shape[axis] for shape in call.out]
    ends = np.cumsum([0, *lengths])
    runs = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    parts = [_slice(call, x, axis, start, stop) for start, stop in runs]
    _keep_one(call, x, axis, runs)
    if x.carries(axis) and call.op != "split_with_sizes":
        if len(set(lengths)) == 1:
            _balance(call, x, axis, len(lengths))
        else:
            call.freeze_indices(x, axis, "split in parts of unequal size")
    if call.op == "split_with_sizes":
        for index, (old, part) in enumerate(zip(lengths, parts, strict=True)):
            call.size("split_sizes", index, old, part, axis)
    elif call.op in ("split", "unsafe_split"):
        call.size("split_size", None, lengths[0], parts[0], axis)
    return parts


def _balance(call: Call, x: Labels, axis: int, parts: int) -> None:
    layer = x.at(axis, call.channels)
    if layer is None:
        return
    ids = layer.ids.reshape(*layer.ids.shape[:-1], parts, -1)
    call.channels.nest(ids)
    blocks = call.channels.rows(ids)
    if blocks.ndim == 1:
        call.freeze(blocks, "one of equal parts, must not vanish")
    else:  # inside a row all parts vanish with the row, or none
        call.channels.unite(blocks, blocks[..., :1])


@rule("select")
def select(call: Call) -> Labels:
    """One index of an axis. Rows addressed one by one can shrink but never vanish."""
    x = call.args["self"]
    axis = positive(call.args["dim"], len(x.shape))
    return _selected(call, x, axis, call.args["index"] % x.shape[axis])


@rule("unbind")
def unbind(call: Call) -> list[Labels]:
    """All indices of an axis, one by one."""
    x = call.args["self"]
    axis = positive(call.args.get("dim", 0), len(x.shape))
    return [_selected(call, x, axis, k) for k in range(x.shape[axis])]


def _selected(call: Call, x: Labels, axis: int, index: int) -> Labels:
    layer = x.at(axis, call.channels)
    if layer is not None:
        call.channels.freeze_inner(layer.ids, "rows are addressed one by one")
    part = _slice(call, x, axis, index, index + 1)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return reshape(part, shape, call.channels)


@rule("glu")
def glu(call: Call) -> Labels:
    """a * sigmoid(b), a and b the halves of one axis: both keep the same channels."""
    x = call.args["self"]
    axis = positive(call.args.get("dim", -1), len(x.shape))
    half = x.shape[axis] // 2
    parts = [_slice(call, x, axis, start, start + half) for start in (0, half)]
    names = [f"d{k}" for k in range(len(x.shape))]
    operands = [(part, names) for part in parts]
    return align(call, operands, names, call.shape, zero=lambda flags: flags.get(0, False))


@rule("slice_scatter")
def slice_scatter(call: Call) -> Labels:
    """x with other values in a run of one axis: their channels there, those of x elsewhere; all
    other axes unite.
    """
    x, part = call.args["self"], call.args["src"]
    axis = positive(call.args.get("dim", 0), len(x.shape))
    size = x.shape[axis]
    given = (call.args.get("start"), call.args.get("end"), call.args.get("step", 1))
    start, stop, step = slice(*given).indices(size)
    if step != 1:
        return _scattered(call, x, part, axis)
    if stop - start < size:
        _keep_one(call, x, axis, [(0, start), (start, stop), (stop, size)])
        _bound(call, "start", start, x, axis)
    if stop < size:
        _bound(call, "end", stop, x, axis)
    return _overwritten(call, x, part, axis, start)


@rule("select_scatter")
def select_scatter(call: Call) -> Labels:
    """x with other values at one index of an axis, which is addressed by itself."""
    x, part = call.args["self"], call.args["src"]
    axis = positive(call.args["dim"], len(x.shape))
    layer = x.at(axis, call.channels)
    if layer is not None:
        call.channels.freeze_inner(layer.ids, "rows are addressed one by one")
    row = reshape(part, (*x.shape[:axis], 1, *x.shape[axis + 1 :]), call.channels)
    return _overwritten(call, x, row, axis, call.args["index"] % x.shape[axis])


def _overwritten(call: Call, x: Labels, part: Labels, axis: int, start: int) -> Labels:
    """Concatenate what is left of x before and after a part, which is as wide as what it covers."""
    stop, size = start + part.shape[axis], x.shape[axis]
    names = [f"d{k}" for k in range(len(x.shape))]
    covered = _slice(call, x, axis, start, stop)
    operands = [(covered, names), (part, names)]
    part = align(call, operands, names, part.shape, zero=lambda flags: flags.get(1, False))
    parts = (_slice(call, x, axis, 0, start), part, _slice(call, x, axis, stop, size))
    return _concatenated(call, [p for p in parts if p.shape[axis]], axis)


def _scattered(call: Call, x: Labels, part: Labels, axis: int) -> Labels:
    """Write to every n-th index: that axis is fixed, all others unite."""
    for labels in (x, part):
        for layer in (e for e in labels.layers if axis in e.axes):
            call.freeze(layer.ids, "every n-th channel is written")
    names = [f"d{k}" for k in range(len(x.shape))]
    own = [name if k != axis else "part" for k, name in enumerate(names)]
    left, right = (
        replace(labels, layers=tuple(e for e in labels.layers if axis not in e.axes))
        for labels in (x, part)
    )
    return align(call, [(left, names), (right, own)], names, call.shape, zero=_all_zero(2))
