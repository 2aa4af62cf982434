"""Entries addressed by data: the indexed axes are fixed, all others pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..labels import Labels, Layer
from .base import Call, Zero, align, positive, rule

_DATA = "an index tensor is data"


def _fix(call: Call, x: Labels, axis: int) -> Labels:
    """Freeze every index of an axis, and return the labels without it."""
    call.freeze_indices(x, axis, "indexed by data")
    for layer in x.layers:
        if axis in layer.axes:
            call.freeze(layer.ids, "indexed by data")
    return replace(x, layers=tuple(e for e in x.layers if axis not in e.axes))


@rule("index")
def index(call: Call) -> Labels:
    """x[i, :, j]: the indexed axes are fixed, the others move on."""
    return _picked(call, call.args["self"], call.args["indices"], call.shape)


def _picked(
    call: Call, x: Labels, indices: Sequence[Labels | None], shape: tuple[int, ...]
) -> Labels:
    used = [k for k, i in enumerate(indices) if i is not None]
    found = [i for i in indices if i is not None]
    for axis in used:
        x = _fix(call, x, axis)
    for tensor in found:
        call.freeze_all(tensor, _DATA)
    width = max(len(tensor.shape) for tensor in found)
    together = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if together else 0
    rest = [k for k in range(len(x.shape)) if k not in used]
    moved = {old: (new if new < at else new + width) for new, old in enumerate(rest)}
    layers = tuple(Layer(tuple(moved[a] for a in e.axes), e.ids, e.zero) for e in x.layers)
    return Labels(shape, layers)


@rule("index_put")
def index_put(call: Call) -> Labels:
    """x with x[i, :, j] = values: the indexed axes are fixed, all others unite with the values'."""
    x, values, indices = call.args["self"], call.args["values"], call.args["indices"]
    used = [k for k, i in enumerate(indices) if i is not None]
    if any(len(indices[k].shape) != len(indices[used[0]].shape) for k in used):
        for tensor in (x, values, *(indices[k] for k in used)):
            call.freeze_all(tensor, _DATA)
        return Labels(call.shape)
    common = list(indices[used[0]].shape)
    first = used[0] if used == list(range(used[0], used[0] + len(used))) else 0
    rest = [k for k in range(len(x.shape)) if k not in used]
    before = [k for k in rest if k < first]
    names = [f"d{k}" for k in range(len(x.shape))]
    wanted = [names[k] for k in before] + [f"i{k}" for k in range(len(common))]
    wanted += [names[k] for k in rest if k not in before]
    for axis in used:
        x = _fix(call, x, axis)
        call.freeze_all(indices[axis], _DATA)
    for axis in range(len(common)):
        at = len(values.shape) - (len(wanted) - len(before) - axis)
        if 0 <= at < len(values.shape):
            values = _fix(call, values, at)
    given = (values, wanted[len(wanted) - len(values.shape) :])
    return align(call, [(x, names), given], names, call.shape, zero=_both)


def _both(flags: dict[int, bool]) -> bool:
    return flags.get(0, False) and flags.get(1, False)


@rule("index_select", "index_copy", "index_add", "index_fill")
def index_select(call: Call) -> Labels:
    """Entries of one axis picked or written by data: that axis is fixed."""
    x = call.args["self"]
    axis = positive(call.args["dim"], len(x.shape))
    call.freeze_all(call.args["index"], _DATA)
    x = _fix(call, x, axis)
    source = call.args.get("source")
    if source is None:
        filled = call.op == "index_fill"
        layers = tuple(replace(e, zero=e.zero and not filled) for e in x.layers)
        return Labels(call.shape, layers)
    source = _fix(call, source, axis)
    names = [f"d{k}" for k in range(len(x.shape))]
    own = [f"i{k}" if k == axis else name for k, name in enumerate(names)]
    return align(call, [(x, names), (source, own)], names, call.shape, zero=_both)


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce")
def gather(call: Call) -> Labels:
    """y[i, j] = x[index[i, j], j], or the write the other way: axis `dim` is fixed, the others
    unite with those of the index.
    """
    x = call.args["self"]
    rank = len(x.shape)
    axis = positive(call.args["dim"], rank) if call.args.get("dim") is not None else None
    places = call.args["index"] if "index" in call.args else call.args["indices"]
    others = [places, *(t for t in (call.args.get("src"),) if isinstance(t, Labels))]
    if axis is None or any(len(t.shape) != rank for t in others):
        for tensor in (x, *others):
            call.freeze_all(tensor, _DATA)
        return Labels(call.shape)
    names = [f"d{k}" for k in range(rank)]
    operands = []
    for number, tensor in enumerate((x, *others)):
        tensor = _fix(call, tensor, axis)
        for k in range(rank):
            if k != axis and tensor.shape[k] != x.shape[k]:  # a part of the axis is addressed
                tensor, x = _fix(call, tensor, k), _fix(call, x, k)
        own = [n if tensor.shape[k] == x.shape[k] else f"{n}_{number}" for k, n in enumerate(names)]
        own[axis] = f"i{number}"
        operands.append((tensor, own))
    operands[0] = (_fix(call, x, axis), operands[0][1])
    reads = call.op in ("gather", "take_along_dim")
    out = [f"i{int(reads)}" if k == axis else n for k, n in enumerate(names)]
    zero = (lambda flags: flags.get(0, False)) if reads else _written(call)
    return align(call, operands, out, call.shape, zero=zero)


def _written(call: Call) -> Zero:
    """What is written keeps dead channels at zero where it is zero there itself."""
    if isinstance(call.args.get("src"), Labels):
        return lambda flags: flags.get(0, False) and flags.get(2, False)
    return lambda flags: flags.get(0, False) and call.args.get("value") == 0


@rule("embedding")
def embedding(call: Call) -> Labels:
    """Rows of a table by index: the table's rows are fixed, its columns move on."""
    return _looked_up(call, len(call.shape))


@rule("embedding_bag", "_embedding_bag")
def embedding_bag(call: Call) -> list[Labels]:
    """Sums, means or maxima of rows of a table: as an embedding; the bags are data."""
    for name in ("offsets", "per_sample_weights"):
        if isinstance(call.args.get(name), Labels):
            call.freeze_all(call.args[name], _DATA)
    rest = [Labels(shape) for shape in call.out[1:]]
    return [_looked_up(call, len(call.shape)), *rest]


def _looked_up(call: Call, rank: int) -> Labels:
    w, indices = call.args["weight"], call.args["indices"]
    call.freeze_all(indices, _DATA)
    call.freeze_axis(w, 0, "indexed by data")
    layer = w.owned(1)
    if layer is not None:
        call.channels.use(layer.ids)
    if layer is not None and len(layer.axes) > 1:
        call.freeze(layer.ids, "columns of a table that are coupled to its rows")
        layer = None
    return Labels(call.shape, () if layer is None else (replace(layer, axes=(rank - 1,)),))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(call: Call) -> Labels:
    """y[n, c, p] = x[n, c, near grid[n, p]]: the plane is sampled at places that are data."""
    x, grid = call.args["input"], call.args["grid"]
    for axis in range(2, len(x.shape)):
        x = _fix(call, x, axis)
    grid = _fix(call, grid, len(grid.shape) - 1)
    space = [f"p{k}" for k in range(len(grid.shape) - 2)]
    plane = [f"s{k}" for k in range(len(x.shape) - 2)]
    operands = [(x, ["n", "c", *plane]), (grid, ["n", *space, "xy"])]
    zero = lambda flags: flags.get(0, False)  # noqa: E731 - one line says it
    return align(call, operands, ["n", "c", *space], call.shape, zero=zero)
