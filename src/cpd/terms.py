"""Costs that are counted: items that are products of axis sizes, and how they add up.

`Terms` are sums (MACs, parameters), `liveness.Peak` is the largest of many sums (memory). All obey
one interface, so that `Tally` can follow any of them through single changes without counting anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .channels import Ids
from .labels import Labels, Mask, layer_size, live_size
from .rules import Factor

Values = NDArray[Any]
Item = tuple[int, tuple[Factor, ...]]


class Cost:
    """Items, each a coefficient x a product of live axis sizes; `total` says what they come to.

    `factors` are the distinct axes; row i of `rows` names those of item i, filled up with the
    number of factors, which stands for 1.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self.factors: list[Factor] = []
        index: dict[tuple[int, int], int] = {}
        keys: list[tuple[int, ...]] = []
        times: list[int] = []
        for coefficient, factors in items:
            key = []
            for factor in factors:
                name = (id(factor.layer.ids), factor.position)
                if name not in index:
                    index[name] = len(self.factors)
                    self.factors.append(factor)
                key.append(index[name])
            keys.append(tuple(sorted(key)))
            times.append(coefficient)
        self._set(keys, times)

    def _set(self, keys: Sequence[tuple[int, ...]], times: Sequence[int]) -> None:
        self.times = np.array(times, np.int64)
        self.rows = np.full((len(keys), max(map(len, keys), default=0)), len(self.factors))
        for row, key in zip(self.rows, keys, strict=True):
            row[: len(key)] = key

    def values(self, sizes: Ids, items: Any = slice(None)) -> Values:
        """Return what items come to, shape (items,), with these sizes of the factors."""
        found: Values = np.append(sizes, 1)[self.rows[items]].prod(1) * self.times[items]
        return found

    def total(self, values: Values) -> int:
        """Return the cost of the values of all items."""
        return int(values.sum())

    def sizes(self, alive_ids: Mask) -> Ids:
        """Return the size of each factor with these ids alive."""
        found = [layer_size(f.layer, f.position, alive_ids) for f in self.factors]
        return np.array(found, np.int64)

    def count(self, alive_ids: Mask) -> int:
        """Return the cost with these ids alive (exact)."""
        return self.total(self.values(self.sizes(alive_ids)))


class Terms(Cost):
    """A sum over items, divided by `per`."""

    def __init__(self, items: Iterable[Item], per: int = 1) -> None:
        super().__init__(items)
        self.per = per
        merged: dict[tuple[int, ...], int] = {}
        for row, times in zip(self.rows.tolist(), self.times.tolist(), strict=True):
            key = tuple(k for k in row if k < len(self.factors))
            merged[key] = merged.get(key, 0) + times
        self._set(list(merged), list(merged.values()))

    def total(self, values: Values) -> int:
        """Return the sum, divided and rounded down."""
        return int(values.sum()) // self.per

    def without_each(self, owner: Ids, count: int) -> list[int]:
        """Return the cost without the ids of group k, for each k of `count` groups.

        `owner`: the group of each id, or -1. Linear in the network: of each cost only the terms
        change that a group has a part in.
        """
        sizes = np.array([f.layer.ids.shape[f.position] for f in self.factors], np.int64)
        parts = [np.unique(owner[f.layer.ids]) for f in self.factors]
        touched: list[dict[int, None]] = [{} for _ in range(count)]
        for number, row in enumerate(self.rows.tolist()):
            mine = (factor for factor in row if factor < len(self.factors))
            for group in {int(k) for factor in mine for k in parts[factor] if k >= 0}:
                touched[group][number] = None
        values = self.values(sizes)
        whole = int(values.sum())
        found = []
        for group, numbers in enumerate(touched):
            items = np.array(list(numbers), np.int64)
            changed = sizes.copy()
            for factor in np.unique(self.rows[items]).tolist():
                if factor < len(self.factors):
                    f = self.factors[factor]
                    changed[factor] = live_size(owner[f.layer.ids] != group, f.position)
            saved = int(values[items].sum() - self.values(changed, items).sum())
            found.append((whole - saved) // self.per)
        return found


def factors_of(labels: Labels, shape: Sequence[int]) -> Item:
    """Return the number of elements of a tensor as an item: fixed sizes x those that change."""
    times, factors = 1, []
    for axis, size in enumerate(shape):
        layer = labels.governing(axis)
        if layer is None:
            times *= size
        else:
            factors.append(Factor(layer, layer.axes.index(axis)))
    return times, tuple(factors)


class Tally:
    """A cost at a point (which classes are alive), and next to it, without counting anew.

    `label`: the class of each id. `now` is the cost at the point.
    """

    def __init__(self, cost: Cost, label: Ids, alive: Mask) -> None:
        self.cost, self.alive = cost, alive.copy()
        self._classes = [label[f.layer.ids] for f in cost.factors]
        flat = [np.unique(classes) for classes in self._classes]
        numbers = [np.full(len(part), k) for k, part in enumerate(flat)]
        empty = [np.empty(0, np.int64)]
        self._pairs = np.concatenate(flat or empty), np.concatenate(numbers or empty)
        self._items: list[list[int]] = [[] for _ in cost.factors]
        for item, row in enumerate(cost.rows.tolist()):
            for factor in {k for k in row if k < len(cost.factors)}:
                self._items[factor].append(item)
        self._sizes = cost.sizes(alive[label])
        self._values = cost.values(self._sizes)
        self.now = cost.total(self._values)

    def at(self, alive: Mask) -> Any:
        """Return the cost at another point."""
        return self.cost.total(self._changed(alive)[1])

    def move(self, alive: Mask) -> None:
        """Go to another point."""
        self._sizes, self._values = self._changed(alive)
        self.alive, self.now = alive.copy(), self.cost.total(self._values)

    def _changed(self, alive: Mask) -> tuple[Ids, Values]:
        differs = alive != self.alive
        if not differs.any():
            return self._sizes, self._values
        sizes, values = self._sizes.copy(), self._values.copy()
        items: set[int] = set()
        for factor in np.unique(self._pairs[1][differs[self._pairs[0]]]).tolist():
            position = self.cost.factors[factor].position
            new = live_size(alive[self._classes[factor]], position)
            if new != sizes[factor]:
                sizes[factor] = new
                items.update(self._items[factor])
        if items:
            changed = np.fromiter(items, np.int64)
            values[changed] = self.cost.values(sizes, changed)
        return sizes, values
