"""Units: the smallest sets of channels that can be removed together.

Solves the relations recorded in `Channels`. Ids become *classes* (one class = one channel, however
many tensors it runs through). Classes that rows and columns bind form *families*: a family is a
list of clusters of equal width, and removing its k-th unit removes one class from every cluster:
one channel; one head; one conv group; one channel from each head.

NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from .channels import Channels, Fold, Ids, Place, Reason, components
from .clusters import columns_of, equal_rows, in_step, relate, share_items

KINDS = {"conv": ("conv groups", "group channels"), "group_norm": ("norm groups", "group channels")}


@dataclass(frozen=True, eq=False)
class Family:
    """Units of one kind: unit k removes one class of each cluster. `width` counts the frozen ones
    too. `multiple`: the number of what stays must be a multiple of it.
    """

    kind: str
    clusters: tuple[Ids, ...]
    width: int
    multiple: int = 1

    @property
    def size(self) -> int:
        """The number of units that can be removed, in the order of each cluster."""
        return min(len(cluster) for cluster in self.clusters)


@dataclass
class Units:
    """The solution: `label[id]` is the class of an id; `reason(class)` why it stays, or None.

    `frozen` and `held` are places in `reasons`, or -1: a held class cannot go by itself, since the
    width of its row stays or since it is bound to others that cannot. `fold_of`: where in `places`
    the call is that binds a class to others last, or -1.
    """

    label: Ids
    count: int
    reasons: list[Reason]
    frozen: Ids
    held: Ids
    families: list[Family]
    below: dict[int, Ids]
    nonempty: list[Ids]
    fold_of: Ids
    places: list[Place]
    multiples: list[tuple[Ids, int, Reason]] = field(default_factory=list)
    _closures: dict[int, Ids] = field(default_factory=dict)

    def closure(self, classes: Iterable[int]) -> Ids:
        """Return the classes and, for blocks, everything that dies with them."""
        mine = np.unique(np.fromiter(classes, np.int64))
        blocks = [c for c in mine.tolist() if c in self.below] if self.below else []
        if not blocks:
            return mine
        return np.unique(np.concatenate([mine, *(self._under(c) for c in blocks)]))

    def _under(self, block: int, depth: int = 0) -> Ids:
        """Everything below one block, found once."""
        if block not in self._closures:
            below = self.below[block]
            inner = [
                self._under(c, depth + 1) for c in below.tolist() if c in self.below and depth < 8
            ]
            self._closures[block] = np.unique(np.concatenate([below, *inner]))
        return self._closures[block]

    def keep_multiples(self) -> None:
        """Tell families the numbers that must divide their widths; keep those that cannot."""
        for ids, number, reason in self.multiples:
            mine = np.unique(self.label[ids])
            families = []
            for family in self.families:
                classes = np.concatenate(family.clusters)
                if not np.isin(self.closure(classes.tolist()), mine).any():
                    families.append(family)
                elif ids.ndim == 1 and np.isin(classes, mine).all() and family.width % number == 0:
                    multiple = math.lcm(family.multiple, number)
                    families.append(replace(family, multiple=multiple))
                else:
                    self.reasons.append(reason)
                    _fill(self.frozen, classes, len(self.reasons) - 1)
            self.families = families

    def cause(self, c: int) -> Reason | None:
        """Return why a class stays and which call demands it, or None where it may go."""
        return None if self.frozen[c] < 0 else self.reasons[self.frozen[c]]

    def reason(self, c: int) -> str | None:
        """Return why a class stays, or None where it may go."""
        cause = self.cause(c)
        return None if cause is None else cause.text


@dataclass
class _Bound:
    """A fold in terms of classes: items (rows, columns), the classes of its rows and columns."""

    items: Ids
    rows: Ids
    columns: Ids | None
    place: Place


def solve(channels: Channels) -> Units:
    """Solve the relations and return classes, frozen ones with reasons, and families of units."""
    roots = channels.labels()
    unique, label = np.unique(roots, return_inverse=True)
    solver = _Solver(label.astype(np.int64), len(unique), channels)
    solver.close()
    solver.substitute()
    solver.freeze()
    return solver.result()


class _Solver:
    def __init__(self, label: Ids, count: int, channels: Channels) -> None:
        self.label, self.count, self.channels = label, count, channels
        self.bounds = [self._bind(fold) for fold in channels.folds]
        self.reasons: list[Reason] = []
        self.frozen = self.held = np.empty(0, np.int64)
        self.conflicts: list[tuple[Ids, Place]] = []
        self.blocks: set[int] = set()
        self.links: list[list[Ids]] = []

    def _bind(self, fold: Fold) -> _Bound:
        items = self.label[fold.ids]
        rows = self._fresh(len(items)) if fold.rows is None else self.label[fold.rows]
        columns = None
        if fold.tied:
            fresh = fold.columns is None
            columns = self._fresh(items.shape[1]) if fresh else self.label[fold.columns]
        return _Bound(items, rows, columns, fold.place)

    def _fresh(self, count: int) -> Ids:
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def close(self) -> None:
        """Unite blocks of equal rows, and blocks of one channel with it, until nothing changes."""
        while True:
            edges: list[tuple[int, int]] = []
            block_of: dict[bytes, int] = {}
            for bound in self.bounds:
                sides = [(bound.items, bound.rows)]
                if bound.columns is not None:
                    sides.append((bound.items.T, bound.columns))
                for items, blocks in sides:
                    equal_rows(np.sort(items, axis=1), blocks, block_of, edges)
            if not edges:
                return
            pairs = np.array(edges, dtype=np.int64)
            self._relabel(components(self.count, pairs[:, 0], pairs[:, 1]))

    def _relabel(self, roots: Ids) -> None:
        unique, compact = np.unique(roots, return_inverse=True)
        self.count, self.label = len(unique), compact[self.label]
        for bound in self.bounds:
            bound.items, bound.rows = compact[bound.items], compact[bound.rows]
            if bound.columns is not None:
                bound.columns = compact[bound.columns]
        self.links = [[np.unique(compact[row]) for row in link] for link in self.links]

    def substitute(self) -> None:
        """Express rows that consist of smaller rows by the blocks of these, so that no two rows
        overlap.
        """
        for _ in range(8):
            smallest = self._smallest()
            changed = False
            for bound in self.bounds:
                changed |= self._substitute(bound, smallest)
            if not changed:
                break
            self.close()
        self._find_conflicts()

    def _smallest(self) -> dict[int, tuple[int, Ids]]:
        smallest: dict[int, tuple[int, Ids]] = {}
        rows = [
            (int(block), np.unique(row))
            for bound in self.bounds
            for row, block in zip(bound.items, bound.rows, strict=True)
        ]
        several = [(block, items) for block, items in rows if len(items) > 1]
        for block, items in sorted(several, key=lambda pair: -len(pair[1])):
            smallest.update(dict.fromkeys(items.tolist(), (block, items)))
        return smallest

    def _substitute(self, bound: _Bound, smallest: dict[int, tuple[int, Ids]]) -> bool:
        if bound.columns is not None:
            return False
        rows, parts_of = [], []
        for row in bound.items:
            items = np.unique(row)
            if not all(item in smallest for item in items.tolist()):
                return False  # a row of one channel is no row of others
            parts = {smallest[item][1].tobytes(): smallest[item] for item in items.tolist()}
            if len(parts) == 1 or sum(len(p) for _, p in parts.values()) != len(items):
                return False
            order = dict.fromkeys(smallest[item][1].tobytes() for item in row.tolist())
            rows.append([parts[key][0] for key in order])
            parts_of.append([parts[key][1] for key in order])
        if len({len(row) for row in rows}) > 1:
            return False
        bound.items = np.array(rows, dtype=np.int64)
        # the parts in one place of each row must keep one number, or the rows would differ
        self.links += [list(parts) for parts in zip(*parts_of, strict=True)]
        return True

    def _find_conflicts(self) -> None:
        row_of: dict[int, bytes] = {}
        bad: dict[bytes, Place] = {}
        rows: dict[bytes, Ids] = {}
        for place, row in ((bound.place, row) for bound in self.bounds for row in bound.items):
            items, counts = np.unique(row, return_counts=True)
            if len(items) == 1:
                continue
            key = items.tobytes()
            rows[key] = items
            if len(set(counts.tolist())) > 1:
                bad.setdefault(key, place)
            others = dict.fromkeys(row_of.setdefault(item, key) for item in items.tolist())
            for other in (key, *others) if set(others) - {key} else ():
                bad.setdefault(other, place)
        self.conflicts = [(rows[key], place) for key, place in bad.items()]

    def freeze(self) -> None:
        """Spread the frozen: a row that keeps a channel stays, and so does a tied column."""
        self.frozen = np.full(self.count, -1, dtype=np.int64)
        index: dict[Reason, int] = {}
        for ids, reason in self.channels.frozen:
            _fill(self.frozen, self.label[ids], index.setdefault(reason, len(index)))
        for items, place in self.conflicts:
            overlap = Reason("rows of different partitions overlap", place)
            _fill(self.frozen, items, index.setdefault(overlap, len(index)))
        self.held = np.full(self.count, -1, dtype=np.int64)
        for ids, reason in self.channels.held:
            _fill(self.held, self.label[ids], index.setdefault(reason, len(index)))
        self.reasons = list(index)
        before = -1
        while before != (before := int((self.frozen >= 0).sum())):
            for bound in self.bounds:
                self._spread(bound)

    def _spread(self, bound: _Bound) -> None:
        marks = self.frozen[bound.items]
        new = (marks >= 0).any(1) & (self.frozen[bound.rows] < 0)
        for row in np.flatnonzero(new):
            _fill(self.frozen, bound.rows[row : row + 1], int(marks[row].max()))
        if bound.columns is None:
            return
        new = (marks >= 0).any(0) & (self.frozen[bound.columns] < 0)
        for column in np.flatnonzero(new):
            _fill(self.frozen, bound.columns[column : column + 1], int(marks[:, column].max()))
        rows, columns = self.frozen[bound.rows] >= 0, self.frozen[bound.columns] >= 0
        for row in np.flatnonzero(rows & columns.any()):
            _fill(self.frozen, bound.items[row, columns], int(self.frozen[bound.rows[row]]))

    def result(self) -> Units:
        below = self._below()
        families, bound_items = self._bundles()
        families += self._blocks(bound_items)
        nonempty = [np.unique(self.label[ids]) for ids in self.channels.nonempty]
        fold_of = np.full(self.count, -1, np.int64)
        for number, fold in enumerate(self.bounds):
            for classes in (fold.items, fold.rows, fold.columns):
                if classes is not None:
                    fold_of[classes] = number
        solved = (self.label, self.count, self.reasons, self.frozen, self.held)
        folds = (fold_of, [bound.place for bound in self.bounds])
        return Units(*solved, families, below, nonempty, *folds, self.channels.multiples)

    def _below(self) -> dict[int, Ids]:
        parts: dict[int, list[Ids]] = {}
        for bound in self.bounds:
            for row, block in zip(bound.items, bound.rows.tolist(), strict=True):
                parts.setdefault(block, []).append(row)
            if bound.columns is not None:
                for column, block in zip(bound.items.T, bound.columns.tolist(), strict=True):
                    parts.setdefault(block, []).append(column)
        return {
            block: (np.setdiff1d(np.concatenate(rows), [block])) for block, rows in parts.items()
        }

    def _bundles(self) -> tuple[list[Family], set[int]]:
        """Join folds that share a row or a tied column: all live rows keep the same number."""
        row_bound: dict[bytes, int] = {}
        edges = [(0, 0)]
        for number, bound in enumerate(self.bounds):
            for row in bound.items:
                key = np.unique(row).tobytes()
                edges.append((row_bound.setdefault(key, number), number))
            keys = [] if bound.columns is None else [x.tobytes() for x in bound.columns]
            edges += [(row_bound.setdefault(key, number), number) for key in keys]
        for link in self.links:
            numbers = [row_bound[row.tobytes()] for row in link if row.tobytes() in row_bound]
            edges += [(numbers[0], number) for number in numbers]
        pairs = np.array(edges, dtype=np.int64)
        joined = components(max(len(self.bounds), 1), pairs[:, 0], pairs[:, 1])
        families, taken = [], set()
        self.blocks = {int(block) for bound in self.bounds for block in bound.rows}
        for root in np.unique(joined[: len(self.bounds)]):
            members = [self.bounds[k] for k in np.flatnonzero(joined[: len(self.bounds)] == root)]
            family, items = self._bundle(members)
            taken |= items
            if family is None:
                self._hold(np.array(sorted(items), np.int64))
            else:
                families.append(family)
        return families, taken

    def _hold(self, classes: Ids, reason: Reason | None = None) -> None:
        """Remember for classes that are bound together why none of them can go by itself."""
        held, frozen = self.held[classes].max(initial=-1), self.frozen[classes].max(initial=-1)
        if held < 0 <= frozen:
            stays = self.reasons[frozen]
            reason = Reason(f"keeps step with what stays: {stays.text}", stays.place)
        if held < 0 and reason is not None:
            held = len(self.reasons)
            self.reasons.append(reason)
        if held >= 0:
            _fill(self.held, classes, int(held))

    def _bundle(self, bounds: list[_Bound]) -> tuple[Family | None, set[int]]:
        tied = [(x.items, x.columns) for x in bounds if x.columns is not None]
        taken: set[int] = set()
        if not tied and all((bound.items == bound.items[:, :1]).all() for bound in bounds):
            return None, taken  # every row is one channel: its blocks are the units
        for ids in (part for pair in tied for part in pair):
            taken |= set(ids.ravel().tolist())
        clusters: dict[bytes, Ids] = {}
        column_of, relations = columns_of(tied), []
        for bound in sorted(bounds, key=lambda bound: bound.columns is None):
            with_columns = bound.columns is not None
            relation, items = relate(bound.items, clusters, column_of, tied=with_columns)
            taken |= items
            relations.append(relation)
        known = [relation for relation in relations if relation is not None]
        if len(known) < len(relations):
            return None, taken
        mine = {id(bound) for bound in bounds}
        for bound in self.bounds if tied else ():
            columns = np.concatenate([columns for _, columns in tied])
            if id(bound) not in mine and np.isin(columns, bound.items).any():
                return None, taken  # these columns are the units of another fold
        if share_items(clusters.values()):
            return None, taken
        parts = in_step(clusters, known)
        if parts is None:
            reason = Reason("bound to rows of other widths", bounds[-1].place)
            self._hold(np.array(sorted(taken), np.int64), reason)
            return None, taken
        free = tuple(part[self.frozen[part] < 0] for part in parts)
        of_blocks = any(int(item) in self.blocks for part in parts for item in part)
        kinds = KINDS.get(_kind(bounds[0].place.op), ("heads", "head dims"))
        family = Family(kinds[0 if of_blocks and not tied else 1], free, len(parts[0]))
        return (family if family.size else None), taken

    def _blocks(self, bound_items: set[int]) -> list[Family]:
        """Whole rows as units: heads, conv groups. Those that are items of a larger fold are there
        already.
        """
        families: dict[bytes, Family] = {}
        for bound in self.bounds:
            blocks = np.array([b for b in np.unique(bound.rows).tolist() if b not in bound_items])
            free = blocks[self.frozen[blocks] < 0] if len(blocks) else blocks
            other = families.get(free.tobytes())  # the same rows, beside others that stay
            if len(blocks) > 1 and len(free) and (other is None or len(blocks) < other.width):
                kind = KINDS.get(_kind(bound.place.op), ("heads", "head dims"))[0]
                if np.isin(blocks, bound.items).all():
                    kind = "channels"  # the rows are one channel each
                families[free.tobytes()] = Family(kind, (free,), len(blocks))
        return list(families.values())


def _kind(op: str) -> str:
    return "conv" if op.startswith("conv") else op


def _fill(places: Ids, classes: Ids, reason: int) -> None:
    """Set what is not set yet."""
    places[classes[places[classes] < 0]] = reason
