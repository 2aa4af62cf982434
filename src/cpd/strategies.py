"""Strategies: in which order candidates go. One signature: `Candidates` -> numbers of candidates."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from math import floor, log2
from typing import Any

from .candidates import Candidates


def oneshot(found: Candidates) -> Sequence[int]:
    """Order all candidates by their keys; those of one family keep their order."""
    return sorted(range(len(found.units)), key=lambda number: (found.units[number].key, number))


def greedy(found: Candidates) -> Sequence[int]:
    """The paper's loop: each event cuts the family whose k least important channels sum up to least by k.

    k = min(2^floor(log2(floor(kept / 16))), 4), at least 1, for channels; 1 for heads, groups and their dims.
    Source: the released code of "Comb, Prune, Distill" (arXiv 2408.03046).
    """
    queues: dict[int, list[int]] = {}
    for number, unit in enumerate(found.units):
        queues.setdefault(unit.family, []).append(number)
    kept = dict(found.kept)
    order: list[int] = []

    def event(family: int) -> tuple[float, int, int]:
        k = _per_event(kept[family]) if found.kinds[family] == "channels" else 1
        numbers = queues[family][:k]
        return sum(found.units[n].score for n in numbers), family, len(numbers)

    heap = [event(family) for family in queues]
    heapq.heapify(heap)
    while heap:
        _, family, k = heapq.heappop(heap)
        gone, queues[family] = queues[family][:k], queues[family][k:]
        order += gone
        kept[family] -= sum(found.units[n].units for n in gone)
        if queues[family]:
            heapq.heappush(heap, event(family))
    return order


def _per_event(kept: int) -> int:
    sixteenths = kept // 16
    return 1 if sixteenths < 1 else min(2 ** floor(log2(sixteenths)), 4)


STRATEGIES: dict[str, Callable[..., Any]] = {"oneshot": oneshot, "greedy": greedy}
