"""The value every member of the shelf returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpd.errors import InputError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["Data"]


@dataclass(frozen=True)
class Data:
    """Three map-style data sets of (x, y), and what a sample looks like.

    train, val, test: ``val`` is for decisions during a run, ``test`` is looked at once, at the
        end. A data set may have ``set_epoch(epoch)``, to be called before every epoch, and
        ``ragged``, true where its samples differ in size and so cannot be stacked.
    num_classes: labels are 0 … num_classes − 1.
    input_shape: shape of one x, without the batch axis.
    name: what to call it in a report.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    input_shape: tuple[int, ...]
    name: str = "data"

    def __post_init__(self) -> None:
        for part, count in self.sizes.items():
            if not count:
                raise InputError(f"data set {self.name!r}: its {part} part is empty.")

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in each part: {"train": …, "val": …, "test": …}."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {part: len(samples) for part, samples in parts.items()}  # type: ignore[arg-type]

    def __str__(self) -> str:
        sizes = ", ".join(f"{count} {part}" for part, count in self.sizes.items())
        shape = "x".join(map(str, self.input_shape))
        return f"{self.name}: {sizes}; {self.num_classes} classes, input {shape}"
