"""Labels: the channel ids that one tensor carries along its axes.

A `Layer` is an array of ids over one or more axes of a tensor, named from the outside in. The last
of them *owns* the layer: `Layer(axes=(1, 3), ids=[heads, dims])` says which head dims are alive in
which head, and its outer axis is alive through the block ids of its rows. An axis in no layer has a
size that nothing changes. `Labels` are all layers of a tensor: at most one is owned by each axis.

NumPy only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .channels import Channels, Ids

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Layer:
    """Ids over `axes` (outside in). `zero`: entries of dead channels are exactly 0 once masked."""

    axes: tuple[int, ...]
    ids: Ids
    zero: bool = True

    @property
    def owner(self) -> int:
        """The innermost axis."""
        return self.axes[-1]


@dataclass(frozen=True)
class Labels:
    """The layers of a tensor of `shape`. `uniform`: the same value everywhere, so that any of its
    indices may go for any other.
    """

    shape: tuple[int, ...]
    layers: tuple[Layer, ...] = ()
    uniform: bool = False

    def owned(self, axis: int) -> Layer | None:
        """Return the layer owned by `axis`."""
        return next((layer for layer in self.layers if layer.owner == axis), None)

    def at(self, axis: int, channels: Channels) -> Layer | None:
        """Return the ids along `axis`: its own layer, or the blocks of a layer that it is an outer
        axis of.
        """
        found = self.owned(axis)
        if found is not None:
            return found
        blocks = (self.at_layer(layer, axis, channels) for layer in self.layers)
        return next((layer for layer in blocks if layer is not None), None)

    def at_layer(self, layer: Layer, axis: int, channels: Channels) -> Layer | None:
        """Return the ids along `axis` by one layer: its own, or the blocks of its rows."""
        if axis not in layer.axes:
            return None
        ids = layer.ids
        for _ in range(len(layer.axes) - 1 - layer.axes.index(axis)):
            ids = channels.rows(ids)
        return Layer(layer.axes[: ids.ndim], ids, layer.zero)

    def governing(self, axis: int) -> Layer | None:
        """Return the layer that says how many indices of `axis` are left: its own where it has
        one, else one that it is an outer axis of.
        """
        return self.owned(axis) or next((x for x in self.layers if axis in x.axes), None)

    def carries(self, axis: int) -> bool:
        """Say whether anything may change the size of `axis`."""
        return any(axis in layer.axes for layer in self.layers)

    def all_ids(self) -> Ids:
        """Return every id in these labels, flat."""
        parts = [layer.ids.ravel() for layer in self.layers]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def alive_mask(labels: Labels, alive: Mask) -> Mask:
    """Return which entries survive: the tensor's shape, 1 on axes that nothing varies along."""
    mask: Mask = np.ones((1,) * len(labels.shape), bool)
    for layer in labels.layers:
        mask = mask & spread(layer, alive[layer.ids], len(labels.shape))
    return mask


def spread(layer: Layer, values: NDArray[Any], rank: int) -> NDArray[Any]:
    """Place an array over a layer's axes into `rank` axes, 1 elsewhere."""
    order = np.argsort(layer.axes)
    shape = [1] * rank
    for axis, size in zip(layer.axes, values.shape, strict=True):
        shape[axis] = size
    return values.transpose(order).reshape(shape)


def axis_size(labels: Labels, axis: int, alive: Mask) -> int:
    """Return how many indices of `axis` are left, counted from the outside in."""
    layer = labels.governing(axis)
    if layer is None:
        return labels.shape[axis]
    return layer_size(layer, layer.axes.index(axis), alive)


def layer_size(layer: Layer, position: int, alive: Mask) -> int:
    """Return the live size of the `position`-th axis of a layer: that of its first live row."""
    return live_size(alive[layer.ids], position)


def live_size(left: Any, position: int) -> int:
    """Return the size of the `position`-th axis of what is left of ids, shape of the ids."""
    while left.ndim > position + 1:
        left = left.any(-1)
    rows = left.reshape(-1, left.shape[-1]).sum(-1)
    return int(rows.max(initial=0))


