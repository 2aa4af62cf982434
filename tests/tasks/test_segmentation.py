"""Segmentation: values by hand, kinds of output, hard pixels, metrics over processes."""

from __future__ import annotations

from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cpd import tasks
from cpd.errors import InputError
from cpd.tasks import Segmentation

EVEN = torch.zeros(1, 4, 2, 2)
LABELS = torch.tensor([[[0, 1], [2, 3]]])


def scores(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits of one image of 1 x n pixels with these probabilities, one row a pixel."""
    return torch.tensor(rows).log().T.reshape(1, len(rows[0]), 1, len(rows))


@pytest.mark.parametrize(
    "outputs",
    [EVEN, {"out": EVEN}, {"logits": EVEN}, (EVEN, EVEN), [EVEN], SimpleNamespace(logits=EVEN)],
    ids=["tensor", "out", "logits", "tuple", "list", "object"],
)
def test_where_the_logits_are(outputs: Any) -> None:
    assert Segmentation().logits(outputs) is EVEN


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"scores": EVEN}, "got dict"),
        (None, "got NoneType"),
        (torch.zeros(2, 4), r"logits must be \(N, C, h, w\), got \(2, 4\)"),
        ((EVEN, torch.zeros(2, 4)), r"logits must be \(N, C, h, w\), got \(2, 4\)"),
    ],
)
def test_no_logits(outputs: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Segmentation().logits(outputs)


def test_loss_by_hand() -> None:
    assert Segmentation().loss(EVEN, LABELS).item() == pytest.approx(log(4))
    outputs = scores((0.5, 0.5), (0.25, 0.75), (0.1, 0.9))
    value = Segmentation().loss(outputs, torch.tensor([[[0, 1, 255]]]))
    assert value.item() == pytest.approx((log(2) + log(4 / 3)) / 2)


def test_class_weights_by_hand() -> None:
    outputs = scores((0.5, 0.5), (0.25, 0.75))
    value = Segmentation(class_weights=[3.0, 1.0]).loss(outputs, torch.tensor([[[0, 1]]]))
    assert value.item() == pytest.approx((3 * log(2) + log(4 / 3)) / 4)


def test_auxiliary_outputs_by_hand() -> None:
    other = scores((0.25, 0.75))
    targets = torch.tensor([[[0]]])
    for outputs in (
        (scores((0.5, 0.5)), other),
        {"out": scores((0.5, 0.5)), "aux": other},
        SimpleNamespace(logits=scores((0.5, 0.5)), auxiliary_logits=other),
    ):
        value = Segmentation().loss(outputs, targets).item()
        assert value == pytest.approx(log(2) + 0.4 * log(4))
        assert Segmentation(auxiliary=0.0).loss(outputs, targets).item() == pytest.approx(log(2))


def test_no_pixel_counts() -> None:
    outputs = torch.randn(1, 4, 2, 2, requires_grad=True)
    for task in (Segmentation(), Segmentation(ohem=0.7)):
        value = task.loss(outputs, torch.full((1, 2, 2), 255))
        value.backward()
        assert value.item() == 0
    assert outputs.grad is not None
    assert not outputs.grad.any()


def test_logits_are_resized_to_the_labels() -> None:
    outputs, targets = torch.randn(2, 4, 3, 3), torch.randint(4, (2, 12, 10))
    large = F.interpolate(outputs, size=(12, 10), mode="bilinear", align_corners=False)
    value = Segmentation().loss(outputs, targets)
    torch.testing.assert_close(value, F.cross_entropy(large, targets))


def test_hard_pixels_by_hand() -> None:
    outputs = scores((0.5, 0.5), (0.25, 0.75), (0.1, 0.9), (0.9, 0.1))
    targets = torch.tensor([[[0, 1, 1, 255]]])  # probabilities 0.5, 0.75, 0.9, none
    value = Segmentation(ohem=0.8, ohem_kept=1).loss(outputs, targets)
    assert value.item() == pytest.approx((log(2) + log(4 / 3)) / 2)
    value = Segmentation(ohem=0.1, ohem_kept=1).loss(outputs, targets)
    assert value.item() == pytest.approx(log(2))  # the hardest one stays
    value = Segmentation(ohem=0.1, ohem_kept=9).loss(outputs, targets)
    assert value.item() == pytest.approx((log(2) + log(4 / 3) + log(10 / 9)) / 3)


def test_loss_gradient_by_numbers() -> None:
    outputs = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[[0, 2, 255, 1]] * 3])
    task = Segmentation(class_weights=[1.0, 2.0, 0.5])
    assert torch.autograd.gradcheck(lambda z: task.loss(z, targets), (outputs,))


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (LABELS.float(), r"int64 labels \(N, H, W\) .* got torch\.float32"),
        (LABELS[0], r"got torch\.int64 of shape \(2, 2\)"),
        (LABELS.repeat(2, 1, 1), r"of shape \(2, 2, 2\)"),
        (LABELS + 1, r"labels must be in \[0, 4\) or 255 \(ignored\) .* found \[4\]"),
        (LABELS - 1, r"found \[-1\]"),
    ],
)
def test_targets_must_be_labels(targets: torch.Tensor, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Segmentation().loss(EVEN, targets)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ohem": 0}, r"ohem is a probability in \(0, 1\], got 0"),
        ({"ohem_kept": 0}, "ohem_kept must be a whole number of at least 1, got 0"),
        ({"auxiliary": -1}, "auxiliary must be a weight >= 0"),
        ({"class_weights": [1.0, -1.0]}, "class_weights must be numbers >= 0"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"window": "512"}, "window must be a whole number of at least 1, got '512'"),
        ({"window": 4, "stride": 2.5}, "stride must be a whole number of at least 1, got 2.5"),
        ({"window": 4, "stride": 5}, "at most as long; got stride=5, window=4"),
        ({"stride": 5}, "stride is the step of a window.*window=None"),
        ({"class_weights": []}, "class_weights must be numbers >= 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Segmentation(**options)


def test_one_weight_for_each_class() -> None:
    with pytest.raises(InputError, match="there are 2 class_weights for 4 classes"):
        Segmentation(class_weights=[1.0, 1.0]).loss(EVEN, LABELS)


# metrics -----------------------------------------------------------------------------------------


def called(*classes: int, count: int = 4) -> torch.Tensor:
    """Logits of one image of 1 x n pixels that are called so."""
    return F.one_hot(torch.tensor(classes), count).T.reshape(1, count, 1, -1).float()


def test_metrics_by_hand() -> None:
    metrics = Segmentation(per_class=True).metrics()
    metrics.update(called(0, 0, 1), torch.tensor([[[0, 1, 1]]]))
    metrics.update(called(1, 2, 2), torch.tensor([[[1, 0, 255]]]))
    # class 0: 1 right, union 3; class 1: 2 right, union 3; class 2: 0 right, union 1; 3: not there
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(
        {"miou": 1 / 3, "pixel_accuracy": 3 / 5, "iou_0": 1 / 3, "iou_1": 2 / 3, "iou_2": 0.0}
    )
    assert set(Segmentation().metrics()) == {"segmentation"}


def test_metrics_begin_anew() -> None:
    metrics = Segmentation().metrics()
    metrics.update(called(0, 1), torch.tensor([[[1, 0]]]))
    assert metrics.compute()["miou"].item() == 0
    metrics.reset()
    metrics.update(called(0, 1), torch.tensor([[[0, 1]]]))
    assert metrics.compute()["miou"].item() == 1


def test_metrics_resize() -> None:
    outputs, targets = torch.randn(2, 4, 3, 3), torch.randint(4, (2, 9, 9))
    metrics = Segmentation().metrics()
    metrics.update(outputs, targets)
    large = F.interpolate(outputs, size=(9, 9), mode="bilinear", align_corners=False).argmax(1)
    expected = (large == targets).float().mean().item()
    assert metrics.compute()["pixel_accuracy"].item() == pytest.approx(expected)


def test_metrics_of_several_processes() -> None:
    """One process with samples and one without: each counts what both have."""
    outputs, targets = called(0, 0, 1), torch.tensor([[[0, 1, 1]]])
    full, empty = (Segmentation().metrics()["segmentation"] for _ in range(2))
    full.update(outputs, targets)

    def gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        size = torch.tensor(4)
        return [size, torch.tensor(0)] if tensor.dim() == 0 else [tensor, full.counts]

    empty._sync_dist(gather)
    assert torch.equal(empty.counts, full.counts)


def test_windows_cover_every_pixel_and_average() -> None:
    images = torch.randn(2, 3, 10, 13)

    def network(part: torch.Tensor) -> torch.Tensor:
        return part[:, :2] + part.mean((1, 2, 3), keepdim=True)  # says which window it saw

    found = Segmentation(window=6, stride=4).infer(network, images)
    total, seen = torch.zeros(2, 2, 10, 13), torch.zeros(10, 13)
    for top in (0, 4):
        for left in (0, 4, 7):
            part = images[..., top : top + 6, left : left + 6]
            total[..., top : top + 6, left : left + 6] += network(part)
            seen[top : top + 6, left : left + 6] += 1
    assert seen.min() == 1
    torch.testing.assert_close(found, total / seen)


def test_windows_of_smaller_logits_and_smaller_images() -> None:
    images, calls = torch.randn(1, 3, 12, 6), []

    def network(part: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(tuple(part.shape[-2:]))
        return {"out": F.avg_pool2d(part, 2)}

    task = Segmentation(window=8)  # the default stride: two thirds, 5
    assert task.infer(network, images).shape == (1, 3, 12, 6)
    assert calls == [(8, 6), (8, 6)]
    whole = Segmentation(window=12).infer(network, images)
    assert whole["out"].shape == (1, 3, 6, 3)


def test_judged_by_windows() -> None:
    from cpd.distill import Batches, evaluate

    images, labels = torch.randn(3, 2, 9, 9), torch.randint(2, (3, 9, 9))
    data = list(zip(images, labels, strict=True))
    source = torch.utils.data.StackDataset(images, labels)
    task, network = Segmentation(window=4), torch.nn.Conv2d(2, 2, 3, padding=1)
    found = evaluate(network, Batches(source, 2, seed=0, train=False), task, torch.device("cpu"))
    expected = task.metrics()
    with torch.no_grad():
        for x, y in data:
            expected.update(task.infer(network, x[None]), y[None])
    assert found == pytest.approx({n: v.item() for n, v in expected.compute().items()})


def test_metrics_refuse() -> None:
    metrics = Segmentation().metrics()
    metrics.update(called(0), torch.tensor([[[255]]]))
    with pytest.raises(InputError, match="of no labelled pixel"):
        metrics.compute()
    with pytest.raises(InputError, match="logits of 4 classes, now of 3"):
        metrics.update(called(0, count=3), torch.tensor([[[0]]]))


def test_resolve() -> None:
    assert tasks.resolve("segmentation") == Segmentation()
    spec = {"segmentation": {"ohem": 0.7, "class_weights": [1.0, 2.0]}}
    assert tasks.resolve(spec) == Segmentation(ohem=0.7, class_weights=[1.0, 2.0])


def test_what_a_picture_shows() -> None:
    outputs = scores((0.9, 0.1), (0.2, 0.8), (0.6, 0.4))
    labels, called = Segmentation().maps(outputs, torch.tensor([[[0, 0, 255]]]))
    assert labels.tolist() == [[[0, 0, -1]]]
    assert called.tolist() == [[[0, 1, 0]]]
    large = F.interpolate(outputs, scale_factor=2, mode="bilinear", align_corners=False)
    labels, called = Segmentation().maps({"out": outputs}, torch.zeros(1, 2, 6, dtype=torch.long))
    assert called.shape == labels.shape == (1, 2, 6)
    assert torch.equal(called, large.argmax(1))
