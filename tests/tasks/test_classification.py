"""Classification: values by hand, kinds of output, metrics over batches, faults by text."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import log
from typing import Any

import pytest
import torch

from cpd import tasks
from cpd.errors import InputError, UnknownName
from cpd.tasks import Classification

EVEN = torch.zeros(2, 4)
LABELS = torch.tensor([0, 3])


@dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize(
    "outputs",
    [EVEN, {"logits": EVEN}, OrderedDict(logits=EVEN), Output(EVEN), (EVEN, 1), [EVEN]],
    ids=lambda outputs: type(outputs).__name__,
)
def test_where_the_logits_are(outputs: Any) -> None:
    assert Classification().logits(outputs) is EVEN


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"scores": EVEN}, "the network returned dict"),
        ((), "the network returned tuple"),
        (None, "the network returned NoneType"),
        (torch.zeros(2, 4, 3), r"logits must be \(N, C\), got \(2, 4, 3\)"),
    ],
)
def test_no_logits(outputs: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Classification().logits(outputs)


def test_loss_by_hand() -> None:
    assert Classification().loss(EVEN, LABELS).item() == pytest.approx(log(4))
    outputs = torch.tensor([[log(3.0), 0.0]])
    assert Classification().loss((outputs,), torch.tensor([0])).item() == pytest.approx(log(4 / 3))


def test_label_smoothing_by_hand() -> None:
    outputs = torch.tensor([[log(3.0), 0.0]])
    value = Classification(label_smoothing=0.2).loss(outputs, torch.tensor([0]))
    assert value.item() == pytest.approx(0.9 * log(4 / 3) + 0.1 * log(4))


def test_loss_gradient_by_numbers() -> None:
    outputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda z: Classification().loss(z, targets), (outputs,))


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (torch.tensor([0.0, 1.0]), r"int64 labels of shape \(2,\) .* got torch.float32"),
        (torch.tensor([[0], [1]]), r"got torch.int64 of shape \(2, 1\)"),
        (torch.tensor([0]), r"of shape \(1,\)"),
        (torch.tensor([0, 4]), r"labels must be in \[0, 4\) .* from 0 to 4"),
        (torch.tensor([-1, 3]), "from -1 to 3"),
    ],
)
def test_targets_must_be_labels(targets: torch.Tensor, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Classification().loss(EVEN, targets)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_must_be_a_share(smoothing: float) -> None:
    with pytest.raises(InputError, match=r"label_smoothing must be in \[0, 1\)"):
        Classification(label_smoothing=smoothing)


def ranked(*order: int) -> torch.Tensor:
    """One row of logits whose classes rank in the given order."""
    row = torch.zeros(len(order))
    row[list(order)] = torch.arange(len(order), 0, -1).float()
    return row


def test_metrics_by_hand() -> None:
    task = Classification()
    metrics = task.metrics()
    outputs = torch.stack([ranked(*range(7))] * 4)
    metrics.update(outputs, torch.tensor([0, 1, 4, 5]))  # ranks 1, 2, 5, 6
    assert {name: value.item() for name, value in metrics.compute().items()} == {
        "top1": 0.25,
        "top5": 0.75,
    }
    assert task.primary in metrics
    assert task.higher_is_better


def test_metrics_stay_apart_after_a_batch_on_which_they_agree() -> None:
    metrics = Classification().metrics()
    outputs = torch.stack([ranked(*range(7))] * 2)
    metrics.update(outputs, torch.tensor([0, 0]))
    metrics.update(outputs, torch.tensor([1, 1]))
    assert {name: value.item() for name, value in metrics.compute().items()} == {
        "top1": 0.5,
        "top5": 1.0,
    }


def test_batches_count_by_their_samples() -> None:
    metrics = Classification().metrics()
    metrics.update(ranked(0, 1)[None], torch.tensor([0]))
    metrics.update({"logits": torch.stack([ranked(0, 1)] * 3)}, torch.tensor([1, 1, 1]))
    assert metrics.compute()["top1"].item() == 0.25


def test_few_classes_all_count_as_top5() -> None:
    metrics = Classification().metrics()
    metrics.update(EVEN, LABELS)
    assert metrics.compute()["top5"].item() == 1.0


def test_reset() -> None:
    metrics = Classification().metrics()
    metrics.update(EVEN, LABELS)
    metrics.reset()
    metrics.update(ranked(0, 1)[None], torch.tensor([1]))
    assert metrics.compute()["top1"].item() == 0.0


def test_metrics_of_nothing() -> None:
    metrics = Classification().metrics()
    metrics.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="accuracy of no samples"):
        metrics.compute()


def test_metrics_need_one_label_a_row() -> None:
    with pytest.raises(InputError, match=r"targets must have shape \(2,\)"):
        Classification().metrics().update(EVEN, torch.tensor([1]))


# resolve -----------------------------------------------------------------------------------------


def test_resolve() -> None:
    assert tasks.resolve("classification") == Classification()
    spec = {"classification": {"label_smoothing": 0.1}}
    assert tasks.resolve(spec) == Classification(label_smoothing=0.1)
    own = Classification()
    assert tasks.resolve(own) is own


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("clasification", UnknownName, "unknown task .*; did you mean 'classification'"),
        ({"classification": {"smooth": 1}}, UnknownName, "names: label_smoothing"),
        ({}, InputError, "exactly one task is wanted, got 0"),
        (None, InputError, "a task is given by a name"),
        (object(), InputError, "is not a task: it has no primary, higher_is_better, logits, loss"),
        (Classification, InputError, "is not a task: give an instance, not the class"),
    ],
)
def test_resolve_refuses(spec: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        tasks.resolve(spec)
