"""Timing: a latency budget, held to what the cut network really takes.

The table predicts; what it predicts wrongly is found by measuring the cut network end to end, and
the predicted limit is moved by the ratio until the real one is met within `WITHIN`, or halfway
between the nearest limits that were too high and too low, where the ratio leads out of these.

Near the least that calls take by themselves the table is flat: limits that hardly differ choose
networks far apart. Where none comes near, the search goes on along the order of one that was fast
enough: the more of it go the faster, so between too slow and fast enough one is near.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from .budgets import shortest
from .candidates import Candidates
from .channels import Ids
from .labels import Mask
from .planning import shaped
from .table import Table, whole_inputs

WITHIN = 0.03
ENOUGH = 0.02  # of the target: nearer ones are looked for, as another measurement may differ
ROUNDS = 8  # networks that are measured by limits, and again along an order, at most
NEAR = 1e-3  # limits nearer to each other than this share of the target choose the same
AIM = 1 - WITHIN / 3  # a little below the target, where it was above
NAMES = ("latency", "latency_ms")


@dataclass(frozen=True)
class Timed:
    """What was chosen: the candidates that go, what the cut network takes, what was asked, and the
    importance that is lost.
    """

    gone: list[int]
    met: bool
    real: float
    target: float
    lost: float
    rounds: int

    @property
    def ratio(self) -> float:
        """What it takes over what was asked."""
        return self.real / self.target

    @property
    def rank(self) -> tuple[bool, bool, int, float, float]:
        """Smaller is better: near the target, below it, nearest by steps of `WITHIN`; of those the
        one that loses least, as many may take the same.
        """
        off = abs(self.ratio - 1)
        return off > WITHIN, self.ratio > 1, int(off / WITHIN), self.lost, off

    def __str__(self) -> str:
        word = "above" if self.ratio > 1 else "below"
        times = "1 time" if self.rounds == 1 else f"{self.rounds} times"
        text = (
            f"latency: {self.real:.4g} ms measured, {abs(self.ratio - 1):.2%} {word} its budget of "
            f"{self.target:.4g} ms; measured end to end {times}"
        )
        if abs(self.ratio - 1) <= WITHIN:
            return text
        if self.ratio > 1:
            why = "no other choice that was tried is faster" if self.met else "no more can go"
        else:
            why = (
                "another budget decides, or one unit changes much at once; multiple_of='auto' helps"
            )
        return f"{text}; not within {WITHIN:.0%}: {why}"


def timed(found: Candidates, table: Table, ordered: Callable[[Candidates], Sequence[int]]) -> Timed:
    """Choose, measure, correct the limit, and choose again, until the real latency is near; then,
    where it is not, along the order that was fast enough.

    A network that seems near is measured once more, and the mean of both counts: of many noisy
    measurements the one that happens to fit would be taken otherwise. `found.allowed` is left with
    the limit that the table would have needed.
    """
    search = _Search(found, table)
    best = search.by_limits(ordered)
    if best.met and abs(best.ratio - 1) > WITHIN:
        best = min([best, *search.along(ordered)], key=lambda one: one.rank)
    search.limit(search.counted(best.gone) / max(best.ratio, 1e-9))
    table.measure.save()
    return replace(best, rounds=len(search.seen))


class _Search:
    """The networks that were measured, by what is left of them."""

    def __init__(self, found: Candidates, table: Table) -> None:
        self.found, self.table = found, table
        self.place = next(k for k, budget in enumerate(found.allowed) if budget.name in NAMES)
        self.target = found.allowed[self.place].limit
        self.seen: dict[bytes, Timed] = {}
        self.fast: tuple[float, Timed] | None = None  # the last limit that was fast enough

    def by_limits(self, ordered: Callable[[Candidates], Sequence[int]]) -> Timed:
        """Move the limit of the table; return the best."""
        low, high = 0.0, self.table.whole  # limits with which it was fast enough, and too slow
        limit = self.target
        best: Timed | None = None
        points = [(0.0, 0.0)]  # limits, and what the networks took
        while best is None or high - low > NEAR * self.target:
            gone, met = self._chosen(limit, ordered)
            known = len(self.seen)
            if known == ROUNDS and self._key(gone) not in self.seen:
                break
            now = self.take(gone, met)
            if not met:
                limit = max(limit, self.counted(gone))
            best = now if best is None or now.rank < best.rank else best
            if not now.met or 1 - ENOUGH <= now.ratio <= 1:
                break
            if now.ratio > 1:
                high = min(high, limit)
            else:
                low, self.fast = max(low, limit), (limit, now)
            step = limit * _step(points, limit, now)
            points = [*points, (limit, now.real)]
            fresh = len(self.seen) > known
            limit = step if low < step < high and fresh else (low + high) / 2
        assert best is not None  # the first time is for sure
        return best

    def along(self, ordered: Callable[[Candidates], Sequence[int]]) -> list[Timed]:
        """Measure what the first candidates of one order leave, more or fewer of them, between too
        slow and fast enough; return what was measured.

        Where to look next is told by the MACs: between two networks that are near each other time
        is about a line of them. Where that leads to the same side twice, time has a step: halfway.
        """
        limit, fast = self.fast if self.fast is not None else (self.target, None)
        self.limit(limit)
        order = np.asarray(ordered(self.found), np.int64)
        others = [b for k, b in enumerate(self.found.allowed) if k != self.place]
        least, met = shortest(self.found, others, order)
        if not met:
            return []
        low, high = _length(order, least), len(order)
        slow = self.take(least, met).ratio if least else self.table.whole / self.target
        if fast is None:
            fast = self.take(order.tolist(), met)
        else:
            high = _length(order, fast.gone)
        quick, rounds = fast.ratio, 0
        prefixes, last = _Prefixes(self.found, order), 0
        # the other budgets decide where slow is fast, and no more can go where fast is slow
        while slow > 1 >= quick and high - low > 1 and rounds < ROUNDS:
            share = (slow - AIM) / (slow - quick) if abs(last) < 2 else 0.5
            at = prefixes.between(low, high, min(max(share, 0.1), 0.9))
            now = self.take(order[:at].tolist(), met)
            rounds += 1
            if abs(now.ratio - 1) <= ENOUGH:
                break
            if now.ratio > 1:
                low, slow, last = at, now.ratio, max(last, 0) + 1
            else:
                high, quick, last = at, now.ratio, min(last, 0) - 1
        return [one for one in self.seen.values() if one.met]

    def take(self, gone: list[int], met: bool) -> Timed:
        """Return what the network takes without these candidates; `met`: all budgets hold by what
        is counted.
        """
        key = self._key(gone)
        if key in self.seen:
            return self.seen[key]
        alive = self.found.without(gone)
        small = shaped(self.found.groups, alive)
        real = self._measured(small)
        if abs(real / self.target - 1) <= WITHIN and self.table.measure.clock is not None:
            real = (real + self._measured(small)) / 2
        # What the table takes for too slow may be fast enough, where the other budgets hold.
        met = met or (real <= self.target and _holds(self.found, alive, self.place))
        lost = self.found.lost(alive)
        self.seen[key] = Timed(gone, met, real, self.target, lost, len(self.seen) + 1)
        return self.seen[key]

    def _measured(self, small: nn.Module) -> float:
        """What a cut network takes; a share of the whole one's time is measured beside it."""
        inputs, table = whole_inputs(self.found.groups), self.table
        if self.found.allowed[self.place].name == "latency":
            return table.measure.beside(small, self.found.groups.model, table.whole, inputs)
        return table.measure.now(small, inputs)

    def _chosen(
        self, limit: float, ordered: Callable[[Candidates], Sequence[int]]
    ) -> tuple[list[int], bool]:
        self.limit(limit)
        return shortest(self.found, self.found.allowed, np.asarray(ordered(self.found), np.int64))

    def limit(self, limit: float) -> None:
        """Change the limit of the table."""
        allowed = list(self.found.allowed)
        allowed[self.place] = replace(allowed[self.place], limit=limit)
        self.found.allowed = tuple(allowed)

    def counted(self, gone: Sequence[int]) -> float:
        """What the table says of the network without these candidates."""
        return self.table.count(self.found.without(gone)[self.found.groups.units.label])

    def _key(self, gone: Sequence[int]) -> bytes:
        return self.found.without(gone).tobytes()


