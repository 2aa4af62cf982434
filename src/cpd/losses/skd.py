"""SKD, pair-wise: which positions of an image resemble each other."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import whole
from cpd.losses._maps import planes

__all__ = ["skd"]


def skd(student: torch.Tensor, teacher: torch.Tensor, *, pool: int = 2) -> torch.Tensor:
    """Return the mean over samples and pairs (i, j) of positions of (a_s[i, j] − a_t[i, j])².

    a[i, j] = ⟨x_i, x_j⟩ / (‖x_i‖ ‖x_j‖), of the map after max pooling of ``pool`` × ``pool``.

    student, teacher: maps (N, C, H, W) of one resolution; the widths may differ.
    pool: side of the pooled cells, ≥ 1. Memory grows with (H · W / pool²)².

    Returns a scalar in [0, 4], float32 or wider; the usual weight is 10. Raises InputError for
    resolutions that differ.

    Source: Y. Liu, C. Shu, J. Wang, C. Shen, "Structured Knowledge Distillation for Dense
    Prediction", TPAMI 2020, arXiv 1903.04197, equation 2.
    """
    whole("pool", pool, 1)
    student, teacher = planes(student, teacher, same_width=False)
    return (_similar(student, pool) - _similar(teacher, pool)).square().mean()


def _similar(maps: torch.Tensor, pool: int) -> torch.Tensor:
    small = F.max_pool2d(maps, pool, ceil_mode=True) if pool > 1 else maps
    unit = F.normalize(small.flatten(2), dim=1)
    return unit.transpose(1, 2) @ unit
