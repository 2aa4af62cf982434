"""What a teacher says costs less: half the precision, or said once and kept on disk."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cpd import errors, tasks
from cpd.compress import compress
from cpd.data import digits
from cpd.distill import distill, read, write
from cpd.distill.teacher import Sample, Teacher
from cpd.files import staging
from test_compress import SGD, Data, keywords, normed, same

OPTIONS = {"batch_size": 16, "optimizer": SGD, "epochs": 3}


class Counting(nn.Module):
    """A network that counts its calls on its class, so that copies count too."""

    calls = 0

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        Counting.calls += 1
        return self.network(x)


def trained(folder, **changes):
    given = {"data": Data(), "teacher": Counting(normed()), "seed": 1}
    options = {**OPTIONS, "teacher_cache": folder, **changes.pop("options", {})}
    Counting.calls = 0
    result = distill(normed(), **{**given, **changes, "options": options})
    return result, Counting.calls


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("losses", ["kd", {"kd": {"weight": 2.0}, "dist": {}}])
def test_a_cache_gives_the_same_weights_bit_for_bit(parts, losses, tmp_path):
    more = {"losses": losses, "options": {"accumulate": parts}}
    plain, every = trained(None, **more)
    first, some = trained(tmp_path, **more)
    second, none = trained(tmp_path, **more)
    assert (every, some, none) == (18 * parts, 6 * parts, 0)
    for found in (first, second):
        assert same(found.model, plain.model)
        assert found.history == plain.history
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["0-0.safetensors"]
    assert sorted(read(folder / "0-0.safetensors")["number"].tolist()) == list(range(96))


def test_stages_of_compress_share_a_cache_and_resume(tmp_path):
    plain = compress(normed(), **keywords())
    stage = {"batch_size": 16, "optimizer": SGD, "teacher_cache": str(tmp_path / "cache")}
    recover = {**stage, "epochs": 2, "schedule": "CosineAnnealingLR"}
    options = {"prune": stage, "recover": recover, "output": tmp_path / "out", "resume": True}

    class Stop:
        def after_step(self, state):
            if (state.stage, state.step) == ("recover", 7):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(normed(), **keywords(**options), callbacks=(Stop(),))
    found = compress(normed(), **keywords(**options))
    assert same(found.model, plain.model)
    assert found.plan.to_json() == plain.plan.to_json()
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the same teacher in both stages


class Deep(nn.Module):
    """A row of what it says depends on which rows are beside it, if only in the last bits."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(192, 300), nn.ReLU(), nn.Linear(300, 4)
            )

    def forward(self, x):
        return self.body(x) + 1e-3 * len(x)


@pytest.mark.parametrize("step", [2, 30])
def test_a_cache_and_a_stop_within_an_epoch_end_the_same(step, tmp_path):
    def run(name, **more):
        cache = {"teacher_cache": str(tmp_path / name)}
        options = {**OPTIONS, "batch_size": 5, "accumulate": 4, **cache}
        return distill(normed(), data=Data(), teacher=Deep(), options=options, seed=1, **more)

    class Stop:
        def after_backward(self, state):
            if state.step == step - 1 and state.synced:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = run("whole")
    with pytest.raises(errors.Interrupted, match=f"after step {step} of 57"):
        run("broken", checkpoint=tmp_path / "file", callbacks=(Stop(),))
    found = run("broken", checkpoint=tmp_path / "file", resume=True)
    assert same(found.model, whole.model)
    assert found.history == whole.history


def test_files_of_a_cache_take_no_other_s_place(tmp_path):
    task, x = tasks.resolve("classification"), torch.zeros(1, 3, 8, 8)
    teacher = Teacher(normed(), task, device=torch.device("cpu"), cache=tmp_path)
    for number in range(3):
        teacher.logits((x,), {}, [Sample(number, bytes(16))])
        teacher.save()
    (teacher.folder / "0-0.safetensors").unlink()
    teacher.logits((x,), {}, [Sample(3, bytes(16))])
    teacher.save()
    found = [read(path)["number"].item() for path in sorted(teacher.folder.iterdir())]
    assert found == [3, 1, 2]


def test_what_was_left_half_written_in_a_cache_is_swept_away(tmp_path):
    trained(tmp_path)
    (folder,) = tmp_path.iterdir()
    with staging(folder) as old:
        os.utime(old, (0, 0))
        trained(tmp_path)
        assert not old.exists()


def test_another_teacher_or_precision_is_another_cache(tmp_path):
    task = tasks.resolve("classification")
    device = torch.device("cpu")
    other = normed()
    with torch.no_grad():
        other.head.bias += 1
    made = [
        Teacher(network, task, device=device, precision=precision, cache=tmp_path).folder
        for network, precision in (
            (normed(), "no"),
            (normed(), "no"),
            (normed(), "bf16"),
            (other, "no"),
        )
    ]
    assert made[0] == made[1]
    assert len(set(made)) == 3


class Noisy(Dataset):
    """Noise of the global generator on every sample."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + 0.1 * torch.randn(image.shape), label


class Given:
    def __init__(self, train):
        self.train, self.val, self.test = train, Data().val, Data().test


def test_data_that_changes_at_random_is_refused(tmp_path):
    with pytest.raises(
        errors.InputError, match="sample 0 of the training data is changed at random"
    ):
        trained(tmp_path, data=Given(Noisy(Data().train)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    options = {**OPTIONS, "teacher_cache": tmp_path}
    with pytest.raises(errors.InputError, match="changed at random: turn its transforms off"):
        distill(model, data=digits(size=8, shift=1), teacher=model, options=options)
    distill(model, data=digits(size=8), teacher=model, options={**options, "steps": 1})


def test_a_sample_that_is_another_one_is_an_error(tmp_path):
    trained(tmp_path)
    data = Data()
    data.train.tensors[0][5] += 1
    with pytest.raises(errors.InputError, match="sample 5 is not what it was"):
        trained(tmp_path, data=data)


def test_what_a_cache_cannot_serve_is_refused(tmp_path):
    with pytest.raises(errors.InputError, match=r"look inside the teacher \(stem\)"):
        trained(tmp_path, losses={"at": {"at": "stem"}})
    with pytest.raises(errors.InputError, match="not a loader of batches"):
        trained(tmp_path, data=Given(DataLoader(Data().train, 16)))
    with pytest.raises(errors.UnknownName, match="teacher_precision"):
        trained(None, options={"teacher_precision": "bf8"})


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    trained(tmp_path)
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] + b"\0\0\0\0\0\0\0")
    with pytest.raises(errors.ArtefactError, match=r"0-0\.safetensors: its checksum is another"):
        trained(tmp_path)
    write(path, {"number": torch.arange(3)})
    with pytest.raises(errors.ArtefactError, match="holds no answers of a teacher"):
        trained(tmp_path)
    path.unlink()
    assert trained(tmp_path)[1] == 6


def test_a_teacher_may_have_a_precision_of_its_own():
    seen = []

    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = normed()

        def forward(self, x):
            out = self.network(x)
            seen.append((out.dtype, out.requires_grad))
            return out

    for mine, its, wanted in (
        ("no", "bf16", torch.bfloat16),
        ("bf16", "no", torch.float32),
        ("bf16", None, torch.bfloat16),
        ("no", None, torch.float32),
    ):
        seen.clear()
        options = {**OPTIONS, "steps": 1, "precision": mine, "teacher_precision": its}
        distill(normed(), data=Data(), teacher=Seeing(), options=options)
        assert seen == [(wanted, False)]
