"""Moves: operators that carry entries elsewhere without computing. The ids move along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..labels import Labels, Layer, permute, reshape, spread, squeeze_constant
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
    return out


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


@rule("transpose", "t", "swapaxes", "numpy_T", "movedim", "mT", "adjoint", "matrix_H")
def transpose(call: Call) -> Labels:
    """Two axes exchanged."""
    x = call.args["self"]
    order = list(range(len(x.shape)))
    if call.op == "movedim":
        named = torch.empty([k + 1 for k in order], device="meta")
        moved = named.movedim(call.args["source"], call.args["destination"])
        order = [size - 1 for size in moved.shape]
    elif "dim0" in call.args:
        a, b = (positive(call.args[name], len(order)) for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    elif call.op == "numpy_T":
        order.reverse()
    elif len(order) > 1:
        order[-2:] = order[:-3:-1]
    return permute(x, order, call.channels)


@rule("expand", "broadcast_to")
def expand(call: Call) -> Labels:
    """Axes of size 1 repeated, new axes in front: the copies may be fewer where they meet fewer."""
    return _shape_sizes(call, "size", _expanded(call, call.args["self"], call.shape))


@rule("expand_as")
def expand_as(call: Call) -> Labels:
    """Axes of size 1 repeated as often as another tensor is wide."""
    names = [f"d{k}" for k in range(len(call.shape))]
    x, other = call.args["self"], call.args["other"]
    operands = [(x, names[len(names) - len(x.shape) :]), (other, names)]
    return align(call, operands, names, call.shape, zero=lambda flags: flags.get(0, False))


def _expanded(call: Call, x: Labels, shape: tuple[int, ...]) -> Labels:
    """Return the labels after `expand`. Copies have ids of their own where rows are copied (the key
    heads that several query heads read) or nothing; the copies of one channel are that channel.
    """
    offset = len(shape) - len(x.shape)
    layers = [replace(e, axes=tuple(a + offset for a in e.axes)) for e in x.layers]
    if x.uniform:
        return Labels(shape, tuple(layers), uniform=True)
    for axis in range(1, len(shape)):
        if shape[axis] == 1 or (axis >= offset and x.shape[axis - offset] > 1):
            continue
        out = Labels(shape, tuple(layers))
        rows = None if out.owned(axis - 1) else out.at(axis - 1, call.channels)
        if rows is not None:
            ids = call.channels.new(*rows.ids.shape, shape[axis])
            call.channels.unite(call.channels.rows(ids), rows.ids)
            layers.append(Layer((*rows.axes, axis), ids, zero=False))
        elif not any(min(e.axes) < axis for e in layers):
            layers.append(Layer((axis,), call.channels.new(shape[axis]), zero=False))
    return Labels(shape, tuple(layers))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def pad(call: Call) -> Labels:
    """Padded axes are fixed; the others are not touched."""
    x = call.args["self"]
    widths = list(call.args.get("pad") or call.args.get("padding") or ())
    padded = {len(x.shape) - 1 - k // 2 for k, width in enumerate(widths) if width}
    for axis in padded:
        call.freeze_axis(x, axis, "padded")
        call.freeze_indices(x, axis, "padded")
    kept = tuple(e for e in x.layers if not padded & set(e.axes))
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
    "diagonal",
    "tril",
    "triu",
)
def moved(call: Call) -> Labels:
    """Run the operator itself on the ids. A roll over channels depends on their number and fixes
    them.
    """
    x = call.args["self"]
    if any(isinstance(value, Labels) for key, value in call.args.items() if key != "self"):
        call.freeze_all(x, "moved by data")
        return Labels(call.shape)
    if call.op in ("roll", "rot90", "diagonal", "tril", "triu"):
        dims = call.args.get("dims") or range(len(x.shape))
        if call.op == "diagonal":
            dims = (call.args.get("dim1", 0), call.args.get("dim2", 1))
        elif call.op in ("tril", "triu"):
            dims = (-2, -1)
        for axis in (positive(d, len(x.shape)) for d in dims):
            call.freeze_axis(x, axis, "the order of channels matters")
            call.freeze_indices(x, axis, "the order of channels matters")
    if call.op in ("tril", "triu"):
        return x
    return _moved(call, x)


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


def _moved(call: Call, x: Labels) -> Labels:
    layers = []
    for layer in x.layers:
        full = np.broadcast_to(spread(layer, layer.ids, len(x.shape)), x.shape)
        args = {**call.args, "self": torch.from_numpy(np.array(full))}
        result = call.target(**args).numpy()
        part = squeeze_constant(tuple(range(result.ndim)), result, layer.zero)
        if part.axes:
            call.channels.nest(part.ids)
            layers.append(part)
    return Labels(call.shape, tuple(layers), x.uniform)
