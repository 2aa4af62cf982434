"""Clusters: sets of channels that shrink in step.

Rows that keep one number of entries may hold their channels in different ways: a row in which every
channel occurs twice (the halves of a rotation) loses two entries with each, one beside it in which
every channel occurs once must lose two channels for it. So a unit takes several channels of some
clusters, and those are split into parts that each give one.

NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import gcd, lcm

import numpy as np

from .channels import Ids

Key = bytes


def columns_of(tied: Iterable[tuple[Ids, Ids]]) -> dict[int, int]:
    """Return item -> column for the items (rows, columns) and columns of tied folds; a column that
    is an item of another one leads on to its column.
    """
    found: dict[int, int] = {}
    for items, columns in tied:
        of_items = np.broadcast_to(columns, items.shape).ravel().tolist()
        found.update(zip(items.ravel().tolist(), of_items, strict=True))
    for _ in range(4):
        further = {
            item: found[column]
            for item, column in found.items()
            if column in found and found[column] != column
        }
        if not further:
            break
        found |= further
    return found


def relate(
    rows: Ids, clusters: dict[Key, Ids], column_of: Mapping[int, int], *, tied: bool
) -> tuple[dict[Key, int] | None, set[int]]:
    """Add the clusters of a fold's rows; return how many entries of a row a channel of each is, and
    the channels in no tied fold.

    None where its rows cannot lose channels in step: one that is one channel all along keeps its
    width, or goes, and so do those that keep the same number.
    """
    relation: dict[Key, int] = {}
    taken: set[int] = set()
    odd = whole = False
    for row in rows.tolist():
        free = not any(item in column_of for item in row)
        if free:
            taken |= set(row)
        items, counts = np.unique([column_of.get(k, k) for k in row], return_counts=True)
        if len(items) == 1 < len(row) and not column_of:
            whole = True
        elif free or tied:
            clusters.setdefault(items.tobytes(), items)
        odd |= items.tobytes() not in clusters or int(counts.min()) < int(counts.max())
        relation[items.tobytes()] = int(counts[0])
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
    flat = np.concatenate(list(clusters))
    return len(np.unique(flat)) < len(flat)


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
