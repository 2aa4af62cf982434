"""cirkd, mgd, af_dcd: terms by hand, queues, generators that learn, faults by their text."""

from __future__ import annotations

from itertools import product
from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from cpd.errors import InputError
from cpd.losses import CIRKD, MGD, AfDCD
from cpd.losses.af_dcd import contrast
from cpd.losses.cirkd import Queue, across, recalled


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1)


# cirkd -------------------------------------------------------------------------------------------


def test_across_by_hand() -> None:
    # two images of two pixels; the student's pixels are all alike, the teacher's orthogonal
    student = torch.ones(2, 1, 1, 2, dtype=torch.float64)
    teacher = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2).repeat(2, 1, 1, 1)
    p = exp(1) / (exp(1) + 1)
    expected = p * log(2 * p) + (1 - p) * log(2 * (1 - p))
    value = across(student, teacher, temperature=1.0, pool=1)
    assert value.item() == pytest.approx(expected)


def test_across_is_the_mean_over_pairs_of_images() -> None:
    student, teacher = (torch.randn(3, c, 2, 2, dtype=torch.float64) for c in (4, 5))
    total = 0.0
    for a, b in product(range(3), range(3)):
        near = []
        for maps in (teacher, student):
            left, right = (unit(maps[n].flatten(1).T) for n in (a, b))
            near.append(torch.log_softmax(left @ right.T / 0.1, 1))
        total += (near[0].exp() * (near[0] - near[1])).sum(1).mean().item()
    assert across(student, teacher, pool=1).item() == pytest.approx(total / 9)


def test_across_pools_first() -> None:
    student, teacher = torch.randn(2, 2, 3, 5, 5)
    small = [F.avg_pool2d(x, 2, ceil_mode=True) for x in (student, teacher)]
    torch.testing.assert_close(across(student, teacher), across(*small, pool=1))


def test_recalled_by_hand() -> None:
    bank = torch.eye(2, dtype=torch.float64)
    student, teacher = unit(torch.ones(1, 2, dtype=torch.float64)), bank[:1]
    p = exp(1) / (exp(1) + 1)
    expected = p * log(2 * p) + (1 - p) * log(2 * (1 - p))
    value = recalled(student, teacher, bank, temperature=1.0)
    assert value.item() == pytest.approx(expected)
    value = recalled(student, teacher, bank, temperature=0.5, soften=2.0)
    assert value.item() == pytest.approx(4 * expected)


def test_a_queue_keeps_the_newest() -> None:
    queue = Queue(classes=2, size=3, channels=1)
    for value in range(5):
        queue.push(1, torch.tensor([[float(value)]]))
    assert sorted(queue.entries[1, :, 0].tolist()) == [2.0, 3.0, 4.0]
    assert sorted(queue.sample(10)[:, 0].tolist()) == [2.0, 3.0, 4.0]
    queue.push(0, torch.tensor([[7.0]]))
    assert sorted(queue.sample(10)[:, 0].tolist()) == [2.0, 3.0, 4.0, 7.0]
    assert len(queue.sample(1)) in (1, 2)
    queue.push(0, torch.arange(5.0)[:, None])
    assert sorted(queue.entries[0, :, 0].tolist()) == [2.0, 3.0, 4.0]


def test_nothing_is_sampled_from_an_empty_queue() -> None:
    assert Queue(2, 3, 4).sample(5).shape == (0, 4)


