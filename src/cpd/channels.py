"""Channel ids: which indices of which tensors live and die together.

Every index of every axis that may shrink carries an integer *id*. Three relations are recorded
while the graph of a network is read, and solved once at the end (`cpd.solver`):

- **union**: two ids are the same channel;
- **freeze**: a channel that must stay, with the reason; **keep one**: of a run, one channel must
  stay;
- **multiple**: of these channels a multiple of a number must stay;
- **fold**: ids laid out as rows and columns because one axis is used as two (heads x head dim,
  groups x channels). Every row that is alive must keep the same number of ids (*balance*). A row
  has a *block* id, which is dead exactly when the whole row is. A *tied* fold keeps the same
  columns in every row; then columns have block ids as well.

NumPy only: nothing here knows about tensors, operators or networks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """A call of the network: its operator, the path of the module that made it, "file:line"."""

    op: str = ""
    path: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = " in ".join(part for part in (self.op, self.path) if part)
        return ", ".join(part for part in (where, self.source) if part)


@dataclass(frozen=True)
class Reason:
    """Why a channel stays: in words, and the call that demands it."""

    text: str
    place: Place = field(default_factory=Place)

    def __str__(self) -> str:
        place = str(self.place)
        return f"{self.text} ({place})" if place else self.text


@dataclass
class Fold:
    """Ids of shape (rows, columns), with block ids of its rows and, where tied, its columns.

    `place`: the call that first used the axis as two.
    """

    ids: Ids
    rows: Ids | None = None
    columns: Ids | None = None
    tied: bool = False
    place: Place = field(default_factory=Place)


class Channels:
    """The id space of one network: ids, and the relations between them."""

    def __init__(self) -> None:
        self.count = 0
        self.folds: list[Fold] = []
        self.frozen: list[tuple[Ids, Reason]] = []
        self.held: list[tuple[Ids, Reason]] = []
        self.nonempty: list[Ids] = []
        self.multiples: list[tuple[Ids, int, Reason]] = []
        self.used: list[Ids] = []
        self.place = Place()  # the call that is being read: what is demanded is its demand
        self._edges: list[tuple[Ids, Ids]] = []
        self._fold_of: dict[tuple[tuple[int, ...], bytes], tuple[Fold, bool]] = {}

    def new(self, *shape: int) -> Ids:
        """Return fresh ids, one for each index of `shape`."""
        size = int(np.prod(shape, dtype=np.int64))
        ids = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return ids

    def unite(self, a: Ids, b: Ids) -> None:
        """Make `a[i]` and `b[i]` one channel, for every i of two arrays of one shape."""
        a, b = np.broadcast_arrays(a, b)
        if a is not b:
            self._edges.append((a.ravel(), b.ravel()))

    def freeze(self, ids: Ids, reason: str) -> None:
        """Keep these channels for good; `reason` is what the user reads, with `place`."""
        if ids.size:
            self.frozen.append((ids.ravel(), Reason(reason, self.place)))

    def use(self, ids: Ids) -> None:
        """Note that an operator computes with these channels (it does not only move them)."""
        self.used.append(ids.ravel())

    def unused(self, ids: Ids) -> Ids:
        """Return those of `ids` that nothing computes with."""
        mask = np.ones(self.count, bool)
        for used in self.used:
            mask[used] = False
        return ids[mask[ids]]

    def keep_one(self, ids: Ids) -> None:
        """At least one of these channels must stay."""
        self.nonempty.append(ids.ravel())

    def keep_multiple(self, ids: Ids, number: int, reason: str) -> None:
        """How many of these channels stay must be a multiple of `number`."""
        self.multiples.append((ids, number, Reason(reason, self.place)))

    def freeze_inner(self, ids: Ids, reason: str) -> None:
        """Fix the size of the last axis of `ids`; whole rows may still vanish."""
        if ids.ndim == 1:
            self.freeze(ids, reason)
        else:
            self.unite(ids, ids[..., :1])
            self.held.append((ids.ravel(), Reason(reason, self.place)))

    def rows(self, ids: Ids) -> Ids:
        """Return the block ids over the last axis: shape `ids.shape[:-1]`."""
        outer = ids.shape[:-1]
        if ids.shape[-1] == 1:
            return ids[..., 0]
        fold, flipped = self._fold(ids.reshape(-1, ids.shape[-1]))
        return self._blocks(fold, columns=flipped).reshape(outer)

    def columns(self, ids: Ids) -> Ids:
        """Return the block ids over the first axis of a 2-D array, and tie its rows."""
        if ids.shape[0] == 1:
            return ids[0]
        fold, flipped = self._fold(ids)
        fold.tied = True
        return self._blocks(fold, columns=not flipped)

    def tie(self, ids: Ids) -> None:
        """Make all live rows of a 2-D array keep the same columns; it may then be transposed."""
        fold, flipped = self._fold(ids)
        fold.tied = True
        self._fold_of.setdefault(_key(ids.T), (fold, not flipped))

    def nest(self, ids: Ids) -> None:
        """Record the folds of an array of two or more axes, from the inside out."""
        while ids.ndim > 1:
            ids = self.rows(ids)

    def product(self, rows: Ids, columns: Ids) -> Ids:
        """Return fresh ids [i, j], alive exactly when `rows[i]` and `columns[j]` both are."""
        ids = self.new(rows.size, columns.size)
        fold, flipped = self._fold(ids)
        fold.tied = True
        self.unite(self._blocks(fold, columns=flipped), rows.ravel())
        self.unite(self._blocks(fold, columns=not flipped), columns.ravel())
        return ids

    def labels(self) -> Ids:
        """Return the smallest id of each id's channel, shape (count,)."""
        if not self._edges:
            return np.arange(self.count, dtype=np.int64)
        a = np.concatenate([edge[0] for edge in self._edges])
        b = np.concatenate([edge[1] for edge in self._edges])
        self._edges = [(a, b)]
        return components(self.count, a, b)

    def _fold(self, ids: Ids) -> tuple[Fold, bool]:
        key = _key(ids)
        if key not in self._fold_of:
            fold = Fold(np.ascontiguousarray(ids), place=self.place)
            self.folds.append(fold)
            self._fold_of[key] = (fold, False)
        return self._fold_of[key]

    def _blocks(self, fold: Fold, *, columns: bool) -> Ids:
        """The block ids of a fold's rows or columns, made at their first use."""
        found = fold.columns if columns else fold.rows
        if found is not None:
            return found
        number: dict[bytes, int] = {}
        rows = np.ascontiguousarray(fold.ids.T if columns else fold.ids)
        order = [number.setdefault(row.tobytes(), len(number)) for row in rows]
        fresh = self.new(len(number))[order]  # rows that are the same have one block
        if columns:
            fold.columns, fold.tied = fresh, True
        else:
            fold.rows = fresh
        return fresh


def _key(ids: Ids) -> tuple[tuple[int, ...], bytes]:
    return ids.shape, np.ascontiguousarray(ids).tobytes()


def components(count: int, a: Ids, b: Ids) -> Ids:
    """Return the smallest member of each node's connected component, for edges (a[i], b[i]).

    Hooking and pointer jumping (Shiloach and Vishkin, 1982) on whole arrays.
    """
    label = np.arange(count, dtype=np.int64)
    while True:
        la, lb = label[a], label[b]
        open_ = la != lb
        if not open_.any():
            return label
        a, b, la, lb = a[open_], b[open_], la[open_], lb[open_]
        np.minimum.at(label, np.maximum(la, lb), np.minimum(la, lb))
        while True:
            jumped = label[label]
            if (jumped == label).all():
                break
            label = jumped
