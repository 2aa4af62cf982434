"""Candidates: the units that may go, with their scores and the keys by which they are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray

from .channels import Ids
from .errors import InputError
from .groups import CouplingGroup, Groups
from .labels import Mask
from .units import Family

Scores = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One step of a family: the classes that go together. `family` numbers the families."""

    family: int
    classes: Ids
    score: float
    key: float
    units: int


@dataclass(eq=False)
class Candidates:
    """All candidates, those of one family in the order in which they may go."""

    groups: Groups
    units: list[Candidate] = field(default_factory=list)
    limited: int = 0
    kept: dict[int, int] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)

    def closure(self, number: int) -> Ids:
        """Return the classes that go with a candidate, blocks with all that is in them."""
        classes = self.units[number].classes
        if self.kinds[self.units[number].family] == "channels":
            return classes
        return self.groups.units.closure(classes.tolist())

    def independent(self, number: int) -> bool:
        """Say whether a candidate may be put back without regard to the others."""
        return self.kinds[self.units[number].family] == "channels" and self.units[number].units == 1


def candidates(
    groups: Groups,
    scores: Scores,
    alive: Mask,
    *,
    ranking: str,
    multiple_of: int,
    min_keep: float,
    limits: Mapping[str, float],
    seed: int,
) -> Candidates:
    """Return all units that may go, scored and ranked (see `choose`)."""
    values = _class_scores(groups, scores)
    _check_limits(groups, limits)
    tie = np.random.default_rng(seed).random(len(values))
    found = Candidates(groups)
    pools: dict[object, list[tuple[int, NDArray[np.float64], list[Ids], int]]] = {}
    number = 0
    for group in groups:
        for position, family in enumerate(group.families):
            number += 1
            found.kinds[number] = family.kind
            steps, kept = _ordered(groups, family, values, tie, alive)
            removable = _removable(group, family, kept, len(steps), min_keep, limits)
            found.limited += int(removable < len(steps) or kept > len(steps))
            found.kept[number] = kept
            chunk = multiple_of if family.kind in ("channels", "head dims") else 1
            sizes = _chunks(kept, removable, chunk)
            key = {"isomorphic": (group.kind, position), "uniform": number}.get(ranking, "all")
            entry = (number, _step_scores(groups, family, values, steps), steps, removable)
            pools.setdefault(key, []).append((entry[0], entry[1], _joined(steps, sizes), family.width))
            found.units += _candidates_of(entry, sizes)
    _rank(found, pools, ranking)
    _protect(found)
    return found


def _class_scores(groups: Groups, scores: Scores) -> NDArray[np.float64]:
    values = np.zeros(groups.units.count)
    for group in groups:
        if group.name not in scores:
            raise InputError(f"scores have no entry for group {group.name!r}; give one vector for each group")
        vector = torch.as_tensor(scores[group.name]).detach().double().cpu().numpy()
        if vector.shape != (group.size,):
            raise InputError(
                f"scores of group {group.name!r} have shape {vector.shape}, not ({group.size},)"
            )
        if not np.isfinite(vector).all():
            raise InputError(f"scores of group {group.name!r} are not finite")
        values[group.classes] = vector
    return values


def _check_limits(groups: Groups, limits: Mapping[str, float]) -> None:
    for pattern, share in limits.items():
        if not any(fnmatchcase(group.name, pattern) for group in groups):
            names = ", ".join(group.name for group in groups)
            raise InputError(f"limit {pattern!r} matches no coupling group; there are: {names}")
        if not 0 <= share <= 1:
            raise InputError(f"limit {pattern}={share!r}; give the largest share that may go, 0 to 1")


