"""dkd, nkd, hard, standardised: values by hand, gradients by numbers, faults by their text."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch.nn import functional as F

from cpd.errors import InputError
from cpd.losses import dkd, hard, kd, nkd, standardised

FIRST = torch.tensor([0])


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits whose softmax is the given rows."""
    return torch.tensor(rows, dtype=torch.float64).log()


def divergence(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


STUDENT = logits((0.25, 0.25, 0.5))
TEACHER = logits((0.5, 0.3, 0.2))
SPLIT = divergence((0.5, 0.5), (0.25, 0.75))
REST = divergence((0.6, 0.4), (1 / 3, 2 / 3))


def test_dkd_by_hand() -> None:
    options = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
    assert dkd(STUDENT, TEACHER, labels=FIRST, **options).item() == pytest.approx(SPLIT)
    options = {"alpha": 0.0, "beta": 1.0, "temperature": 1.0}
    assert dkd(STUDENT, TEACHER, labels=FIRST, **options).item() == pytest.approx(REST)
    value = dkd(4 * STUDENT, 4 * TEACHER, labels=FIRST)
    assert value.item() == pytest.approx(16 * (SPLIT + 8 * REST))


def test_dkd_with_the_teachers_weights_is_kd() -> None:
    student, teacher = torch.randn(2, 1, 6, dtype=torch.float64)
    rest = 1 - torch.softmax(teacher, 1)[0, 2].item()
    value = dkd(student, teacher, labels=torch.tensor([2]), alpha=1.0, beta=rest, temperature=1.0)
    torch.testing.assert_close(value, kd(student, teacher))


def test_nkd_by_hand() -> None:
    target = -0.5 * log(0.25)
    rest = -(0.6 * log(1 / 3) + 0.4 * log(2 / 3))
    assert nkd(STUDENT, TEACHER, labels=FIRST).item() == pytest.approx(target + 1.5 * rest)
    value = nkd(STUDENT, TEACHER, labels=FIRST, gamma=0.0)
    assert value.item() == pytest.approx(target)


def test_nkd_softens_the_others_alone() -> None:
    options = {"gamma": 2.0, "temperature": 2.0}
    value = nkd(STUDENT, TEACHER, labels=FIRST, **options).item()
    p, q = (torch.softmax(z[0, 1:] / 2, 0) for z in (TEACHER, STUDENT))
    assert value == pytest.approx(-0.5 * log(0.25) - 2 * 4 * (p * q.log()).sum().item())


def test_hard_by_hand() -> None:
    assert hard(STUDENT, TEACHER).item() == pytest.approx(log(4))
    assert hard(STUDENT, STUDENT).item() == pytest.approx(log(2))


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_labels_of_maps(loss) -> None:
    student, teacher = torch.randn(2, 2, 5, 2, 3, dtype=torch.float64)
    labels = torch.randint(5, (2, 2, 3))
    fine = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    rows = [z.movedim(1, -1).reshape(-1, 5) for z in (student, teacher)]
    expected = loss(*rows, labels=labels.reshape(-1))
    torch.testing.assert_close(loss(student, teacher, labels=labels), expected)
    torch.testing.assert_close(loss(student, teacher, labels=fine), expected)


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_rows_without_a_label_do_not_count(loss) -> None:
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.tensor([1, 255, 3, -1])
    value = loss(student, teacher, labels=labels)
    torch.testing.assert_close(value, loss(student[[0, 2]], teacher[[0, 2]], labels=labels[[0, 2]]))
    nothing = loss(student, teacher, labels=torch.full((4,), 255))
    nothing.backward()
    assert nothing.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_gradient_by_numbers(loss) -> None:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    student.requires_grad_()
    labels = torch.tensor([0, 3, 2])
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, labels=labels), (student,))


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_extreme_logits_stay_finite(loss) -> None:
    student = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    value = loss(student, -student.detach(), labels=FIRST)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([0.0]), r"int64 labels of the task as targets, got torch\.float32"),
        (None, "got NoneType"),
        (torch.tensor([0, 1]), r"labels \(2,\) do not belong to a map \(1, 3\)"),
        (torch.tensor([[0]]), r"labels \(1, 1\) do not belong"),
    ],
)
def test_labels_that_do_not_fit(labels: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        dkd(STUDENT, TEACHER, labels=labels)


@pytest.mark.parametrize(
    ("loss", "options", "text"),
    [
        (dkd, {"alpha": -1}, "alpha must be a finite number >= 0"),
        (dkd, {"beta": -1}, "beta must be a finite number >= 0"),
        (dkd, {"temperature": 0}, "temperature must be a finite number > 0"),
        (nkd, {"gamma": -1}, "gamma must be a finite number >= 0"),
        (nkd, {"temperature": 0}, "temperature must be a finite number > 0"),
    ],
)
def test_options_out_of_range(loss, options: dict[str, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        loss(STUDENT, TEACHER, labels=FIRST, **options)


# standardised ------------------------------------------------------------------------------------


def test_standardised_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)  # to (-1, 0, 1)
    teacher = torch.tensor([[30.0, 10.0, 20.0]], dtype=torch.float64)  # to (1, -1, 0)
    p = torch.softmax(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) / 2, 0)
    q = torch.softmax(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) / 2, 0)
    value = standardised(kd)(student, teacher, temperature=2.0)
    assert value.item() == pytest.approx(4 * (p * (p / q).log()).sum().item(), rel=1e-5)


def test_standardised_forgets_scale_and_offset() -> None:
    student, teacher = torch.randn(2, 4, 7, 3, dtype=torch.float64)
    loss = standardised(kd)
    torch.testing.assert_close(
        loss(5 * student - 3, teacher), loss(student, teacher), rtol=1e-5, atol=1e-7
    )
    assert loss(teacher, 9 * teacher).item() == pytest.approx(0, abs=1e-9)


def test_standardised_passes_labels_on() -> None:
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (student, teacher)]
    value = standardised(dkd)(student, teacher, labels=labels)
    torch.testing.assert_close(value, dkd(*z, labels=labels), rtol=1e-5, atol=1e-6)


def test_hard_takes_maps() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 3)
    expected = F.cross_entropy(student, teacher.argmax(1))
    torch.testing.assert_close(hard(student, teacher), expected)