def test_what_is_remembered() -> None:
    loss = CIRKD(channels=2, classes=3, pixels=8, regions=4, update=16)
    teacher = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])  # pixels (3, 0) and (0, 4)
    labels = torch.tensor([[[2, 2]]])
    loss(torch.randn_like(teacher), teacher, labels)
    assert loss.pixels.count.tolist() == [0, 0, 2]
    assert loss.regions.count.tolist() == [0, 0, 1]
    assert sorted(loss.pixels.sample(9).tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    torch.testing.assert_close(loss.regions.sample(9), torch.full((1, 2), 0.5**0.5))


def test_terms_of_cirkd() -> None:
    options = {"batch": 2.0, "pixel": 3.0, "region": 4.0}
    loss = CIRKD(channels=4, classes=3, **options)
    student, teacher = torch.randn(2, 2, 4, 3, 3).requires_grad_().unbind()
    labels = torch.randint(3, (2, 6, 6))
    terms = loss(student, teacher, labels)
    torch.testing.assert_close(terms["batch"], 2 * across(student, teacher))
    rows = [unit(x.flatten(2).transpose(1, 2).reshape(-1, 4)) for x in (student, teacher)]
    for name, queue in (("pixel", loss.pixels), ("region", loss.regions)):
        bank = queue.sample(10**6)  # all of it: it holds less than is sampled
        torch.testing.assert_close(terms[name], options[name] * recalled(*rows, bank))


def test_pixels_without_a_label_are_neither_stored_nor_compared() -> None:
    loss = CIRKD(channels=4, classes=3)
    student, teacher = torch.randn(2, 1, 4, 4, 4).requires_grad_().unbind()
    terms = loss(student, teacher, torch.full((1, 4, 4), 255))
    assert not loss.pixels.count.any()
    assert terms["pixel"].item() == terms["region"].item() == 0
    assert terms["batch"].item() > 0


def test_the_same_is_remembered_whatever_was_drawn_before() -> None:
    teacher, labels = torch.randn(2, 4, 8, 8), torch.randint(3, (2, 8, 8))
    stored = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss = CIRKD(channels=4, classes=3, update=2)
        loss(teacher + 1, teacher, labels)
        stored.append(loss.pixels.entries)
    assert torch.equal(*stored)


# mgd ---------------------------------------------------------------------------------------------


def test_mgd_by_hand() -> None:
    loss = MGD(channels=2, classes=3, alpha=0.5, mask=0.0)
    for parameter in loss.parameters():
        torch.nn.init.zeros_(parameter)
    teacher = torch.full((3, 2, 2, 2), 2.0)
    terms = loss(torch.randn(3, 2, 2, 2), teacher, None)
    assert {name: term.item() for name, term in terms.items()} == {"mgd": 0.5 * 8 * 4.0}


def test_mgd_hides_whole_positions_at_the_given_rate() -> None:
    loss = MGD(channels=3, classes=2, mask=0.75)
    seen = []
    loss.generator = torch.nn.Identity()
    loss.generator.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss(torch.ones(4, 3, 50, 50), torch.ones(4, 3, 50, 50), None)
    hidden = seen[0] == 0
    assert torch.equal(hidden.all(1), hidden.any(1))
    assert hidden.float().mean().item() == pytest.approx(0.75, abs=0.02)


def test_the_generator_learns() -> None:
    loss = MGD(channels=2, classes=3, alpha=1.0, mask=0.0)
    student = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss(student, torch.randn(2, 2, 4, 4), None)["mgd"].backward()
    assert student.grad is not None
    assert student.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


# af_dcd ------------------------------------------------------------------------------------------


def test_contrast_by_hand() -> None:
    # one patch of one position, two groups of one channel: each has one right and one wrong vector
    made, teacher = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 4.0])
    value = contrast(
        made.reshape(1, 2, 1, 1), teacher.reshape(1, 2, 1, 1), temperature=0.5, groups=2, patch=1
    )
    first = log(1 + exp((0.5 - 3.0) / 0.5))
    second = log(1 + exp((2.0 - 0.5) / 0.5))
    assert value.item() == pytest.approx(first + second, rel=1e-5)


def test_contrast_by_loops() -> None:
    made, teacher = torch.randn(2, 2, 6, 4, 5, dtype=torch.float64)
    total = 0.0
    for n, row, column in product(range(2), (0, 2), (0, 2)):
        inside = list(product(range(row, row + 2), range(column, column + 2), range(3)))
        for y, x, g in inside:
            u = made[n, 2 * g : 2 * g + 2, y, x]
            near = {
                (b, a, h): exp(-(u - teacher[n, 2 * h : 2 * h + 2, b, a]).abs().sum().item() / 0.7)
                for b, a, h in inside
            }
            right = near[y, x, g]
            wrong = sum(value for (_, _, h), value in near.items() if h != g)
            total -= log(right / (right + wrong))
    value = contrast(made, teacher, temperature=0.7, groups=3, patch=2)
    assert value.item() == pytest.approx(total / (2 * 4 * 4))


def test_contrast_gradient_by_numbers() -> None:
    made, teacher = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64)
    made.requires_grad_()
    options = {"temperature": 1.0, "groups": 2, "patch": 2}
    assert torch.autograd.gradcheck(lambda x: contrast(x, teacher, **options), (made,))


def test_terms_of_af_dcd() -> None:
    loss = AfDCD(16, 3, feature=0.5, contrastive=0.25, mask=0.0, groups=4, patch=2, pool=2)
    student, teacher = torch.randn(2, 2, 16, 8, 8)
    made = loss.generator(student)
    terms = loss(student, teacher, None)
    torch.testing.assert_close(terms["feature"], 0.5 * (made - teacher).square().sum() / 2)
    small = [F.max_pool2d(x, 2) for x in (made, teacher)]
    torch.testing.assert_close(terms["contrast"], 0.25 * contrast(*small, groups=4, patch=2))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MGD(2, 2, mask=1.0), r"mask must be a number in \[0, 1\), got 1.0"),
        (lambda: MGD(2, 2, alpha=-1), "alpha must be a finite number >= 0"),
        (lambda: AfDCD(16, 2, groups=1), "groups must be a whole number of at least 2, got 1"),
        (lambda: AfDCD(16, 2, temperature=0), "temperature must be"),
        (lambda: CIRKD(4, 2, pixels=0), "pixels must be a whole number of at least 1, got 0"),
        (lambda: CIRKD(4, 2, region=-0.1), "region must be a finite number >= 0"),
        (
            lambda: AfDCD(12, 2)(torch.zeros(1, 12, 16, 16), torch.zeros(1, 12, 16, 16), None),
            r"channels in 16 equal groups and at least 4 x 4 .* map \(1, 12, 4, 4\)",
        ),
        (
            lambda: MGD(2, 2)(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), None),
            r"needs maps \(N, C, H, W\), got \(1, 2, 4\)",
        ),
    ],
)
def test_refused(make, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make()
