"""Logit standardisation: a wrapper that takes scale and offset out of any loss on logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from cpd.losses._logits import rows

__all__ = ["standardised"]

_EPS = 1e-7  # added to the deviation, as in the authors' code


def standardised(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``loss`` on logits standardised over the classes: (z − mean(z)) / (std(z) + 1e-7).

    std has C − 1 in its denominator. What is left to follow is the relation between the classes;
    how confident a network is no longer counts. The authors take kd at τ = 2 with weight 9.

    Source: S. Sun, W. Ren, J. Li, R. Wang, X. Cao, "Logit Standardization in Knowledge
    Distillation", CVPR 2024, arXiv 2403.01427, algorithm 1.
    """

    @wraps(loss)
    def wrapped(student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> Any:
        rows(student, teacher)
        return loss(_standard(student), _standard(teacher.detach()), **options)

    return wrapped


def _standard(logits: torch.Tensor) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide - wide.mean(1, keepdim=True)) / (wide.std(1, keepdim=True) + _EPS)