def new_shape(labels: Labels, alive: Mask) -> tuple[int, ...]:
    """Return the shape that is left."""
    return tuple(axis_size(labels, axis, alive) for axis in range(len(labels.shape)))


def permute(labels: Labels, order: Sequence[int], channels: Channels) -> Labels:
    """Return the labels after `tensor.permute(order)`.

    Rows may keep different columns only while the row axis stays outside. Where the permutation
    puts a column axis outside its rows, the rows are tied to the same columns.
    """
    where = {old: new for new, old in enumerate(order)}
    layers = [place(x, tuple(where[axis] for axis in x.axes), channels) for x in labels.layers]
    shape = tuple(labels.shape[axis] for axis in order)
    return replace(labels, shape=shape, layers=tuple(layers))


def place(layer: Layer, axes: tuple[int, ...], channels: Channels) -> Layer:
    """Return the layer with its axes renamed to `axes`, tied where that changes their order."""
    order = np.argsort(axes)
    moved = Layer(tuple(sorted(axes)), layer.ids.transpose(order), layer.zero)
    prefix = len(axes)
    while prefix and order[prefix - 1] == prefix - 1:
        prefix -= 1
    if prefix == 0:
        return moved
    blocks = layer.ids
    while blocks.ndim > prefix:
        blocks = channels.rows(blocks)
    if prefix == 2:
        channels.tie(blocks)
    else:
        channels.freeze(blocks, "three or more coupled axes change their order")
    return moved


def factor_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest runs of old and new axes with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        size_left = size_right = 1
        while True:
            if size_left <= size_right and i < len(old) and (not left or size_left < size_right):
                left.append(i)
                size_left *= old[i]
                i += 1
            elif j < len(new) and (not right or size_right < size_left):
                right.append(j)
                size_right *= new[j]
                j += 1
            else:
                break
        groups.append((left, right))
    return groups


def reshape(labels: Labels, shape: Sequence[int], channels: Channels) -> Labels:
    """Return the labels after `tensor.reshape(shape)`; axes that split become folds."""
    if 0 in labels.shape:
        return Labels(tuple(shape))
    groups = factor_groups(labels.shape, shape)
    labels = _merge_owners(labels, groups, channels)
    layers = []
    for layer in labels.layers:
        moved = _reshaped(layer, labels.shape, shape, groups)
        channels.nest(moved.ids)
        if moved.axes:
            layers.append(moved)
    return Labels(tuple(shape), tuple(layers), labels.uniform)


def _reshaped(
    layer: Layer,
    old: Sequence[int],
    new: Sequence[int],
    groups: list[tuple[list[int], list[int]]],
) -> Layer:
    touched = [group for group in groups if set(group[0]) & set(layer.axes)]
    old_axes = [axis for group in touched for axis in group[0]]
    new_axes = [axis for group in touched for axis in group[1]]
    shape = [old[axis] if axis in layer.axes else 1 for axis in old_axes]
    ids = np.broadcast_to(layer.ids.reshape(shape), [old[axis] for axis in old_axes])
    ids = ids.reshape([new[axis] for axis in new_axes])
    return squeeze_constant(tuple(new_axes), ids, layer.zero)


def squeeze_constant(axes: tuple[int, ...], ids: Ids, zero: bool = True) -> Layer:
    """Drop the axes along which the ids do not vary."""
    if not ids.size:
        return Layer((), ids.reshape(0), zero)  # an empty slice carries nothing
    keep = []
    for position, axis in enumerate(axes):
        first = ids.take([0], axis=position)
        if ids.shape[position] > 1 and not (ids == first).all():
            keep.append(axis)
        else:
            ids = first
    return Layer(tuple(keep), ids.reshape([size for size in ids.shape if size > 1]), zero)


def _merge_owners(
    labels: Labels,
    groups: list[tuple[list[int], list[int]]],
    channels: Channels,
) -> Labels:
    """Make one layer of the layers owned inside each run of axes that a reshape joins."""
    for old_axes, _ in groups:
        if len(old_axes) > 1:
            labels = _absorb(labels, old_axes, channels)
        owners = [axis for axis in old_axes if labels.owned(axis) is not None]
        while len(owners) > 1:
            inner = labels.owned(owners.pop())
            outer = labels.owned(owners[-1])
            assert inner is not None
            assert outer is not None
            merged = _joined(outer, inner, channels)
            rest = tuple(x for x in labels.layers if x is not inner and x is not outer)
            labels = replace(labels, layers=(*rest, merged))
            owners = [axis for axis in old_axes if labels.owned(axis) is not None]
    return labels


