"""Knapsack: the units whose importance adds up to least, at costs as they are when all are gone.

    minimise  Σ_f L_f(k_f)   subject to   C_b(k_1, …, k_F) ≤ limit_b  for every budget b

`k_f` steps of family f go; `L_f` is the importance of what goes. A cost is a sum of products of
widths, so what a step saves hangs on what else goes, and the problem is solved in turns: around the
present point each cost is counted for other widths of each family alone, the programme with these
savings is solved by `scipy.optimize.milp` (HiGHS), its answer is counted really, what was misjudged
is taken off the limits, and the answer becomes the next point where it loses less. The first points
are what "oneshot" and "greedy" choose, so the result never loses more than they do.

A programme takes steps in pieces, which become single steps from round to round, and lets one piece
for each budget be a fraction, which is rounded up: what that takes too much is given back.

Pruning as a knapsack: Y. Aflalo et al., Knapsack Pruning with Inner Distillation, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .budgets import Ledger, given_back, shortest
from .candidates import Candidates, Floats
from .channels import Ids

PIECES = 16  # steps of a family are taken in so many pieces at most, smaller from round to round
CORRECTIONS = 5
STAGES = 6


class Knapsack:
    """The problem: which steps each family has, what they lose, and what is left of each cost."""

    def __init__(self, found: Candidates, *, ranked: bool = False) -> None:
        self.found, self.ranked = found, ranked
        self.score = found.ranked() if ranked else found.score
        families = np.unique(found.family).tolist()
        self.steps: list[Ids] = [np.flatnonzero(found.family == f) for f in families]
        self.limits = np.array([budget.limit for budget in found.allowed])
        self.ledger = Ledger(found, found.allowed)
        self.weight = self.score / np.maximum(found.units, 1)
        for steps in self.steps:  # what goes later in a family never weighs less
            self.weight[steps] = np.maximum.accumulate(self.weight[steps])

    def gone(self, point: Ids) -> list[int]:
        """Return the candidates that are gone at a point, which is steps gone of each family."""
        pairs = zip(self.steps, point.tolist(), strict=True)
        return [number for steps, count in pairs for number in steps[:count].tolist()]

    def point(self, gone: Sequence[int]) -> Ids:
        """Return the point at which these candidates are gone."""
        mask = np.zeros(len(self.found), bool)
        mask[np.asarray(gone, np.int64)] = True
        return np.array([mask[steps].sum() for steps in self.steps], np.int64)

    def lost(self, point: Ids) -> float:
        """Return the importance of all that is gone, each channel once; or what its units weigh by
        rank.
        """
        gone = self.gone(point)
        return (
            float(self.score[gone].sum())
            if self.ranked
            else self.found.lost(self.found.without(gone))
        )

    def go(self, point: Ids) -> None:
        """Move the ledger to a point."""
        self.ledger.reset(Ledger(self.found, (), self.gone(point)))

    def costs(self, alive: np.ndarray) -> Floats:
        """Return what is left of each budget's cost."""
        return np.array([tally.at(alive) for tally in self.ledger.tallies], np.float64)

    def meets(self, point: Ids) -> bool:
        """Say whether all budgets hold at a point."""
        return bool((self.costs(self.found.without(self.gone(point))) <= self.limits).all())

    def ladder(self, family: int, at: int, low: int, high: int) -> tuple[Ids, Floats]:
        """Return up to `PIECES` + 1 numbers of steps from low to high, `at` among them, and the
        costs with so many of one family gone, shape (numbers, budgets), all others as at the point.
        """
        steps = self.steps[family]
        places = np.unique(np.r_[np.linspace(low, high, PIECES).round().astype(np.int64), at])
        found = []
        for count in places.tolist():
            change = steps[at:count] if count > at else steps[count:at]
            alive = self.ledger.alive_with(1 if count > at else -1, change.tolist())
            found.append(self.costs(alive))
        return places, np.stack(found)

    def losses(self, family: int, places: Ids) -> Floats:
        """Return the importance of the steps between one number of steps gone and the next."""
        total = np.r_[0.0, np.cumsum(self.score[self.steps[family]])]
        return np.diff(total[places])


def knapsack(found: Candidates, *, rounds: int = 12, ranked: bool = False) -> Sequence[int]:
    """Order candidates so that those of the best choice found come first.

    `rounds`: programmes to solve around the best point. `ranked`: a unit weighs what `ranking`
    makes of its importance, not the importance itself. Needs SciPy.
    """
    rest: list[int] = np.argsort(found.key, kind="stable").tolist()
    if not found.allowed or not len(found):
        return rest
    problem = Knapsack(found, ranked=ranked)
    best = _best(problem, [*_starts(problem), _from_whole(problem)])
    if best is None:
        return rest
    radius = 0.5
    for _ in range(rounds):
        better = _improved(problem, best, radius)
        if better is None:
            radius /= 3
        else:
            best = better
        if radius * max(map(len, problem.steps)) < 1:
            break
    chosen = set(problem.gone(best))
    return [n for n in rest if n in chosen] + [n for n in rest if n not in chosen]


