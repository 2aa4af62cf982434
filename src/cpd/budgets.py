"""Budgets: what a target allows of each cost, and how near below it a choice comes.

A target names costs and how much of each is to be left: `"macs=0.5,memory=0.6"`. All budgets hold
at once. What a strategy took too much is given back, most important units first, until no unit that
went fits any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .candidates import Budget, Candidates
from .errors import InputError, UnknownName
from .groups import Groups
from .labels import Mask
from .liveness import Peak
from .table import Table
from .terms import Tally

COSTS = ("macs", "params", "memory", "latency", "latency_ms")
TIMES = COSTS[3:]
NEAR = 0.005  # a budget that is met this closely from below needs no explanation


def parse_target(
    target: str | Mapping[str, float], costs: Sequence[str] | None = None
) -> dict[str, float]:
    """Return cost -> share of a target such as "macs=0.5", "macs=0.5,params=0.6" or a dict.

    `costs`: the names that are known; any name where it is None.

    Raises `InputError` for another form, a cost named twice and shares that are not in (0, 1],
    `UnknownName` for unknown costs.
    """
    if isinstance(target, str):
        pairs: list[tuple[str, Any]] = [part.partition("=")[::2] for part in target.split(",")]
    elif isinstance(target, Mapping):
        pairs = [(key, value) for key, value in target.items()]
    else:
        raise InputError(f'target is {target!r}; give a string like "macs=0.5" or a dict')
    shares: dict[str, float] = {}
    for key, value in pairs:
        name = str(key).strip()
        if costs is not None and name not in costs:
            raise UnknownName("cost in the target", name, costs)
        if name in shares:
            raise InputError(f"target names {name} twice: {target!r}; give each cost one share")
        shares[name] = _share_left(name, value)
    if shares.keys() >= set(TIMES):
        raise InputError("target names latency and latency_ms; give one of them")
    if not shares:
        raise InputError('target is empty; give a string like "macs=0.5"')
    return shares


def partly(shares: Mapping[str, float], done: float) -> dict[str, float]:
    """Return the target of a part of the way, 0 < done <= 1: on a straight line from all of a cost.

    Of `latency_ms` the whole is not known: it gets 1 / done times the final one, which never asks
    for more than the end does, as nothing that went comes back.
    """
    return {
        cost: share / done if cost == "latency_ms" else 1 - (1 - share) * done
        for cost, share in shares.items()
    }


def _share_left(name: str, value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f'target {name}={value!r} is not a number; write "{name}=0.5"') from error
    if name == "latency_ms" and 0 < share < float("inf"):
        return share
    if not 0 < share <= 1:
        raise InputError(
            f"target {name}={share:g}: give the share that is to be left, over 0 and at most 1 "
            "(0.5 keeps half)"
        )
    return share


def budgets(
    groups: Groups, shares: Mapping[str, float], table: Table | None = None
) -> tuple[Budget, ...]:
    """Return the budgets of a target; those of time need a table.

    Raises `InputError` for a cost that the network does not have at all.
    """
    everything = groups.everything()
    found = []
    for name, share in shares.items():
        if table is not None and name in TIMES:
            limit = share if name == "latency_ms" else share * table.whole
            found.append(Budget(name, table, limit, table.whole))
            continue
        whole = groups.cost(name, everything)
        if not whole:
            raise InputError(f"the network has no {name} to take a share of; name another cost")
        found.append(Budget(name, groups.counted(name), share * whole, whole))
    return tuple(found)


class Ledger:
    """Which candidates are gone, and what is left of each budget's cost."""

    def __init__(
        self, found: Candidates, limits: Iterable[Budget], gone: Iterable[int] = ()
    ) -> None:
        self.found, self.budgets = found, tuple(limits)
        candidate, classes = found.classes
        order = np.argsort(candidate, kind="stable")
        self._classes = classes[order]
        self._ends = np.searchsorted(candidate[order], np.arange(len(found) + 1))
        self._times = np.zeros(len(found.before), np.int64)
        for number in gone:
            self._times[self.of(number)] += 1
        label = found.groups.units.label
        self.tallies = [Tally(budget.cost, label, self.alive) for budget in self.budgets]

    def of(self, number: int) -> Any:
        """Return the classes of a candidate."""
        return self._classes[self._ends[number] : self._ends[number + 1]]

    @property
    def alive(self) -> Mask:
        """Return the classes that are left."""
        left: Mask = self.found.before & (self._times == 0)
        return left

    def alive_with(self, change: int, numbers: Iterable[int]) -> Mask:
        """Return what would be left if these also went (+1) or came back (-1)."""
        numbers = list(numbers)
        for number in numbers:
            self._times[self.of(number)] += change
        left = self.alive
        for number in numbers:
            self._times[self.of(number)] -= change
        return left

    def change(self, change: int, numbers: Iterable[int]) -> None:
        """Let candidates go (+1) or come back (-1)."""
        for number in numbers:
            self._times[self.of(number)] += change
        alive = self.alive
        for tally in self.tallies:
            tally.move(alive)

    def reset(self, other: Ledger) -> None:
        """Let exactly those candidates be gone that are in another ledger."""
        self._times = other._times.copy()
        alive = self.alive
        for tally in self.tallies:
            tally.move(alive)

    def meets(self, alive: Mask) -> bool:
        """Say whether all budgets hold with these classes."""
        pairs = zip(self.tallies, self.budgets, strict=True)
        return all(tally.at(alive) <= budget.limit for tally, budget in pairs)


