"""dist: values by hand, against numpy's correlation, gradients by numbers, faults by their text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpd.errors import InputError
from cpd.losses import dist, kd

THIRD = 1 / 3


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits whose softmax is the given rows."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_between_classes_by_hand() -> None:
    student = logits((THIRD + 0.1, THIRD, THIRD - 0.1))
    teacher = logits((THIRD + 0.1, THIRD - 0.1, THIRD))
    # centred: (1, 0, -1) and (1, -1, 0), so the correlation is 1/2
    assert dist(student, teacher, intra=0.0).item() == pytest.approx(0.5, abs=1e-5)


def test_between_rows_by_hand() -> None:
    student = logits((0.7, 0.3), (0.5, 0.5), (0.3, 0.7))
    teacher = logits((0.7, 0.3), (0.3, 0.7), (0.5, 0.5))
    # each class over the rows: the same (1, 0, -1) and (1, -1, 0), up to sign
    assert dist(student, teacher, inter=0.0).item() == pytest.approx(0.5, abs=1e-5)


def test_opposites_by_hand() -> None:
    student = logits((0.75, 0.25), (0.25, 0.75))
    assert dist(student, student.flip(0)).item() == pytest.approx(4.0, abs=1e-5)


def test_weights_and_temperature() -> None:
    student = 2 * logits((0.75, 0.25), (0.25, 0.75))
    value = dist(student, student.flip(0), temperature=2.0, inter=3.0, intra=0.5)
    assert value.item() == pytest.approx(4 * (3 * 2 + 0.5 * 2), abs=1e-4)


def test_order_and_spacing_count_but_values_do_not() -> None:
    student = logits((0.6, 0.3, 0.1), (0.2, 0.2, 0.6))
    teacher = (0.5 * student.exp() + 0.5 * THIRD).log()
    assert dist(student, teacher).item() == pytest.approx(0.0, abs=1e-5)
    assert kd(student, teacher).item() > 0.01


def test_against_numpy() -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    p, q = (torch.softmax(z / 2, dim=1).numpy() for z in (student, teacher))
    between_classes = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    between_rows = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    value = dist(student, teacher, temperature=2.0).item()
    assert value == pytest.approx(4 * (between_classes + between_rows), rel=1e-5)


def test_every_position_is_a_row() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    flat = [z.movedim(1, -1).reshape(-1, 5) for z in (student, teacher)]
    torch.testing.assert_close(dist(student, teacher), dist(*flat))


def test_gradient_by_numbers() -> None:
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: dist(z, teacher, temperature=2.0, intra=0.5), (student,)
    )


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 3, 4).unbind()
    teacher.requires_grad_()
    student.requires_grad_()
    dist(student, teacher).backward()
    assert teacher.grad is None


def test_one_row_has_no_relation_between_rows() -> None:
    student, teacher = torch.randn(2, 1, 4).unbind()
    student.requires_grad_()
    value = dist(student, teacher, inter=0.0)
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert student.grad is not None
    assert not student.grad.any()


def test_constant_rows_stay_finite() -> None:
    student = torch.zeros(3, 4, requires_grad=True)
    value = dist(student, torch.randn(3, 4))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ({"inter": -1}, "inter must be a finite number >= 0, got -1"),
        ({"intra": float("nan")}, "intra must be a finite number >= 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        dist(torch.zeros(2, 2), torch.zeros(2, 2), **options)


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"student \(2, 3\), teacher \(3, 2\)"):
        dist(torch.zeros(2, 3), torch.zeros(3, 2))
