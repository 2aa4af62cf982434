"""The border of the dense losses: maps of features or logits, and labels at their resolution."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from cpd.errors import InputError

__all__ = ["labels_at", "labels_of", "maps", "planes", "wide"]


def maps(
    student: object, teacher: object, *, same_width: bool = True, least: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both maps (N, C, …) in float32 or wider, the teacher without gradient.

    Taken are floating tensors with channels on axis 1 and one position or more behind it, equal in
    every axis; with ``same_width=False`` the channels may differ. ``least``: fewest axes.
    InputError otherwise.
    """
    for who, found in (("student", student), ("teacher", teacher)):
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            what = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(f"the {who}'s map must be a floating tensor, got {what}.")
    assert isinstance(student, torch.Tensor)
    assert isinstance(teacher, torch.Tensor)
    one, two = list(student.shape), list(teacher.shape)
    alike = one == two if same_width else one[:1] + one[2:] == two[:1] + two[2:]
    if not alike or min(len(one), len(two)) < least or not student.numel() or not teacher.numel():
        widths = "" if same_width else " (C may differ)"
        raise InputError(
            f"student and teacher maps must have one shape (N, C, ...){widths} of at least {least} "
            f"axes, none empty; got student {tuple(one)}, teacher {tuple(two)}."
        )
    return wide(student), wide(teacher.detach())


def planes(
    student: object, teacher: object, *, same_width: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like ``maps`` where two spatial axes are needed: (N, C, H, W)."""
    found = maps(student, teacher, same_width=same_width)
    if found[0].dim() != 4:
        raise InputError(f"this loss needs maps (N, C, H, W), got {tuple(found[0].shape)}.")
    return found


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as wide as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def labels_at(labels: object, shape: torch.Size) -> torch.Tensor:
    """Return labels as (N, …) at the resolution of a map (N, C, …), by the nearest pixel.

    InputError unless they are int64 with one for each sample and as many axes as the map has
    positions.
    """
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        what = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise InputError(f"this loss needs int64 labels of the task as targets, got {what}.")
    if labels.dim() != len(shape) - 1 or labels.shape[0] != shape[0]:
        raise InputError(
            f"labels {tuple(labels.shape)} do not belong to a map {tuple(shape)}: they must be "
            "(N, ...) with the same axes of positions."
        )
    if labels.shape[1:] == shape[2:]:
        return labels
    # Labels beyond 2**24 would not survive float32; class numbers are far below.
    small = F.interpolate(labels[:, None].float(), size=tuple(shape[2:]), mode="nearest")
    return small[:, 0].to(torch.int64)


def labels_of(labels: object, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (label of each row, which rows have one) for logits (N, C, …) flattened to rows.

    A label outside [0, C), such as 255 where nothing was annotated, is none.
    """
    found = labels_at(labels, student.shape).reshape(-1)
    known = (found >= 0) & (found < student.shape[1])
    return found, known
