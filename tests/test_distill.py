"""The training loop: exact, resumable, one process or several alike, and clear when it fails."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import cpd
from cpd import errors
from cpd import losses as loss_shelf
from cpd.distill import Callback, TrainOptions, coerce, distill, read, write
from cpd.distill.batches import Batches, parts, unpack
from cpd.distill.optim import Schedule, build_optimizer, optimizers, schedules
from cpd.distill.seeds import seed_all
from cpd.distill.spread import Sharded

HERE = Path(__file__).parent


class Blobs:
    """Four Gaussian blobs in 6 dimensions."""

    def __init__(self, dtype=torch.float32, samples=70):
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(4, 6, generator=generator)
        targets = torch.arange(samples + 40) % 4
        inputs = centres[targets] + 0.3 * torch.randn(len(targets), 6, generator=generator)
        inputs = inputs.to(dtype)
        self.train = TensorDataset(inputs[:samples], targets[:samples])
        self.val = TensorDataset(inputs[samples:], targets[samples:])
        self.test = self.val


def network(dtype=torch.float32, norm=True, dropout=0.2, seed=1):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.Dropout(dropout), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(dtype)


def options(**changes):
    sgd = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    return {"batch_size": 16, "epochs": 3, "optimizer": sgd, **changes}


def same(one, two):
    first, second = one.state_dict(), two.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- what a run does and leaves alone


def test_learns_and_reports():
    result = distill(network(), data=Blobs(), options=options(epochs=6))
    assert result.best > 0.9
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4, 5, 6]
    assert set(result.history[0]["losses"]) == {"task", "total"}
    assert "best" in str(result)


def test_leaves_everything_given_as_it_was():
    student, teacher = network(), network(seed=2)
    student.eval()
    student[1].train()
    teacher.train()
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (student, teacher)]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    result = distill(student, teacher=teacher, data=Blobs(), options=options())
    for model, was in zip((student, teacher), before, strict=True):
        assert all(torch.equal(tensor, was[name]) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert teacher.training
    assert [m.training for m in result.model.modules()] == [m.training for m in student.modules()]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="its generators are seeded too")
def test_seeding_costs_nothing_where_there_is_no_accelerator(monkeypatch):
    torch.manual_seed(2**62 + 1)
    wanted = torch.rand(3), torch.initial_seed()
    with monkeypatch.context() as patched:  # what PyTorch would keep for a device to come
        patched.setattr("traceback.format_stack", lambda *_, **__: pytest.fail("a stack"))
        seed_all(2**62 + 1)
    assert torch.equal(torch.rand(3), wanted[0])
    assert torch.initial_seed() == wanted[1]


def test_same_seed_same_weights():
    runs = [distill(network(), data=Blobs(), options=options(), seed=s).model for s in (4, 4, 5)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_ends_with_the_best_weights():
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def after_evaluate(self, state, metrics):
            weights = {n: t.clone() for n, t in state.student.state_dict().items()}
            self.seen.append((metrics["top1"], weights))

    watch = Watch()
    rough = options(epochs=8, optimizer={"name": "SGD", "lr": 1.5})
    result = distill(network(), data=Blobs(), options=rough, callbacks=(watch,))
    best = max(value for value, _ in watch.seen)
    weights = next(weights for value, weights in watch.seen if value == best)
    assert result.best == best
    assert all(torch.equal(t, weights[n]) for n, t in result.model.state_dict().items())


def test_teacher_is_followed():
    teacher = distill(network(), data=Blobs(), options=options(epochs=6)).model
    only = options(task_weight=0.0, epochs=6)
    run = distill(network(seed=9), teacher=teacher, data=Blobs(), options=only, losses="kd")
    assert run.best > 0.9
    assert run.history[-1]["losses"]["task"] == 0.0
    assert run.history[-1]["losses"]["kd"] < run.history[0]["losses"]["kd"]


def test_own_loss_task_and_loader():
    class Regress:
        primary, higher_is_better = "error", False

        def logits(self, outputs):
            return outputs

        def loss(self, outputs, targets):
            return (outputs[:, 0] - targets).square().mean()

        def metrics(self):
            from torchmetrics import MeanMetric, MetricCollection

            class Error(MeanMetric):
                def update(self, outputs, targets):
                    super().update((outputs[:, 0] - targets).abs())

            return MetricCollection({"error": Error()})

    class Loaders:
        train = DataLoader(Blobs().train, batch_size=8, shuffle=True)
        val = DataLoader(Blobs().val, batch_size=8)

    def gap(student, teacher):
        return (student - teacher).square().mean()

    run = distill(
        network(dropout=0.0),
        teacher=network(seed=3),
        data=Loaders,
        task=Regress(),
        losses=gap,
        options=options(optimizer="Adam", epochs=4),
    )
    errors_seen = [entry["metrics"]["error"] for entry in run.history]
    assert run.best == min(errors_seen) < errors_seen[0]
    assert run.history[0]["step"] == 9


def test_bf16_trains_float32_weights():
    run = distill(network(), data=Blobs(), options=options(precision="bf16", epochs=6))
    assert run.best > 0.9
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("at", [None, "0"])
def test_losses_are_computed_in_float32_beside_autocast(at, monkeypatch):
    seen = []

    def gap(student, teacher):
        """A sum of products, which autocast rounds."""
        product = student @ teacher.detach().transpose(-1, -2)
        seen.append((student.dtype, teacher.dtype, product.dtype))
        return product.square().mean()

    monkeypatch.setitem(loss_shelf.SHELF, "gap", gap)
    losses = {"gap": {} if at is None else {"at": at}}
    given = options(precision="bf16", epochs=1)
    distill(network(), teacher=network(seed=2), data=Blobs(), losses=losses, options=given)
    assert len(seen) > 2
    assert set(seen) == {(torch.float32,) * 3}


class Pictures(nn.Module):
    """A convolution over (N, 3, 2, 1) that notes how its images lie in memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 2, padding=1, dtype=torch.float64)
        self.head = nn.Linear(8, 4, dtype=torch.float64)
        self.seen = []

    def __deepcopy__(self, memo):
        other = Pictures()
        other.load_state_dict(self.state_dict())
        other.seen = self.seen  # of all copies together
        return other

    def forward(self, x):
        self.seen.append((self.training, x.stride(1) == 1))
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_channels_last_is_another_layout_and_not_another_function():
    flat, runs = Blobs(torch.float64), []
    shaped = [
        TensorDataset(d.tensors[0].unflatten(1, (3, 2, 1)), d.tensors[1])
        for d in (flat.train, flat.val)
    ]
    data = types.SimpleNamespace(train=shaped[0], val=shaped[1], test=shaped[1])
    for last in (False, True):
        student = Pictures()
        given = options(channels_last=last)
        runs.append(distill(student, teacher=Pictures(), data=data, options=given))
        assert {training for training, _ in student.seen} == {True, False}
        assert {layout for _, layout in student.seen} == {last}
    for one, two in zip(*(run.model.parameters() for run in runs), strict=True):
        assert two.is_contiguous()
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_frozen_norms_keep_their_statistics():
    student = network()
    frozen = distill(student, data=Blobs(), options=options(freeze_norms=True)).model
    assert torch.equal(frozen[1].running_mean, student[1].running_mean)
    assert not torch.equal(frozen[1].weight, student[1].weight)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulating_parts_equals_the_whole_batch(accumulate):
    student = network(torch.float64, norm=False, dropout=0.0)
    teacher = network(torch.float64, norm=False, dropout=0.0, seed=2)
    data = Blobs(torch.float64)
    runs = [
        distill(student, teacher=teacher, data=data, options=options(accumulate=count, clip=0.5))
        for count in (1, accumulate)
    ]
    for one, two in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    losses = [[entry["losses"]["total"] for entry in run.history] for run in runs]
    assert losses[0] == pytest.approx(losses[1])


