"""What `cpd sensitivity` measures: names become data, a task and scores."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpd.cli.models import named

if TYPE_CHECKING:
    from cpd.sensitivity import Sensitivity

__all__ = ["measured"]


def measured(
    network: nn.Module, data: Any, task: Any, importance: Any, batches: int, batch_size: int
) -> Sensitivity:
    """The sensitivity of a network on the validation samples of a data set."""
    from cpd import data as shelf
    from cpd import tasks
    from cpd.comb import comb
    from cpd.distill.batches import Batches, unpack
    from cpd.distill.evaluate import answer
    from cpd.importance import score
    from cpd.sensitivity import sensitivity

    source = shelf.resolve(named("data", data))
    judge = tasks.resolve(named("task", task))
    every = Batches(source.val, batch_size, seed=0, train=False)
    some = list(itertools.islice(every.epoch(0), batches))
    args, kwargs, _ = unpack(some[0])
    groups = comb(network, kwargs or args)
    scores = score(named("importance", importance), network, groups)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return judge.loss(answer(model, judge, batch), unpack(batch)[2])

    return sensitivity(network, groups, scores, some, loss)
