"""The whole way: exact on resume, one process or several, and nothing lost when it fails."""

from __future__ import annotations

import inspect
import json
import random
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

import cpd
from cpd import errors
from cpd.compress import CompressConfig, compress
from cpd.distill import Batches, Loop, LoopOptions, TrainOptions, read
from test_distill import launched
from two_processes import Split, network

SGD = {"name": "SGD", "lr": 0.02, "momentum": 0.9}


class Data(Split):
    """The same blobs in float32."""

    def __init__(self):
        super().__init__()
        for part in (self.train, self.val, self.test):
            part.tensors = (part.tensors[0].float(), part.tensors[1])


class Loaders(Data):
    """Loaders of the user's own, shuffled by themselves."""

    def __init__(self):
        super().__init__()
        self.train = DataLoader(self.train, 16, shuffle=True)
        self.val = DataLoader(self.val, 10)
        self.test = DataLoader(self.test, 10)


def normed():
    """Batch norms, a sum of two branches and dropout."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
            self.side = nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
            self.drop = nn.Dropout(0.1)
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.drop((x + self.side(x)).mean((2, 3))))

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


def keywords(**changes):
    stage = {"batch_size": 16, "optimizer": SGD}
    given = {
        "data": Data(),
        "target": "macs=0.5",
        "interval": 3,
        "events": 3,
        "prune": stage,
        "recover": {**stage, "epochs": 2, "schedule": "CosineAnnealingLR"},
        "onnx": False,
        "seed": 1,
    }
    return {**given, **changes}


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    first, second = tensors(one), tensors(two)
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


class Break:
    """A power cut after a step of a stage."""

    def __init__(self, stage, step):
        self.at = (stage, step)

    def after_step(self, state):
        if (state.stage, state.step) == self.at:
            raise KeyboardInterrupt


# --- what comes out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    model = normed()
    before = tensors(model), [m.training for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    bench = {"runs": 20, "warmup": 2, "threads": 1}
    base = {"batch_size": 16, "optimizer": SGD, "epochs": 2}
    result = compress(
        model, **keywords(output=folder, onnx=True, bench=bench, base=base), callbacks=()
    )
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    return model, before, result, folder


def test_the_network_given_is_not_changed(whole):
    model, (state, flags), *_ = whole
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_the_result_is_smaller_of_the_same_class_and_proved(whole):
    model, _, result, _ = whole
    assert type(result.model) is type(model)
    assert result.plan.costs["macs"][1] <= 0.5 * result.plan.costs["macs"][0]
    assert cpd.costs.macs(result.model, torch.zeros(2, 3, 8, 8)) == result.plan.costs["macs"][1]
    assert cpd.costs.params(result.model) == result.plan.costs["params"][1]
    assert "verified" in result.report.proof
    assert [m.training for m in result.model.modules()] == [True] * len(list(model.modules()))
    assert not any(m._forward_hooks or m._backward_hooks for m in result.model.modules())


def test_the_report_compares(whole):
    *_, result, _ = whole
    before, after = result.report.before, result.report.after
    assert after.params < before.params
    assert after.onnx_bytes < before.onnx_bytes
    assert after.latency.runs == before.latency.runs == 20
    assert "top1" in str(result)
    assert {entry["phase"] for entry in result.report.history} == {"base", "prune", "recover"}
    events = [entry for entry in result.report.history if entry["event"] == "prune"]
    assert [entry["step"] for entry in events] == [3, 6, 9]
    assert [e["macs"] for e in events] == sorted((e["macs"] for e in events), reverse=True)
    assert events[-1]["macs"] == after.macs


def test_the_folder_holds_everything(whole):
    model, _, result, folder = whole
    names = {path.name for path in folder.iterdir()}
    assert names >= {"plan.json", "model.safetensors", "model.onnx", "report.json", "report.html"}
    assert names >= {"log.jsonl", "config.yaml", "base.onnx", "checkpoints"}
    again = cpd.load(folder, model)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(again.eval()(x), result.model.eval()(x))
    result.model.train()
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [e for e in entries if e.get("event") == "step"]
    assert {e["phase"] for e in steps} == {"base", "prune", "recover"}
    assert set(steps[-1]["terms"]) == {"task", "kd"}
    assert cpd.Report.from_json((folder / "report.json").read_text()) == result.report


def test_the_result_can_be_saved_elsewhere(whole, tmp_path):
    *_, result, _ = whole
    folder = result.save(tmp_path / "copy")
    assert {path.name for path in folder.iterdir()} >= {"report.json", "plan.json"}
    with pytest.raises(errors.OutputError):
        result.save(folder)
    result.save(folder, overwrite=True)


def test_base_weights_can_be_used_again(whole):
    model, _, result, folder = whole
    weights = folder / "checkpoints" / "base.safetensors"
    again = compress(model, **keywords(weights=str(weights)))
    assert again.plan.to_json() == result.plan.to_json()
    assert same(again.model, result.model)


# --- what goes stays gone


def test_removed_channels_stay_zero_and_never_return():
    class Watch:
        plans = ()
        events = ()

        def on_event(self, name, details):
            if name == "prune":
                self.events += (details["shares"]["macs"],)

        def after_step(self, state):
            if state.stage == "prune":
                zeros = {n: t == 0 for n, t in state.student.named_parameters()}
                for name, zero in self.plans[-1].items() if self.plans else ():
                    assert (zeros[name] | ~zero).all()
                self.plans += ({n: z.clone() for n, z in zeros.items()},)

    watch = Watch()
    compress(network().float(), **keywords(events=4), callbacks=(watch,))
    wanted = [0.875, 0.75, 0.625, 0.5]
    assert all(share <= most + 1e-9 for share, most in zip(watch.events, wanted, strict=True))
    assert any(zero.any() for zero in watch.plans[-1].values())


@pytest.mark.parametrize(
    "importance",
    ["fisher", "taylor", "random", {"magnitude": {"p": 1}}, lambda m, groups: ones(groups)],
)
def test_every_importance_prunes(importance):
    result = compress(normed(), **keywords(importance=importance, recover={"epochs": 0}))
    assert result.plan.costs["macs"][1] < result.plan.costs["macs"][0]


def ones(groups):
    return {group.name: torch.arange(group.size) for group in groups}


@pytest.mark.parametrize("importance", ["hessian", "fisher"])
def test_accumulating_parts_gives_the_same_plan(importance):
    plans = []
    for parts in (1, 2):
        stage = {"batch_size": 16, "optimizer": SGD, "accumulate": parts}
        given = keywords(data=Split(), importance=importance, prune=stage, recover={"epochs": 0})
        plans.append(compress(network(), **given).plan.to_json())
    assert plans[0] == plans[1]


def test_options_reach_the_plan():
    stage = {"batch_size": 16, "optimizer": "AdamW", "precision": "bf16", "freeze_norms": True}
    result = compress(
        network().float(),
        **keywords(
            target={"params": 0.9, "macs": 0.7},
            events=None,
            step=0.15,
            strategy="greedy",
            ranking="global",
            multiple_of=2,
            ignore=["2"],
            teacher=network().float(),
            losses={"dist": {"weight": 2.0}},
            prune=stage,
        ),
    )
    assert all(width.after % 2 == 0 for width in result.plan.widths)
    assert result.plan.options["strategy"] == "greedy"
    assert {width.group for width in result.plan.widths} == {"0"}
    assert result.report.config["teacher"] == "torch.nn.modules.container:Sequential"
    events = [entry for entry in result.report.history if entry["event"] == "prune"]
    assert len(events) == 2


def test_patterns_of_decay_are_met_before_anything_is_trained():
    recover = {**keywords()["recover"], "no_decay": ["nothing"]}
    trained = []

    class Steps:
        def after_step(self, state):
            trained.append(state.step)

    with pytest.raises(errors.InputError, match="no parameter is named like 'nothing'"):
        compress(normed(), **keywords(recover=recover), callbacks=(Steps(),))
    assert not trained
    stage = {**keywords()["prune"], "no_decay": ["stem.0.wei*"]}
    along = {"mgd": {"at": "stem"}}  # a loss with parameters, which have no such names
    compress(normed(), **keywords(prune=stage, losses=along))


def test_a_teacher_of_ones_own_stays_as_it_is():
    teacher = normed().train()
    teacher.stem[0].weight.requires_grad_(False)
    before = tensors(teacher), [p.requires_grad for p in teacher.parameters()]
    result = compress(normed(), **keywords(teacher=teacher))
    assert re.search(
        r"The teacher on the same data: [\d,]+ parameters, top1 [01]\.", str(result.report)
    )
    assert all(module.training for module in teacher.modules())
    assert [p.requires_grad for p in teacher.parameters()] == before[1]
    assert all(torch.equal(tensor, before[0][n]) for n, tensor in tensors(teacher).items())


def test_without_a_teacher(tmp_path):
    folder = tmp_path / "out"
    result = compress(network().float(), **keywords(teacher=None, output=folder))
    assert "The teacher" not in str(result.report)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(list(e["terms"]) == ["task"] for e in entries if e.get("event") == "step")


def test_a_callable_makes_the_network():
    def make(width):
        torch.nn.init.normal_(torch.empty(3))
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.Flatten(), nn.Linear(64 * width, 4))

    runs = [compress(make, **keywords(model_args={"width": 8})) for _ in range(2)]
    assert same(runs[0].model, runs[1].model)
    assert "make" in runs[0].report.config["model"]
    assert runs[0].report.config["model_args"] == {"width": 8}


# --- resume


@pytest.mark.parametrize(
    ("stage", "step"),
    [("base", 2), ("base", 9), ("prune", 2), ("prune", 3), ("prune", 8), ("recover", 7)],
)
def test_resume_ends_where_the_whole_run_ends(tmp_path, stage, step):
    base = {"batch_size": 16, "optimizer": SGD, "epochs": 2}
    adam = {"batch_size": 16, "optimizer": {"name": "AdamW", "lr": 0.003}, "accumulate": 2}
    given = keywords(base=base, prune=adam, importance="fisher")
    straight = compress(normed(), **given, output=tmp_path / "straight")
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        compress(normed(), **given, output=folder, callbacks=(Break(stage, step),))
    torch.randn(5)
    result = compress(normed(), **given, output=folder, resume=True)
    assert same(result.model, straight.model)
    assert result.plan.to_json() == straight.plan.to_json()
    assert result.report.history == straight.report.history
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("straight", "broken")]
    assert logs[0] == logs[1]


def test_resume_again_and_again(tmp_path):
    given = keywords(data=Loaders(), recover={"epochs": 1, "batch_size": 16})
    straight = compress(normed(), **given)
    given = {**given, "output": tmp_path / "out", "resume": True}
    for at in (("prune", 1), ("prune", 4), ("prune", 8), ("recover", 2)):
        with pytest.raises(KeyboardInterrupt):
            compress(normed(), **given, callbacks=(Break(*at),))
    for _ in range(2):  # the second one finds everything done
        result = compress(normed(), **given)
        assert same(result.model, straight.model)


def test_resume_refuses_another_run(tmp_path):
    given = keywords(output=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        compress(normed(), **given, callbacks=(Break("prune", 5),))
    with pytest.raises(errors.InputError, match=r"target was 'macs=0.5', is 'macs=0.4'"):
        compress(normed(), **{**given, "target": "macs=0.4", "resume": True})
    other = normed()
    nn.init.zeros_(other.head.bias)
    with pytest.raises(errors.InputError, match="another network"):
        compress(other, **given, resume=True)
    path = tmp_path / "out" / "checkpoints" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(errors.ArtefactError, match="cannot read"):
        compress(normed(), **given, resume=True)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(errors.ArtefactError, match="not a checkpoint"):
        compress(normed(), **given, resume=True)


# --- several processes


def test_two_processes_find_the_same_plan(tmp_path):
    from two_processes import compressed

    launched("compress", tmp_path)
    one = tmp_path / "one"
    weights = compressed(one)
    plans = [(folder / "plan.json").read_text() for folder in (one, tmp_path / "run")]
    assert plans[0] == plans[1]
    found = load_file(tmp_path / "weights")
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)


# --- bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": "macs=1.2"}, "at most 1"),
        ({"target": "macs=0"}, "over 0 and at most 1"),
        ({"target": "macs"}, "not a number"),
        ({"target": 0.5}, "macs=0.5"),
        ({"target": "macs=0.5,macs=0.4"}, "twice"),
        ({"target": "flops=0.5"}, "macs"),
        ({"importance": "hesian"}, "did you mean 'hessian'"),
        ({"losses": "kdd"}, "did you mean 'kd'"),
        ({"task": "sorting"}, "classification"),
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"ranking": "local"}, "isomorphic"),
        ({"strategy": "lazy"}, "greedy"),
        ({"unknown": "guess"}, "freeze"),
        ({"teacher": "me"}, "'self'"),
        ({"interval": 0}, "at least 1"),
        ({"events": -1}, "at least 1"),
        ({"step": 0.1}, "not both"),
        ({"events": None, "step": 0}, "above 0"),
        ({"prune": {"optimizer": "SDG"}}, "did you mean 'SGD'"),
        ({"prune": {"epochs": 3}}, "batch_size"),
        ({"recover": {"schedule": "Cosine"}}, "CosineAnnealingLR"),
        ({"bench": {"runs": 0}}, "at least 1"),
        ({"bench": {"times": 3}}, "runs"),
        ({"intervall": 3}, "did you mean 'interval'"),
        ({"resume": True}, "output="),
        ({"model_args": {"width": 3}}, "callable"),
        ({"min_keep": 1.0}, "cannot be reached"),
        ({"ignore": ["nothing"]}, "nothing"),
        ({"example_inputs": torch.zeros(2, 5)}, "input"),
    ],
)
def test_bad_input_is_met_before_a_unit_goes(changes, text):
    with pytest.raises(errors.CPDError, match=text):
        compress(network().float(), **keywords(**changes), callbacks=(Break("prune", 3),))


def test_the_first_step_is_not_taken_for_a_target_out_of_reach():
    base = {"epochs": 1, "optimizer": SGD}
    with pytest.raises(errors.UnreachableTarget) as caught:
        compress(
            normed(), **keywords(base=base, target="macs=0.001"), callbacks=(Break("base", 1),)
        )
    assert 0 < caught.value.closest["macs"] < 1


def wider():
    """Another network of the task: its stem has other channels than the student's."""
    return nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 64, 4))


