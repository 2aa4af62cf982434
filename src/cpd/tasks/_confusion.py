"""What a segmentation is judged by, from one confusion matrix that adds up over processes.

The one module beside ``_topk`` that needs torchmetrics to be imported; its user imports it when
called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from cpd.errors import InputError

__all__ = ["Confusion"]


class Confusion(Metric):
    """Intersection over union and pixel accuracy: ``compute`` returns scalars by name.

    With n[a, b] = pixels of class a called b, over all samples and processes:
    iou_c = n[c, c] / (Σ_b n[c, b] + Σ_a n[a, c] − n[c, c]), for classes that occur or are called;
    miou: their mean. pixel_accuracy: Σ_c n[c, c] / Σ n. All in [0, 1].

    labels: turns (outputs, targets) into classes and labels of every pixel that counts, int64 (P,)
    each, and the number of classes. each: whether "iou_0", "iou_1", … are among the results.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    counts: torch.Tensor

    def __init__(
        self,
        labels: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor, int]],
        *,
        each: bool,
    ) -> None:
        super().__init__()
        self.labels, self.each = labels, each
        self.add_state("counts", default=torch.zeros(0, 0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Any, targets: torch.Tensor) -> None:
        """Count one batch."""
        called, labels, classes = self.labels(outputs, targets)
        self._grow(classes)
        pairs = labels * classes + called
        self.counts += torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def _grow(self, classes: int) -> None:
        """The matrix for so many classes; it is empty until a network's outputs tell them."""
        have = len(self.counts)
        if have == 0 and classes:
            self.counts = self.counts.new_zeros(classes, classes)
        elif have != classes:
            raise InputError(f"the network gave logits of {have} classes, now of {classes}.")

    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., list[torch.Tensor]] = gather_all_tensors,
        process_group: Any = None,
    ) -> None:
        """A process that got no sample does not know the classes; the others tell it."""
        mine = torch.tensor(len(self.counts), device=self.counts.device)
        self._grow(int(max(dist_sync_fn(mine, process_group))))
        super()._sync_dist(dist_sync_fn, process_group)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the results, each a scalar tensor; InputError where nothing was counted."""
        counts = self.counts.double()
        if not counts.sum():
            raise InputError("segmentation metrics of no labelled pixel; is the data set empty?")
        right = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - right
        seen = union > 0
        iou = right[seen] / union[seen]
        found = {"miou": iou.mean(), "pixel_accuracy": right.sum() / counts.sum()}
        if self.each:
            found |= {f"iou_{c}": iou[k] for k, c in enumerate(seen.nonzero()[:, 0].tolist())}
        return {name: value.float() for name, value in found.items()}
