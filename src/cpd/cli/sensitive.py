"""What `cpd sensitivity` measures: names become data, a task and scores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpd.cli.models import named
from cpd.errors import InputError

if TYPE_CHECKING:
    from cpd.groups import Groups
    from cpd.importance import Scores
    from cpd.sensitivity import Sensitivity

__all__ = ["limited", "measured"]


def measured(
    network: nn.Module,
    data: Any,
    task: Any,
    importance: Any,
    sizes: tuple[int, int],
    ratios: Sequence[float] | None = None,
    depth: bool = False,
) -> Sensitivity:
    """The sensitivity of a network on the validation samples of a data set.

    ``sizes`` are the batches and the samples of each; ``depth`` measures residual branches too.
    An importance that reads gradients or activations reads them of the same samples.
    """
    from cpd import data as shelf
    from cpd import tasks
    from cpd.comb import comb
    from cpd.distill.batches import Batches, unpack
    from cpd.distill.evaluate import answer
    from cpd.sensitivity import RATIOS, sensitivity

    source = shelf.resolve(named("data", data))
    judge = tasks.resolve(named("task", task))
    batches, batch_size = sizes
    every = Batches(source.val, batch_size, seed=0, train=False)
    some = list(itertools.islice(every.epoch(0), batches))
    if not some:
        raise InputError(f"no batch to measure: batches is {batches}, or the data has no samples")
    args, kwargs, _ = unpack(some[0])
    groups = comb(network.eval(), kwargs or args, depth=depth)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return judge.loss(answer(model, judge, batch), unpack(batch)[2])

    def trained(model: nn.Module, batch: Any) -> torch.Tensor:
        args, kwargs, targets = unpack(batch)
        return judge.loss(model(*args, **kwargs), targets)

    scores = _scores(named("importance", importance), network, groups, some, trained)
    return sensitivity(network, groups, scores, some, loss, ratios=ratios or RATIOS)


def _scores(spec: Any, network: nn.Module, groups: Groups, batches: Any, loss: Any) -> Scores:
    """Scores of the weights alone where the importance needs no more."""
    from cpd.importance import collect, resolve, score

    importance = resolve(spec)
    if importance.needs_gradient or getattr(importance, "needs_forward", False):
        return collect(importance, network, groups, batches, loss)
    return score(importance, network, groups)


def limited(found: Sensitivity, rise: float) -> str:
    """One line of YAML with the limits at a rise: of a recipe, or behind ``prune --limits``."""
    return f"limits: {json.dumps(found.limits(rise))}"
