"""Metrics of a network over data, summed over every process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cpd.distill.batches import Batches, to_device, unpack

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module, batches: Batches, task: Any, device: torch.device
) -> dict[str, float]:
    """The task's metrics, each a plain number.

    ``model`` runs in evaluation mode and gets every module's training flag back. The metrics are
    torchmetrics and reduce over processes on their own.
    """
    flags = {module: module.training for module in model.modules()}
    metrics = task.metrics().to(device)
    infer: Any = getattr(task, "infer", None)  # a task may want more than one call, such as windows
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches.epoch(0):
                args, kwargs, targets = unpack(to_device(batch, device))
                asked = infer is not None and not kwargs and len(args) == 1
                outputs = infer(model, args[0]) if asked else model(*args, **kwargs)
                metrics.update(outputs, targets)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return {name: float(value) for name, value in metrics.compute().items()}
