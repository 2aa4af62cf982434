"""AT: attention transfer, where a map's energy over its positions is what is compared."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd._numbers import positive
from cpd.losses._maps import maps

__all__ = ["at"]


def at(student: torch.Tensor, teacher: torch.Tensor, *, power: float = 2.0) -> torch.Tensor:
    """Return the mean over samples and positions of (Q(s) − Q(t))².

    Q(x)[n, i] = a[n, i] / ‖a[n]‖₂ with a[n, i] = mean over channels of |x[n, c, i]|^power.

    student, teacher: maps (N, C, …) of one resolution; the widths may differ.
    power: > 0.

    Returns a scalar, ≥ 0, float32 or wider. It is small (1 / positions): the usual weight is 10⁴.
    Raises InputError for resolutions that differ.

    Source: S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv
    1612.03928, equation 2, with the mean of squares of the authors' code.
    """
    positive("power", power)
    student, teacher = maps(student, teacher, same_width=False)
    return (_attention(student, power) - _attention(teacher, power)).square().mean()


def _attention(maps: torch.Tensor, power: float) -> torch.Tensor:
    return F.normalize(maps.abs().pow(power).mean(dim=1).flatten(1), dim=1)
