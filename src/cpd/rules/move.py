"""Moves: operators that carry entries elsewhere without computing. The ids move along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..labels import Labels, Layer, permute, reshape, spread, squeeze_constant
from ._copies import copied, expanded
from .base import Call, align, positive, rule


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
    x = call.args["self"]
    if call.op == "squeeze" and call.args.get("dim") is None:
        for axis in (k for k, size in enumerate(x.shape) if size > 1):
            call.keep_two(x, axis)
    out = reshape(x, call.shape, call.channels)
    for arg in ("size", "shape"):
        _shape_sizes(call, arg, out)
    return _like(call, out) if call.op.endswith("_as") else out


def _like(call: Call, out: Labels) -> Labels:
    """The shape is that of another tensor, whatever that becomes: both keep the same channels."""
    names = [f"d{k}" for k in range(len(call.shape))]
    operands = [(out, names), (call.args["other"], names)]
    return align(call, operands, names, call.shape, zero=lambda flags: flags.get(0, False))


@rule("unflatten")
def unflatten(call: Call) -> Labels:
    """One axis as several."""
    out = reshape(call.args["self"], call.shape, call.channels)
    first = positive(call.args["dim"], len(call.args["self"].shape))
    for index, old in enumerate(call.args["sizes"]):
        call.size("sizes", index, int(old), out, first + index)
    return out


@rule("permute")
def permute_(call: Call) -> Labels:
    """Axes in another order."""
    x = call.args["self"]
    return permute(x, [positive(d, len(x.shape)) for d in call.args["dims"]], call.channels)


@rule("transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis")
@rule("numpy_T", "mT", "mH", "adjoint", "matrix_H")
def transpose(call: Call) -> Labels:
    """Two axes exchanged."""
    x = call.args["self"]
    order = list(range(len(x.shape)))
    if call.op in ("movedim", "moveaxis"):
        named = torch.empty([k + 1 for k in order], device="meta")
        moved = named.movedim(call.args["source"], call.args["destination"])
        order = [size - 1 for size in moved.shape]
    elif "dim0" in call.args or "axis0" in call.args:
        names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
        a, b = (positive(call.args[name], len(order)) for name in names)
        order[a], order[b] = order[b], order[a]
    elif call.op == "numpy_T":
        order.reverse()
    elif len(order) > 1:
        order[-2:] = order[:-3:-1]
    return permute(x, order, call.channels)


@rule("expand", "broadcast_to")
def expand(call: Call) -> Labels:
    """Axes of size 1 repeated, new axes in front: the copies may be fewer where they meet fewer."""
    return _shape_sizes(call, "size", expanded(call, call.args["self"], call.shape))


@rule("expand_as")
def expand_as(call: Call) -> Labels:
    """Axes of size 1 repeated as often as another tensor is wide."""
    names = [f"d{k}" for k in range(len(call.shape))]
    x, other = call.args["self"], call.args["other"]
    operands = [(x, names[len(names) - len(x.shape) :]), (other, names)]
    return align(call, operands, names, call.shape, zero=lambda flags: flags.get(0, False))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def pad(call: Call) -> Labels:
    """Padded axes are fixed, the others are not touched. Channels padded by a constant stay free
    between the fixed ones; those of heads stay, but heads may go.
    """
    x = call.args["self"]
    widths = list(call.args.get("pad") or call.args.get("padding") or ())
    ends = {len(x.shape) - 1 - k // 2: (widths[k], widths[k + 1]) for k in range(0, len(widths), 2)}
    constant = call.op == "constant_pad_nd" or call.args.get("mode", "constant") == "constant"
    zero = call.args.get("value") in (None, 0, 0.0)
    kept = []
    for layer in x.layers:
        padded = {axis for axis in layer.axes if any(ends.get(axis, ()))}
        if padded == {layer.owner} == set(layer.axes) and constant and min(ends[layer.owner]) >= 0:
            sides = [call.channels.new(width) for width in ends[layer.owner]]
            for side in sides:
                call.freeze(side, "padded")
            ids = np.concatenate([sides[0], layer.ids, sides[1]])
            kept.append(replace(layer, ids=ids))
        elif padded == {layer.owner} and constant and min(ends[layer.owner]) >= 0:
            call.channels.freeze_inner(layer.ids, "padded")
            sides = [layer.ids[..., :1].repeat(n, -1) for n in ends[layer.owner]]
            ids = np.concatenate([sides[0], layer.ids, sides[1]], -1)
            kept.append(replace(layer, ids=ids, zero=layer.zero and zero))
        elif padded:
            call.freeze(layer.ids, "padded")
        else:
            kept.append(replace(layer, zero=layer.zero and zero))
    return Labels(call.shape, tuple(kept))


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


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Labels:
    """(g c) -> (c g): each group keeps the same channels."""
    x, groups = call.args["self"], call.args["groups"]
    n, c, *space = x.shape
    parts = reshape(x, (n, groups, c // groups, *space), call.channels)
    call.size("groups", None, groups, parts, 1)
    order = [0, 2, 1, *range(3, len(parts.shape))]
    return reshape(permute(parts, order, call.channels), call.shape, call.channels)


@rule("flip", "fliplr", "flipud")
def flip(call: Call) -> Labels:
    """Entries in reverse order."""
    return _moved(call, call.args["self"])


@rule("repeat", "tile")
def repeat(call: Call) -> Labels:
    """Whole axes again and again. Copies of an axis of size 1 are as those of `expand`."""
    x = call.args["self"]
    arg = "repeats" if "repeats" in call.args else "dims"
    times = list(call.args[arg])
    times = [1] * (len(call.shape) - len(times)) + times
    sizes = [1] * (len(call.shape) - len(x.shape)) + list(x.shape)
    single = [n if size == 1 else size for n, size in zip(times, sizes, strict=True)]
    out = expanded(call, x, tuple(single))
    offset = len(call.shape) - len(call.args[arg])
    for axis in (k for k, size in enumerate(sizes) if size == 1 and k >= offset):
        call.size(arg, axis - offset, times[axis], out, axis)
    again = [1 if size == 1 else n for n, size in zip(times, sizes, strict=True)]
    return _by_layers(call.shape, out, lambda ids: ids.repeat(*again), call)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Labels:
    """Each index of an axis several times: as `unsqueeze`, `expand` and `flatten`."""
    x, times, dim = call.args["self"], call.args["repeats"], call.args.get("dim")
    if isinstance(times, Labels) or dim is None:
        call.freeze_all(x, "repeated as data says" if dim is not None else "repeated as a whole")
        return Labels(call.shape)
    axis = positive(dim, len(x.shape))
    return copied(call, x, axis, times, literal="repeats")


@rule("roll")
def roll(call: Call) -> Labels:
    """Entries moved along an axis, the last ones to the front: those stay, the others are free."""
    x, shifts, dims = call.args["self"], call.args["shifts"], call.args.get("dims") or ()
    total: dict[int, int] = {}
    for shift, dim in zip(shifts, dims, strict=bool(dims)):
        axis = positive(dim, len(x.shape))
        total[axis] = total.get(axis, 0) + shift
    for layer in x.layers:
        moved = [axis for axis in layer.axes if total.get(axis)]
        if not dims or (moved and (len(layer.axes) > 1 or abs(total[moved[0]]) >= layer.ids.size)):
            call.freeze(layer.ids, "the order of channels matters")
        elif moved:
            shift = total[moved[0]]
            first = layer.ids[-shift:] if shift > 0 else layer.ids[:-shift]
            call.freeze(first, "the order of channels matters")
    return _moved(call, x)


@rule("rot90", "diagonal", "tril", "triu")
def placed(call: Call) -> Labels:
    """What an entry becomes depends on its place in two axes, which are fixed."""
    x = call.args["self"]
    dims = call.args.get("dims", (-2, -1))
    if call.op == "diagonal":
        dims = (call.args.get("dim1", 0), call.args.get("dim2", 1))
    for axis in (positive(d, len(x.shape)) for d in dims):
        for layer in x.layers:
            if axis in layer.axes:
                call.freeze(layer.ids, "the order of channels matters")
    return x if call.op in ("tril", "triu") else _moved(call, x)


@rule("unfold")
def unfold(call: Call) -> Labels:
    """Windows of one axis, which is fixed; they become the last axis."""
    x = call.args["self"]
    axis = positive(call.args["dimension"], len(x.shape))
    for layer in x.layers:
        if axis in layer.axes:
            call.freeze(layer.ids, "unfolded")
    return Labels(call.shape, tuple(e for e in x.layers if axis not in e.axes))


@rule("meshgrid")
def meshgrid(call: Call) -> list[Labels]:
    """Each tensor along an axis of its own, and as wide as the others along theirs."""
    tensors = call.args["tensors"]
    axes = list(range(len(tensors)))
    if call.args.get("indexing") == "xy" and len(axes) > 1:
        axes[:2] = [1, 0]
    along = [(x, k) for x, k in zip(tensors, axes, strict=True) if len(x.shape) == 1]
    return [
        Labels(
            shape, tuple(Layer((k,), e.ids, e.zero and t is x) for x, k in along for e in x.layers)
        )
        for t, shape in zip(tensors, call.out, strict=True)
    ]


@rule("view_as_complex", "view_as_real")
def view_as_complex(call: Call) -> Labels:
    """The last axis of two, real and imaginary part, taken away or put there."""
    x = call.args["self"]
    if call.op == "view_as_real":
        return Labels(call.shape, x.layers)
    last = len(x.shape) - 1
    call.freeze_axis(x, last, "real and imaginary part")
    layer = x.at(last - 1, call.channels)
    kept = tuple(e for e in x.layers if last not in e.axes)
    if layer is not None and layer not in kept:
        kept = (*kept, layer)
    return Labels(call.shape, kept)


@rule("im2col")
def im2col(call: Call) -> Labels:
    """(c, h, w) -> (c k k, places): the k x k values of one channel go together."""
    x = call.args["self"]
    at = len(x.shape) - 3
    for axis in (at + 1, at + 2):
        call.freeze_axis(x, axis, "unfolded")
        call.freeze_indices(x, axis, "unfolded")
    kept = tuple(e for e in x.layers if max(e.axes) <= at)
    taps = call.shape[at] // x.shape[at]
    y = reshape(Labels((*x.shape[: at + 1], taps), kept), call.shape[: at + 1], call.channels)
    return Labels(call.shape, y.layers)


@rule("col2im")
def col2im(call: Call) -> Labels:
    """(c k k, places) -> (c, h, w): the k x k values of one channel go together."""
    x = call.args["self"]
    at = len(x.shape) - 2
    for layer in (e for e in x.layers if at + 1 in e.axes):
        call.freeze(layer.ids, "folded")
    c = call.shape[at]
    kept = tuple(e for e in x.layers if at + 1 not in e.axes)
    apart = (*x.shape[:at], c, x.shape[at] // c)
    y = reshape(Labels(x.shape[: at + 1], kept), apart, call.channels)
    call.freeze_axis(y, at + 1, "places of one channel")
    layer = y.at(at, call.channels)
    rest = tuple(e for e in y.layers if not set(e.axes) & {at, at + 1})
    return Labels(call.shape, rest if layer is None else (*rest, layer))


def _moved(call: Call, x: Labels) -> Labels:
    def run(ids: torch.Tensor) -> torch.Tensor:
        return call.target(**{**call.args, "self": ids})

    return _by_layers(call.shape, x, run, call)


def _by_layers(
    shape: tuple[int, ...], x: Labels, run: Callable[[torch.Tensor], torch.Tensor], call: Call
) -> Labels:
    """Run a move on the ids of each layer."""
    layers = []
    for layer in x.layers:
        full = np.broadcast_to(spread(layer, layer.ids, len(x.shape)), x.shape)
        result = run(torch.from_numpy(np.array(full))).numpy()
        part = squeeze_constant(tuple(range(result.ndim)), result, layer.zero)
        if part.axes:
            call.channels.nest(part.ids)
            layers.append(part)
    return Labels(shape, tuple(layers), x.uniform)
