"""Strategies: in which order candidates go. One signature: `Candidates` -> their numbers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from math import floor, log2
from typing import Any

import numpy as np

from .branches import Branch
from .candidates import Candidates
from .knapsack import knapsack


def oneshot(found: Candidates) -> Sequence[int]:
    """Order all candidates by their keys; those of one family keep their order."""
    order: list[int] = np.argsort(found.key, kind="stable").tolist()
    return order


def greedy(found: Candidates, *, ranked: bool = False) -> Sequence[int]:
    """The paper's loop: each event cuts the family whose k least important channels sum up to least
    by k.

    `ranked`: a unit weighs what `ranking` makes of its importance (by "isomorphic", its place among
    all that are built alike), not the importance itself.

    k = min(2^floor(log2(floor(kept / 16))), 4), at least 1, for channels; 1 for heads, groups and
    their dims. Source: the released code of "Comb, Prune, Distill" (arXiv 2408.03046).
    """
    queues: dict[int, list[int]] = {}
    for number, family in enumerate(found.family.tolist()):
        queues.setdefault(family, []).append(number)
    kept = {family: found.sources[family].kept for family in queues}
    order: list[int] = []
    weight = found.ranked() if ranked else found.score

    def event(family: int) -> tuple[float, int, int]:
        channels = found.sources[family].family.kind == "channels"
        numbers = queues[family][: _per_event(kept[family]) if channels else 1]
        return float(weight[numbers].sum()), family, len(numbers)

    heap = [event(family) for family in queues]
    heapq.heapify(heap)
    while heap:
        _, family, k = heapq.heappop(heap)
        gone, queues[family] = queues[family][:k], queues[family][k:]
        order += gone
        kept[family] -= int(found.units[gone].sum())
        if queues[family]:
            heapq.heappush(heap, event(family))
    return order


def uniform(found: Candidates) -> Sequence[int]:
    """The same share of every family, whatever the scores: they only say which units of it.

    Branches that are alike are one family here.
    """
    share = np.empty(len(found))
    alike: dict[object, list[int]] = {}
    for family in np.unique(found.family).tolist():
        mine = np.flatnonzero(found.family == family)
        source = found.sources[family]
        if isinstance(source.group, Branch):
            alike.setdefault(source.group.kind, []).extend(mine.tolist())
            continue
        gone = source.family.width - source.kept + np.cumsum(found.units[mine])
        share[mine] = (gone - found.units[mine] / 2) / source.family.width
    for kind, numbers in alike.items():
        left = [found.before[x.number] for x in found.groups.branches if x.kind == kind]
        numbers.sort(key=lambda number: float(found.score[number]))
        share[numbers] = (left.count(False) + np.arange(len(numbers)) + 0.5) / len(left)
    order: list[int] = np.argsort(share, kind="stable").tolist()
    return order


def _per_event(kept: int) -> int:
    sixteenths = kept // 16
    return 1 if sixteenths < 1 else min(2 ** floor(log2(sixteenths)), 4)


STRATEGIES: dict[str, Callable[..., Any]] = {
    "greedy": greedy,
    "knapsack": knapsack,
    "oneshot": oneshot,
    "uniform": uniform,
}