def _starts(problem: Knapsack) -> list[Ids]:
    """What other orders choose: by raw scores, by rank, and by the paper's events."""
    from .strategies import greedy, oneshot

    found = problem.found
    raw = np.argsort(problem.weight, kind="stable").tolist()
    points = []
    for order in (raw, oneshot(found), greedy(found)):
        gone, met = shortest(found, found.allowed, np.asarray(order, np.int64))
        points += [problem.point(gone)] if met else []
    return points


def _from_whole(problem: Knapsack) -> Ids | None:
    """Go from nothing gone to the limits in stages, each solved around the one before."""
    point = np.zeros(len(problem.steps), np.int64)
    whole = problem.costs(problem.found.before)
    for stage in range(1, STAGES + 1):
        limits = whole + (problem.limits - whole).clip(max=0) * stage / STAGES
        next_point = _solved(problem, point, 1.0, np.maximum(limits, problem.limits))
        if next_point is None:
            return None
        point = next_point
    return _feasible(problem, point, 1.0)


def _feasible(problem: Knapsack, point: Ids, radius: float) -> Ids | None:
    """Solve around a point until the budgets really hold; then give back what need not go."""
    short = np.zeros(len(problem.limits))
    for _ in range(CORRECTIONS):
        found = _solved(problem, point, radius, problem.limits - short)
        if found is None:
            return None
        over = problem.costs(problem.found.without(problem.gone(found))) - problem.limits
        if (over <= 0).all():
            order = sorted(problem.gone(found), key=lambda number: problem.weight[number])
            return problem.point(given_back(problem.found, problem.found.allowed, order))
        short += np.maximum(over, 0)
    return None


def _improved(problem: Knapsack, point: Ids, radius: float) -> Ids | None:
    found = _feasible(problem, point, radius)
    return None if found is None or problem.lost(found) >= problem.lost(point) else found


def _best(problem: Knapsack, points: Sequence[Ids | None]) -> Ids | None:
    real = [point for point in points if point is not None and problem.meets(point)]
    return min(real, key=problem.lost, default=None)


def _solved(problem: Knapsack, point: Ids, radius: float, limits: Floats) -> Ids | None:
    """Solve the programme around a point: each family within `radius` of its steps; None where
    nothing meets the limits.

    One variable for each piece of steps that may change: 1 where it is gone.
    """
    problem.go(point)
    now = np.array([tally.now for tally in problem.ledger.tallies], np.float64)
    start = now.copy()
    places: list[Ids] = []
    losses: list[Floats] = []
    savings: list[Floats] = []
    order: list[int] = []
    for family, steps in enumerate(problem.steps):
        at, reach = int(point[family]), max(1, round(radius * len(steps)))
        found, table = problem.ladder(family, at, max(at - reach, 0), min(at + reach, len(steps)))
        start += table[0] - now
        loss, saving = problem.losses(family, found), np.diff(table, axis=0)
        first = sum(len(part) for part in losses)
        if _disordered(loss / np.diff(found), saving / np.diff(found)[:, None]):
            order += range(first, first + len(loss) - 1)
        places.append(found)
        losses.append(loss)
        savings.append(saving)
    taken = _programme(np.concatenate(losses), np.concatenate(savings), limits - start, order)
    if taken is None:
        return None
    cuts = np.cumsum([len(loss) for loss in losses])[:-1]
    counts = [int(part.sum()) for part in np.split(taken, cuts)]
    return np.array([found[count] for found, count in zip(places, counts, strict=True)], np.int64)


def _programme(losses: Floats, savings: Floats, room: Floats, order: Sequence[int]) -> Ids | None:
    """Return which pieces go: min losses · y subject to savings · y ≤ room, 0 ≤ y ≤ 1, rounded up;
    None where none do.

    `order`: numbers of pieces that go before the next one.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not len(losses):
        return None
    scale = np.maximum(np.abs(savings).max(0), 1e-12)
    rules = [LinearConstraint(csr_array((savings / scale).T), ub=room / scale)]
    if order:
        rows, first = np.arange(len(order)), np.asarray(order, np.int64)
        pairs = (np.r_[rows, rows], np.r_[first, first + 1])
        values = np.repeat([1.0, -1.0], len(order))
        shape = (len(order), len(losses))
        rules.append(LinearConstraint(csr_array((values, pairs), shape=shape), lb=0))
    answer = milp(
        losses / max(float(losses.max()), 1e-300),
        integrality=np.zeros(len(losses)),  # HiGHS prints from its search for whole numbers
        bounds=Bounds(0, 1),
        constraints=rules,
    )
    return None if answer.x is None else np.ceil(answer.x - 1e-6).astype(np.int64)


def _disordered(loss: Floats, saving: Floats) -> bool:
    """Say whether a later step might pay more than an earlier one, so that order must be told."""
    ascending = bool((np.diff(loss) >= 0).all())
    falling = bool((np.diff(saving, axis=0) >= -1e-9 * np.abs(saving[:1])).all())
    return not (ascending and falling and bool((saving <= 0).all()))
