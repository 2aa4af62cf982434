"""Candidates: the units that may go, with their scores and the keys by which they are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, lcm

import numpy as np
import torch
from numpy.typing import NDArray

from .branches import KIND, Branch
from .channels import Ids
from .errors import InputError
from .groups import CouplingGroup, Groups
from .labels import Mask
from .terms import Cost
from .units import Family

Scores = Mapping[str, torch.Tensor]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Source:
    """A family that candidates come from: what is left of it now."""

    group: CouplingGroup | Branch
    family: Family
    kept: int


@dataclass(frozen=True, eq=False)
class Budget:
    """How much of a cost may be left: `limit` of `whole`, in the cost's own unit."""

    name: str
    cost: Cost
    limit: float
    whole: float


@dataclass(eq=False)
class Candidates:
    """All candidates as arrays of one length; those of one family in the order in which they may
    go.

    `family[i]` indexes `sources`. `score[i]` is the importance of what goes, `key[i]` what
    `ranking` compares, `units[i]` how many units of a family go at once, `ties[i]` of how many
    families, which go in step. `classes`: (candidate, class) pairs, blocks with all that is in
    them. `before`: the classes that are alive before anything goes;
    `values`: the importance of each class; `allowed`: the budgets, which all must hold.
    """

    groups: Groups
    sources: list[Source]
    family: Ids
    score: Floats
    key: Floats
    units: Ids
    ties: Ids
    classes: tuple[Ids, Ids]
    limited: int
    before: Mask
    values: Floats
    allowed: tuple[Budget, ...] = ()

    def __len__(self) -> int:
        return len(self.family)

    def gone_at(self, order: Ids, alive: Mask) -> Ids:
        """Return for each class the place in `order` at which it goes; len(order) + 1 where it
        stays.
        """
        place = np.full(len(self), len(order) + 1, np.int64)
        place[order] = np.arange(len(order))
        gone = np.where(alive, len(order) + 1, -1)
        candidate, classes = self.classes
        np.minimum.at(gone, classes, place[candidate])
        return gone

    def without(self, gone: Sequence[int]) -> Mask:
        """Return the classes that are alive once these candidates are gone."""
        candidate, classes = self.classes
        alive = self.before.copy()
        alive[classes[np.isin(candidate, gone)]] = False
        return alive

    def lost(self, alive: Mask) -> float:
        """Return the predicted loss: the importance of all that went, each channel once."""
        return float(self.values[self.before & ~alive].sum())

    def ranked(self) -> Floats:
        """Return what candidates weigh by their keys: what `ranking` compares, for each unit."""
        return self.key * self.units * self.ties

    def kind(self, number: int) -> str:
        """Return the kind of a candidate's family."""
        return self.sources[self.family[number]].family.kind


@dataclass(frozen=True)
class Rules:
    """The options of `choose` that bound and rank candidates."""

    ranking: str
    multiple_of: int
    min_keep: float
    limits: Mapping[str, float]
    seed: int
    uniform: bool
    held: Mask


def candidates(groups: Groups, scores: Scores, alive: Mask, rules: Rules) -> Candidates:
    """Return all units that may go, scored and ranked (see `choose`)."""
    values = _class_scores(groups, scores)
    tie = np.random.default_rng(rules.seed).random(len(values))
    weights = _Weights(groups, values)
    sources: list[Source] = []
    pools: list[object] = []
    parts: list[tuple[NDArray[np.int64], Floats, list[int]]] = []
    means: list[float] = []
    limited = 0
    for group in groups:
        for position, family in enumerate(group.families):
            steps, kept = _ordered(weights, family, tie, (alive, alive & ~rules.held))
            removable = _removable(group, family, kept, len(steps), rules)
            limited += int(removable < kept)
            chunk = rules.multiple_of if family.kind in ("channels", "head dims") else 1
            sizes = _chunks(kept, removable, lcm(chunk, family.multiple))
            values_of = weights.of(steps.ravel()).reshape(steps.shape).sum(1)
            means.append(sum(float(weights.of(c).mean()) for c in family.clusters))
            steps = steps[: sum(sizes)]
            parts.append((steps, values_of[: len(steps)], sizes))
            pool = {"isomorphic": (group.kind, position), "uniform": len(sources)}
            pools.append(pool.get(rules.ranking, "all"))
            sources.append(Source(group, family, kept))
    for branch in _branches(groups, weights, alive, rules):
        pools.append({"isomorphic": branch.kind, "uniform": KIND}.get(rules.ranking, "all"))
        means.append(1.0)  # each is a family of its own: over its own mean all would be alike
        steps = np.array([[branch.number]])
        parts.append((steps, weights.of(steps.ravel()), [1]))
        sources.append(Source(branch, branch.family, 1))
    found = _gathered(groups, sources, parts, limited, (alive, values))
    if rules.uniform:
        found = _in_step(found, pools, means)
    _rank(found, pools, rules.ranking, means)
    return _protected(found, alive)


