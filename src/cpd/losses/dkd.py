"""DKD: the share of the target class and the shape of the others, each with its own weight."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import nonnegative, positive
from cpd.losses._logits import rows
from cpd.losses._maps import labels_of

__all__ = ["dkd"]


def dkd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    labels: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> torch.Tensor:
    """Return τ² · mean over rows of (α · KL(b_t ‖ b_s) + β · KL(q_t ‖ q_s)).

    With p = softmax(z / τ) and y the row's label:
    b = (p[y], 1 − p[y]), the binary split into the target and the rest;
    q[c] = p[c] / (1 − p[y]) for c ≠ y, the distribution over the other classes.
    With α = 1 and β = 1 − p_t[y] of each row this is plain knowledge distillation.

    student, teacher: logits (N, C) or (N, C, …) with C ≥ 2. labels: int64 (N,) or (N, …); finer
        than the logits they are taken at the nearest pixel; rows with a label outside [0, C)
        do not count.
    alpha, beta: weights ≥ 0. The authors take 1, 8 at τ = 4 for CIFAR-100 (the defaults), and 1,
        0.5 or 2 (for a teacher of another family) at τ = 1 for ImageNet.

    Returns a scalar in nats, ≥ 0, float32 or wider; 0 where no row has a label. Raises InputError
    for shapes that differ, labels that do not fit, and values out of range.

    Source: B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR
    2022, arXiv 2203.08679, equation 7.
    """
    nonnegative("alpha", alpha)
    nonnegative("beta", beta)
    positive("temperature", temperature)
    z_student, z_teacher = rows(student, teacher)
    target, known = labels_of(labels, student)
    if not known.any():
        return z_student.sum() * 0
    z_student, z_teacher, target = z_student[known], z_teacher[known], target[known]
    split = F.kl_div(
        _binary(z_student / temperature, target),
        _binary(z_teacher / temperature, target),
        reduction="batchmean",
        log_target=True,
    )
    rest = F.kl_div(
        _others(z_student / temperature, target),
        _others(z_teacher / temperature, target),
        reduction="batchmean",
        log_target=True,
    )
    return (alpha * split + beta * rest) * temperature**2


def _binary(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(log p[y], log(1 − p[y])) of each row; the sum of the others keeps its digits."""
    others = torch.logsumexp(z.scatter(1, target[:, None], -torch.inf), dim=1)
    both = torch.stack([z.gather(1, target[:, None])[:, 0], others], dim=1)
    return F.log_softmax(both, dim=1)


def _others(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Log of the distribution over the classes that are not the target: (rows, C − 1)."""
    keep = torch.ones_like(z, dtype=torch.bool).scatter_(1, target[:, None], value=False)
    return F.log_softmax(z[keep].reshape(len(z), -1), dim=1)