@pytest.mark.parametrize(
    ("teacher", "losses", "text"),
    [
        ("self", {"inner": {"at": "sidee"}}, "sidee"),
        ("self", {"inner": {"at": "stem.0", "axis": 7}}, "axis 7"),
        (wider(), {"inner": {"at": "stem"}}, "unknown module of Sequential 'stem'"),
        (normed(), {"inner": {"at": "sidee"}}, "did you mean 'side'"),
        (normed(), {"mgd": {"at": "head", "axis": 5}}, "axis 5"),
    ],
)
def test_losses_that_cannot_be_attached_are_met_before_the_base_is_trained(teacher, losses, text):
    base = {"epochs": 1, "optimizer": SGD}
    given = keywords(base=base, teacher=teacher, losses=losses)
    with pytest.raises(errors.CPDError, match=text):
        compress(normed(), **given, callbacks=(Break("base", 1),))


@pytest.mark.parametrize("losses", [{"inner": {"at": "stem"}}, {"mgd": {"at": "stem"}}])
def test_a_point_narrower_than_another_teacher_is_met_before_a_unit_goes(losses):
    """The student is as wide as its sibling until it is cut."""
    with pytest.raises(errors.InputError, match=r"'stem': the student gives .*, the teacher"):
        compress(
            normed(), **keywords(teacher=normed(), losses=losses), callbacks=(Break("prune", 1),)
        )


