"""Semantic segmentation: one label for each pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F

from cpd._mend import before_metrics
from cpd._numbers import whole
from cpd.errors import InputError

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

__all__ = ["Segmentation"]


@dataclass(frozen=True)
class Segmentation:
    """Cross-entropy of every pixel to train by, the mean intersection over union to judge by.

    Logits come as (N, C, h, w) and are resized to the labels' (H, W) bilinearly.

    ignore_index: the label of pixels that do not count.
    class_weights: a weight ≥ 0 for each class, or nothing; the mean is over weights.
    ohem: train on hard pixels: those whose own class has a probability below it, such as 0.7
        (A. Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example
        Mining", CVPR 2016); nothing for all pixels.
    ohem_kept: pixels of an image that are kept at least, on average over a batch.
    auxiliary: weight of the same loss on each auxiliary output, without ``ohem``.
    per_class: also report the intersection over union of each class, "iou_0", "iou_1", …
    window: side of the windows by which images are judged, whose logits are averaged where they
        overlap; nothing: whole images. stride: step from window to window; two thirds of the side
        where left out.
    """

    ignore_index: int = 255
    class_weights: Sequence[float] | None = None
    ohem: float | None = None
    ohem_kept: int = 100_000
    auxiliary: float = 0.4
    per_class: bool = False
    window: int | None = None
    stride: int | None = None

    primary: ClassVar[str] = "miou"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ohem is not None and not 0 < self.ohem <= 1:
            raise InputError(f"ohem is a probability in (0, 1], got {self.ohem!r}.")
        sides = (("ohem_kept", self.ohem_kept), ("window", self.window), ("stride", self.stride))
        for name, number in sides:
            if number is not None:
                whole(name, number, 1)
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise InputError(
                f"stride is the step of a window, and at most as long; got stride={self.stride!r}, "
                f"window={self.window!r}."
            )
        if not self.auxiliary >= 0:
            raise InputError(f"auxiliary must be a weight >= 0, got {self.auxiliary!r}.")
        weights = self.class_weights
        if weights is not None and (len(weights) == 0 or not all(w >= 0 for w in weights)):
            raise InputError(f"class_weights must be numbers >= 0, got {weights!r}.")

    def logits(self, outputs: Any) -> torch.Tensor:
        """Return the logits (N, C, h, w) in what a network returned, at its own resolution.

        Taken are a tensor, a mapping with "logits" or "out", an object with ``logits``, and a tuple
        or list, whose first entry is used. InputError for anything else.
        """
        return self._split(outputs)[0]

    def _split(self, outputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits and the auxiliary ones."""
        found, more = outputs, []
        if isinstance(outputs, Mapping):
            name = next((key for key in ("logits", "out") if key in outputs), None)
            found = outputs if name is None else outputs[name]
            more = [outputs[key] for key in ("aux", "auxiliary_logits") if key in outputs]
        elif isinstance(getattr(outputs, "logits", None), torch.Tensor):
            found, more = outputs.logits, [getattr(outputs, "auxiliary_logits", None)]
        elif isinstance(outputs, tuple | list) and outputs:
            found, more = outputs[0], list(outputs[1:])
        if not isinstance(found, torch.Tensor):
            raise InputError(
                "segmentation needs logits: a tensor, a mapping with 'logits' or 'out', an object "
                f"with logits, or a tuple that starts with them; got {type(outputs).__name__}."
            )
        for each in (found, *(m for m in more if isinstance(m, torch.Tensor))):
            if each.dim() != 4:
                raise InputError(f"logits must be (N, C, h, w), got {tuple(each.shape)}.")
        return found, [each for each in more if isinstance(each, torch.Tensor)]

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return CE(logits) + auxiliary · Σ CE(auxiliary logits), a scalar in nats.

        CE = Σ_i w[y_i] · (−log softmax(z_i)[y_i]) / Σ_i w[y_i] over the pixels that count, 0 where
        there are none. targets: labels int64 (N, H, W). InputError where they do not fit.
        """
        logits, more = self._split(outputs)
        check_labels(logits, targets, self.ignore_index)
        total = self._cross_entropy(logits, targets, self.ohem)
        for each in more if self.auxiliary else ():
            total = total + self.auxiliary * self._cross_entropy(each, targets, None)
        return total

    def _cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, ohem: float | None
    ) -> torch.Tensor:
        logits = resized(logits, targets)
        weight = self._weights(logits)
        each = F.cross_entropy(
            logits, targets, weight, ignore_index=self.ignore_index, reduction="none"
        )
        counts = targets != self.ignore_index
        if ohem is not None:
            counts = counts & self._hard(logits.detach(), targets, ohem)
        known = torch.where(counts, targets, 0)
        shares = counts.to(each.dtype) if weight is None else weight[known] * counts
        return (each * counts).sum() / shares.sum().clamp(min=torch.finfo(each.dtype).tiny)

    def _weights(self, logits: torch.Tensor) -> torch.Tensor | None:
        if self.class_weights is None:
            return None
        if len(self.class_weights) != logits.shape[1]:
            raise InputError(
                f"there are {len(self.class_weights)} class_weights for {logits.shape[1]} classes."
            )
        return torch.tensor(self.class_weights, dtype=logits.dtype, device=logits.device)

    def _hard(self, logits: torch.Tensor, targets: torch.Tensor, most: float) -> torch.Tensor:
        """Which pixels are hard: below the probability, or among the hardest of the batch."""
        known = targets != self.ignore_index
        own = torch.softmax(logits, 1).gather(1, torch.where(known, targets, 0)[:, None])[:, 0]
        ranked = own[known].sort().values
        if not len(ranked):
            return known
        last = min(self.ohem_kept * len(targets), len(ranked)) - 1
        return known & ((own < most) | (own <= ranked[last]))

    def infer(self, model: Callable[..., Any], images: torch.Tensor) -> Any:
        """Return what the network makes of images (N, 3, H, W): whole, or by windows.

        With ``window`` it is (N, C, H, W): each window's logits, resized to it, averaged over the
        windows that see a pixel. The last windows end with the image.
        """
        if self.window is None or max(images.shape[-2:]) <= self.window:
            return model(images)
        step = self.stride or max(1, 2 * self.window // 3)
        total: torch.Tensor | None = None
        seen = images.new_zeros(1, 1, *images.shape[-2:])
        for top in _starts(images.shape[-2], self.window, step):
            for left in _starts(images.shape[-1], self.window, step):
                rows, columns = slice(top, top + self.window), slice(left, left + self.window)
                part = images[..., rows, columns]
                logits = resized(self.logits(model(part)), part[:, 0])
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
                total[..., rows, columns] += logits
                seen[..., rows, columns] += 1
        assert total is not None
        return total / seen

    def metrics(self) -> MetricCollection:
        """Return fresh metrics "miou", "pixel_accuracy" and, with ``per_class``, "iou_0", ….

        All are shares in [0, 1], fed by ``update(outputs, targets)``. Classes that neither occur
        nor are called have none. Needs torchmetrics.
        """
        before_metrics()
        from torchmetrics import MetricCollection

        from cpd.tasks._confusion import Confusion

        return MetricCollection({"segmentation": Confusion(self.called, each=self.per_class)})

    def called(self, outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return class and label of every pixel that counts, int64 (P,), and how many classes."""
        logits = self.logits(outputs)
        check_labels(logits, targets, self.ignore_index)
        counts = targets != self.ignore_index
        called = resized(logits, targets).argmax(dim=1)
        return called[counts], targets[counts], logits.shape[1]

    def maps(self, outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a picture shows, int64 (N, H, W): the labels, −1 where ignored, and calls."""
        called = resized(self.logits(outputs), targets).argmax(dim=1)
        return targets.masked_fill(targets == self.ignore_index, -1), called


def _starts(length: int, window: int, step: int) -> list[int]:
    """Where windows begin so that they cover a length and none reaches beyond it."""
    last = max(0, length - window)
    return [*range(0, last, step), last]


def resized(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits at the resolution of labels (N, H, W), in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    size = tuple(targets.shape[1:])
    if wide.shape[2:] == size:
        return wide
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False)


def check_labels(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> None:
    """InputError unless ``targets`` are labels (N, H, W) for ``logits`` (N, C, h, w).

    The range is looked at on the CPU only: elsewhere it would wait for the device at every step.
    """
    fits = targets.dim() == 3 and len(targets) == len(logits)
    if targets.dtype != torch.int64 or not fits:
        raise InputError(
            f"targets must be int64 labels (N, H, W) for logits {tuple(logits.shape)}; got "
            f"{targets.dtype} of shape {tuple(targets.shape)}."
        )
    if targets.device.type != "cpu":
        return
    wrong = targets[((targets < 0) | (targets >= logits.shape[1])) & (targets != ignore)]
    if len(wrong):
        raise InputError(
            f"labels must be in [0, {logits.shape[1]}) or {ignore} (ignored) for logits "
            f"{tuple(logits.shape)}; found {wrong.unique().tolist()[:8]}."
        )