def test_callbacks_in_order_and_stop():
    calls = []

    class Log:
        def after_backward(self, state):
            calls.append(("backward", state.step, state.synced))

        def after_step(self, state):
            calls.append(("step", state.step, state.losses["total"] > 0))
            state.stop = state.step == 2

    distill(network(), data=Blobs(), options=options(accumulate=2), callbacks=(Log(),))
    one = [("backward", 0, False), ("backward", 0, True), ("step", 1, True)]
    assert calls[:3] == one
    assert len(calls) == 6


def test_zero_epochs_change_nothing():
    student = network()
    assert same(distill(student, data=Blobs(), options=options(epochs=0)).model, student)


# --- resume


class Break(Callback):
    """A power cut after some step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, state):
        if state.step == self.step:
            raise KeyboardInterrupt


SETTINGS = {
    "sgd": {"schedule": "CosineAnnealingLR", "warmup": 3},
    "adamw": {"optimizer": {"name": "AdamW", "lr": 0.01}, "schedule": "OneCycleLR"},
    "epochs": {"schedule": {"name": "StepLR", "step_size": 1, "per": "epoch"}, "accumulate": 2},
    "plateau": {"schedule": {"name": "ReduceLROnPlateau", "patience": 0}, "norm_decay": False},
}
SETTINGS["adamw"]["schedule"] = {"name": "OneCycleLR", "max_lr": 0.05}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("step", [5, 11])
def test_resume_ends_where_the_whole_run_ends(tmp_path, name, step):
    chosen = options(epochs=4, **SETTINGS[name])
    teacher = network(seed=2)
    whole = distill(network(), teacher=teacher, data=Blobs(), options=chosen, seed=3)
    path = tmp_path / "checkpoint"
    given = {"teacher": teacher, "data": Blobs(), "options": chosen, "seed": 3, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        distill(network(), **given, callbacks=(Break(step),))
    assert path.exists()
    torch.randn(7)
    again = distill(network(), **given, resume=True)
    assert same(again.model, whole.model)
    assert again.history == whole.history
    assert again.best == whole.best


def test_resume_with_a_loader_of_ones_own(tmp_path):
    def data():
        blobs = Blobs()
        generator = torch.Generator().manual_seed(11)
        blobs.train = DataLoader(blobs.train, 16, shuffle=True, generator=generator)
        return blobs

    path = tmp_path / "checkpoint"
    whole = distill(network(), data=data(), options=options())
    with pytest.raises(KeyboardInterrupt):
        distill(network(), data=data(), options=options(), checkpoint=path, callbacks=(Break(7),))
    again = distill(network(), data=data(), options=options(), checkpoint=path, resume=True)
    assert same(again.model, whole.model)


def test_resume_needs_a_file():
    with pytest.raises(errors.InputError, match="checkpoint="):
        distill(network(), data=Blobs(), resume=True)


# --- several processes


def test_two_processes_train_as_one(tmp_path):
    launched("distill", tmp_path)
    found = load_file(tmp_path / "weights")
    for name, tensor in two_processes().distilled().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_cut_student_learns_on_two_processes_as_on_one(parallel, tmp_path):
    """Whole on each, or in shards; broken off and resumed; uneven widths, batches and parts."""
    (tmp_path / "one").mkdir()
    launched(parallel, tmp_path)
    found = load_file(tmp_path / "weights")
    for name, tensor in two_processes().taught(tmp_path / "one", parallel).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield types.SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    torch.distributed.destroy_process_group()


def test_what_cannot_be_in_shards_is_refused(alone):
    sharded = Sharded(alone, network())
    with pytest.raises(errors.InputError, match=r"lies in shards \(FSDP\).*shard what comes out"):
        cpd.Pruner(sharded.student, torch.zeros(2, 6), target="macs=0.5")
    model = network()
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(errors.InputError, match="cannot be sharded"):
        Sharded(alone, model)
    with pytest.raises(errors.InputError, match=r"prune\.parallel must be ddp"):
        cpd.compress(network(), data=Blobs(), target="macs=0.5", prune={"parallel": "fsdp"})
    with pytest.raises(errors.UnknownName, match="did you mean 'fsdp'"):
        coerce(TrainOptions, {"parallel": "fsdp2"})


def test_shards_hold_what_the_network_holds(alone):
    """Values, buffers and moments come together whole, and go back into shards."""
    model = network()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sharded = Sharded(alone, model)
    assert {
        n: torch.equal(t, wanted[n]) for n, t in sharded.whole().state_dict().items()
    } == dict.fromkeys(wanted, True)
    assert type(sharded.whole()) is nn.Sequential
    optimizer = torch.optim.AdamW(model.parameters())
    sharded.model(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    state = sharded.optimizer_state(optimizer)
    assert state["state"][0]["exp_avg"].shape == (16, 6)
    assert not hasattr(state["state"][0]["exp_avg"], "full_tensor")
    sharded.load_optimizer(optimizer, state)
    assert hasattr(next(iter(optimizer.state.values()))["exp_avg"], "full_tensor")
    sharded.load(wanted)
    assert same(sharded.whole(), network())


def two_processes():
    import two_processes

    return two_processes


def launched(mode, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", "2", "--master-port", str(port)]
    command += [str(HERE / "two_processes.py"), mode, str(folder)]
    place = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr


# --- batches


class Noisy(Dataset):
    """Samples with a random transform."""

    def __len__(self):
        return 21

    def __getitem__(self, index):
        return torch.randn(2) + np.random.rand() + random.random(), index  # noqa: NPY002


def test_processes_share_every_global_batch():
    source = TensorDataset(torch.arange(21.0), torch.arange(21))
    whole = [b[1].tolist() for b in Batches(source, 4, seed=2).epoch(1)]
    shares = [
        [b[1].tolist() for b in Batches(source, 4, seed=2, rank=rank, world=2).epoch(1)]
        for rank in range(2)
    ]
    assert len(whole) == 5
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(b) for b in whole]
    loader = DataLoader(source, batch_size=4)
    half = [b[1].tolist() for b in Batches(loader, 9, 0, train=False, rank=1, world=2).epoch(0)]
    assert half[0] == [1, 3]


def test_evaluation_sees_every_sample_once():
    source = TensorDataset(torch.arange(21.0), torch.arange(21))
    seen = []
    for rank in range(4):
        share = Batches(source, 8, seed=0, train=False, rank=rank, world=4)
        seen += [i for batch in share.epoch(0) for i in batch[1].tolist()]
    assert sorted(seen) == list(range(21))


@pytest.mark.parametrize("loader", [False, True])
def test_skipping_gives_the_rest_of_the_same_epoch(loader):
    source = DataLoader(Noisy(), 4, shuffle=True) if loader else Noisy()
    batches = Batches(source, 4, seed=5)
    whole = list(batches.epoch(2))
    torch.randn(3)
    rest = list(batches.epoch(2, skip=2))
    assert len(whole) == len(rest) + 2
    for one, two in zip(whole[2:], rest, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_transforms_do_not_depend_on_workers():
    plain, worked = (list(Batches(Noisy(), 4, 5, workers=count).epoch(1)) for count in (0, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, worked, strict=True))


def test_parts_and_forms_of_a_batch():
    x, y = torch.arange(10).reshape(5, 2), torch.arange(5)
    assert [len(part[1]) for part in parts((x, y), 2)] == [2, 3]
    assert len(parts((x[:1], y[:1]), 4)) == 1
    assert unpack((x, y))[0] == (x,)
    assert unpack([[x, x], y])[0] == (x, x)
    assert unpack(({"ids": x}, y))[1] == {"ids": x}
    args, kwargs, targets = unpack({"ids": x, "labels": y})
    assert args == ()
    assert list(kwargs) == ["ids"]
    assert targets is y


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (TensorDataset(torch.zeros(0)), "empty"),
        (3, "iterable of batches"),
        (Stream(), "DataLoader"),
    ],
)
def test_sources_that_cannot_be_used(source, text):
    with pytest.raises(errors.InputError, match=text):
        Batches(source, 4, seed=0)


@pytest.mark.parametrize("batch", [(1, 2, 3), {"ids": torch.zeros(2)}, "text"])
def test_batches_that_cannot_be_used(batch):
    with pytest.raises(errors.InputError, match="batch"):
        unpack(batch)


def test_batches_that_cannot_be_shared():
    source = TensorDataset(torch.arange(21.0))
    with pytest.raises(errors.InputError, match="multiple of 2"):
        Batches(source, 5, seed=0, world=2)
    with pytest.raises(errors.InputError, match="cannot be shared"):
        next(Batches(DataLoader(source, 5), 5, seed=0, world=2).epoch(0))


def test_a_last_batch_of_a_loader_smaller_than_the_processes():
    loader = DataLoader(TensorDataset(torch.arange(10)), 8)
    found = [list(Batches(loader, 8, 0, rank=rank, world=4).epoch(0)) for rank in range(4)]
    assert [batches[1][0].tolist() for batches in found] == [[8], [9], [8], [9]]
    assert all(len(batches) == 2 for batches in found)
    (again,) = Batches(loader, 8, 0, rank=1, world=4).epoch(0, skip=1)
    assert again[0].tolist() == [9]


@pytest.mark.parametrize("samples", [16, 19, 22])
def test_an_uneven_last_batch_of_a_loader_is_shared_as_far_as_it_divides(samples):
    loader = DataLoader(TensorDataset(torch.arange(samples)), 8)
    found = [
        [int(x) for batch in Batches(loader, 8, 0, rank=rank, world=2).epoch(0) for x in batch[0]]
        for rank in range(2)
    ]
    assert [len(each) for each in found] == [samples // 2] * 2
    assert sorted(found[0] + found[1]) == list(range(samples // 2 * 2))


def test_a_loader_without_batches_or_length():
    class Nothing:
        train = ()
        val = None

    class Endless(Nothing):
        train = (batch for batch in [])

    with pytest.raises(errors.InputError, match="no batch"):
        distill(network(), data=Nothing, options=options(steps=4))
    with pytest.raises(errors.InputError, match="steps="):
        distill(network(), data=Endless, options=options())


# --- optimizers and schedules


def rates(spec, steps, warmup=0, epoch=1, lr=1.0):
    optimizer = build_optimizer(nn.Linear(2, 2), {"name": "SGD", "lr": lr})
    schedule = Schedule(optimizer, spec, steps=steps, epoch=epoch, warmup=warmup)
    found = []
    for _ in range(steps):
        found.append(schedule.rate)
        optimizer.step()
        schedule.step()
    return found


def test_rates():
    assert rates(None, 3) == [1, 1, 1]
    assert rates(None, 4, warmup=3) == [0.25, 0.5, 0.75, 1.0]
    cosine = rates("CosineAnnealingLR", 6, warmup=2)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert cosine[2:] == pytest.approx([(1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)])
    step = {"name": "StepLR", "step_size": 1, "gamma": 0.1, "per": "epoch"}
    assert rates(step, 6, epoch=2) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert len(rates({"name": "OneCycleLR", "max_lr": 1.0}, 5)) == 5
    linear = {"name": "LinearLR", "start_factor": 1.0, "end_factor": 0.5}
    assert rates(linear, 4)[-1] == pytest.approx(0.625)


# SparseAdam takes sparse gradients and Muon matrices alone: this network has neither.
@pytest.mark.parametrize("name", sorted(set(optimizers()) - {"SparseAdam", "Muon"}))
def test_every_optimizer_can_be_named(name):
    lr = {} if name == "Adafactor" else {"lr": 1e-3}
    chosen = options(epochs=None, steps=2, optimizer={"name": name, **lr})
    assert distill(network(), data=Blobs(), options=chosen).history[-1]["step"] == 2


def test_callables_make_optimizer_and_schedule():
    chosen = options(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5),
    )
    assert distill(network(), data=Blobs(), options=chosen).history[-1]["rate"] == 0.05


def test_no_decay_on_vectors():
    optimizer = build_optimizer(
        network(), {"name": "SGD", "lr": 1.0, "weight_decay": 0.5}, norm_decay=False
    )
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.5
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert vectors["weight_decay"] == 0
    assert all(p.ndim < 2 for p in vectors["params"])
    assert "LambdaLR" not in schedules()


@pytest.mark.parametrize("norm_decay", [True, False])
def test_no_decay_by_name(norm_decay):
    model = network()
    spec = {"name": "SGD", "lr": 1.0, "weight_decay": 0.5}
    made = build_optimizer(model, spec, norm_decay=norm_decay, no_decay=["0.wei*"])
    decayed, free = made.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    ids = {id(p) for p in free["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in ids}
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert names == {"0.weight"} | (set() if norm_decay else vectors)
    assert len(decayed["params"]) + len(ids) == len(list(model.parameters()))
    for wrong in (["nothing*"], "0.weight", [1], None):
        with pytest.raises(errors.InputError, match="no_decay"):
            distill(network(), data=Blobs(), options=options(no_decay=wrong))
    along = nn.Parameter(torch.zeros(3, 3))
    made = build_optimizer(model, spec, no_decay=["0.wei*"], beside=[along])
    assert made.param_groups[0]["params"][-1] is along


def test_extra_state_that_is_no_tensor():
    class Noting(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            assert state == {"a": 1}

    model = nn.Sequential(Noting(6, 4))
    samples = types.SimpleNamespace(train=Blobs().train, val=None)
    distill(model, data=samples, options=options(epochs=1))


# --- bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"optimizer": "SDG"}, "did you mean 'SGD'"),
        ({"optimizer": {"name": "LBFGS"}}, "AdamW"),
        ({"optimizer": {"name": "SGD", "rate": 1}}, "momentum"),
        ({"optimizer": {"name": "SGD", "lr": -1}}, "lr"),
        ({"optimizer": {"lr": 1}}, "'name'"),
        ({"optimizer": 3}, "'name'"),
        ({"schedule": "Cosine"}, "CosineAnnealingLR"),
        ({"schedule": {"name": "StepLR"}}, "step_size"),
        ({"schedule": {"name": "StepLR", "step_size": 1, "per": "day"}}, "epoch"),
        ({"precision": "fp8"}, "bf16"),
        ({"batch_size": 0}, "at least 1"),
        ({"accumulate": 1.5}, "whole number"),
        ({"epochs": -1}, "at least 0"),
        ({"clip": 0}, "above 0"),
        ({"learning_rate": 1}, "batch_size"),
    ],
)
def test_bad_options_are_named(changes, text):
    with pytest.raises(errors.InputError, match=text):
        distill(network(), data=Blobs(), options=options(**changes))


def test_options_are_a_mapping():
    assert coerce(TrainOptions, {"epochs": 3}).epochs == 3
    with pytest.raises(errors.InputError, match="mapping"):
        coerce(TrainOptions, 3)


def test_unknown_loss_and_task():
    with pytest.raises(errors.UnknownName, match="dist"):
        distill(network(), data=Blobs(), losses="dits")
    with pytest.raises(errors.UnknownName, match="classification"):
        distill(network(), data=Blobs(), task="sleep")


def test_nothing_to_train():
    with pytest.raises(errors.InputError, match="nothing to train"):
        distill(network().requires_grad_(False), data=Blobs())


def test_non_finite_loss_names_the_place_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "checkpoint"

    def sick(student, teacher):
        sick.calls += 1
        return student.sum() * (float("nan") if sick.calls > 6 else 0.0)

    sick.calls = 0
    given = {"teacher": network(), "data": Blobs(), "options": options(), "checkpoint": path}
    with pytest.raises(errors.NonFiniteLoss, match=r"step 7 of 12.*task = \d.*sick = nan"):
        distill(network(), losses=sick, **given)
    assert read(path)["at"]["step"] == 4


# --- checkpoints


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(value=VALUES)
def test_checkpoints_give_back_what_was_written(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("checkpoint") / "file"
    shared = torch.arange(6.0)
    tensors = [torch.tensor(3), shared, shared[::2], torch.zeros(0, 2, dtype=torch.bool)]
    write(path, {"value": value, "tensors": (*tensors, torch.tensor(float("nan")))})
    found = read(path)
    assert found["value"] == value
    assert all(torch.equal(a, b) for a, b in zip(tensors, found["tensors"][:4], strict=True))
    assert isinstance(found["tensors"], tuple)


def test_checkpoints_refuse_what_they_cannot_hold(tmp_path):
    with pytest.raises(errors.InputError, match="place: object"):
        write(tmp_path / "file", {"place": object()})
    with pytest.raises(errors.InputError, match="key"):
        write(tmp_path / "file", {(1, 2): 3})
    assert not list(tmp_path.iterdir())


def test_checkpoints_keep_apart_keys_that_would_have_one_name(tmp_path):
    keys = {"a/b": 0, "a": {"b": 1, "c'": 2}, "a/c": 3, "a/c'": 4, "1": 5, 1: 6, "": {"a": 7}}
    value = {**keys, "/a": 8, "list": [9], "list/0": 10}

    def tensors(part):
        if isinstance(part, dict):
            return {key: tensors(inner) for key, inner in part.items()}
        return list(map(tensors, part)) if isinstance(part, list) else torch.tensor(part)

    write(tmp_path / "file", tensors(value))
    assert read(tmp_path / "file") == tensors(value)


def test_damaged_and_foreign_checkpoints(tmp_path):
    path = tmp_path / "file"
    write(path, {"a": torch.arange(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(errors.ArtefactError, match="cannot read"):
        read(path)
    with pytest.raises(errors.ArtefactError, match="cannot read"):
        read(tmp_path / "missing")
    save_file({"a": torch.arange(3)}, path)
    with pytest.raises(errors.ArtefactError, match="not a checkpoint"):
        read(path)


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.OutputError):
        write(tmp_path / "file" / "checkpoint", {"a": 1})