def shortest(found: Candidates, limits: Sequence[Budget], order: Any) -> tuple[list[int], bool]:
    """Return the shortest run of `order` that meets all budgets, and whether one does.

    What of it is not needed is given back (see `given_back`).
    """
    gone_at = found.gone_at(order, found.before)
    label = found.groups.units.label

    def meets(length: int) -> bool:
        alive_ids = (gone_at >= length)[label]
        return all(budget.cost.count(alive_ids) <= budget.limit for budget in limits)

    numbers: list[int] = order.tolist()
    if not meets(len(numbers)):
        return numbers, False
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle + 1
    return given_back(found, limits, numbers[:high]), True


def given_back(found: Candidates, limits: Sequence[Budget], gone: list[int]) -> list[int]:
    """Return those of `gone` that must go for the budgets to hold.

    The last ones to go come back first, one by one, as long as all budgets hold: what is free is
    shared by all families that it fits. A family of which one no longer fits is done. What a unit
    has in common with another one that goes stays gone.
    """
    ledger = Ledger(found, limits, gone)
    back: set[int] = set()
    done: set[int] = set()
    for number in reversed(gone):
        family = int(found.family[number])
        if family in done:
            continue
        if ledger.meets(ledger.alive_with(-1, [number])):
            ledger.change(-1, [number])
            back.add(number)
        else:
            done.add(family)
        if len(done) == len(found.sources):
            break
    return [number for number in gone if number not in back]


def notes(found: Candidates, limits: Sequence[Budget], gone: Sequence[int]) -> tuple[str, ...]:
    """Say of each budget that is not met closely how far off it is, and why; of memory, where its
    peak is.
    """
    ledger = Ledger(found, limits, gone)
    used = {b.name: t.now / b.limit for b, t in zip(limits, ledger.tallies, strict=True)}
    tight = max(used, key=lambda name: used[name], default="")
    lines = []
    for budget in limits:
        if budget.name in TIMES:
            continue  # what counts there is what is measured
        free = 1 - used[budget.name]
        why = ""
        if free < 0:
            why = f"{-free:.2%} above its budget"
        elif free > NEAR:
            reason = f"{tight} decides" if budget.name != tight else _steps(ledger, limits, gone)
            why = f"{free:.2%} below its budget; {reason}"
        said = [why] if why else []
        if isinstance(budget.cost, Peak):
            place = budget.cost.place(ledger.alive[found.groups.units.label])
            said.append(f"its peak is at {place}")
        lines += [f"{budget.name}: {'; '.join(said)}"] if said else []
    return tuple(lines)


def _steps(ledger: Ledger, limits: Sequence[Budget], gone: Sequence[int]) -> str:
    """Say why nothing more may stay: the least that any unit would add is too much."""
    if not gone:
        return "nothing had to go"
    last = {int(ledger.found.family[number]): number for number in gone}
    least, name = np.inf, ""
    for family, number in last.items():
        alive = ledger.alive_with(-1, [number])
        more = max(
            (tally.at(alive) - tally.now) / budget.limit
            for tally, budget in zip(ledger.tallies, limits, strict=True)
        )
        if more < least:
            least, name = more, ledger.found.sources[family].group.name
    return f"the smallest step back, one of {name}, takes {least:.2%}"
