"""Timing: a latency budget, held to what the cut network really takes.

The table predicts; what it predicts wrongly is found by measuring the cut network end to end, and
the predicted limit is moved by the ratio until the real one is met within `WITHIN`, or halfway
between the nearest limits that were too high and too low, where the ratio leads out of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from .budgets import shortest
from .candidates import Candidates
from .labels import Mask
from .planning import shaped
from .table import Table, whole_inputs

WITHIN = 0.03
ROUNDS = 8  # networks that are measured, at most
NEAR = 1e-3  # limits nearer to each other than this share of the target choose the same
NAMES = ("latency", "latency_ms")


@dataclass(frozen=True)
class Timed:
    """What was chosen: the candidates that go, what the cut network takes, and what was asked."""

    gone: list[int]
    met: bool
    real: float
    target: float
    rounds: int

    @property
    def ratio(self) -> float:
        """What it takes over what was asked."""
        return self.real / self.target

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Smaller is better: near the target, below it, nearest."""
        return abs(self.ratio - 1) > WITHIN, self.ratio > 1, abs(self.ratio - 1)

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
            why = "another budget decides, or the next unit saves much at once"
        return f"{text}; not within {WITHIN:.0%}: {why}"


def timed(found: Candidates, table: Table, ordered: Callable[[Candidates], Sequence[int]]) -> Timed:
    """Choose, measure, correct the limit, and choose again, until the real latency is near.

    A network that seems near is measured once more, and the mean of both counts: of many noisy
    measurements the one that happens to fit would be taken otherwise. `found.allowed` is left with
    the corrected limit.
    """
    place = next(k for k, budget in enumerate(found.allowed) if budget.name in NAMES)
    target = limit = found.allowed[place].limit
    low, high = 0.0, table.whole  # limits with which it was fast enough, and too slow
    best: Timed | None = None
    seen: dict[bytes, Timed] = {}
    points = [(0.0, 0.0)]  # limits, and what the networks took
    while high - low > NEAR * target:
        allowed = list(found.allowed)
        allowed[place] = replace(allowed[place], limit=limit)
        found.allowed = tuple(allowed)
        gone, met = shortest(found, found.allowed, np.asarray(ordered(found), np.int64))
        alive = found.without(gone)
        now = seen.get(alive.tobytes())
        again = now is not None
        if now is None:
            if len(seen) == ROUNDS:
                break
            real = _measured(found, table, shaped(found.groups, alive), place)
            if abs(real / target - 1) <= WITHIN and table.measure.clock is not None:
                real = (real + _measured(found, table, shaped(found.groups, alive), place)) / 2
            # What the table takes for too slow may be fast enough, where the other budgets hold.
            if not met:
                met = real <= target and _holds(found, alive, place)
                limit = max(limit, table.count(alive[found.groups.units.label]))
            now = Timed(gone, met, real, target, len(seen) + 1)
            seen[alive.tobytes()] = now
        best = now if best is None or now.rank < best.rank else best
        if not now.met or 1 - WITHIN <= now.ratio <= 1:
            break
        low, high = (low, min(high, limit)) if now.ratio > 1 else (max(low, limit), high)
        step = limit * _step(points, limit, now)
        points = [*points, (limit, now.real)]
        limit = step if low < step < high and not again else (low + high) / 2
    assert best is not None
    table.measure.save()
    return replace(best, rounds=len(seen))


def _step(points: Sequence[tuple[float, float]], limit: float, now: Timed) -> float:
    """Return the factor by which the limit is to change: by the line through the logarithms of
    this limit and the last one, as most of a small network's time is no work.
    """
    aim = 1 - WITHIN / 3 if now.ratio > 1 else 1.0  # a little below, where it was above
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


def _measured(found: Candidates, table: Table, small: nn.Module, place: int) -> float:
    """What a cut network takes; a share of the whole one's time is measured beside it."""
    inputs = whole_inputs(found.groups)
    if found.allowed[place].name == "latency":
        return table.measure.beside(small, found.groups.model, table.whole, inputs)
    return table.measure.now(small, inputs)
