"""Prune in one call: comb, score, choose, cut, verify."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .choose import choose
from .comb import comb
from .cut import cut
from .errors import InputError, UnknownName
from .importance import resolve, score
from .plan import Plan
from .repair import repair as mended
from .trace import Inputs


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    importance: Any = "magnitude",
    target: str | Mapping[str, float],
    verify: bool = True,
    repair: Iterable[Inputs] | None = None,
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
        **options: of `comb` (ignore, exact, unknown) and `choose` (strategy, ranking, multiple_of,
            ...).

    Raises what `comb`, `choose`, `repair` and `cut` raise.
    """
    comb_options = _known(comb, options, {"model", "example_inputs"})
    choose_options = _known(choose, options, {"groups", "scores", "target"})
    unknown = set(options) - set(comb_options) - set(choose_options)
    if unknown:
        valid = {*_keywords(comb), *_keywords(choose), "importance", "repair", "verify"}
        raise UnknownName("option of prune", sorted(unknown)[0], valid)
    chosen = resolve(importance)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    groups = comb(model, example_inputs, **comb_options)
    scores = score(chosen, model, groups, example_inputs)
    plan = choose(groups, scores, target, **choose_options)
    if repair is not None:
        model = mended(model, plan, repair)
    return cut(model, plan, verify=verify), plan


def _keywords(function: Any) -> list[str]:
    return [
        p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]


def _known(function: Any, options: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    names = set(_keywords(function)) - without
    return {key: value for key, value in options.items() if key in names}
