"""Copies: what repeats rows. Shared by the moves and by attention with fewer keys than queries."""

from __future__ import annotations

from dataclasses import replace

from ..labels import Labels, Layer, reshape
from .base import Call


def expanded(call: Call, x: Labels, shape: tuple[int, ...]) -> Labels:
    """Return the labels after `expand`. Copies have ids of their own where rows are copied (the key
    heads that several query heads read) or nothing; the copies of one channel are that channel.
    """
    offset = len(shape) - len(x.shape)
    layers = [replace(e, axes=tuple(a + offset for a in e.axes)) for e in x.layers]
    for axis in range(1, len(shape)):
        if shape[axis] == 1 or (axis >= offset and x.shape[axis - offset] > 1):
            continue
        out = Labels(shape, tuple(layers))
        own = out.owned(axis - 1)
        of_rows = any(axis - 1 in e.axes[:-1] for e in layers)  # what it owns then counts rows
        rows = out.at(axis - 1, call.channels) if own is None or of_rows else None
        if rows is not None:
            ids = call.channels.new(*rows.ids.shape, shape[axis])
            call.channels.unite(call.channels.rows(ids), rows.ids)
            layers = [e for e in layers if e is not own]  # the copies say it
            layers.append(Layer((*rows.axes, axis), ids, zero=False))
        elif not any(min(e.axes) < axis for e in layers):
            layers.append(Layer((axis,), call.channels.new(shape[axis]), zero=False))
    return Labels(shape, tuple(layers), x.uniform)


def copied(call: Call, x: Labels, axis: int, times: int, *, literal: str = "") -> Labels:
    """Return the labels after each index of an axis came `times` times: `unsqueeze`, `expand` and
    `flatten`. `literal`: the argument that holds `times`.
    """
    apart = (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :])
    copies = (*apart[: axis + 1], times, *apart[axis + 2 :])
    out = expanded(call, reshape(x, apart, call.channels), copies)
    if literal:
        call.size(literal, None, times, out, axis + 1)
    merged = (*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :])
    return reshape(out, merged, call.channels)
