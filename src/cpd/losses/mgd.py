"""MGD: from the student's features, partly hidden, a generator makes the teacher's."""

from __future__ import annotations

import torch

from cpd._numbers import nonnegative, share
from cpd.losses._maps import planes
from cpd.losses._state import Stateful, generator, hidden, rebuilt

__all__ = ["MGD"]


class MGD(Stateful):
    """α / N Σ (G(s · M) − t)²: M hides positions, G is a small network that learns along.

    G: convolution 3 × 3, ReLU, convolution 3 × 3, of the teacher's width. Each position is hidden
    with the chance ``mask``, drawn anew in every step.

    alpha: 2·10⁻⁵ for segmentation and detection. mask: 0.75 for segmentation, 0.65 for detection.
        For classification the authors hide channels instead; this does not.

    Takes maps (N, C, H, W) of one resolution. Returns {"mgd": scalar ≥ 0}. Raises InputError for
    other shapes and values out of range.

    Source: Z. Yang, Z. Li, M. Shao, D. Shi, Z. Yuan, C. Yuan, "Masked Generative Distillation",
    ECCV 2022, arXiv 2205.01529, equations 3 and 4.
    """

    def __init__(
        self, channels: int, classes: int, *, alpha: float = 2e-5, mask: float = 0.75
    ) -> None:
        """``channels`` of the teacher's map; see the class for the options."""
        nonnegative("alpha", alpha)
        share("mask", mask)
        super().__init__(channels, classes)
        self.alpha, self.mask = alpha, mask
        self.generator = generator(channels)

    def forward(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,  # noqa: ARG002  (every stateful loss is called with labels)
    ) -> dict[str, torch.Tensor]:
        """Return the one term."""
        student, teacher = planes(student, teacher)
        made = self.generator(hidden(student, self.mask))
        return {"mgd": self.alpha * rebuilt(made, teacher)}