class _Prefixes:
    """What the first candidates of an order leave: the MACs, fewer the more of them go."""

    def __init__(self, found: Candidates, order: Ids) -> None:
        self.found = found
        self.gone_at = found.gone_at(order, found.before)
        self.macs = found.groups.counted("macs")

    def left(self, length: int) -> float:
        """Return the MACs without so many."""
        return self.macs.count((self.gone_at >= length)[self.found.groups.units.label])

    def between(self, low: int, high: int, share: float) -> int:
        """Return the length between two others that goes this share of the way between their MACs;
        never one of the two.
        """
        wanted = self.left(low) + share * (self.left(high) - self.left(low))
        first, last = low + 1, high - 1
        while first < last:
            middle = (first + last) // 2
            if self.left(middle) <= wanted:
                last = middle
            else:
                first = middle + 1
        return first


def _length(order: Ids, gone: Sequence[int]) -> int:
    """Return how many of an order have to go for all of these to be gone."""
    places = np.flatnonzero(np.isin(order, list(gone)))
    return int(places.max()) + 1 if len(places) else 0


def _step(points: Sequence[tuple[float, float]], limit: float, now: Timed) -> float:
    """Return the factor by which the limit is to change: by the line through the logarithms of
    this limit and the last one, as most of a small network's time is no work.
    """
    aim = AIM if now.ratio > 1 else 1.0
    wanted = np.log(max(aim * now.target, 1e-9) / max(now.real, 1e-9))
    before, real = points[-1]
    slope = 1.0
    if before > 0 and before != limit and real > 0 and now.real > 0:
        slope = float(np.clip(np.log(now.real / real) / np.log(limit / before), 0.1, 1.0))
    return float(np.exp(np.clip(wanted / slope, np.log(0.25), np.log(4.0))))


def _holds(found: Candidates, alive: Mask, place: int) -> bool:
    """Say whether all budgets but the one of time hold with these classes."""
    of_ids = alive[found.groups.units.label]
    others = [budget for k, budget in enumerate(found.allowed) if k != place]
    return all(budget.cost.count(of_ids) <= budget.limit for budget in others)
