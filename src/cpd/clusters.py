"""Clusters: sets of channels that shrink in step.

Rows that keep one number of entries may hold their channels in different ways: a row in which every
channel occurs twice (the halves of a rotation) loses two entries with each, one beside it in which
every channel occurs once must lose two channels for it. So a unit takes several channels of some
clusters, and those are split into parts that each give one.

NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from .channels import Ids

Key = bytes


@dataclass(frozen=True)
class Columns:
    """The columns of the items of tied folds: `items` in order, and the column of each."""

    items: Ids
    columns: Ids

    def of(self, items: Ids) -> tuple[Ids, NDArray[np.bool_]]:
        """Return the column of each item, or itself where it has none, and which have one."""
        if not len(self.items):
            return items, np.zeros(items.shape, bool)
        at = np.searchsorted(self.items, items).clip(max=len(self.items) - 1)
        known = self.items[at] == items
        return np.where(known, self.columns[at], items), known


def columns_of(tied: Sequence[tuple[Ids, Ids]]) -> Columns:
    """Return the columns of the items (rows, columns) of tied folds; a column that is an item of
    another one leads on to its column.
    """
    pairs = [(x.ravel(), np.broadcast_to(columns, x.shape).ravel()) for x, columns in tied]
    empty = np.empty(0, np.int64)
    items = np.concatenate([empty, *(x for x, _ in pairs)])[::-1]  # of two columns the last counts
    columns = np.concatenate([empty, *(of_items for _, of_items in pairs)])[::-1]
    distinct, first = np.unique(items, return_index=True)
    found = Columns(distinct, columns[first])
    for _ in range(4):
        further, _ = found.of(found.columns)
        if (further == found.columns).all():
            break
        found = Columns(distinct, further)
    return found


def sets_of(rows: Ids) -> list[tuple[Ids, Ids]]:
    """Return for each row of an array its items, once each and in order, and how often they are
    there.
    """
    ordered = np.sort(rows, axis=1)
    first = np.ones(rows.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    once = np.ones(rows.shape[1], np.int64)
    if first.all():
        return [(row, once) for row in ordered]
    places = [np.flatnonzero(new) for new in first]
    return [
        (row[at], np.diff(at, append=len(row))) for row, at in zip(ordered, places, strict=True)
    ]


def relate(
    rows: Ids, clusters: dict[Key, Ids], columns: Columns, *, tied: bool
) -> tuple[dict[Key, int] | None, Ids]:
    """Add the clusters of a fold's rows; return how many entries of a row a channel of each is, and
    the channels in no tied fold.

    None where its rows cannot lose channels in step: one that is one channel all along keeps its
    width, or goes, and so do those that keep the same number.
    """
    relation: dict[Key, int] = {}
    odd = whole = False
    mapped, known = columns.of(rows)
    loose = known.sum(axis=1) == 0
    for free, (items, counts) in zip(loose, sets_of(mapped), strict=True):
        key = items.tobytes()
        if len(items) == 1 < rows.shape[1] and not len(columns.items):
            whole = True
        elif free or tied:
            clusters.setdefault(key, items)
        odd |= key not in clusters or int(counts.min()) < int(counts.max())
        relation[key] = int(counts[0])
    taken = rows[loose].ravel()
    if whole or (odd and len(relation) > 1):
        return None, taken
    return {} if odd else relation, taken


def in_step(
    clusters: Mapping[Key, Ids], relations: Sequence[Mapping[Key, int]]
) -> tuple[Ids, ...] | None:
    """Return parts of all clusters, as wide as each other, of which each unit takes one channel.

    Each relation says of clusters that keep one number of entries how many entries a channel of
    each is. None where no whole numbers of channels satisfy them all.
    """
    shares = _shares(clusters, relations)
    if shares is None:
        return None
    parts: list[Ids] = []
    for key, cluster in clusters.items():
        if len(cluster) % shares[key]:
            return None
        parts += list(cluster.reshape(shares[key], -1))
    widths = {len(part) for part in parts}
    return tuple(parts) if len(widths) == 1 else None


def _shares(
    clusters: Mapping[Key, Ids], relations: Sequence[Mapping[Key, int]]
) -> dict[Key, int] | None:
    """Return how many channels of each cluster go at once: entries x channels is the same number
    for all clusters of a relation.
    """
    shares: dict[Key, int] = {}
    left = [relation for relation in relations if len(relation) > 1]
    for start in clusters:
        if start in shares:
            continue
        mine = {start: 1}
        touching = [relation for relation in left if mine.keys() & relation.keys()]
        while touching:
            left = [relation for relation in left if all(relation is not x for x in touching)]
            for relation in touching:
                _spread(mine, relation)
            touching = [relation for relation in left if mine.keys() & relation.keys()]
        common = gcd(*mine.values())
        shares |= {key: share // common for key, share in mine.items()}
    for relation in relations:
        if len({entries * shares[key] for key, entries in relation.items()}) > 1:
            return None
    return shares


def _spread(mine: dict[Key, int], relation: Mapping[Key, int]) -> None:
    """Give the clusters of a relation the shares that follow from one that has its share."""
    known = next(key for key in relation if key in mine)
    together = lcm(mine[known] * relation[known], *relation.values())
    times = together // (mine[known] * relation[known])
    for key in mine:
        mine[key] *= times
    for key, entries in relation.items():
        mine.setdefault(key, together // entries)


def share_items(clusters: Iterable[Ids]) -> bool:
    """Say whether an item is in two clusters, or twice in one."""
    flat = np.sort(np.concatenate(list(clusters)))
    return bool((flat[1:] == flat[:-1]).any())


def equal_rows(
    rows: Ids, blocks: Ids, block_of: dict[bytes, int], edges: list[tuple[int, int]]
) -> None:
    """Add an edge between the blocks of rows of the same items, and of a row of one item and it."""
    first = np.ones(rows.shape, bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    for row, new, block in zip(rows, first, blocks.tolist(), strict=True):
        items = row[new]  # how often an item is there makes no other row
        if len(items) == 1 and int(items[0]) != block:
            edges.append((int(items[0]), block))
        found = block_of.setdefault(items.tobytes(), block)
        if found != block:
            edges.append((found, block))


def copies(rows: Ids, blocks: Ids) -> list[tuple[int, int]]:
    """Return the pairs of items that are one where rows with one block are copies of each other."""
    _, first, number = np.unique(blocks, return_index=True, return_inverse=True)
    mine, same = rows.ravel(), rows[first[number]].ravel()
    return list(zip(*(x[mine != same].tolist() for x in (mine, same)), strict=True))