def _branches(groups: Groups, weights: _Weights, alive: Mask, rules: Rules) -> list[Branch]:
    """Return the branches that may go: of those that are alike a share of `min_keep` stays, the
    most important ones.
    """
    alike: dict[object, list[Branch]] = {}
    for branch in groups.branches:
        alike.setdefault(branch.kind, []).append(branch)
    found: set[int] = set()
    for mine in alike.values():
        left = [branch for branch in mine if alive[branch.number]]
        free = [
            branch for branch in left
            if rules.limits.get(branch.name, 1.0) > 0 and not rules.held[branch.number]
        ]  # fmt: skip
        stay = max(ceil(rules.min_keep * len(mine)), 0) - (len(left) - len(free))
        free.sort(key=lambda branch: float(weights.total[branch.number]))
        found |= {branch.number for branch in free[: len(free) - max(stay, 0)]}
    return [branch for branch in groups.branches if branch.number in found]


class _Weights:
    """What classes weigh; a block weighs what all its channels weigh."""

    def __init__(self, groups: Groups, values: Floats) -> None:
        self.total = values.copy()
        for block in groups.units.below:
            self.total[block] = values[groups.units.closure([block])].sum()

    def of(self, classes: Ids) -> Floats:
        return self.total[classes]


def _class_scores(groups: Groups, scores: Scores) -> Floats:
    values = np.zeros(groups.units.count)
    for group in groups:
        if group.name not in scores:
            raise InputError(
                f"scores have no entry for group {group.name!r}; give one vector for each group"
            )
        vector = torch.as_tensor(scores[group.name]).detach().double().cpu().numpy()
        if vector.shape != (group.size,):
            raise InputError(
                f"scores of group {group.name!r} have shape {vector.shape}, not ({group.size},)"
            )
        if not np.isfinite(vector).all():
            raise InputError(f"scores of group {group.name!r} are not finite")
        values[group.classes] = vector
    return values


def _ordered(
    weights: _Weights, family: Family, tie: Floats, masks: tuple[Mask, Mask]
) -> tuple[Ids, int]:
    """Return the units that could go, least important first, shape (units, clusters); and how many
    are left. `masks`: the classes that are alive, and those of them that may go.
    """
    alive, free = masks
    columns = []
    gone = 0
    for cluster in family.clusters:
        left = int(alive[cluster].sum())
        if left:  # otherwise the whole row has gone
            gone = max(gone, len(cluster) - left)
            may = cluster[free[cluster]]
            columns.append(may[np.lexsort((tie[may], weights.of(may)))])
    if not columns:
        return np.empty((0, 1), np.int64), 0
    length = min(len(column) for column in columns)
    return np.stack([column[:length] for column in columns], axis=1), family.width - gone


def _removable(group: CouplingGroup, family: Family, kept: int, free: int, rules: Rules) -> int:
    most = min(1 - rules.min_keep, rules.limits.get(group.name, 1.0))
    least = max(1, ceil(family.width * (1 - most) - 1e-9))
    return max(0, min(free, kept - least))