def test_relations_inside_a_map_have_another_teacher_of_any_width():
    seen = []

    class Watch:
        def after_step(self, state):
            seen.append((state.stage, state.losses["skd"] > 0))

    teacher = normed()
    given = keywords(teacher=teacher, losses={"skd": {"at": "stem"}})
    result = compress(normed(), **given, callbacks=(Watch(),))
    assert result.model.stem[0].weight.shape[0] < teacher.stem[0].weight.shape[0]
    assert ("recover", True) in seen


def test_networks_are_measured_with_the_workers_of_the_recovery(monkeypatch):
    from cpd.compress import measure

    asked = []

    def noting(*args, **more):
        asked.append((args[1], more["workers"]))
        return Batches(*args, **{**more, "workers": 0})

    monkeypatch.setattr(measure, "Batches", noting)
    monkeypatch.setattr(Loop, "_batches", unhurried)
    recover = {"batch_size": 10, "workers": 3, "epochs": 0}
    compress(normed(), **keywords(recover=recover, events=1, interval=1))
    assert asked == [(10, 3)] * 2


def unhurried(loop, source, *, train):
    return Batches(source, loop.options.batch_size, loop.seed, train=train)


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(tmp_path):
    def sick(student, teacher):
        return student.sum() * (float("inf") if sick.broken else 0.0)

    class Later:
        def after_step(self, state):
            sick.broken = state.stage == "prune" and state.step >= 7

    sick.broken = False
    given = keywords(losses=sick, output=tmp_path / "out")
    with pytest.raises(errors.NonFiniteLoss, match=r"step 8 of 9 in stage 'prune'.*sick = "):
        compress(normed(), **given, callbacks=(Later(),))
    assert read(tmp_path / "out" / "checkpoints" / "last.safetensors")["done"] == 2
    sick.broken = False
    result = compress(normed(), **given, resume=True)
    assert same(result.model, compress(normed(), **{**given, "output": None}).model)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Poison:
        def after_step(self, state):
            if (state.stage, state.step) == ("recover", 7):
                state.student.head.weight.data.fill_(float("nan"))

        def after_evaluate(self, state, metrics):
            raise AssertionError

    class Fine(Poison):
        def after_evaluate(self, state, metrics):
            pass

    recover = {"batch_size": 16, "optimizer": SGD, "steps": 7, "epochs": 1}
    given = keywords(recover=recover, output=tmp_path / "out")
    with pytest.raises(errors.NonFiniteLoss, match="checkpoint is intact"):
        compress(normed(), **given, callbacks=(Fine(),))
    saved = read(tmp_path / "out" / "checkpoints" / "last.safetensors")
    assert saved["loop"]["at"]["step"] == 6


