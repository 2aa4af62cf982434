"""CWD: channel-wise distillation, where each channel is a distribution over the positions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import positive
from cpd.losses._maps import maps

__all__ = ["cwd"]


def cwd(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float = 4.0) -> torch.Tensor:
    """Return τ² / (N · C) Σ_n Σ_c KL(φ(t[n, c]) ‖ φ(s[n, c])).

    φ(x) = softmax(x / τ) over the positions of a channel.

    student, teacher: maps (N, C, …) of one shape: logits, or features of the same channels.
    temperature: τ > 0. The authors take 4 with weight 3 on logits and 50 on features (the value of
        their script; other repositories take 1 with weight 5 to 10).

    Returns a scalar in nats, ≥ 0, float32 or wider. A channel with a constant added stays the same
    channel. Raises InputError for shapes that differ and τ ≤ 0.

    Source: C. Shu, Y. Liu, J. Gao, Z. Yan, C. Shen, "Channel-wise Knowledge Distillation for Dense
    Prediction", ICCV 2021, arXiv 2011.13256, equation 4.
    """
    positive("temperature", temperature)
    student, teacher = maps(student, teacher)
    log_student = F.log_softmax(student.flatten(2) / temperature, dim=2).flatten(0, 1)
    log_teacher = F.log_softmax(teacher.flatten(2) / temperature, dim=2).flatten(0, 1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
