"""Samples of a data set by name: what is scored, repaired and measured on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cpd.cli.models import named
from cpd.errors import InputError

if TYPE_CHECKING:
    from cpd.groups import Groups
    from cpd.importance import Scores

__all__ = ["Samples"]


class Samples:
    """The first batches of a part of a data set ("train" or "val"), and the task's loss on them."""

    def __init__(self, data: Any, task: Any, part: str, batches: int, batch_size: int) -> None:
        from cpd import data as shelf
        from cpd import tasks
        from cpd.distill.batches import Batches, unpack

        source = shelf.resolve(named("data", data))
        self.judge = tasks.resolve(named("task", task))
        every = Batches(getattr(source, part), batch_size, seed=0, train=part == "train")
        self.batches = list(itertools.islice(every.epoch(0), batches))
        if not self.batches:
            raise InputError(f"no batch to take: batches is {batches}, or the data has no samples")
        self.inputs = [kwargs or args for args, kwargs, _ in map(unpack, self.batches)]

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss of what a network answers when it is judged."""
        from cpd.distill.batches import unpack
        from cpd.distill.evaluate import answer

        return self.judge.loss(answer(model, self.judge, batch), unpack(batch)[2])

    def trained(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss of what a network puts out, as it trains."""
        from cpd.distill.batches import unpack

        args, kwargs, targets = unpack(batch)
        return self.judge.loss(model(*args, **kwargs), targets)

    def scores(
        self, spec: Any, network: nn.Module, groups: Groups, batches: int | None = None
    ) -> Scores:
        """Scores by an importance, on the first ``batches`` (all, where that is nothing); of the
        weights alone where it needs no more.
        """
        from cpd.importance import collect, resolve, score

        importance = resolve(named("importance", spec))
        if importance.needs_gradient or getattr(importance, "needs_forward", False):
            return collect(importance, network, groups, self.batches[:batches], self.trained)
        return score(importance, network, groups)
