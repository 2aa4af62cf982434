"""Solver: from the relations recorded in `Channels` to classes of ids and families of units.

NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .channels import Channels, Fold, Ids, Place, Reason, components
from .clusters import columns_of, copies, equal_rows, in_step, relate, sets_of, share_items
from .units import Family, Units, fill

KINDS = {"conv": ("conv groups", "group channels"), "group_norm": ("norm groups", "group channels")}


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
        self.blocks = np.empty(0, bool)
        self.links: list[list[Ids]] = []
        self.nonempty: list[Ids] = []

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
        """Unite blocks of equal rows, and blocks of one channel with it, until nothing changes.

        An entry of a tied fold is alive exactly when its row and its column are. So entries of one
        row (column) whose columns (rows) are one are one as well.
        """
        while True:
            edges: list[tuple[int, int]] = []
            block_of: dict[bytes, int] = {}
            for bound in self.bounds:
                sides = [(bound.items, bound.rows)]
                if bound.columns is not None:
                    sides.append((bound.items.T, bound.columns))
                for items, blocks in sides:
                    edges += copies(items, blocks) if len(sides) > 1 else []
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
            smallest, rows = self._smallest()
            changed = False
            for bound in self.bounds:
                changed |= self._substitute(bound, smallest, rows)
            if not changed:
                break
            self.close()
        self._find_conflicts()

    def _smallest(self) -> tuple[Ids, list[tuple[int, Ids]]]:
        """Return the rows of several items, and for each item the number of the smallest or -1."""
        rows = [
            (int(block), items)
            for bound in self.bounds
            for (items, _), block in zip(sets_of(bound.items), bound.rows, strict=True)
            if len(items) > 1
        ]
        rows.sort(key=lambda pair: -len(pair[1]))
        smallest = np.full(self.count, -1, np.int64)
        for number, (_, items) in enumerate(rows):
            smallest[items] = number
        return smallest, rows

    def _substitute(self, bound: _Bound, smallest: Ids, smaller: Sequence[tuple[int, Ids]]) -> bool:
        if bound.columns is not None:
            return False
        rows, parts_of = [], []
        for row, (items, _) in zip(bound.items, sets_of(bound.items), strict=True):
            if (smallest[items] < 0).any():
                return False  # a row of one channel is no row of others
            found = [smaller[k] for k in dict.fromkeys(smallest[row].tolist())]
            parts = {part.tobytes(): (block, part) for block, part in found}
            if len(parts) == 1 or sum(len(p) for _, p in parts.values()) != len(items):
                return False
            rows.append([block for block, _ in parts.values()])
            parts_of.append([part for _, part in parts.values()])
        if len({len(row) for row in rows}) > 1:
            return False
        bound.items = np.array(rows, dtype=np.int64)
        # the parts in one place of each row must keep one number, or the rows would differ
        self.links += [list(parts) for parts in zip(*parts_of, strict=True)]
        return True

    def _find_conflicts(self) -> None:
        owner = np.full(self.count, -1, np.int64)  # the first row that an item is in
        number: dict[bytes, int] = {}
        bad: dict[int, Place] = {}
        rows: list[Ids] = []
        for place, (items, counts) in (
            (bound.place, found) for bound in self.bounds for found in sets_of(bound.items)
        ):
            if len(items) == 1:
                continue
            mine = number.setdefault(items.tobytes(), len(rows))
            rows += [items] if mine == len(rows) else []
            if counts.min() < counts.max():
                bad.setdefault(mine, place)
            owners = owner[items]
            owners[owners < 0] = mine
            owner[items] = owners
            others = dict.fromkeys(owners.tolist()) if (owners != mine).any() else ()
            for other in (mine, *others) if others else ():
                bad.setdefault(other, place)
        self.conflicts = [(rows[k], place) for k, place in bad.items()]

    def freeze(self) -> None:
        """Spread the frozen: a row that keeps a channel stays, and so does a tied column."""
        self.frozen = np.full(self.count, -1, dtype=np.int64)
        index: dict[Reason, int] = {}
        for ids, reason in self.channels.frozen:
            fill(self.frozen, self.label[ids], index.setdefault(reason, len(index)))
        for items, place in self.conflicts:
            overlap = Reason("rows of different partitions overlap", place)
            fill(self.frozen, items, index.setdefault(overlap, len(index)))
        self.held = np.full(self.count, -1, dtype=np.int64)
        for ids, reason in self.channels.held:
            fill(self.held, self.label[ids], index.setdefault(reason, len(index)))
        self.reasons = list(index)
        before = -1
        while before != (before := int((self.frozen >= 0).sum())):
            for bound in self.bounds:
                self._spread(bound)

    def _spread(self, bound: _Bound) -> None:
        marks = self.frozen[bound.items]
        new = (marks >= 0).any(1) & (self.frozen[bound.rows] < 0)
        for row in np.flatnonzero(new):
            fill(self.frozen, bound.rows[row : row + 1], int(marks[row].max()))
        if bound.columns is None:
            return
        new = (marks >= 0).any(0) & (self.frozen[bound.columns] < 0)
        for column in np.flatnonzero(new):
            fill(self.frozen, bound.columns[column : column + 1], int(marks[:, column].max()))
        rows, columns = self.frozen[bound.rows] >= 0, self.frozen[bound.columns] >= 0
        for row in np.flatnonzero(rows & columns.any()):
            fill(self.frozen, bound.items[row, columns], int(self.frozen[bound.rows[row]]))

    def result(self) -> Units:
        below = self._below()
        families, bound_items = self._bundles()
        families += self._blocks(bound_items)
        nonempty = [np.unique(self.label[ids]) for ids in self.channels.nonempty] + self.nonempty
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
            sides = [(bound.items, bound.rows)]
            sides += [] if bound.columns is None else [(bound.items.T, bound.columns)]
            for items, blocks in sides:
                for (row, _), block in zip(sets_of(items), blocks.tolist(), strict=True):
                    parts.setdefault(block, []).append(row)
        whole = {
            block: rows[0] if len(rows) == 1 else np.unique(np.concatenate(rows))
            for block, rows in parts.items()
        }
        return {block: items[items != block] for block, items in whole.items()}

    def _bundles(self) -> tuple[list[Family], NDArray[np.bool_]]:
        """Join folds that share a row or a tied column: all live rows keep the same number."""
        row_bound: dict[bytes, int] = {}
        edges = [(0, 0)]
        for number, bound in enumerate(self.bounds):
            for items, _ in sets_of(bound.items):
                edges.append((row_bound.setdefault(items.tobytes(), number), number))
            keys = [] if bound.columns is None else [x.tobytes() for x in bound.columns]
            edges += [(row_bound.setdefault(key, number), number) for key in keys]
        for link in self.links:
            numbers = [row_bound[row.tobytes()] for row in link if row.tobytes() in row_bound]
            edges += [(numbers[0], number) for number in numbers]
        pairs = np.array(edges, dtype=np.int64)
        joined = components(max(len(self.bounds), 1), pairs[:, 0], pairs[:, 1])
        families, taken = [], np.zeros(self.count, bool)
        self.blocks = np.zeros(self.count, bool)
        for bound in self.bounds:
            self.blocks[bound.rows] = True
        for root in np.unique(joined[: len(self.bounds)]):
            members = [self.bounds[k] for k in np.flatnonzero(joined[: len(self.bounds)] == root)]
            family, items = self._bundle(members)
            taken[items] = True
            if family is None:
                self._hold(items)
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
            fill(self.held, classes, int(held))

    def _bundle(self, bounds: list[_Bound]) -> tuple[Family | None, Ids]:
        tied = [(x.items, x.columns) for x in bounds if x.columns is not None]
        taken = np.empty(0, np.int64)
        whole = all((bound.items == bound.items[:, :1]).all() for bound in bounds)
        if whole and not (tied and self._columns_elsewhere(bounds)):
            return self._rows_whole(bounds)  # every row is one channel
        bound_ids = [ids.ravel() for pair in tied for ids in pair]
        clusters: dict[bytes, Ids] = {}
        columns, relations = columns_of(tied), []
        for bound in sorted(bounds, key=lambda bound: bound.columns is None):
            with_columns = bound.columns is not None
            relation, items = relate(bound.items, clusters, columns, tied=with_columns)
            bound_ids.append(items)
            relations.append(relation)
        taken = np.concatenate(bound_ids)
        known = [relation for relation in relations if relation is not None]
        if len(known) < len(relations) or (tied and self._units_of_others(bounds)):
            return None, taken
        if share_items(clusters.values()):
            return None, taken
        parts = in_step(clusters, known)
        if parts is None:
            self._hold(taken, Reason("bound to rows of other widths", bounds[-1].place))
            return None, taken
        if len(parts[0]) == 1:
            return self._rows_whole(bounds)  # rows of one channel keep others in step with them
        free = tuple(part[self.frozen[part] < 0] for part in parts)
        of_blocks = any(self.blocks[part].any() for part in parts)
        kinds = KINDS.get(_kind(bounds[0].place.op), ("heads", "head dims"))
        family = Family(kinds[0 if of_blocks and not tied else 1], free, len(parts[0]))
        return (family if family.size else None), taken

    def _rows_whole(self, bounds: list[_Bound]) -> tuple[None, Ids]:
        """Leave the blocks of rows as units. A tied column needs one of them, unless it is a row
        elsewhere, and goes as that.
        """
        for bound in bounds:
            if bound.columns is not None and not self.blocks[bound.columns].any():
                self.nonempty.append(np.unique(bound.rows))
        return None, np.empty(0, np.int64)

    def _units_of_others(self, bounds: list[_Bound]) -> bool:
        """Say whether tied columns are items of another fold."""
        column = np.zeros(self.count, bool)
        for bound in bounds:
            if bound.columns is not None:
                column[bound.columns] = True
        mine = {id(bound) for bound in bounds}
        return any(column[other.items].any() for other in self.bounds if id(other) not in mine)

    def _columns_elsewhere(self, bounds: list[_Bound]) -> bool:
        """Say whether tied columns are rows or items of any fold that is not one channel whole."""
        column = np.zeros(self.count, bool)
        for bound in bounds:
            if bound.columns is not None:
                column[bound.columns] = True
        several = (bound for bound in self.bounds if (bound.items != bound.items[0, 0]).any())
        return any(column[b.items].any() or column[b.rows].any() for b in several)

    def _blocks(self, bound_items: NDArray[np.bool_]) -> list[Family]:
        """Whole rows as units: heads, conv groups. Those that are items of a larger fold are there
        already.
        """
        families: dict[bytes, Family] = {}
        for bound in self.bounds:
            blocks = np.unique(bound.rows)
            blocks = blocks[~bound_items[blocks]]
            free = blocks[self.frozen[blocks] < 0]
            if len(blocks) < 2 or not len(free):
                continue
            found = Family(_kind_of_rows(bound, blocks), (free,), len(blocks))
            other = families.get(free.tobytes(), found)  # the same rows, beside others that stay
            named = min(other, found, key=lambda one: (one.kind == "channels", one.width))
            families[free.tobytes()] = replace(named, width=min(other.width, found.width))
        return list(families.values())


def _kind_of_rows(bound: _Bound, blocks: Ids) -> str:
    """Return what whole rows are called; untied ones of one channel each are channels."""
    if bound.columns is None and np.isin(blocks, bound.items).all():
        return "channels"
    return KINDS.get(_kind(bound.place.op), ("heads", "head dims"))[0]


def _kind(op: str) -> str:
    return "conv" if op.startswith("conv") else op
