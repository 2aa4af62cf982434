"""Prune in one call: comb, score, choose, cut, verify."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .choose import choose
from .comb import comb
from .cut import cut
from .errors import InputError, UnknownName
from .importance import resolve, score
from .plan import Plan
from .repair import helps
from .repair import repair as mended
from .trace import Inputs, named_tensors


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    importance: Any = "magnitude",
    target: str | Mapping[str, float],
    verify: bool = True,
    repair: Iterable[Inputs] | Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, Plan]:
    """Return a smaller copy of a network and the plan that made it; the network itself is not
    changed.

    Args:
        model: any network that `torch.export` can trace.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        importance: a name of the shelf, {name: options}, or a callable (model, groups) -> scores.
            One that needs gradients takes those that the model holds; one that needs activations
            those of the example inputs.
        target: share of a cost to be left: "macs=0.5".
        verify: prove the result against the masked network.
        repair: batches of inputs, all of one shape; what is kept then makes good for what goes (see
            `cpd.repair`). The result is proved against the repaired network, not the one given.
            A mapping has them as "batches" beside options of `cpd.repair`, and "judge" beside that:
            batches of other samples, where outputs must come nearer to the whole network's, or
            nothing is repaired and the plan's notes say so.
        **options: of `comb` (ignore, exact, unknown) and `choose` (strategy, ranking, multiple_of,
            ...).

    Raises what `comb`, `choose`, `repair` and `cut` raise.
    """
    comb_options, choose_options = split("prune", options, ("importance", "repair", "verify"))
    chosen = resolve(importance)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    groups = comb(model, example_inputs, **comb_options)
    scores = score(chosen, model, groups, example_inputs)
    plan = choose(groups, scores, target, **choose_options)
    if repair is not None:
        given = repair if isinstance(repair, Mapping) else {"batches": repair}
        model, plan = _repaired(model, plan, **given)
    return cut(model, plan, verify=verify), plan


def _repaired(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Inputs] = (),
    judge: Iterable[Inputs] | None = None,
    **options: Any,
) -> tuple[nn.Module, Plan]:
    if unknown := options.keys() - set(_keywords(mended)):
        valid = {"batches", "judge", *_keywords(mended)}
        raise UnknownName("option of repair", min(unknown), valid)
    found = mended(model, plan, batches, **options)
    if judge is None or helps(model, plan, dict(named_tensors(found)), judge):
        return found, plan
    note = "repair: left out, on other samples it brings the outputs no nearer to what they were"
    return model, replace(plan, notes=(*plan.notes, note))


def split(
    verb: str, options: Mapping[str, Any], more: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that `comb` and those that `choose` takes.

    Raises `UnknownName` for others; `more` are those that the verb itself takes, which it may mean.
    """
    found = [
        {key: value for key, value in options.items() if key in _keywords(function)}
        for function in (comb, choose)
    ]
    unknown = sorted(set(options) - set(found[0]) - set(found[1]))
    if unknown:
        valid = {*_keywords(comb), *_keywords(choose), *more}
        raise UnknownName(f"option of {verb}", unknown[0], valid)
    return found[0], found[1]


def _keywords(function: Any) -> list[str]:
    return [
        p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
