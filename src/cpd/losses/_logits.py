"""The border of the logit losses: one check, one shape, for every member of the family."""

from __future__ import annotations

import math

import torch

from cpd.errors import InputError

__all__ = ["nonnegative", "positive", "rows", "share", "whole"]


def rows(student: object, teacher: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both logits as (rows, classes), in float32 or wider, the teacher without gradient.

    Taken are floating tensors of one shape (N, C) or (N, C, …); classes are axis 1, and every
    position of the other axes is a row. InputError otherwise.
    """
    for who, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, torch.Tensor):
            raise InputError(
                f"the {who}'s logits must be a tensor, got {type(logits).__name__}; "
                f"a task turns outputs into logits: task.logits(outputs)."
            )
        if not logits.is_floating_point():
            raise InputError(f"the {who}'s logits must be floating point, got {logits.dtype}.")
    assert isinstance(student, torch.Tensor)
    assert isinstance(teacher, torch.Tensor)
    if student.shape != teacher.shape or student.dim() < 2 or not student.numel():
        raise InputError(
            "student and teacher logits must have one shape (N, C) or (N, C, ...) with no empty "
            f"axis; got student {tuple(student.shape)}, teacher {tuple(teacher.shape)}."
        )
    return _flat(student), _flat(teacher.detach())


def _flat(logits: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).movedim(1, -1).reshape(-1, logits.shape[1])


def positive(name: str, value: float) -> None:
    """InputError unless ``value`` is a finite number > 0."""
    if not (_is_number(value) and value > 0):
        raise InputError(f"{name} must be a finite number > 0, got {value!r}.")


def nonnegative(name: str, value: float) -> None:
    """InputError unless ``value`` is a finite number ≥ 0."""
    if not (_is_number(value) and value >= 0):
        raise InputError(f"{name} must be a finite number >= 0, got {value!r}.")


def share(name: str, value: object) -> None:
    """InputError unless ``value`` is a number in [0, 1)."""
    if not (_is_number(value) and isinstance(value, int | float) and 0 <= value < 1):
        raise InputError(f"{name} must be a number in [0, 1), got {value!r}.")


def whole(name: str, value: object, least: int) -> None:
    """InputError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
