"""What `cpd prune` does: names become scores and samples to repair with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from cpd.cli.models import named
from cpd.cli.samples import Samples
from cpd.errors import InputError

if TYPE_CHECKING:
    from cpd.plan import Plan

__all__ = ["described", "pruned"]


def pruned(
    network: nn.Module,
    inputs: Any,
    importance: Any,
    repair: int | str,
    samples: Mapping[str, Any],
    **options: Any,
) -> tuple[nn.Module, Plan]:
    """Prune in one call; ``samples`` are what `Samples` takes, scores and repair are taken on them.

    Without data (`samples["data"]` is nothing) only importances that read weights alone will do.
    """
    import cpd
    from cpd.compress.run import AUTO_REPAIR
    from cpd.importance import resolve

    if repair != "auto" and not (isinstance(repair, int) and repair >= 0):
        raise InputError(f"repair is a number of batches, 0 for none, or auto; got {repair!r}")
    spec = named("importance", importance)
    if samples["data"] is None:
        needy = resolve(spec)
        reads = needy.needs_gradient or getattr(needy, "needs_forward", False)
        if repair or reads:
            what = f"repair={repair}" if repair else f"importance {importance}"
            raise InputError(f"{what} needs samples: also give --data, such as --data digits")
        return cpd.prune(network, inputs, importance=spec, **options)
    count, scored = AUTO_REPAIR if repair == "auto" else int(repair), samples["batches"]
    found = Samples(**{**samples, "part": "train", "batches": max(count, scored)})
    if repair == "auto" and len(found.inputs) < 2:
        raise InputError("repair=auto needs two batches of training data: one to judge by")
    mending = found.inputs[:count]
    judge = {"judge": [mending.pop()]} if repair == "auto" else {}
    return cpd.prune(
        network.eval(),
        inputs,
        importance=lambda model, groups: found.scores(spec, model, groups, scored),
        repair={"batches": mending, **judge} if mending else None,
        **options,
    )


def described(
    network: nn.Module, small: nn.Module, plan: Plan, args: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """Of a uniform plan: what is to be said of the configuration that builds the result, and what
    is to be noted of it; else nothing.
    """
    from cpd import models

    if not plan.options["uniform"]:
        return "", {}
    found = models.smaller(network, small, plan, args)
    return models.sentence(found), {"config": found.to_dict()} if found else {}
