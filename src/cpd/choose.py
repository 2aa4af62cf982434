"""Choose: which units go, until the target is met.

Every strategy has one signature: it gets the candidate units and returns the order in which they
go. The shortest run of that order that meets the target is the plan. Units of one family go in the
order of their scores, from the least important; a family never falls under its minimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ._numbers import is_number, whole
from ._shelf import check_options, keywords, one
from .budgets import COSTS, TIMES, budgets, notes, parse_target, shortest
from .candidates import Candidates, Rules, candidates
from .errors import InputError, UnknownName, UnreachableTarget
from .groups import Groups
from .labels import Mask
from .limits import Keep, Limits, kept_classes, limits_of
from .measure import measurer
from .plan import Plan
from .planning import alive_of, plan_of
from .strategies import STRATEGIES
from .table import Table, alignment
from .timing import Timed, timed

Strategy = Callable[[Candidates], Sequence[int]]
RANKINGS = ("isomorphic", "global", "uniform")


def choose(
    groups: Groups,
    scores: Mapping[str, torch.Tensor],
    target: str | Mapping[str, float],
    *,
    strategy: str | Mapping[str, Any] | Strategy = "oneshot",
    ranking: str = "isomorphic",
    multiple_of: int | str = 1,
    min_keep: float = 0.1,
    limits: Limits | None = None,
    keep: Keep | None = None,
    unreachable: str = "error",
    seed: int = 0,
    start: Plan | None = None,
    uniform: bool = False,
    measure: Any = "onnx",
) -> Plan:
    """Choose what to remove.

    Args:
        groups: from `comb`.
        scores: group name -> importance of its channels, shape (group.size,); small goes first.
        target: share of a cost that is to be left, "macs=0.5"; several must all hold. Costs: macs,
            params, memory, latency; latency_ms is in milliseconds.
        strategy: "oneshot" (least important first), "greedy" (the paper's: each event cuts the one
            group whose least important channels sum up to least), "knapsack" (the least importance
            lost that linear programmes find), "uniform" (the same share of every family, in step),
            one of them with options ({"greedy": {"ranked": True}}), or a function of `Candidates`.
        ranking: "isomorphic" ranks units among structurally identical groups and takes the same
            share of each kind; "global" compares raw scores; "uniform" takes the same share of
            every family. "oneshot" goes by it; "greedy" and "knapsack" by raw importance unless
            they are `ranked`.
        multiple_of: kept channels come in multiples of this, where a family is at least that wide;
            "auto" measures which multiple pays.
        min_keep: share of each family that always stays (at least one unit).
        limits: name or pattern of groups, or of modules that make their channels -> largest share
            of the units that may go (0: none); or a function of a `CouplingGroup` that returns it,
            or None.
        keep: module or tensor -> numbers of the channels it makes that stay, or "all".
        unreachable: "error", or "closest" to take what can be reached.
        seed: breaks ties between equal scores.
        start: a plan to go on from; what it removed stays removed.
        uniform: layers that are alike in structure and width keep the same number, so that a
            smaller configuration of the same class can describe the result.
        measure: what measures latency: "onnx", "eager", one of them with options, or a function
            (module, inputs) -> milliseconds (see `cpd.measure`).

    Raises:
        UnreachableTarget: with the closest reachable costs and what blocks more.
        InputError: scores, target or options that cannot be used.
    """
    shares = parse_target(target, COSTS)
    if unreachable not in ("error", "closest"):
        raise UnknownName("handling of unreachable targets", unreachable, ("error", "closest"))
    if ranking not in RANKINGS:
        raise UnknownName("ranking", ranking, RANKINGS)
    _check_options(multiple_of, min_keep, seed)
    clock = measurer(measure) if multiple_of == "auto" or set(shares) & set(TIMES) else None
    if clock is not None and multiple_of == "auto":
        multiple_of = alignment(groups, clock)
        clock.save()
    table = Table(groups, clock) if clock is not None and set(shares) & set(TIMES) else None
    before = groups.everything() if start is None else alive_of(groups, start)
    name, ordered = _strategy(strategy)
    uniform = uniform or ordered is STRATEGIES["uniform"]
    bounds = limits_of(groups, limits)
    held = kept_classes(groups, keep)
    rules = Rules(ranking, int(multiple_of), min_keep, bounds, seed, uniform, held)
    found = candidates(groups, scores, before, rules)
    found.allowed = budgets(groups, shares, table)
    gone, met, taken = _chosen(found, ordered, table)
    alive = found.without(gone)
    if not met and unreachable == "error":
        raise _unreachable(groups, found, alive, shares, taken)
    options = {
        "target": shares, "strategy": name, "ranking": ranking, "multiple_of": multiple_of,
        "min_keep": min_keep, "limits": bounds if callable(limits) else dict(limits or {}),
        "seed": seed, "uniform": uniform, "keep": {k: _plain(v) for k, v in (keep or {}).items()},
        **groups.options,
    }  # fmt: skip
    told = [*notes(found, found.allowed, gone), *([] if taken is None else [str(taken)])]
    times = {"latency_ms": (table.whole, taken.real)} if table and taken else {}
    counted = [name for name in shares if name not in TIMES]
    return plan_of(groups, alive, options, costs=counted, measured=times, notes=told)


def _chosen(
    found: Candidates, ordered: Strategy, table: Table | None
) -> tuple[list[int], bool, Timed | None]:
    """Return what goes, whether the target is met, and the latency where the target names it."""
    if table is not None:
        taken = timed(found, table, ordered)
        return taken.gone, taken.met, taken
    order = np.asarray(ordered(found), np.int64)
    return *shortest(found, found.allowed, order), None


def _plain(numbers: Any) -> Any:
    return numbers if isinstance(numbers, str) else [int(number) for number in numbers]


def _check_options(multiple_of: int | str, min_keep: float, seed: int) -> None:
    whole("seed", seed, 0)
    if isinstance(multiple_of, str):
        if multiple_of != "auto":
            raise InputError(f'multiple_of is {multiple_of!r}; give a whole number, or "auto"')
    elif int(multiple_of) != multiple_of or multiple_of < 1:
        raise InputError(f"multiple_of is {multiple_of!r}; give a whole number of at least 1")
    if not (is_number(min_keep) and 0 <= min_keep <= 1):
        raise InputError(f"min_keep is {min_keep!r}; give a share between 0 and 1")


def _strategy(strategy: str | Mapping[str, Any] | Strategy) -> tuple[Any, Strategy]:
    """Return a strategy and what the plan calls it: its name, with its options where it has any."""
    if callable(strategy):
        return getattr(strategy, "__name__", "own"), strategy
    name, options = one("strategy", strategy)
    if name not in STRATEGIES:
        raise UnknownName("strategy", name, STRATEGIES)
    function = STRATEGIES[name]
    check_options("strategy", name, options, keywords(function)[1:])
    return (name, function) if not options else ({name: options}, partial(function, **options))


def _unreachable(
    groups: Groups,
    found: Candidates,
    alive: Mask,
    shares: Mapping[str, float],
    taken: Timed | None,
) -> UnreachableTarget:
    of_ids = alive[groups.units.label]
    closest = {}
    for x in found.allowed:
        left = taken.real if taken and x.name in TIMES else x.cost.count(of_ids)
        closest[x.name] = left / (1 if x.name == "latency_ms" else max(x.whole, 1e-12))
    blockers = []
    if found.limited:
        blockers.append(
            f"{found.limited} families are at their minimum (min_keep, limits, multiple_of)"
        )
    by_reason: dict[str, int] = {}
    weights = {name for name, _ in groups.model.named_parameters()}
    for item in groups.frozen:
        if item.tensor in weights and not item.reason.startswith("kernel axis"):
            by_reason[item.reason] = by_reason.get(item.reason, 0) + item.count
    for reason, count in sorted(by_reason.items(), key=lambda pair: -pair[1])[:5]:
        blockers.append(f"{count} indices kept: {reason}")
    wanted = ", ".join(f"{name}={share:g}" for name, share in shares.items())
    reach = ", ".join(f"{name}={value:.4f}" for name, value in closest.items())
    return UnreachableTarget(
        f"target {wanted} cannot be reached; the closest is {reach}. What blocks more: "
        + "; ".join(blockers)
        + '. Lower min_keep or the limits, or pass unreachable="closest".',
        closest=closest,
        blockers=tuple(blockers),
    )
