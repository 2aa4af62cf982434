"""Classification: one label for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F

from cpd._mend import before_metrics
from cpd.errors import InputError

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification:
    """Cross-entropy to train by, top-1 and top-5 accuracy to judge by.

    label_smoothing: ε in [0, 1): the target gives 1 − ε to the label and ε / C to every class.
    """

    label_smoothing: float = 0.0

    primary: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}.")

    def logits(self, outputs: Any) -> torch.Tensor:
        """Return the logits (N, C) in what a network returned.

        Taken are a tensor, a mapping or an object with ``logits``, and a tuple or list, whose first
        entry is used. InputError for anything else, and for a tensor that is not (N, C).
        """
        found = outputs
        if isinstance(outputs, Mapping) and "logits" in outputs:
            found = outputs["logits"]
        elif isinstance(getattr(outputs, "logits", None), torch.Tensor):
            found = outputs.logits
        elif isinstance(outputs, tuple | list) and outputs:
            found = outputs[0]
        if not isinstance(found, torch.Tensor):
            raise InputError(
                "classification needs logits: a tensor, a mapping or object with 'logits', or a "
                f"tuple that starts with them; the network returned {type(outputs).__name__}."
            )
        if found.dim() != 2:
            raise InputError(f"logits must be (N, C), got {tuple(found.shape)}.")
        return found

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, −1/N Σ_n log softmax(z_n)[y_n], a scalar in nats.

        outputs: what the network returned (see ``logits``). targets: labels, int64 (N,), each in
        [0, C). InputError where they do not fit.
        """
        logits = self.logits(outputs)
        check_labels(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def metrics(self) -> MetricCollection:
        """Return fresh metrics "top1" and "top5", fed by ``update(outputs, targets)``.

        Both are shares in [0, 1]. With fewer than five classes "top5" counts all of them. Needs
        torchmetrics.
        """
        before_metrics()
        from torchmetrics import MetricCollection

        from cpd.tasks._topk import TopK

        metrics = {"top1": TopK(self.logits, 1), "top5": TopK(self.logits, 5)}
        # Compute groups would merge the two as soon as their counts agree on the first batch.
        return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]


def check_labels(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """InputError unless ``targets`` are labels for ``logits`` (N, C).

    The range is looked at on the CPU only: elsewhere it would wait for the device at every step.
    """
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise InputError(
            f"targets must be int64 labels of shape ({len(logits)},) for logits "
            f"{tuple(logits.shape)}; got {targets.dtype} of shape {tuple(targets.shape)}."
        )
    if targets.device.type != "cpu" or not len(targets):
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"labels must be in [0, {logits.shape[1]}) for logits {tuple(logits.shape)}; "
            f"found labels from {low} to {high}."
        )