def _unit_values(groups: Groups, classes: Ids, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A block weighs what all its channels weigh."""
    below = groups.units.below
    return np.array(
        [values[groups.units.closure([c])].sum() if c in below else values[c] for c in classes.tolist()]
    )


def _ordered(
    groups: Groups, family: Family, values: NDArray[np.float64], tie: NDArray, alive: Mask
) -> tuple[list[Ids], int]:
    """Return the units that could go, from the least important, and how many units are left now."""
    columns = []
    for cluster in family.clusters:
        left = cluster[alive[cluster]]
        if not len(left):
            continue  # the whole row is gone
        score = _unit_values(groups, left, values)
        columns.append(left[np.lexsort((tie[left], score))])
    if not columns:
        return [], 0
    gone = max(int((~alive[cluster]).sum()) for cluster in family.clusters if alive[cluster].any())
    length = min(len(column) for column in columns)
    return list(np.stack([column[:length] for column in columns], axis=1)), family.width - gone


def _removable(
    group: CouplingGroup,
    family: Family,
    kept: int,
    free: int,
    min_keep: float,
    limits: Mapping[str, float],
) -> int:
    share = min([1 - min_keep] + [s for p, s in limits.items() if fnmatchcase(group.name, p)])
    least = max(1, ceil(family.width * (1 - share) - 1e-9))
    return max(0, min(free, kept - least))


def _chunks(kept: int, removable: int, multiple_of: int) -> list[int]:
    """Sizes of the steps by which a width goes down to multiples of `multiple_of`."""
    if multiple_of == 1 or kept < multiple_of:
        return [1] * (removable if multiple_of == 1 else 0)
    sizes = [kept % multiple_of] if kept % multiple_of else []
    while sum(sizes) + multiple_of <= removable and kept - sum(sizes) - multiple_of > 0:
        sizes.append(multiple_of)
    return sizes if sum(sizes) <= removable else []


def _step_scores(
    groups: Groups, family: Family, values: NDArray[np.float64], steps: list[Ids]
) -> NDArray[np.float64]:
    if not steps:
        return np.empty(0)
    flat = np.stack(steps)
    return _unit_values(groups, flat.ravel(), values).reshape(flat.shape).sum(1)


def _joined(steps: list[Ids], sizes: list[int]) -> list[Ids]:
    ends = np.cumsum([0, *sizes])
    return [np.concatenate(steps[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _candidates_of(
    entry: tuple[int, NDArray[np.float64], list[Ids], int], sizes: list[int]
) -> list[Candidate]:
    number, score, steps, _ = entry
    ends = np.cumsum([0, *sizes])
    return [
        Candidate(number, classes, float(score[a:b].sum()), float(score[a:b].mean()), b - a)
        for classes, a, b in zip(_joined(steps, sizes), ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]


def _rank(found: Candidates, pools: Mapping[object, list], ranking: str) -> None:
    """Turn scores into keys: the share of the pool that has gone by then, or the score itself."""
    pool_of = {entry[0]: pool for pool, entries in pools.items() for entry in entries}
    total = {pool: sum(entry[3] for entry in entries) for pool, entries in pools.items()}
    keys = np.array([unit.key for unit in found.units])
    families = np.array([unit.family for unit in found.units])
    for number in np.unique(families):
        mine = families == number
        keys[mine] = np.maximum.accumulate(keys[mine])
    if ranking != "global":
        gone = dict.fromkeys(pools, 0)
        for position in np.argsort(keys, kind="stable"):
            unit = found.units[position]
            pool = pool_of[unit.family]
            keys[position] = (gone[pool] + unit.units / 2) / total[pool]
            gone[pool] += unit.units
    found.units = [
        Candidate(u.family, u.classes, u.score, float(k), u.units)
        for u, k in zip(found.units, keys, strict=True)
    ]


def _protect(found: Candidates) -> None:
    """Of every run that must not vanish, hold back the candidates from the best one on."""
    killer: dict[int, int] = {}
    for number in range(len(found.units)):
        for c in found.closure(number).tolist():
            killer.setdefault(c, number)
    cut_off: dict[int, int] = {}
    for run in found.groups.units.nonempty:
        numbers = [killer.get(c) for c in run.tolist()]
        if None in numbers:
            continue
        last = max((n for n in numbers if n is not None), key=lambda n: (found.units[n].key, n))
        family = found.units[last].family
        cut_off[family] = min(cut_off.get(family, last), last)
    found.units = [
        unit for n, unit in enumerate(found.units) if n < cut_off.get(unit.family, len(found.units))
    ]
