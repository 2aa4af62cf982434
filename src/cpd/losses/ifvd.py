"""IFVD: how much each pixel differs from the mean of its class in the same image."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd.losses._maps import labels_at, maps

__all__ = ["ifvd"]


def ifvd(student: torch.Tensor, teacher: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean over samples and positions of (m_s[i] − m_t[i])².

    m[i] = cos(x_i, mean of x_j over the positions j of the same image with the label of i). A pixel
    with a negative label or one of 255 and more is its own mean: it counts as equal.

    student, teacher: maps (N, C, …) of one resolution; the widths may differ. labels: int64 (N, …),
        taken at the nearest pixel where they are finer.

    Returns a scalar in [0, 4], float32 or wider; the usual weight is 20. Raises InputError for
    resolutions that differ and for labels that do not fit.

    Source: Y. Wang, W. Zhou, T. Jiang, X. Bai, Y. Xu, "Intra-class Feature Variation Distillation
    for Semantic Segmentation", ECCV 2020, equations 1 to 3.
    """
    student, teacher = maps(student, teacher, same_width=False)
    where = labels_at(labels, student.shape).flatten(1)
    known = (where >= 0) & (where < 255)
    classes = F.one_hot(torch.where(known, where, 0)) * known[..., None]
    own, taught = (_variation(x.flatten(2), classes.to(x.dtype)) for x in (student, teacher))
    return ((own - taught) * known).square().mean()


def _variation(maps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cosine of every pixel (N, C, P) to the prototype of its class; classes (N, P, K) one-hot."""
    count = classes.sum(dim=1).clamp(min=1)
    prototypes = (maps @ classes) / count[:, None]
    return F.cosine_similarity(maps, prototypes @ classes.transpose(1, 2), dim=1)
