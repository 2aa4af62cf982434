"""The shelf of tasks: what a network is for, told by its loss, its metrics and its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from cpd import _shelf
from cpd.errors import InputError
from cpd.tasks.classification import Classification
from cpd.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

__all__ = ["SHELF", "Classification", "Segmentation", "Task", "resolve"]


@runtime_checkable
class Task(Protocol):
    """What training and judging need to know; any object with these members is a task."""

    @property
    def primary(self) -> str:
        """Name of the metric that decides which network is better."""

    @property
    def higher_is_better(self) -> bool:
        """Which way it decides."""

    def logits(self, outputs: Any) -> torch.Tensor:
        """Return the tensor that distillation compares, classes on axis 1."""

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Return the scalar to minimise."""

    def metrics(self) -> MetricCollection:
        """Return fresh metrics, ``primary`` among them, fed by ``update(outputs, targets)``."""


SHELF: dict[str, Callable[..., Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
}


def resolve(spec: object) -> Task:
    """Return the task that a spec means.

    spec: a name of the shelf (``"classification"``), a mapping of one name to its options
        (``{"classification": {"label_smoothing": 0.1}}``), or an object with ``Task``'s members.

    Raises UnknownName for a name or an option that is not there, InputError for any other fault.
    """
    if isinstance(spec, Task) and not isinstance(spec, type):
        return spec
    if spec is None or isinstance(spec, str | dict):
        return _shelf.build("task", SHELF, *_shelf.one("task", spec))
    wanted = ("primary", "higher_is_better", "logits", "loss", "metrics")
    missing = [name for name in wanted if not hasattr(spec, name)]
    fault = f"it has no {', '.join(missing)}" if missing else "give an instance, not the class"
    raise InputError(f"{spec!r} is not a task: {fault}.")
