"""kd: values by hand, gradients by numbers, faults by their text."""

from __future__ import annotations

from math import log

import pytest
import torch

from cpd.errors import InputError
from cpd.losses import kd

EVEN = torch.tensor([[0.0, 0.0]])
THREE_TO_ONE = torch.tensor([[log(3.0), 0.0]])
DIVERGENCE = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)  # KL((3/4, 1/4) || (1/2, 1/2))


def test_by_hand() -> None:
    assert kd(EVEN, THREE_TO_ONE).item() == pytest.approx(DIVERGENCE, rel=1e-6)


def test_the_divergence_is_from_the_teacher() -> None:
    reverse = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    assert kd(THREE_TO_ONE, EVEN).item() == pytest.approx(reverse, rel=1e-6)


def test_temperature_softens_and_rescales() -> None:
    value = kd(EVEN, 2 * THREE_TO_ONE, temperature=2.0)
    assert value.item() == pytest.approx(4 * DIVERGENCE, rel=1e-6)


def test_mean_over_the_batch() -> None:
    student = torch.cat([EVEN, EVEN])
    value = kd(student, torch.cat([THREE_TO_ONE, EVEN]))
    assert value.item() == pytest.approx(DIVERGENCE / 2, rel=1e-6)


@pytest.mark.parametrize("trailing", [(3,), (2, 4), (1, 2, 3)])
def test_every_position_is_a_row(trailing: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, 2, 5, *trailing, dtype=torch.float64)
    flat = [z.movedim(1, -1).reshape(-1, 5) for z in (student, teacher)]
    torch.testing.assert_close(kd(student, teacher, temperature=3.0), kd(*flat, temperature=3.0))


def test_a_shift_of_all_logits_changes_nothing() -> None:
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(kd(student + 7, teacher - 2), kd(student, teacher))


def test_zero_where_both_agree() -> None:
    logits = 50 * torch.randn(4, 10)
    assert kd(logits, logits).item() == 0


def test_gradient_by_numbers() -> None:
    student, teacher = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd(z, teacher, temperature=2.5), (student,))


def test_gradient_by_hand() -> None:
    student = EVEN.clone().requires_grad_()
    kd(student, THREE_TO_ONE).backward()
    assert student.grad is not None  # dKL/dz = p_s - p_t
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25]]))


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 3, 4).unbind()
    teacher.requires_grad_()
    student.requires_grad_()
    kd(student, teacher).backward()
    assert teacher.grad is None


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = torch.randn(2, 8, 1000).bfloat16()
    value = kd(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, kd(student.float(), teacher.float()))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), True, "hot"])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature must be a finite number > 0, got"):
        kd(EVEN, EVEN, temperature=temperature)


@pytest.mark.parametrize(
    ("student", "teacher", "text"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"student \(2, 3\), teacher \(2, 4\)"),
        (torch.zeros(3), torch.zeros(3), r"one shape \(N, C\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "no empty axis"),
        ({"logits": EVEN}, EVEN, r"student's logits must be a tensor, got dict; .*task\.logits"),
        (EVEN, None, "teacher's logits must be a tensor, got NoneType"),
        (EVEN, EVEN.long(), r"teacher's logits must be floating point, got torch\.int64"),
    ],
)
def test_what_is_not_logits_is_refused(student: object, teacher: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        kd(student, teacher)  # type: ignore[arg-type]
