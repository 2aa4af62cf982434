"""The border of the logit losses: one check, one shape, for every member of the family."""

from __future__ import annotations

import torch

from cpd.errors import InputError

__all__ = ["rows"]


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