def _absorb(labels: Labels, axes: Sequence[int], channels: Channels) -> Labels:
    """Where a permutation left two layers with one owner, let the wider one say what both do.

    An index of the narrower layer is alive exactly when its row of the wider one is.
    """
    for axis in axes:
        same = sorted((x for x in labels.layers if x.owner == axis), key=lambda x: len(x.axes))
        for narrow, wide in itertools.pairwise(same):
            _absorb_one(narrow, wide, channels)
            rest = tuple(x for x in labels.layers if x is not narrow)
            labels = replace(labels, layers=rest)
    return labels


def _absorb_one(narrow: Layer, wide: Layer, channels: Channels) -> None:
    if not set(narrow.axes) <= set(wide.axes):
        why = "two axes coupled to a third are merged"
        channels.freeze(narrow.ids, why)
        channels.freeze(wide.ids, why)
        return
    first = [wide.axes.index(x) for x in narrow.axes]
    ids = wide.ids.transpose([*first, *(k for k in range(wide.ids.ndim) if k not in first)])
    while ids.ndim > len(first):
        ids = channels.rows(ids)
    channels.unite(ids, narrow.ids)


def _joined(outer: Layer, inner: Layer, channels: Channels) -> Layer:
    if outer.owner in inner.axes:
        copied = _copied_rows(outer, inner, channels)
        if copied is not None:
            return replace(inner, ids=copied, zero=inner.zero or outer.zero)
        ids = inner.ids
        while ids.ndim > inner.axes.index(outer.owner) + 1:
            ids = channels.rows(ids)
        if ids.shape == outer.ids.shape:
            channels.unite(ids, outer.ids)
        else:
            channels.freeze(outer.ids, "coupled axes of different depth are merged")
            channels.freeze(inner.ids, "coupled axes of different depth are merged")
        return replace(inner, zero=inner.zero or outer.zero)
    if set(outer.axes) & set(inner.axes):
        sizes = dict(zip(outer.axes + inner.axes, outer.ids.shape + inner.ids.shape, strict=True))
        axes = tuple(sorted(sizes))
        ids = channels.new(*(sizes[axis] for axis in axes))
        for frozen in (inner.ids, outer.ids, ids):
            channels.freeze(frozen, "two axes coupled to a third are merged")
        return Layer(axes, ids, outer.zero or inner.zero)
    axes = outer.axes + inner.axes
    ids = channels.product(outer.ids, inner.ids).reshape(outer.ids.shape + inner.ids.shape)
    order = np.argsort(axes)
    if list(order) != sorted(order):
        channels.freeze(ids, "interleaved coupled axes are merged")
    return Layer(tuple(sorted(axes)), ids.transpose(order), outer.zero or inner.zero)


def _copied_rows(outer: Layer, inner: Layer, channels: Channels) -> Ids | None:
    """Give the copies of one row ids of their own, where `outer` says which copies are there.

    Entry [i, j] is alive exactly when copy i and column j of the row that it is a copy of are.
    """
    if outer.axes != inner.axes[:-1]:
        return None
    rows = inner.ids.reshape(-1, inner.ids.shape[-1])
    copies, owners = equal_rows(rows), outer.ids.ravel()
    if len(copies) == len(rows) or any(len(np.unique(owners[c])) < len(c) for c in copies):
        return None
    ids = np.empty_like(rows)
    for same in copies:
        ids[same] = channels.product(owners[same], rows[same[0]])
    return ids.reshape(inner.ids.shape)


def equal_rows(rows: Ids) -> list[Ids]:
    """Return the numbers of the rows, those that are equal together, in order."""
    found: dict[bytes, list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.tobytes(), []).append(number)
    return [np.array(same, np.int64) for same in found.values()]
