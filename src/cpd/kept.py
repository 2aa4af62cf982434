"""Kept: what stays of a tensor, as masks over some of its axes, and how masks compose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import PlanMismatch
from .labels import Mask


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays along some axes of a tensor: `mask` has one dimension for each of `axes`."""

    axes: tuple[int, ...]
    mask: Mask

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kept):
            return NotImplemented
        return self.axes == other.axes and np.array_equal(self.mask, other.mask)

    __hash__ = None  # type: ignore[assignment]

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is left of each axis, counted from the outside in."""
        left: Any = self.mask
        sizes = []
        for _ in self.axes:
            sizes.append(int(left.reshape(-1, left.shape[-1]).sum(-1).max(initial=0)))
            left = left.any(-1)
        return tuple(reversed(sizes))


def placed(part: Kept, rank: int) -> Mask:
    """Return a mask with `rank` axes, 1 along those that it does not speak of."""
    shape = [1] * rank
    for axis, size in zip(part.axes, part.mask.shape, strict=True):
        shape[axis] = size
    return part.mask.reshape(shape)


def parts_of(layers: Sequence[tuple[tuple[int, ...], Mask]]) -> tuple[Kept, ...]:
    """Join masks over axes, in increasing order each, into parts with disjoint axes."""
    parts: list[Kept] = []
    for axes, mask in layers:
        touching = [part for part in parts if set(part.axes) & set(axes)]
        parts = [part for part in parts if not set(part.axes) & set(axes)]
        parts.append(_anded([*touching, Kept(axes, mask)]))
    return tuple(sorted((p for p in parts if not p.mask.all()), key=lambda part: part.axes))


def _anded(parts: Sequence[Kept]) -> Kept:
    axes = tuple(sorted({axis for part in parts for axis in part.axes}))
    mask = np.ones((1,) * len(axes), bool)
    for part in parts:
        moved = Kept(tuple(axes.index(axis) for axis in part.axes), part.mask)
        mask = mask & placed(moved, len(axes))
    return Kept(axes, mask)


def composed(
    first: Sequence[Kept], later: Sequence[Kept], shape: Sequence[int]
) -> tuple[Kept, ...]:
    """Each part of the later plan speaks of what the first one left."""
    result = []
    for axes in _spans([*first, *later]):
        span = set(axes)
        whole = Kept(axes, np.ones([shape[axis] for axis in axes], bool))
        mask = _anded([whole, *(p for p in first if set(p.axes) <= span)])
        rest = Kept(axes, np.ones(mask.sizes, bool))
        after = _anded([rest, *(p for p in later if set(p.axes) <= span)])
        joined = mask.mask.copy()
        joined[mask.mask] = after.mask.ravel()
        result.append(Kept(axes, joined))
    return tuple(result)


def beyond(first: Sequence[Kept], total: Sequence[Kept], shape: Sequence[int]) -> tuple[Kept, ...]:
    """The inverse of `composed`: the later plan of the first one and both together."""
    result = []
    for axes in _spans([*first, *total]):
        whole = Kept(axes, np.ones([shape[axis] for axis in axes], bool))
        before = _anded([whole, *(p for p in first if set(p.axes) <= set(axes))])
        after = _anded([whole, *(p for p in total if set(p.axes) <= set(axes))])
        if (after.mask & ~before.mask).any():
            raise PlanMismatch("the further plan keeps what the plan before it has removed")
        left = after.mask[before.mask].reshape(before.sizes)
        if not left.all():
            result.append(Kept(axes, left))
    return tuple(result)


def _spans(parts: Sequence[Kept]) -> list[tuple[int, ...]]:
    """Axes that parts hold jointly."""
    spans: list[set[int]] = []
    for part in parts:
        span = set(part.axes).union(*(s for s in spans if s & set(part.axes)))
        spans = [s for s in spans if not s & span] + [span]
    return [tuple(sorted(span)) for span in spans]
