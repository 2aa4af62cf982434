"""Hard distillation: the teacher's decision is the label."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd.losses._logits import rows

__all__ = ["hard"]


def hard(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of −log softmax(z_s)[argmax_c z_t[c]].

    student, teacher: logits (N, C) or (N, C, …), classes on axis 1; every position is a row. The
    authors give it the weight 0.5, beside 0.5 of the task's loss.

    Returns a scalar in nats, ≥ 0, float32 or wider. Raises InputError for shapes that differ.

    Source: H. Touvron, M. Cord, M. Douze, F. Massa, A. Sablayrolles, H. Jégou, ICML 2021, arXiv
    2012.12877, equation 3.
    """
    z_student, z_teacher = rows(student, teacher)
    return F.cross_entropy(z_student, z_teacher.argmax(dim=1))