def _chunks(kept: int, removable: int, multiple_of: int) -> list[int]:
    """Sizes of the steps by which a width goes down to multiples of `multiple_of`."""
    if multiple_of == 1:
        return [1] * removable
    first = kept % multiple_of or multiple_of
    if kept <= multiple_of or first > removable:
        return []
    return [first] + [multiple_of] * ((removable - first) // multiple_of)


def _gathered(
    groups: Groups,
    sources: list[Source],
    parts: list[tuple[NDArray[np.int64], Floats, list[int]]],
    limited: int,
    held: tuple[Mask, Floats],
) -> Candidates:
    family, units, score, rows, classes = [], [], [], [], []
    first = 0
    for number, (steps, values, sizes) in enumerate(parts):
        length = np.array(sizes, np.int64)
        family.append(np.full(len(length), number))
        units.append(length)
        starts = np.cumsum(length) - length
        score.append(np.add.reduceat(values, starts) if len(length) else np.empty(0))
        row = np.repeat(np.arange(len(length)), length) + first
        rows.append(np.repeat(row, steps.shape[1]))
        classes.append(steps.ravel())
        first += len(length)
    empty = [np.empty(0, np.int64)]
    pairs = _with_blocks(groups, np.concatenate(rows or empty), np.concatenate(classes or empty))
    total = np.concatenate(score or [np.empty(0)])
    counts = np.concatenate(units or empty)
    numbers = np.concatenate(family or empty)
    key = total / np.maximum(counts, 1) / _channels(sources)[numbers]
    one = np.ones(len(counts), np.int64)
    return Candidates(groups, sources, numbers, total, key, counts, one, pairs, limited, *held)


def _channels(sources: list[Source]) -> Floats:
    """Return what the score of one unit is divided by to be compared: a branch counts as the mean
    of its channels.
    """
    of = [len(x.group.inside) if isinstance(x.group, Branch) else 1 for x in sources]
    return np.array(of, np.float64)


def _with_blocks(groups: Groups, rows: Ids, classes: Ids) -> tuple[Ids, Ids]:
    """Add to each block all classes that die with it."""
    all_rows, all_classes = [rows], [classes]
    is_block = np.isin(classes, np.fromiter(groups.units.below, np.int64, len(groups.units.below)))
    for row, block in zip(rows[is_block].tolist(), classes[is_block].tolist(), strict=True):
        closure = groups.units.closure([block])
        all_rows.append(np.full(len(closure), row))
        all_classes.append(closure)
    return np.concatenate(all_rows), np.concatenate(all_classes)


def _in_step(found: Candidates, pools: list[object], means: list[float]) -> Candidates:
    """Let families of one width in isomorphic groups go step by step, all at once.

    Step k of all of them becomes one candidate, under the first of them. Its score is their sum,
    its key their mean; in `pools` and `means` they become one pool, and have the mean of theirs.
    """
    ties: dict[object, list[int]] = {}
    for number, source in enumerate(found.sources):
        if isinstance(source.group, Branch):  # each by itself: all that are alike would all go
            ties[number] = [number]
            continue
        at = source.group.families.index(source.family)
        alike = (source.group.kind, at, source.family.kind, source.family.width, source.kept)
        ties.setdefault(alike, []).append(number)
    new = np.full(len(found), -1, np.int64)
    first: list[int] = []
    count: list[int] = []
    for families in ties.values():
        mean = sum(means[number] for number in families) / len(families)
        for number in families:
            pools[number], means[number] = pools[families[0]], mean
        steps = [np.flatnonzero(found.family == number) for number in families]
        same = np.stack([found.units[mine[: min(map(len, steps))]] for mine in steps])
        for k in range(int(np.minimum.accumulate((same == same[0]).all(0)).sum())):
            new[[mine[k] for mine in steps]] = len(first)
            first.append(int(steps[0][k]))
            count.append(len(families))
    candidate, classes = found.classes
    pairs = new[candidate] >= 0
    score, key, times = np.zeros(len(first)), np.zeros(len(first)), np.array(count, np.int64)
    np.add.at(score, new[new >= 0], found.score[new >= 0])
    np.add.at(key, new[new >= 0], found.key[new >= 0])
    tied = (new[candidate[pairs]], classes[pairs])
    family, units = found.family[first], found.units[first]
    found = replace(found, family=family, units=units, ties=times, classes=tied)
    return replace(found, score=score, key=key / times)


def _rank(found: Candidates, pools: list[object], ranking: str, means: list[float]) -> None:
    """Turn scores into keys: the share of the pool that has gone by then, what went in earlier
    events included, or the score itself.

    Within a pool each family's scores count over their mean: raw ones differ by orders of magnitude
    between layers of different size and depth, and whole layers would go first.
    """
    starts = np.flatnonzero(np.diff(found.family, prepend=-1))
    ends = [*starts[1:], len(found)] if len(starts) else []
    for a, b in zip(starts, ends, strict=True):
        found.key[a:b] = np.maximum.accumulate(found.key[a:b])
    if ranking == "global":
        return
    scale = np.array(means)[found.family] if len(found) else np.empty(0)
    found.key = found.key / np.where(scale > 0, scale, 1.0)
    total: dict[object, int] = {}
    gone: dict[object, int] = {}
    for pool, source in zip(pools, found.sources, strict=True):
        total[pool] = total.get(pool, 0) + source.family.width
        gone[pool] = gone.get(pool, 0) + source.family.width - source.kept
    names = {pool: number for number, pool in enumerate(total)}
    pool_of = np.array([names[pool] for pool in pools], np.int64)[found.family]
    for pool, number in names.items():
        mine = np.flatnonzero(pool_of == number)
        order = mine[np.argsort(found.key[mine], kind="stable")]
        units = found.units[order] * found.ties[order]
        found.key[order] = (gone[pool] + np.cumsum(units) - units / 2) / total[pool]


def _protected(found: Candidates, alive: Mask) -> Candidates:
    """Of every run that must not vanish, hold back what would take its best channel, and what
    follows that in its family.
    """
    candidate, classes = found.classes
    stays = np.ones(len(found), bool)
    of_branch = np.array([isinstance(x.group, Branch) for x in found.sources], bool)
    whole = of_branch[found.family] if len(found) else np.ones(0, bool)
    for run in found.groups.units.nonempty:
        left = run[alive[run]]
        mine = stays[candidate] & np.isin(classes, left) & ~whole[candidate]
        first = np.full(len(alive), np.inf)
        np.minimum.at(first, classes[mine], found.key[candidate[mine]])
        if not len(left) or not np.isfinite(first[left]).all():
            continue
        best = left[first[left].argmax()]
        for number in candidate[mine & (classes == best)].tolist():
            after = np.arange(len(found)) >= number
            stays &= ~(after & (found.family == found.family[number]))
    return _only(found, stays)


def _only(found: Candidates, stays: Mask) -> Candidates:
    index = np.cumsum(stays) - 1
    candidate, classes = found.classes
    pairs = stays[candidate]
    return replace(
        found,
        family=found.family[stays],
        score=found.score[stays],
        key=found.key[stays],
        units=found.units[stays],
        ties=found.ties[stays],
        classes=(index[candidate[pairs]], classes[pairs]),
    )
