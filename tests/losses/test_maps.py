"""Losses on maps: values by hand, invariances, gradients by numbers, faults by their text."""

from __future__ import annotations

from itertools import product
from math import log

import pytest
import torch

from cpd.errors import InputError
from cpd.losses import at, cwd, ifvd, inner, skd


def one(*values: float) -> torch.Tensor:
    """A map of one sample, one channel, 1 x n."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def channels(*rows: tuple[float, ...]) -> torch.Tensor:
    """A map of one sample: a row for each channel, 1 x n."""
    return torch.tensor(rows, dtype=torch.float64).reshape(1, len(rows), 1, -1)


# cwd ---------------------------------------------------------------------------------------------


def test_cwd_by_hand() -> None:
    teacher, student = one(log(3), 0.0), one(0.0, 0.0)
    expected = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert cwd(student, teacher, temperature=1.0).item() == pytest.approx(expected)
    value = cwd(student, 4 * teacher)  # the default temperature, 4
    assert value.item() == pytest.approx(16 * expected)


def test_cwd_is_the_mean_over_channels_and_samples() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    each = [
        cwd(student[n : n + 1, c : c + 1], teacher[n : n + 1, c : c + 1]).item()
        for n, c in product(range(3), range(4))
    ]
    assert cwd(student, teacher).item() == pytest.approx(sum(each) / 12)


def test_cwd_does_not_see_what_a_channel_adds_everywhere() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    shift = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(cwd(student + shift, teacher), cwd(student, teacher))


# at ----------------------------------------------------------------------------------------------


def test_at_by_hand() -> None:
    student, teacher = channels((3.0, 0.0), (0.0, 4.0)), one(1.0, 1.0)
    # energies 9/2, 16/2 of norm sqrt(337)/2, against 1/sqrt(2) each
    norm = 337**0.5
    expected = ((9 / norm - 0.5**0.5) ** 2 + (16 / norm - 0.5**0.5) ** 2) / 2
    assert at(student, teacher).item() == pytest.approx(expected)


def test_at_with_another_power() -> None:
    student, teacher = one(3.0, -4.0), one(1.0, 0.0)
    assert at(student, teacher, power=1.0).item() == pytest.approx((0.4**2 + 0.8**2) / 2)


# skd ---------------------------------------------------------------------------------------------


def test_skd_by_hand() -> None:
    student = channels((1.0, 0.0), (0.0, 1.0))  # orthogonal
    teacher = channels((1.0, 2.0))  # parallel
    assert skd(student, teacher, pool=1).item() == pytest.approx(0.5)  # 2 of 4 pairs differ by 1


def test_skd_pools_first() -> None:
    student, teacher = torch.randn(1, 3, 5, 6), torch.randn(1, 2, 5, 6)
    small = [torch.nn.functional.max_pool2d(x, 2, ceil_mode=True) for x in (student, teacher)]
    torch.testing.assert_close(skd(student, teacher), skd(*small, pool=1))
    assert small[0].shape[-2:] == (3, 3)


# ifvd --------------------------------------------------------------------------------------------


def test_ifvd_by_hand() -> None:
    student = channels((1.0, 0.0, 5.0), (0.0, 1.0, 0.0))
    teacher = channels((1.0, 1.0, 5.0))
    labels = torch.tensor([[[0, 0, 1]]])
    # the student's mean of class 0 is (1/2, 1/2): cosine 1/sqrt(2) twice; the teacher's are all 1
    expected = 2 * (1 - 0.5**0.5) ** 2 / 3
    assert ifvd(student, teacher, labels=labels).item() == pytest.approx(expected)


def test_ifvd_takes_each_image_for_itself() -> None:
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 2, 5, 5)
    labels = torch.randint(3, (3, 5, 5))
    each = [
        ifvd(student[n : n + 1], teacher[n : n + 1], labels=labels[n : n + 1]) for n in range(3)
    ]
    torch.testing.assert_close(ifvd(student, teacher, labels=labels), torch.stack(each).mean())


def test_ifvd_leaves_out_what_has_no_label() -> None:
    student = torch.randn(1, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 2, 1, 3, dtype=torch.float64)
    value = ifvd(student, teacher, labels=torch.tensor([[[0, 0, 255]]]))
    alone = ifvd(student[..., :2], teacher[..., :2], labels=torch.tensor([[[0, 0]]]))
    torch.testing.assert_close(value, alone * 2 / 3)
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[..., 2].any()


# inner -------------------------------------------------------------------------------------------


def test_inner_by_hand() -> None:
    assert inner(one(1.0, 2.0), one(3.0, 2.0)).item() == pytest.approx(2.0)
    assert inner(torch.zeros(2, 3), torch.full((2, 3), 2.0)).item() == pytest.approx(4.0)


# all ---------------------------------------------------------------------------------------------

LABELS = torch.tensor([[[0, 1], [1, 0]], [[2, 2], [0, 2]]])
ALL = {
    "at": at,
    "cwd": cwd,
    "ifvd": lambda s, t: ifvd(s, t, labels=LABELS),
    "inner": inner,
    "skd": lambda s, t: skd(s, t, pool=1),
}


@pytest.mark.parametrize("name", ALL)
def test_equal_maps_lose_nothing(name: str) -> None:
    maps = torch.randn(2, 3, 2, 2)
    assert ALL[name](maps, maps).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_gradient_by_numbers(name: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ALL[name](x, teacher), (student,))


@pytest.mark.parametrize("name", ALL)
def test_the_teacher_gets_no_gradient_and_bf16_is_single(name: str) -> None:
    student, teacher = torch.randn(2, 2, 3, 2, 2).bfloat16().requires_grad_().unbind()
    teacher.retain_grad()
    value = ALL[name](student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["at", "ifvd", "skd"])
def test_relations_take_any_width(name: str) -> None:
    value = ALL[name](torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2))
    assert value.isfinite()


@pytest.mark.parametrize("name", ["cwd", "inner"])
def test_values_need_one_width(name: str) -> None:
    with pytest.raises(InputError, match=r"one shape .* student \(2, 3, 2, 2\), teacher \(2, 5"):
        ALL[name](torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2))


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_map(name: str) -> None:
    maps = torch.randn(2, 3, 2, 2)
    with pytest.raises(InputError, match="student's map must be a floating tensor, got int"):
        ALL[name](3, maps)
    with pytest.raises(InputError, match=r"teacher's map must be .* got torch\.int64"):
        ALL[name](maps, maps.long())
    with pytest.raises(InputError, match=r"got student \(2, 3, 2, 2\), teacher \(2, 3, 2, 3\)"):
        ALL[name](maps, torch.randn(2, 3, 2, 3))


def test_skd_needs_two_axes_of_positions() -> None:
    with pytest.raises(InputError, match=r"needs maps \(N, C, H, W\), got \(2, 3, 4\)"):
        skd(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    with pytest.raises(InputError, match="pool must be a whole number of at least 1, got 0"):
        skd(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), pool=0)


def test_tokens_are_maps_of_one_axis() -> None:
    student, teacher = torch.randn(2, 2, 3, 4)
    tall = [x[..., None] for x in (student, teacher)]
    torch.testing.assert_close(cwd(student, teacher), cwd(*tall))
