"""Runs that are killed, stopped, starved: nothing is lost, and the end is the same bit for bit."""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import cpd
from cpd import errors
from cpd.compress import compress
from cpd.distill import checkpoint, distill, exists, newest, read, write
from cpd.distill.checkpoint import previous
from cpd.files import staging
from test_compress import SGD, Break, Data, keywords, normed, same, tensors

BASE = {"batch_size": 16, "optimizer": SGD, "epochs": 1}


def given(folder, **changes):
    return keywords(base=BASE, output=folder, resume=True, importance="fisher", **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    begun = time.perf_counter()
    result = compress(normed(), **given(folder))
    return result, (folder / "log.jsonl").read_text(), time.perf_counter() - begun


def agrees(whole, folder):
    """The rest of the run, and whether it ends as the whole one did."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compress(normed(), **given(folder))
    assert same(result.model, whole[0].model)
    assert result.plan.to_json() == whole[0].plan.to_json()
    assert result.report.history == whole[0].report.history
    assert (folder / "log.jsonl").read_text() == whole[1]
    assert not list(folder.rglob(".cpd-*"))


def forked(work):
    """Run a function in a process of its own; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(99)  # reached only where nothing killed it
    return child


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def counted(call, count, *, before):
    """The call, in which the process dies the count-th time."""
    left = [count]

    def wrapped(*args, **options):
        left[0] -= 1
        if left[0] == 0 and before:
            die()
        result = call(*args, **options)
        if left[0] == 0:
            die()
        return result

    return wrapped


def torn(call, count):
    """The count-th file is half a file, then death."""
    left = [count]

    def wrapped(values, path, **options):
        left[0] -= 1
        call(values, path, **options)
        if left[0] == 0:
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[: len(data) // 2])
            die()

    return wrapped


def killed_at(place, count, folder):
    """Kill a run at the count-th of the calls that write; return its process."""

    def work():
        if place == "half a file":
            checkpoint.save_file = torn(checkpoint.save_file, count)
        elif place == "flush":
            os.fsync = counted(os.fsync, count, before=True)
        else:
            before = place == "before a rename"
            Path.replace = counted(Path.replace, count, before=before)
        compress(normed(), **given(folder))

    return forked(work)


def waited(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def some(cases, fast):
    """The first of the cases, and the others marked slow."""
    slow = [pytest.param(*case, marks=pytest.mark.slow) for case in cases[fast:]]
    return [*cases[:fast], *slow]


PLACES = [
    ("half a file", 4),
    ("before a rename", 8),
    ("after a rename", 7),
    ("flush", 14),
    ("half a file", 1),
    ("flush", 5),
    ("before a rename", 4),
    ("after a rename", 12),
]


@pytest.mark.parametrize(("place", "count"), some(PLACES, 3))
def test_killed_inside_a_write(place, count, whole, tmp_path):
    folder = tmp_path / "out"
    assert waited(killed_at(place, count, folder)) == -signal.SIGKILL
    agrees(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(24))
def test_killed_at_a_random_instant(number, whole, tmp_path):
    folder = tmp_path / "out"
    random.seed(number)
    for _ in range(1 + number % 3):  # some are killed again and again
        child = forked(lambda: compress(normed(), **given(folder)))
        time.sleep(random.uniform(0.05, whole[2]))
        os.kill(child, signal.SIGKILL)
        assert waited(child) in (-signal.SIGKILL, 99)
    agrees(whole, folder)


# --- two generations


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(whole, tmp_path):
    folder = tmp_path / "out"
    assert waited(killed_at("after a rename", 14, folder)) == -signal.SIGKILL
    last = folder / "checkpoints" / "last.safetensors"
    assert exists(last)
    data = bytearray(last.read_bytes())
    data[-20] ^= 1  # one bit of one weight
    last.write_bytes(data)
    with pytest.warns(UserWarning, match=r"last\.safetensors: its checksum.*last\.previous"):
        result = compress(normed(), **given(folder))
    assert same(result.model, whole[0].model)


def test_generations(tmp_path):
    path = tmp_path / "file.safetensors"
    for number in range(3):
        write(path, {"number": number, "tensor": torch.arange(3.0)}, generations=True)
    assert [read(path)["number"], read(previous(path))["number"]] == [2, 1]
    path.unlink()
    assert newest(path)["number"] == 1
    previous(path).unlink()
    assert not exists(path)
    with pytest.raises(errors.ArtefactError, match="cannot read"):
        newest(path)


def test_every_flipped_byte_is_found(tmp_path):
    path = tmp_path / "file"
    write(path, {"text": "abc", "tensor": torch.arange(4.0), "number": 1.5})
    whole_file = path.read_bytes()
    for place in range(len(whole_file)):
        data = bytearray(whole_file)
        data[place] ^= 0x20
        path.write_bytes(data)
        try:
            found = read(path)
        except errors.ArtefactError:
            continue
        assert found["text"] == "abc", place  # white space of the head, or its order
        assert torch.equal(found["tensor"], torch.arange(4.0))


def test_damaged_base_weights_are_named(tmp_path):
    folder = tmp_path / "out"

    class Stop:
        def after_step(self, state):
            if (state.stage, state.step) == ("prune", 5):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(normed(), **given(folder), callbacks=(Stop(),))
    path = folder / "checkpoints" / "base.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.ArtefactError, match=r"base\.safetensors: its checksum"):
        compress(normed(), **given(folder))


def test_checkpoints_without_a_checksum_are_still_read(tmp_path):
    from safetensors.torch import save_file

    head = {"format": "cpd.checkpoint.1", "value": '{"map": [["a", {"tensor": "a"}]]}'}
    save_file({"a": torch.arange(3)}, tmp_path / "old", metadata=head)
    assert torch.equal(read(tmp_path / "old")["a"], torch.arange(3))


def flipped(path):
    """One bit of one weight is another."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("told", [True, False])
def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one(told, tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    for number in (1, 2):
        write(path, {"number": number, "tensor": torch.arange(3.0)}, generations=True)
    path.with_name("aside").write_bytes(path.read_bytes())
    path.unlink()
    path.with_name("aside").rename(path)  # another file: nothing is known of it
    flipped(path)
    if told:
        with pytest.warns(UserWarning, match="its checksum"):
            assert newest(path)["number"] == 1

    def broken(draft, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", broken)
        with pytest.raises(KeyboardInterrupt):
            write(path, {"number": 3}, generations=True)
    with pytest.warns(UserWarning, match="its checksum"):
        assert newest(path)["number"] == 1
    write(path, {"number": 4}, generations=True)
    assert [newest(path)["number"], read(previous(path))["number"]] == [4, 1]
    write(path, {"number": 5}, generations=True)
    assert [newest(path)["number"], read(previous(path))["number"]] == [5, 4]


def test_what_a_process_wrote_itself_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, {"number": 1}, generations=True)
    monkeypatch.setattr(checkpoint, "read", lambda path: pytest.fail("read again"))
    write(path, {"number": 2}, generations=True)
    monkeypatch.undo()
    assert [read(path)["number"], read(previous(path))["number"]] == [2, 1]


# --- weights that are not finite


def blown(student, teacher):
    """A finite loss; from its sixth call on the gradient is NaN."""
    blown.calls += 1
    zero = (student - student.detach()).abs().sum()
    return zero.sqrt() if blown.calls >= blown.at else (student - teacher).square().mean()


@pytest.mark.parametrize("at", [12, 6])
def test_weights_that_are_not_finite_are_never_saved_by_distill(at, tmp_path):
    path = tmp_path / "checkpoint"
    blown.calls, blown.at = 0, at
    options = {"batch_size": 16, "optimizer": SGD, "epochs": 2}
    plain = {"data": Data(), "teacher": normed(), "losses": blown, "options": options}
    text = rf"stem\.0\.weight is not finite after step {at} of stage 'distill'; the last checkpoint"
    with pytest.raises(errors.NonFiniteLoss, match=text):
        distill(normed(), **plain, checkpoint=path)
    assert exists(path) == (at == 12)
    assert not previous(path).exists()
    if at == 12:
        saved = read(path)
        assert saved["at"]["step"] == 6
        assert all(bool(tensor.isfinite().all()) for tensor in saved["student"].values())
        blown.at = 99
        assert distill(normed(), **plain, checkpoint=path, resume=True).history[-1]["step"] == 12


def test_weights_that_are_not_finite_are_never_saved_by_compress(tmp_path):
    blown.calls, blown.at = 0, 15  # nine steps of prune, and an epoch of recover
    with pytest.raises(errors.NonFiniteLoss, match="not finite after step 6 of stage 'recover'"):
        compress(normed(), **{**given(tmp_path / "out"), "losses": blown})
    assert read(tmp_path / "out" / "checkpoints" / "last.safetensors")["stage"] == "prune"


def test_what_is_infinite_from_the_start_may_stay_so(tmp_path):
    model = normed()
    model.register_buffer("masked", torch.tensor([0.0, float("-inf"), float("nan")]))
    options = {"batch_size": 16, "optimizer": SGD, "epochs": 1}
    distill(model, data=Data(), options=options, checkpoint=tmp_path / "file")
    assert read(tmp_path / "file")["student"]["masked"][1] == float("-inf")


# --- whose checkpoint it is


RUN = {"batch_size": 16, "optimizer": SGD, "epochs": 1, "workers": 0}


def begun(path, model=None, *, resume=True, options=(), **changes):
    given = {"data": Data(), "teacher": normed(), "seed": 1, "losses": {"kd": {"temperature": 2}}}
    options = {**RUN, **dict(options)}
    model = normed() if model is None else model
    return distill(model, **{**given, **changes}, options=options, checkpoint=path, resume=resume)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 2}, "seed was 1, is 2"),
        ({"options": {"epochs": 2}}, "epochs was 1, is 2"),
        ({"options": {"optimizer": "Adam"}}, r"optimizer was \{'name': 'SGD'.*, is 'Adam'"),
        ({"losses": "dist"}, r"losses was \{'kd': \{'temperature': 2\}\}, is 'dist'"),
        ({"task": {"classification": {"label_smoothing": 0.1}}}, "task was 'classification', is"),
        ({"teacher": None}, "teacher was .*Net', is None"),
        ({"seed": 2, "options": {"clip": 1.0}}, "clip was None, is 1.0; seed was 1, is 2"),
    ],
)
def test_distill_refuses_the_checkpoint_of_another_run(changes, text, tmp_path):
    path = tmp_path / "last.safetensors"
    begun(path)
    whole = path.read_bytes()
    with pytest.raises(errors.InputError, match=f"of another run: {text}.*delete it") as found:
        begun(path, **changes)
    assert "last.previous.safetensors" in str(found.value)
    assert path.read_bytes() == whole
    begun(path, options={"workers": 1, "accumulate": 2, "teacher_cache": str(tmp_path / "cache")})
    begun(path, **changes, resume=False)


def test_distill_refuses_the_checkpoint_of_another_network_or_kind(tmp_path):
    path = tmp_path / "file"
    begun(path)
    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    text = r"another network: stem\.0\.weight was \(12, 3, 3, 3\), is missing.* and 15 more"
    with pytest.raises(errors.InputError, match=text):
        begun(path, small)
    wide = normed()
    wide.head = torch.nn.Linear(12, 5)
    with pytest.raises(errors.InputError, match=r"head\.weight was \(4, 12\), is \(5, 12\)"):
        begun(path, wide)
    compress(normed(), **given(tmp_path / "out"))
    with pytest.raises(errors.ArtefactError, match=r"not a checkpoint of cpd\.distill.*delete it"):
        begun(tmp_path / "out" / "checkpoints" / "last.safetensors")
    taken = tmp_path / "taken" / "checkpoints" / "last.safetensors"
    begun(taken)
    (tmp_path / "taken" / "config.yaml").touch()
    with pytest.raises(errors.ArtefactError, match=r"not a checkpoint of cpd\.compress"):
        compress(normed(), **given(tmp_path / "taken"))


def test_older_checkpoints_of_distill_still_resume(tmp_path):
    path = tmp_path / "file"
    begun(path)
    saved = read(path)
    del saved["run"]
    write(path, saved)
    assert begun(path, seed=2).history == saved["history"]
    saved["optimizer"]["param_groups"] *= 2
    write(path, saved)
    with pytest.raises(errors.InputError, match=r"does not fit this run: .*parameter groups"):
        begun(path)


# --- signals


class Signal:
    """Sends a signal to its own process while a step is on."""

    def __init__(self, number, stage, step, times=1):
        self.number, self.at, self.times = number, (stage, step), times

    def after_backward(self, state):
        if (state.stage, state.step + 1) == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


SIGNALS = [
    ("prune", 2, "hessian"),
    ("recover", 4, "fisher"),
    ("base", 2, "hessian"),
    ("prune", 1, "fisher"),
    ("prune", 2, "hutchinson"),
    ("prune", 5, "fisher"),
    ("prune", 8, "kfac"),
    ("prune", 9, "hessian"),
]


@pytest.mark.parametrize(("stage", "step", "importance"), some(SIGNALS, 2))
def test_a_signal_writes_a_checkpoint_after_the_step(stage, step, importance, tmp_path):
    folder = tmp_path / "out"
    options = {**given(folder), "importance": importance}
    wanted = compress(normed(), **{**options, "output": None, "resume": False})
    with pytest.raises(errors.Interrupted, match="stopped by SIGTERM"):
        compress(normed(), **options, callbacks=(Signal(signal.SIGTERM, stage, step),))
    saved = read(folder / "checkpoints" / "last.safetensors")
    assert (saved["stage"], saved["loop"]["at"]["step"]) == (stage, step)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert same(compress(normed(), **options).model, wanted.model)


def test_ctrl_c_is_a_keyboard_interrupt_and_twice_is_at_once(tmp_path):
    options = given(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 9 of stage 'prune'"):
        compress(normed(), **options, callbacks=(Signal(signal.SIGINT, "prune", 2),))
    with pytest.raises(KeyboardInterrupt, match=r"^stopped by Ctrl-C; resume"):
        compress(normed(), **options, callbacks=(Signal(signal.SIGINT, "prune", 4, times=2),))
    assert read(tmp_path / "out" / "checkpoints" / "last.safetensors")["loop"]["at"]["step"] == 3


def test_without_a_folder_and_outside_the_main_thread_signals_are_left_alone(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            compress(normed(), **keywords(), callbacks=(Signal(signal.SIGINT, "prune", 2),))
    finally:
        signal.signal(signal.SIGINT, before)
    found = []
    work = threading.Thread(
        target=lambda: found.append(compress(normed(), **given(tmp_path / "o")))
    )
    work.start()
    work.join()
    assert found


def test_distill_stops_and_goes_on(tmp_path):
    path = tmp_path / "checkpoint"
    options = {"batch_size": 16, "optimizer": SGD, "epochs": 3}
    plain = {"data": Data(), "teacher": normed(), "options": options, "seed": 1}
    wanted = distill(normed(), **plain)
    stop = Signal(signal.SIGTERM, "distill", 8)
    with pytest.raises(errors.Interrupted, match="after step 8 of 18"):
        distill(normed(), **plain, checkpoint=path, callbacks=(stop,))
    found = distill(normed(), **plain, checkpoint=path, resume=True)
    assert same(found.model, wanted.model)
    assert found.history == wanted.history


def test_what_a_killed_distill_left_is_swept_away_but_not_what_others_write(tmp_path):
    path = tmp_path / "checkpoint"

    def work():
        checkpoint.save_file = torn(checkpoint.save_file, 1)
        begun(path)

    assert waited(forked(work)) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".cpd-*"))) == 1
    with staging(tmp_path) as others:
        begun(path)
        assert list(tmp_path.glob(".cpd-*")) == [others]


# --- what a machine runs out of


def test_a_full_disk_leaves_the_checkpoint_before(whole, tmp_path):
    """Files of the child cannot grow over a limit, as on a full disk."""
    folder = tmp_path / "out"

    class Full:
        def after_step(self, state):
            if (state.stage, state.step) == ("prune", 5):
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            compress(normed(), **given(folder), callbacks=(Full(),))
        except errors.OutputError as error:
            os._exit(5 if "cannot write" in str(error) else 6)

    assert waited(forked(work)) == 5
    agrees(whole, folder)


def small_disk(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def refused_as(work):
    """In a process of its own: 5 where an OutputError names the path, 6 where it does not."""

    def tried():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            work()
        except errors.OutputError as error:
            os._exit(5 if "cannot write" in str(error) and "large" in str(error) else 6)

    return waited(forked(tried))


def test_a_full_disk_while_base_weights_and_the_artefact_are_written(whole, tmp_path, monkeypatch):
    from cpd.compress import journal
    from cpd.exporters import artefact

    for number, (place, name) in enumerate([(journal, "save_file"), (artefact, "write")]):
        folder, call = tmp_path / str(number), getattr(place, name)

        def full(*args, call=call, **options):
            small_disk(500)
            call(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            assert refused_as(lambda folder=folder: compress(normed(), **given(folder))) == 5
        agrees(whole, folder)


@pytest.mark.parametrize("kind", ["onnx", "pt2", "openvino", "int8"])
def test_a_full_disk_while_a_format_is_written(kind, tmp_path):
    """ExportError says that the network is at fault; this is the disk's."""
    from cpd import exporters

    if kind == "openvino":
        pytest.importorskip("openvino")
    model, x = normed().eval(), torch.randn(2, 3, 8, 8)
    exporters.onnx(model, x, tmp_path / "plain.onnx")

    def work():
        small_disk(1000)
        if kind == "int8":
            exporters.int8(tmp_path / "plain.onnx", tmp_path / "a.onnx", batches=[x])
        else:
            ending = {"onnx": "onnx", "pt2": "pt2", "openvino": "xml"}[kind]
            getattr(exporters, kind)(model, x, tmp_path / f"a.{ending}")

    assert refused_as(work) == 5
    assert not list(tmp_path.glob("a.*"))


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr("cpd.files.tempfile.mkdtemp", refused)
    with pytest.raises(errors.OutputError, match=r"cannot write .*out.*Permission denied"):
        compress(normed(), **given(tmp_path / "out"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_no_memory_says_what_needs_less(error, whole, tmp_path):
    folder = tmp_path / "out"

    class Starved:
        def after_backward(self, state):
            if (state.stage, state.step) == ("prune", 4):
                raise error

    with pytest.raises(errors.OutOfMemory, match=r"step 5 of 9 in stage 'prune'.*accumulate"):
        compress(normed(), **given(folder), callbacks=(Starved(),))
    agrees(whole, folder)


def test_what_needs_less_memory_may_change_on_resume(whole, tmp_path):
    """As the error says; what decides the gradients may not."""
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(normed(), **given(folder), callbacks=(Break("recover", 2),))
    changed = {"prune": {**keywords()["prune"], "batch_size": 8}}
    with pytest.raises(errors.InputError, match="of another run: prune was"):
        compress(normed(), **{**given(folder), **changed})
    less = {
        name: {**given(folder)[name], "workers": 1, "accumulate": 2}
        for name in ("base", "prune", "recover")
    }
    result = compress(normed(), **{**given(folder), **less})
    for one, two in zip(result.model.parameters(), whole[0].model.parameters(), strict=True):
        assert one.shape == two.shape


@pytest.mark.parametrize("place", ["comb", "verify", "cut", "report", "on_start", "on_end"])
def test_no_memory_outside_of_steps_says_so_too(place, monkeypatch):
    def starved(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Starved:
        pass

    if place in ("on_start", "on_end"):
        setattr(Starved, place, starved)
    else:
        module = "cpd.compress" if place == "report" else "cpd.compress.run"
        monkeypatch.setattr(sys.modules[module], place, starved)
    where = "in stage 'prune'" if place[:3] == "on_" else "before, between or after the stages"
    with pytest.raises(errors.OutOfMemory, match=where):
        compress(normed(), **keywords(), callbacks=(Starved(),))


def test_no_memory_for_another_process_says_so(monkeypatch):
    """A worker that cannot be forked is an OSError; other ones stay what they are."""
    from cpd.distill import Loop

    options = {"batch_size": 16, "optimizer": SGD, "epochs": 1}
    for error, kind in (
        (OSError(12, "Cannot allocate memory"), errors.OutOfMemory),
        (FileNotFoundError("a.jpg"), FileNotFoundError),
    ):

        def epoch(self, error=error):
            raise error

        monkeypatch.setattr(Loop, "_epoch", epoch)
        with pytest.raises(kind):
            distill(normed(), data=Data(), options=options)


def test_no_memory_and_a_dead_worker_in_the_last_evaluation_say_so(monkeypatch):
    from cpd.distill import Loop

    options = {"batch_size": 16, "optimizer": SGD, "epochs": 1, "evaluate_every": 0}
    raised = [
        (torch.OutOfMemoryError("CUDA out of memory"), errors.OutOfMemory),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), errors.DataError),
    ]
    for error, kind in raised:

        def evaluate(self, error=error):
            raise error

        monkeypatch.setattr(Loop, "_evaluate", evaluate)
        with pytest.raises(kind, match=r"at step 6 of 6"):
            distill(normed(), data=Data(), options=options)


def test_a_signal_to_another_process_ends_a_stage_on_all(monkeypatch):
    """Else the others would begin the next stage and wait there for ever."""
    from types import SimpleNamespace

    from cpd.distill import Stopper, Stops

    stops = Stops(active=True)
    monkeypatch.setattr(stops, "asked", lambda: int(signal.SIGTERM))  # nothing is pending here
    with pytest.raises(errors.Interrupted, match="at the end of stage 'prune'"):
        Stopper(stops, lambda: None).on_end(SimpleNamespace(stage="prune"))
    assert not stops.stepping
    quiet = Stops(active=False)
    monkeypatch.setattr(quiet, "asked", lambda: pytest.fail("nobody else asks"))
    Stopper(quiet, lambda: None).on_end(SimpleNamespace(stage="prune"))


def test_memory_that_really_runs_out():
    def work():
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (1 << 28),) * 2)

        class Greedy:
            def after_backward(self, state):
                torch.ones(1 << 30)

        try:
            compress(normed(), **keywords(), callbacks=(Greedy(),))
        except errors.OutOfMemory:
            os._exit(8)

    assert waited(forked(work)) == 8


def _address_space():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


class Deadly(Dataset):
    """The process that loads one sample dies."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == 40 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[index]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_data_worker_that_dies_is_told_apart():
    class Sick(Data):
        def __init__(self):
            super().__init__()
            self.train = Deadly(self.train)

    options = {"batch_size": 16, "optimizer": SGD, "epochs": 1, "workers": 1}
    with pytest.raises(errors.DataError, match=r"data died at step \d.*workers=0"):
        distill(normed(), data=Sick(), options=options)
    # It may die while a socket to it is opened: PyTorch raises from a signal, and nobody closes it.
    gc.collect()


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_a_data_worker_may_die_while_its_tensor_is_taken_over(error, monkeypatch):
    """The signal that tells of it comes later, when the error is on its way already."""

    def gone(*_):
        raise error("reset by peer")

    def signalled(_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("multiprocessing.resource_sharer.DupFd.detach", gone)
    monkeypatch.setattr(import_module("cpd.distill.failures"), "sleep", signalled)
    options = {"batch_size": 16, "optimizer": SGD, "epochs": 1, "workers": 1}
    with pytest.raises(errors.DataError, match=r"data died at step 1 .*reset by peer.*workers=0"):
        distill(normed(), data=Data(), options=options)


def test_the_signal_may_come_while_an_error_is_explained(monkeypatch):
    """PyTorch raises from it once, wherever the code is."""
    failures = import_module("cpd.distill.failures")
    explained, raised = failures.explained, []

    def interrupted(*given):
        if not raised:
            raised.append(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))
            raise raised[0]
        return explained(*given)

    monkeypatch.setattr(failures, "explained", interrupted)
    with (
        pytest.raises(errors.DataError, match=r"data died at step 3"),
        failures.explaining(lambda: "at step 3"),
    ):
        raise EOFError


def test_an_error_of_the_data_itself_stays_what_it_is():
    class Broken(Data):
        def __init__(self):
            super().__init__()
            self.train = self

        def __len__(self):
            return 64

        def __getitem__(self, index):
            raise ConnectionResetError("the store of images has gone")

    options = {"batch_size": 16, "optimizer": SGD, "epochs": 1}
    with pytest.raises(ConnectionResetError, match="the store of images"):
        distill(normed(), data=Broken(), options=options)


def test_a_loss_that_is_not_finite_keeps_its_batch(tmp_path):
    def sick(student, teacher):
        sick.calls += 1
        return student.sum() * (float("nan") if sick.calls > 3 else 0.0)

    sick.calls = 0
    folder = tmp_path / "out"
    with pytest.raises(errors.NonFiniteLoss, match=r"The batch is in .*bad-batch-0\.safetensors"):
        compress(normed(), **{**given(folder), "losses": sick})
    found = read(folder / "checkpoints" / "bad-batch-0.safetensors")
    assert found["batch"][0].shape == (16, 3, 8, 8)
    assert found["terms"]["sick"] != found["terms"]["sick"]  # NaN
    assert tensors(normed())


# --- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("x"), 2),
        (errors.UnreachableTarget("x"), 3),
        (errors.VerifyError("x"), 4),
        (errors.OutputError("x"), 5),
        (errors.ArtefactError("x"), 6),
        (errors.NonFiniteLoss("x"), 7),
        (errors.OutOfMemory("x"), 8),
        (errors.DataError("x"), 9),
        (errors.Interrupted("x"), 143),
        (KeyboardInterrupt("x"), 130),
    ],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    from cpd.cli import main

    def broken(*args):
        raise error

    monkeypatch.setattr("cpd.cli._run", broken)
    assert main(["comb", "x:y"]) == code
    assert "x" in capsys.readouterr().err
    page = (Path(__file__).parents[1] / "docs" / "survival.md").read_text()
    assert f"| {code} |" in page
    assert cpd.CPDError


def command(*words):
    """A real process of the shell, and its output in a file beside."""
    here = Path(__file__).resolve().parent
    places = [str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "cpd.cli", "compress", *map(str, words)]
    # a shell that runs tests in the background lets its children ignore Ctrl-C
    ready = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, **ready)


RECIPE = """
model: timm:test_resnet
model_args: {num_classes: 10, in_chans: 1}
data: {digits: {size: 16}}
target: macs=0.7
interval: 3
events: 6
prune: {batch_size: 16, optimizer: {name: SGD, lr: 0.01}}
recover: {batch_size: 64, epochs: 1}
onnx: false
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe, and the plan of a process that was never stopped."""
    folder = tmp_path_factory.mktemp("shell")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    process = command(path, "--output", folder / "whole")
    assert (process.communicate(timeout=300)[1], process.returncode) == ("", 0)
    return path, (folder / "whole" / "plan.json").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_real_process_leaves_with_its_code_and_goes_on(number, code, recipe, tmp_path):
    path, plan = recipe
    log = tmp_path / "out" / "log.jsonl"
    process = command(path, "--output", tmp_path / "out")
    until = time.monotonic() + 300
    while not (log.exists() and '"event": "step", "step": 4' in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == code
    assert "stopped by" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "plan.json").exists()
    again = command(path, "--output", tmp_path / "out", "--resume", "true")
    assert (again.communicate(timeout=300)[1], again.returncode) == ("", 0)
    assert (tmp_path / "out" / "plan.json").read_bytes() == plan
