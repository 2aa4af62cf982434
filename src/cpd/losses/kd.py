"""Knowledge distillation: the student's softened distribution follows the teacher's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import positive
from cpd.losses._logits import rows

__all__ = ["kd"]


def kd(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """Return τ² · mean over rows of KL(p_t ‖ p_s), with p = softmax(z / τ) over the classes.

    τ² · 1/R Σ_r Σ_c p_t[r, c] · (log p_t[r, c] − log p_s[r, c])

    The factor τ² keeps the size of the gradient as τ grows. The teacher gets no gradient.

    student, teacher: logits, (N, C) or (N, C, …), classes on axis 1; each of the R = N · …
        positions is a row and counts the same.
    temperature: τ > 0.

    Returns a scalar in nats, float32 or wider, 0 exactly where both distributions agree.
    Raises InputError for shapes that differ, tensors that are not floating, and τ ≤ 0.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
    arXiv 1503.02531, section 2.
    """
    positive("temperature", temperature)
    z_student, z_teacher = rows(student, teacher)
    log_student = F.log_softmax(z_student / temperature, dim=1)
    log_teacher = F.log_softmax(z_teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
