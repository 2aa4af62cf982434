"""Moves: operators that carry entries elsewhere without computing. The ids move along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..labels import Labels, Layer, permute, reshape, spread, squeeze_constant
from .base import Call, align, rule


def _axis(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


def _shape_sizes(call: Call, arg: str, out: Labels) -> Labels:
    """Record the literal sizes of a shape argument (aligned to the right of the output)."""
    literals = call.args.get(arg)
    if isinstance(literals, Sequence):
        offset = len(out.shape) - len(literals)
        for index, old in enumerate(literals):
            call.size(arg, index, int(old), out, offset + index)
    return out


@rule("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "reshape_as", "view_as")
def view(call: Call) -> Labels:
    """The same entries in row-major order."""
    out = reshape(call.args["self"], call.shape, call.channels)
    for arg in ("size", "shape"):
        _shape_sizes(call, arg, out)
    return out


@rule("unflatten")
def unflatten(call: Call) -> Labels:
    """One axis as several."""
    out = reshape(call.args["self"], call.shape, call.channels)
    first = _axis(call.args["dim"], len(call.args["self"].shape))
    for index, old in enumerate(call.args["sizes"]):
        call.size("sizes", index, int(old), out, first + index)
    return out


@rule("permute")
def permute_(call: Call) -> Labels:
    """Axes in another order."""
    x = call.args["self"]
    return permute(x, [_axis(d, len(x.shape)) for d in call.args["dims"]], call.channels)


@rule("transpose", "t", "swapaxes", "numpy_T", "movedim", "mT", "adjoint", "matrix_H")
def transpose(call: Call) -> Labels:
    """Two axes exchanged."""
    x = call.args["self"]
    order = list(range(len(x.shape)))
    if call.op == "movedim":
        moved = torch.empty(call.args["self"].shape, device="meta")
        order = list(moved.movedim(call.args["source"], call.args["destination"]).dim_order())
    elif "dim0" in call.args:
        a, b = (_axis(call.args[name], len(order)) for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    elif call.op == "numpy_T":
        order.reverse()
    elif len(order) > 1:
        order[-2:] = order[:-3:-1]
    return permute(x, order, call.channels)


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Labels:
    """Axes of size 1 repeated; new axes in front."""
    x = call.args["self"]
    offset = len(call.shape) - len(x.shape)
    layers = tuple(replace(e, axes=tuple(a + offset for a in e.axes)) for e in x.layers)
    out = Labels(call.shape, layers, x.uniform)
    return _shape_sizes(call, "size", out)


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    """Ids of the parts one after the other; all other axes unite."""
    tensors = [x for x in call.args["tensors"] if x.shape != (0,)]
    rank = len(call.shape)
    axis = _axis(call.args.get("dim", 0), rank)
    names = [f"d{k}" for k in range(rank)]
    parts = [
        (x, [n if k != axis else f"part{i}" for k, n in enumerate(names)])
        for i, x in enumerate(tensors)
    ]
    rest = align(
        call,
        [(_without(x, axis), n) for x, n in parts],
        names,
        call.shape,
        zero=_all_zero(len(parts)),
    )
    return _joined(call, tensors, axis, rest)


def _all_zero(count: int):
    return lambda flags: len(flags) == count and all(flags.values())


def _without(labels: Labels, axis: int) -> Labels:
    """Forget the ids along one axis; layers it is an outer axis of keep to it through `cat` itself."""
    return (
        replace(labels, layers=tuple(e for e in labels.layers if axis not in e.axes), uniform=True)
        if (not [e for e in labels.layers if axis not in e.axes])
        else replace(labels, layers=tuple(e for e in labels.layers if axis not in e.axes))
    )


def _joined(call: Call, tensors: list[Labels], axis: int, rest: Labels) -> Labels:
    found = [x.at(axis, call.channels) for x in tensors]
    if not any(found):
        for x in tensors:
            for layer in x.layers:
                if axis in layer.axes:
                    call.freeze(layer.ids, "concatenated along an outer axis")
        return rest
    if any(e is not None and len(e.axes) > 1 for e in found) or any(
        axis in e.axes[:-1] for x in tensors for e in x.layers
    ):
        return _joined_rows(call, tensors, axis, rest)
    ids = []
    for x, layer in zip(tensors, found, strict=True):
        if layer is None:
            part = call.channels.new(x.shape[axis])
            call.freeze(part, "concatenated with channels of fixed number")
        else:
            part = (
                layer.ids
                if layer.ids.shape[0] == x.shape[axis]
                else np.repeat(layer.ids, x.shape[axis])
            )
        ids.append(part)
    zero = all(e.zero for e in found if e is not None)
    layer = Layer((axis,), np.concatenate(ids), zero)
    return replace(rest, layers=(*rest.layers, layer))


def _joined_rows(call: Call, tensors: list[Labels], axis: int, rest: Labels) -> Labels:
    """Concatenate coupled axes: whole rows stay together, the parts keep their widths."""
    for x in tensors:
        for layer in x.layers:
            if axis not in layer.axes:
                continue
            if layer.owner == axis:
                call.channels.freeze_inner(
                    layer.ids, call.reason("concatenated inside coupled rows")
                )
            else:
                call.freeze(layer.ids, "concatenated along an outer axis")
    blocks = [(x.at(axis, call.channels), x) for x in tensors]
    owned = [(e, x) for e, x in blocks if e is not None and e.owner == axis and len(e.axes) > 1]
    outer = [(Layer(e.axes[:-1], call.channels.rows(e.ids), e.zero), x) for e, x in owned]
    if not outer or len({e.axes for e, _ in outer}) > 1:
        for e, _ in outer:
            call.freeze(e.ids, "concatenated inside different rows")
        return rest
    first = outer[0][0]
    for e, _ in outer[1:]:
        call.channels.unite(first.ids, e.ids)
    if len(outer) < len(tensors) or len(first.axes) > 1 or rest.owned(first.owner) is not None:
        call.freeze(first.ids, "concatenated with rows of fixed number")
    return replace(rest, layers=(*rest.layers, replace(first, zero=False)))


@rule("stack")
def stack(call: Call) -> Labels:
    """A new axis; all others unite."""
    rank = len(call.shape)
    axis = _axis(call.args.get("dim", 0), rank)
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
    axis = _axis(call.args.get("dim", 0), len(x.shape))
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
        call.freeze_axis(x, axis, "every n-th channel is taken")
        _freeze_outer(call, x, axis, "every n-th row is taken")
    out = _slice(call, x, axis, start, stop, step)
    _keep_one(call, x, axis, [(0, start), (start, stop), (stop, size)])
    if call.op == "slice":
        _bound(call, "start", start, x, axis)
        if stop < size:
            _bound(call, "end", stop, x, axis)
    return out


def _freeze_outer(call: Call, x: Labels, axis: int, why: str) -> None:
    layer = x.at(axis, call.channels)
    if layer is not None:
        call.freeze(layer.ids, why)


def _bound(call: Call, arg: str, bound: int, x: Labels, axis: int) -> None:
    if bound > 0 and x.carries(axis):
        call.size(arg, None, bound, _slice(call, x, axis, 0, bound), axis)


def _keep_one(call: Call, x: Labels, axis: int, runs: Sequence[tuple[int, int]]) -> None:
    """Parts addressed one by one can shrink but never vanish."""
    layer = x.at(axis, call.channels)
    if layer is None:
        return
    for start, stop in runs:
        if stop > start:
            call.channels.keep_one(layer.ids[..., start:stop])


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(call: Call) -> list[Labels]:
    """Parts of one axis. Parts of equal size stay equal, since code often computes them from the
    whole.
    """
    x = call.args["self"]
    axis = _axis(call.args.get("dim", 0), len(x.shape))
    lengths = [shape[axis] for shape in call.out]
    ends = np.cumsum([0, *lengths])
    runs = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    parts = [_slice(call, x, axis, start, stop) for start, stop in runs]
    _keep_one(call, x, axis, runs)
    if x.carries(axis) and call.op != "split_with_sizes":
        if len(set(lengths)) == 1:
            _balance(call, x, axis, len(lengths))
        else:
            _freeze_outer(call, x, axis, "split in parts of unequal size")
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
    for part in np.moveaxis(ids, -2, 0):
        call.channels.keep_one(part)


@rule("select")
def select(call: Call) -> Labels:
    """One index of an axis. Rows addressed one by one can shrink but never vanish."""
    x = call.args["self"]
    axis = _axis(call.args["dim"], len(x.shape))
    return _selected(call, x, axis, call.args["index"] % x.shape[axis])


@rule("unbind")
def unbind(call: Call) -> list[Labels]:
    """All indices of an axis, one by one."""
    x = call.args["self"]
    axis = _axis(call.args.get("dim", 0), len(x.shape))
    return [_selected(call, x, axis, k) for k in range(x.shape[axis])]


def _selected(call: Call, x: Labels, axis: int, index: int) -> Labels:
    layer = x.at(axis, call.channels)
    if layer is not None:
        call.freeze(layer.ids, "rows are addressed one by one")
    part = _slice(call, x, axis, index, index + 1)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return reshape(part, shape, call.channels)


@rule("index")
def index(call: Call) -> Labels:
    """Indexing by data: the indexed axes are fixed, the others move on."""
    x, indices = call.args["self"], call.args["indices"]
    used = [k for k, i in enumerate(indices) if i is not None]
    for axis in used:
        call.freeze_axis(x, axis, "indexed by data")
        _freeze_outer(call, x, axis, "indexed by data")
        call.freeze_all(indices[axis], "an index tensor is data")
    width = max(len(indices[axis].shape) for axis in used)
    together = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if together else 0
    rest = [k for k in range(len(x.shape)) if k not in used]
    moved = {old: (new if new < at else new + width) for new, old in enumerate(rest)}
    layers = tuple(
        Layer(tuple(moved[a] for a in e.axes), e.ids, e.zero)
        for e in x.layers
        if not set(e.axes) & set(used)
    )
    for layer in x.layers:
        if set(layer.axes) & set(used) and layer.owner not in used:
            call.freeze(layer.ids, "indexed by data")
    return Labels(call.shape, layers)


@rule("embedding")
def embedding(call: Call) -> Labels:
    """Rows of a table by index: the table's rows are fixed, its columns move on."""
    w, indices = call.args["weight"], call.args["indices"]
    call.freeze_all(indices, "an index tensor is data")
    call.freeze_axis(w, 0, "indexed by data")
    layer = w.owned(1)
    rank = len(call.shape)
    return Labels(call.shape, () if layer is None else (replace(layer, axes=(rank - 1,)),))


