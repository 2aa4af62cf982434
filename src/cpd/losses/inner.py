"""Inner MSE: the values of matching features, channel by channel."""

from __future__ import annotations

import torch

from cpd.losses._maps import maps

__all__ = ["inner"]


def inner(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean of (s − t)² over samples, channels and positions.

    student, teacher: features (N, C) or (N, C, …) of one shape. A student cut from its teacher has
    the kept channels of the teacher's map, so no projector is needed.

    Returns a scalar, ≥ 0, float32 or wider; the authors' weight is 20. Raises InputError for shapes
    that differ.

    Source: Y. Aflalo, A. Noy, M. Lin, I. Friedman, L. Zelnik-Manor, "Knapsack Pruning with Inner
    Distillation", 2020, arXiv 2002.08258, section 3.3.
    """
    student, teacher = maps(student, teacher, least=2)
    return (student - teacher).square().mean()
