"""The top-k accuracy of a task, as a metric that adds up over batches and processes.

The one module of the shelf that needs torchmetrics to be imported; its user imports it when called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchmetrics import Metric

from cpd.errors import InputError

__all__ = ["TopK"]


class TopK(Metric):
    """Share of samples whose label is among the k largest logits: hits / samples, in [0, 1].

    logits: turns a network's outputs into logits (N, C). k: how many classes count, at most C.
    ``compute`` raises InputError where nothing was counted yet.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    hits: torch.Tensor
    samples: torch.Tensor

    def __init__(self, logits: Callable[[Any], torch.Tensor], k: int) -> None:
        super().__init__()
        self.logits = logits
        self.k = k
        self.add_state("hits", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("samples", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Any, targets: torch.Tensor) -> None:
        """Count one batch; targets are labels, int64 (N,)."""
        logits = self.logits(outputs)
        if targets.shape != logits.shape[:1]:
            raise InputError(
                f"targets must have shape ({len(logits)},) for logits {tuple(logits.shape)}; "
                f"got {tuple(targets.shape)}."
            )
        best = logits.topk(min(self.k, logits.shape[1]), dim=1).indices
        self.hits += (best == targets[:, None]).any(dim=1).sum()
        self.samples += len(targets)

    def compute(self) -> torch.Tensor:
        """Return the share, a scalar tensor."""
        if not self.samples:
            raise InputError(f"top-{self.k} accuracy of no samples; is the data set empty?")
        return self.hits / self.samples
