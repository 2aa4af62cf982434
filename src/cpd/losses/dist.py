"""DIST: the student follows the teacher's relations between classes and between samples."""

from __future__ import annotations

import torch

from cpd._numbers import nonnegative, positive
from cpd.losses._logits import rows

__all__ = ["dist"]

_EPS = 1e-8  # in the denominator of the correlation, as in the authors' code


def dist(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> torch.Tensor:
    """Return τ² · (inter · between classes + intra · between rows), of p = softmax(z / τ).

    between classes = mean over rows r of 1 − ρ(p_s[r, :], p_t[r, :])
    between rows    = mean over classes c of 1 − ρ(p_s[:, c], p_t[:, c])
    ρ(a, b) = ⟨a − ā, b − b̄⟩ / (‖a − ā‖ · ‖b − b̄‖ + 1e-8), Pearson's correlation.

    It asks for the same order and spacing, not for the same values. The teacher gets no gradient.

    student, teacher: logits, (N, C) or (N, C, …), classes on axis 1; every other position is a row.
    temperature: τ > 0. inter, intra: weights ≥ 0.

    Returns a scalar, float32 or wider, in [0, 2 τ² (inter + intra)]. A constant vector correlates
    with nothing: a single row gives a constant intra term with no gradient, so use batches of two
    or more. Raises InputError for shapes that differ, tensors that are not floating, τ ≤ 0, and
    negative weights.

    Source: T. Huang, S. You, F. Wang, C. Qian, C. Xu, "Knowledge Distillation from A Stronger
    Teacher", NeurIPS 2022, arXiv 2205.10536, equations 6 to 10.
    """
    positive("temperature", temperature)
    nonnegative("inter", inter)
    nonnegative("intra", intra)
    z_student, z_teacher = rows(student, teacher)
    p_student = torch.softmax(z_student / temperature, dim=1)
    p_teacher = torch.softmax(z_teacher / temperature, dim=1)
    between_classes = 1 - _correlation(p_student, p_teacher, dim=1).mean()
    between_rows = 1 - _correlation(p_student, p_teacher, dim=0).mean()
    return (inter * between_classes + intra * between_rows) * temperature**2


def _correlation(a: torch.Tensor, b: torch.Tensor, *, dim: int) -> torch.Tensor:
    a = a - a.mean(dim, keepdim=True)
    b = b - b.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (norms + _EPS)
