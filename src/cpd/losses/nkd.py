"""NKD: the target's probability as a soft label, and the others normalised among themselves."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import nonnegative, positive
from cpd.losses._logits import rows
from cpd.losses._maps import labels_of

__all__ = ["nkd"]


def nkd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    labels: torch.Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return mean over rows of −p_t[y] · log p_s[y] − γ τ² Σ_{c≠y} q_t[c] · log q_s[c].

    p = softmax(z), y the row's label, q = softmax over the classes c ≠ y of z / τ.

    student, teacher: logits (N, C) or (N, C, …) with C ≥ 2. labels: int64 (N,) or (N, …); finer
        than the logits they are taken at the nearest pixel; rows with a label outside [0, C) do
        not count.
    gamma: weight ≥ 0 of the second term: 1.5 for convolutional networks, 1 for attention.
    temperature: τ > 0, of the second term only.

    Returns a scalar in nats, float32 or wider; its least value is the entropy of the targets, not
    0. It is 0 where no row has a label. Raises InputError as ``dkd`` does.

    Source: Z. Yang, A. Zeng, Z. Li, T. Zhang, C. Yuan, Y. Li, "From Knowledge Distillation to
    Self-Knowledge Distillation", ICCV 2023, arXiv 2303.13005, equation 6.
    """
    nonnegative("gamma", gamma)
    positive("temperature", temperature)
    z_student, z_teacher = rows(student, teacher)
    target, known = labels_of(labels, student)
    if not known.any():
        return z_student.sum() * 0
    z_student, z_teacher, target = z_student[known], z_teacher[known], target[known]
    soft = torch.softmax(z_teacher, dim=1).gather(1, target[:, None])
    mine = F.log_softmax(z_student, dim=1).gather(1, target[:, None])
    keep = torch.ones_like(z_student, dtype=torch.bool).scatter_(1, target[:, None], value=False)
    shape = (len(target), -1)
    others = torch.softmax(z_teacher[keep].reshape(shape) / temperature, dim=1)
    log_others = F.log_softmax(z_student[keep].reshape(shape) / temperature, dim=1)
    rest = (others * log_others).sum(dim=1).mean()
    return -(soft * mine).mean() - gamma * temperature**2 * rest
