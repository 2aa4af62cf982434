"""Losses on features through distill and compress: pruned with, resumed exactly, loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import cpd
from cpd.distill import distill
from cpd.errors import InputError, UnknownName

LOSSES = {
    "cwd": {"weight": 0.5, "temperature": 1.0},
    "inner": {"at": "body", "weight": 2.0, "warmup": 2, "decay": 0.5},
    "mgd": {"at": "body", "alpha": 0.001},
    "cirkd": {"at": "stem", "pixels": 32, "regions": 8, "pool": 1},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)))


class Stripes:
    """Which of four colours a pixel has."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (40, 4, 4), generator=generator)
        labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
        colours = torch.randn(4, 3, generator=generator)
        noise = 0.3 * torch.randn(40, 3, 8, 8, generator=generator)
        images = colours[labels].permute(0, 3, 1, 2) + noise
        self.train = TensorDataset(images[:24], labels[:24])
        self.val = TensorDataset(images[24:32], labels[24:32])
        self.test = TensorDataset(images[32:], labels[32:])


def keywords(**changes):
    stage = {"batch_size": 8, "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}}
    given = {
        "data": Stripes(),
        "task": "segmentation",
        "losses": LOSSES,
        "target": "macs=0.6",
        "base": {**stage, "epochs": 4},
        "interval": 2,
        "events": 2,
        "prune": stage,
        "recover": {**stage, "epochs": 2},
        "onnx": False,
        "seed": 1,
    }
    return {**given, **changes}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


class Watch:
    """Every term of every step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[dict[str, float]]] = {}

    def after_step(self, state) -> None:
        self.seen.setdefault(state.stage, []).append(dict(state.losses))


class Break:
    """A power cut after a step of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.at = (stage, step)

    def after_step(self, state) -> None:
        if (state.stage, state.step) == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    watch = Watch()
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = cpd.compress(network(), **keywords(output=folder), callbacks=(watch,))
    return result, watch, folder


def test_every_term_is_there_and_finite(whole) -> None:
    _, watch, _ = whole
    names = {"task", "cwd", "inner", "mgd", "cirkd.batch", "cirkd.pixel", "cirkd.region", "total"}
    assert set(watch.seen) == {"base", "prune", "recover"}
    assert set(watch.seen["base"][0]) == {"task", "total"}
    for stage in ("prune", "recover"):
        assert set(watch.seen[stage][0]) == names
    # before anything is pruned the student is its teacher, but for batch statistics
    first, last = watch.seen["prune"][0], watch.seen["recover"][-1]
    assert first["cwd"] < 0.1
    assert last["total"] == pytest.approx(sum(last.values()) - last["total"], rel=1e-5)


def test_what_was_trained_is_judged(whole) -> None:
    result, _, folder = whole
    after = result.report.after.accuracy
    assert set(after) == {"miou", "pixel_accuracy"}
    assert after["miou"] > 0.25  # a quarter of the pixels by chance is an IoU of 1/7
    again = cpd.load(folder, network())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(images), result.model.eval()(images))
    assert not any(m._forward_hooks for m in result.model.modules())
    assert set(result.model.state_dict()) == set(network().state_dict())


@pytest.mark.parametrize(("stage", "step"), [("prune", 3), ("recover", 4)])
def test_resumed_exactly(whole, tmp_path: Path, stage: str, step: int) -> None:
    result, watch, _ = whole
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cpd.compress(network(), **keywords(output=output), callbacks=(Break(stage, step),))
    later = Watch()
    again = cpd.compress(network(), **keywords(output=output, resume=True), callbacks=(later,))
    assert again.plan == result.plan
    first, second = result.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert later.seen["recover"][-1] == watch.seen["recover"][-1]


def test_a_generator_is_trained_with_the_student() -> None:
    """Alone, with the task off: the student stays a good student and the loss falls."""
    watch = Watch()
    cpd.distill(
        network(),
        teacher=network(),
        data=Stripes(),
        task="segmentation",
        losses={"mgd": {"at": "body", "alpha": 0.01, "mask": 0.5}},
        options={"steps": 40, "batch_size": 8, "task_weight": 0.0, "optimizer": {"name": "Adam"}},
        callbacks=(watch,),
    )
    terms = [step["mgd"] for step in watch.seen["distill"]]
    assert sum(terms[-5:]) < 0.5 * sum(terms[:5])


def test_distilled_by_hand_on_kept_channels() -> None:
    teacher, images = network().eval(), torch.randn(2, 3, 8, 8)
    small, plan = cpd.prune(teacher, images, target="macs=0.6")
    options = {"steps": 2, "batch_size": 8}
    given = {"data": Stripes(), "task": "segmentation", "losses": {"inner": {"at": "body"}}}
    done = cpd.distill(small, teacher=teacher, plan=plan, options=options, **given)
    assert done.history[-1]["losses"]["inner"] > 0
    with pytest.raises(InputError, match=r"the student gives .* the teacher .* Which channels"):
        cpd.distill(small, teacher=teacher, options=options, **given)
    read = cpd.Plan.from_json(plan.to_json())
    with pytest.raises(InputError, match="the plan does not say where its channels run"):
        cpd.distill(small, teacher=teacher, plan=read, options=options, **given)


def test_a_wrong_point_is_met_before_the_first_step(tmp_path: Path) -> None:
    for losses, error, text in (
        ({"inner": {"at": "neck"}}, InputError, "combing saw no operation in the module 'neck'"),
        ({"af_dcd": {"at": "body"}}, InputError, "channels in 16 equal groups"),
    ):
        watch = Watch()
        with pytest.raises(error, match=text):
            cpd.compress(network(), **keywords(losses=losses, base=None), callbacks=(watch,))
        assert not watch.seen
    with pytest.raises(UnknownName, match="module of Net 'neck'"):
        cpd.distill(
            network(), teacher=network(), data=Stripes(), task="segmentation",
            losses={"inner": {"at": "neck"}}, options={"steps": 1},
        )  # fmt: skip


@pytest.mark.parametrize("name", ["dkd", "nkd", "ifvd", "cirkd"])
def test_no_loss_learns_from_what_the_task_ignores(name: str) -> None:
    """A label that is a class's number as well as 255, which is none's."""
    spec = {name: {"at": "body"} if name in ("ifvd", "cirkd") else {}}
    found, teacher = [], Net()
    for ignored in (2, 255):
        given = Stripes()
        images, labels = given.train.tensors
        given.train = TensorDataset(images, labels.masked_fill(labels == 2, ignored))
        watch = Watch()
        task = {"segmentation": {"ignore_index": ignored}}
        distill(
            network(), data=given, teacher=teacher, task=task, losses=spec,
            options={"steps": 2, "batch_size": 8}, callbacks=(watch,),
        )  # fmt: skip
        found.append(watch.seen["distill"])
    assert found[0] == found[1]
    assert any(value for key, value in found[0][1].items() if key.startswith(name))
