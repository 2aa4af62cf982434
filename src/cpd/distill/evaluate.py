"""Metrics of a network over data, summed over every process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cpd.distill.batches import Batches, to_device, unpack

__all__ = ["answer", "evaluate", "judged"]


def evaluate(
    model: nn.Module,
    batches: Batches,
    task: Any,
    device: torch.device,
    *,
    channels_last: bool = False,
) -> dict[str, float]:
    """The task's metrics, each a plain number.

    ``model`` runs in evaluation mode and gets every module's training flag back. The metrics are
    torchmetrics and reduce over processes on their own.
    """
    metrics = task.metrics().to(device)
    with judged(model):
        for batch in batches.epoch(0):
            batch = to_device(batch, device, channels_last=channels_last)
            metrics.update(answer(model, task, batch), unpack(batch)[2])
    return {name: float(value) for name, value in metrics.compute().items()}


@contextmanager
def judged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; every module's training flag as it was after."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def answer(model: nn.Module, task: Any, batch: Any) -> Any:
    """What a network makes of a batch, the way the task judges it: in one call, or by windows."""
    args, kwargs, _ = unpack(batch)
    infer: Any = getattr(task, "infer", None)  # a task may want more than one call, such as windows
    asked = infer is not None and not kwargs and len(args) == 1
    return infer(model, args[0]) if asked else model(*args, **kwargs)