@rule("index_select")
def index_select(call: Call) -> Labels:
    """Entries of one axis by data."""
    x = call.args["self"]
    axis = _axis(call.args["dim"], len(x.shape))
    call.freeze_axis(x, axis, "indexed by data")
    _freeze_outer(call, x, axis, "indexed by data")
    call.freeze_all(call.args["index"], "an index tensor is data")
    return Labels(call.shape, tuple(e for e in x.layers if axis not in e.axes))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def pad(call: Call) -> Labels:
    """Padded axes are fixed; the others are not touched."""
    x = call.args["self"]
    for axis, (old, new) in enumerate(zip(x.shape, call.shape, strict=True)):
        if old != new:
            call.freeze_axis(x, axis, "padded")
            _freeze_outer(call, x, axis, "padded")
    kept = tuple(e for e in x.layers if all(x.shape[a] == call.shape[a] for a in e.axes))
    zero = call.args.get("value") in (None, 0, 0.0)
    return Labels(call.shape, tuple(replace(e, zero=e.zero and zero) for e in kept))


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Labels:
    """(c r r, h, w) -> (c, h r, w r): the r x r channels of one output channel go together."""
    x, r = call.args["self"], call.args["upscale_factor"]
    *lead, c, h, w = x.shape
    k = len(lead)
    y = reshape(x, (*lead, c // (r * r), r, r, h, w), call.channels)
    for axis in (k + 2, k + 1):
        call.freeze_axis(y, axis, "sub-pixels of one channel")
    y = reshape(y, (*lead, c // (r * r), r * r, h, w), call.channels)
    layer = y.at(k, call.channels)
    kept = tuple(e for e in y.layers if not set(e.axes) & {k, k + 1, k + 2, k + 3})
    return Labels(call.shape, kept if layer is None else (*kept, layer))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Labels:
    """(c, h r, w r) -> (c r r, h, w)."""
    return _moved(call, call.args["self"])


@rule(
    "flip",
    "repeat",
    "tile",
    "repeat_interleave",
    "roll",
    "rot90",
    "im2col",
    "diagonal",
    "tril",
    "triu",
)
def moved(call: Call) -> Labels:
    """Run the operator itself on the ids. A roll over channels depends on their number and fixes
    them.
    """
    x = call.args["self"]
    if call.op in ("roll", "rot90", "diagonal", "im2col", "tril", "triu"):
        dims = call.args.get("dims") or range(len(x.shape))
        if call.op in ("diagonal", "tril", "triu"):
            dims = (-2, -1)
        for axis in (_axis(d, len(x.shape)) for d in dims):
            if x.carries(axis) and (call.op != "im2col" or axis != len(x.shape) - 3):
                call.freeze_axis(x, axis, "the order of channels matters")
                _freeze_outer(call, x, axis, "the order of channels matters")
    if call.op in ("tril", "triu"):
        return x
    return _moved(call, x)


def _moved(call: Call, x: Labels) -> Labels:
    layers = []
    for layer in x.layers:
        full = np.broadcast_to(spread(layer, layer.ids, len(x.shape)), x.shape)
        args = {**call.args, "self": torch.from_numpy(np.ascontiguousarray(full))}
        result = call.target(**args).numpy()
        part = squeeze_constant(tuple(range(result.ndim)), result, layer.zero)
        if part.axes:
            call.channels.nest(part.ids)
            layers.append(part)
    return Labels(call.shape, tuple(layers), x.uniform)