def test_an_importance_without_gradients():
    frozen = network().float()
    for layer in (frozen[0], frozen[2]):
        layer.requires_grad_(False)
    with pytest.raises(errors.MissingGradient, match="no gradient"):
        compress(frozen, **keywords(importance="hessian"))


def test_folders_that_cannot_be_used(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("mine")
    with pytest.raises(errors.OutputError, match="not empty"):
        compress(normed(), **keywords(output=full))
    compress(normed(), **keywords(output=full, overwrite=True, recover={"epochs": 0}))
    assert (full / "precious.txt").read_text() == "mine"
    with pytest.raises(errors.OutputError, match="not empty"):
        compress(normed(), **keywords(output=full))
    with pytest.raises(errors.OutputError):
        compress(normed(), **keywords(output=full / "precious.txt"))
    with pytest.raises(errors.OutputError):
        compress(normed(), **keywords(output=full / "precious.txt" / "below"))


def test_a_callable_or_weights_that_do_not_fit(tmp_path):
    with pytest.raises(errors.InputError, match="not a network"):
        compress(lambda: 3, **keywords())
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(errors.InputError, match="do not fit"):
        compress(normed(), **keywords(weights=str(tmp_path / "other")))
    with pytest.raises(errors.ArtefactError, match="cannot read the weights"):
        compress(normed(), **keywords(weights=str(tmp_path / "missing")))


# --- the configuration


def test_every_field_is_a_keyword_with_its_default():
    signature = inspect.signature(compress).parameters
    extra = {"example_inputs", "callbacks"}
    assert set(signature) == {item.name for item in fields(CompressConfig)} | extra
    assert all(p.kind is p.KEYWORD_ONLY for name, p in signature.items() if name != "model")
    config = CompressConfig(target="macs=0.5", data="digits")
    for name in set(signature) - extra - {"model", "target", "data"}:
        assert signature[name].default == getattr(config, name), name


def test_targets_go_down_in_a_straight_line():
    config = CompressConfig.of(target="macs=0.4,params=1", data="digits", events=3)
    assert config.schedule.target_at(1) == pytest.approx({"macs": 0.8, "params": 1.0})
    assert config.schedule.target_at(3) == {"macs": 0.4, "params": 1.0}
    assert CompressConfig.of(target="macs=0.4", data="digits", step=0.1).schedule.count == 6
    assert CompressConfig.of(target="macs=0.4", data="digits").schedule.count == 10


def test_stages_may_be_mappings_and_are_written_out():
    config = CompressConfig.of(
        target={"macs": 0.5}, data=Data, prune={"batch_size": 3}, output=Path("out")
    )
    assert config.prune == LoopOptions(batch_size=3)
    assert config.recover == TrainOptions()
    written = config.to_dict()
    assert written["prune"]["batch_size"] == 3
    assert written["data"].endswith(":Data")
    assert json.loads(json.dumps(written)) == written
    assert "output" not in json.loads(config.fingerprint())


# --- repair ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [2, "auto"])
def test_repair_at_every_event(repair, tmp_path):
    """Said in the log; other weights than without, and the cut is proved as ever."""
    result = compress(normed(), **keywords(repair=repair, output=tmp_path / "out"))
    plain = compress(normed(), **keywords())
    lines = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    told = [x["repaired"] for x in lines if x.get("event") == "prune"]
    assert len(told) == 3
    assert told == [True] * 3 or repair == "auto"
    assert not any(told) or not same(result.model, plain.model)
    assert "verified" in str(result.report.proof)


def test_repair_is_left_where_it_does_not_help():
    """Judged on other samples than it is made of."""
    from cpd.importance import score
    from cpd.repair import helps, mended

    model, samples = normed().eval(), Data().train.tensors[0]
    groups = cpd.comb(model, samples[:8])
    plan = cpd.choose(groups, score("magnitude", model, groups), "macs=0.5")
    found = mended(model, plan, [samples[:64]])
    judges = [samples[64:128]]
    assert helps(model, plan, found, judges)
    spoiled = {name: tensor * -3 for name, tensor in found.items()}
    assert not helps(model, plan, spoiled, judges)
    assert not helps(model, plan, {}, judges)


def test_repair_by_itself_needs_a_batch_to_judge_by():
    """Said before anything is trained."""
    stage = {"batch_size": 10_000, "optimizer": SGD}
    with pytest.raises(errors.InputError, match="needs two batches"):
        compress(normed(), **keywords(repair="auto", prune=stage, base={**stage, "epochs": 1}))


@pytest.mark.parametrize("repair", [-1, "always", 1.5])
def test_repair_is_a_number_of_batches_or_auto(repair):
    with pytest.raises(errors.InputError, match="repair must be a whole number"):
        CompressConfig.of(**keywords(repair=repair))


def test_the_manifest_says_how_the_network_came_about(tmp_path):
    def make(width):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 4))

    compress(make, **keywords(model_args={"width": 8}, output=tmp_path / "out"))
    extra = json.loads((tmp_path / "out" / "manifest.json").read_text())["extra"]
    assert extra["model"].endswith("make")
    assert (extra["model_args"], extra["target"], extra["seed"]) == ({"width": 8}, "macs=0.5", 1)
    assert {"cpd", "python", "torch"} <= set(extra["versions"])
    assert extra["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert cpd.load(tmp_path / "out", make(8))
    given = compress(normed(), **keywords())
    given.save(tmp_path / "given")  # a network has no name
    assert "model" not in json.loads((tmp_path / "given" / "manifest.json").read_text())["extra"]
