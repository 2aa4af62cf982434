"""The zoo: its registry is complete, its worker tells the truth, its rows are kept."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import checks, network, page, runner, tensors, worker
from zoo.attentions import attentions
from zoo.network import Network
from zoo.registry import libraries, registry

import cpd
from cpd import _torchvision

ROOT = Path(__file__).resolve().parents[1]
# the models of the four libraries beside torch that the tests install
TINY = ("timm:starnet_s050", "torchvision:squeezenet1_1", "transformers:vit", "transformers:gpt2")


class Small(nn.Module):
    """A network with everything the checks look at: a norm, dropout, two batch-first outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.first(x)).relu().mean((2, 3))
        return {"logits": self.last(self.drop(x)), "features": x[:, :0]}


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def entry(build: Any = lambda: (Small(), IMAGES)) -> Network:
    return Network("own:small", build)


def pruned() -> tuple[nn.Module, nn.Module, cpd.Plan]:
    model, inputs = entry().make()
    small, plan = cpd.prune(model, inputs, importance="random", target="macs=0.5")
    return model, small, plan


# registry ---------------------------------------------------------------------------------------


def test_every_file_of_timm_is_there() -> None:
    _torchvision.ensure()
    from timm.models import list_models, list_modules
    from zoo.with_timm import FILES

    assert set(FILES) == set(list_modules())
    for file, name in FILES.items():
        assert name in list_models(module=file)
        assert not name.startswith("test_")


def test_every_network_of_torchvision_is_there() -> None:
    """Those with their own data-dependent part after it by the parts that export."""
    _torchvision.ensure()
    from torchvision import models

    families = (models, models.segmentation, models.video)
    wanted = {f"torchvision:{name}" for home in families for name in models.list_models(home)}
    assert len(wanted) > 90
    assert wanted <= set(registry())


def test_the_registry_names_all_libraries() -> None:
    found = registry()
    assert libraries() == [
        "timm", "torchvision", "transformers", "smp", "ultralytics", "monai", "mmpretrain",
        "mmsegmentation",
    ]  # fmt: skip
    assert len(found) > 200
    assert all(name == entry.name and ":" in name for name, entry in found.items())
    for library in libraries():
        assert library in page.PACKAGES


@pytest.mark.parametrize(
    "name",
    [
        "transformers:upernet_swin", "transformers:phi3", "transformers:mamba", "smp:UnetPlusPlus",
        "ultralytics:rtdetr-l", "monai:SwinUNETR", "mmpretrain:resnext50",
        "mmsegmentation:bisenet_v2", "torchvision:fasterrcnn_resnet50_fpn.backbone",
    ],
)  # fmt: skip
def test_what_was_asked_for_is_there(name: str) -> None:
    assert name in registry()


def test_the_registry_needs_no_library() -> None:
    code = (
        "import sys, zoo.registry\n"
        "zoo.registry.registry()\n"
        "extras = {'timm', 'torchvision', 'transformers', 'monai', 'ultralytics', 'mmengine'}\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# weights ----------------------------------------------------------------------------------------


def test_weights_are_the_same_for_a_seed_and_never_zero() -> None:
    one, _ = entry().make()
    two, _ = entry().make()
    other, _ = entry().make(seed=1)
    for (name, a), b, c in zip(
        one.state_dict().items(),
        two.state_dict().values(),
        other.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)
        if a.is_floating_point():
            assert not torch.equal(a, c), name
            assert (a != 0).all(), name
    assert not any(module.training for module in one.modules())


def test_batch_norms_get_the_statistics_of_the_inputs() -> None:
    model, inputs = entry().make()
    seen = model.first(inputs)
    assert torch.allclose(model.norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model.norm.running_var, seen.var((0, 2, 3)), atol=1e-4)
    assert model.norm.momentum == 0.1


def test_a_network_whose_samples_come_out_alike_is_not_alive() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bias + 0 * x.mean((1, 2, 3))[:, None]

    rows = row_of(entry(lambda: (Deaf(), IMAGES)))
    assert rows["live"] is False


# checks -----------------------------------------------------------------------------------------


def row_of(one: Network) -> dict[str, Any]:
    return worker.described(one, lambda row: None)[0]


def test_all_checks_pass_on_a_cut_network() -> None:
    model, small, plan = pruned()
    assert checks.other_batch(checks.Whole(model, IMAGES), small) == "ok"
    assert checks.training(checks.Whole(model, IMAGES), small) == "ok"
    assert checks.copies(checks.Whole(model, IMAGES), small) == "ok"
    assert checks.artefact(checks.Whole(model, IMAGES), small, plan) == "ok"
    before, after = plan.costs["macs"]
    assert checks.counted_macs(model, IMAGES) == 2 * before
    assert checks.counted_macs(small, IMAGES) == 2 * after


def test_a_lost_dropout_is_found() -> None:
    model, small, _ = pruned()
    small.drop.p = 0.0
    assert "behaves otherwise in training" in checks.training(checks.Whole(model, IMAGES), small)


def test_training_flags_are_compared() -> None:
    model, small, _ = pruned()
    small.norm.train()
    assert checks.training(checks.Whole(model, IMAGES), small) == "training flags differ"


def test_a_network_without_gradients_is_found() -> None:
    model, small, _ = pruned()
    for each in (model, small):
        each.requires_grad_(False)
    assert checks.training(checks.Whole(model, IMAGES), small) == "no output has a gradient"


def test_what_the_network_itself_cannot_do_is_marked() -> None:
    class Fixed(Small):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            if x.shape[0] != 2 or self.training:
                raise ValueError("two samples, please")
            return super().forward(x)

    model = Fixed().eval()
    assert checks.other_batch(checks.Whole(model, IMAGES), model).startswith(
        "as before: ValueError: two samples"
    )
    assert checks.training(checks.Whole(model, IMAGES), model).startswith(
        "as before: ValueError: two samples"
    )


def test_another_batch_that_comes_out_otherwise_is_found() -> None:
    class Counting(Small):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().forward(x + (x.shape[0] == 3))

    model, small, _ = pruned()
    wrong = copy.deepcopy(small)
    wrong.__class__ = Counting
    assert checks.other_batch(checks.Whole(model, IMAGES), small) == "ok"
    assert checks.other_batch(checks.Whole(model, IMAGES), wrong).startswith("differs by")


def test_other_names_in_the_state_dict_are_found() -> None:
    model, small, _ = pruned()
    small.more = nn.Linear(1, 1)
    assert checks.copies(checks.Whole(model, IMAGES), small) == "the state dict has other names"


def test_onnx_is_compared() -> None:
    model, small, _ = pruned()
    assert checks.in_onnx(checks.Whole(model, IMAGES), small) == "ok"


def test_differences() -> None:
    one = [torch.tensor([1.0, 2.0]), torch.tensor([3])]
    assert tensors.difference(one, one) == 0
    assert tensors.difference([torch.tensor([1.0, 1.0]), one[1]], one) == 0.5
    assert tensors.difference(one[:1], one) == float("inf")
    assert tensors.difference([torch.tensor([1.0, float("nan")]), one[1]], one) == float("inf")
    wide = tensors.resized({"a": torch.tensor([[1], [2]]), "b": torch.ones(5), "c": 2}, 3)
    assert wide["a"].tolist() == [[1], [2], [1]]
    assert wide["b"].shape == (5,)
    assert wide["c"] == 2


# worker and runner --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_network_of_a_library_runs_through_the_worker(name: str, tmp_path: Path) -> None:
    (row,) = runner.run_all([name], "prune", tmp_path / "rows.jsonl", limit=300)
    assert runner.status_of(row) == "sound", row
    assert row == runner.read(tmp_path / "rows.jsonl", "prune", name)
    assert row["live"]
    assert row["finite"]
    assert row["fingerprint"] == runner.fingerprint()
    assert set(row["modes"]) == {"exact", "kept"}
    for mode in row["modes"].values():
        assert mode["stage"] == "done"
        assert mode["proved"]
        assert mode["error"] <= 1e-9
        assert mode["groups"] > 0
        assert mode["nodes"] > 50
        assert set(mode["checks"]) == {"batch", "train", "copies", "artefact"}
        assert {"trace", "comb", "choose", "cut", "verify"} <= set(mode["seconds"])
        assert all(after <= before for _, before, after in mode["kinds"].values())
        assert all(isinstance(reason, str) and size > 0 for reason, size in mode["frozen"])
        assert abs(mode["counted"] - mode["macs"]) < 1e-3
    assert runner.reached(row)


def test_time_out_says_where(tmp_path: Path) -> None:
    row = runner.run("prune", TINY[0], limit=1)
    assert runner.status_of(row) == "timeout"
    assert row["ended"]["seconds"] == 1
    assert row["stage"] in ("start", "build")
    runner.keep(tmp_path / "rows.jsonl", "prune", row)
    assert runner.read(tmp_path / "rows.jsonl", "prune", TINY[0]) == row


def test_an_unknown_network_is_an_error_with_its_text() -> None:
    row = runner.run("prune", "timm:no_such_network", limit=100)
    assert runner.status_of(row) == "error"
    assert "no_such_network" in row["message"]


def test_an_exception_in_one_mode_leaves_the_other() -> None:
    class Odd(Small):
        pass

    rows: list[dict[str, Any]] = []
    one = entry(lambda: (Odd(), IMAGES))

    class Broken(cpd.InputError):
        pass

    def refuse(*args: Any, exact: bool = False, **kwargs: Any) -> Any:
        if exact:
            raise Broken("not in this mode")
        return comb(*args, exact=exact, **kwargs)

    comb = cpd.comb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpd, "comb", refuse)
        worker.prune(one, rows.append)
    modes = rows[-1]["modes"]
    assert modes["exact"]["status"] == "error"
    assert modes["exact"]["message"].startswith("Broken: not in this mode")
    assert modes["kept"]["status"] == "sound"
    assert runner.status_of(rows[-1]) == "error"


def test_a_wrong_cut_is_unsound() -> None:
    cut = cpd.cut

    def wrong(model: nn.Module, plan: cpd.Plan, **kwargs: Any) -> nn.Module:
        small = cut(model, plan, **kwargs)
        with torch.no_grad():
            small.last.bias[0] += 1e-3
        return small

    rows: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpd, "cut", wrong)
        worker.prune(entry(), rows.append)
    assert runner.status_of(rows[-1]) == "unsound"
    assert not runner.reached(rows[-1])
    assert rows[-1]["modes"]["kept"]["message"]


ROWS = {
    "good": {"modes": {"kept": {"status": "sound", "reached": True, "proved": True}}},
    "short": {"modes": {"kept": {"status": "sound", "reached": False, "proved": True}}},
    "bad": {"modes": {"exact": {"status": "sound"}, "kept": {"status": "unsound"}}},
    "broken": {"modes": {"exact": {"status": "unsound"}, "kept": {"status": "error"}}},
    "late": {"ended": {"seconds": 300}, "modes": {"kept": {"status": "sound"}}},
    "killed": {"ended": {"code": -9}},
    "empty": {},
}


def test_states_and_what_runs_again() -> None:
    states = {key: runner.status_of(row) for key, row in ROWS.items()}
    assert states == {
        "good": "sound", "short": "sound", "bad": "unsound", "broken": "error", "late": "timeout",
        "killed": "error", "empty": "error",
    }  # fmt: skip

    def again(redo: str | None, job: str = "prune") -> list[str]:
        return [key for key, row in ROWS.items() if runner.wanted(row, redo, job)]

    failed = ["bad", "broken", "late", "killed", "empty"]
    assert runner.wanted(None, None, "prune")
    assert again(None) == []
    assert again("failed") == failed
    assert again("short") == ["short", *failed]
    assert again("short", "onnx") == failed
    assert again("all") == again("stale") == list(ROWS)
    fresh = {"fingerprint": runner.fingerprint()}
    assert not runner.wanted(fresh, "stale", "prune")


def test_what_a_row_is_made_by_is_code_not_words() -> None:
    code = '"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1  # why\n'
    same = 'def f(x):\n    """Other."""\n\n    return (x +\n        1)\n'
    assert runner.without_words(code) == runner.without_words(same)
    assert runner.without_words(code) != runner.without_words(same.replace("1", "2"))
    text = 'def f(x):\n    return "Doc."\n'
    assert runner.without_words(text) != runner.without_words(text.replace("Doc", "Other"))


def zoo(*options: str, output: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "zoo", "--output", str(output), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_what_has_a_row_is_not_run_again(tmp_path: Path) -> None:
    row = {"name": TINY[0], **ROWS["good"], "mark": "kept"}
    runner.keep(tmp_path / "rows.jsonl", "prune", row)
    done = zoo("--names", "starnet_s050", "--jobs", "prune", output=tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert "prune: 0 networks to run, 1 have a row" in done.stdout
    assert runner.read(tmp_path / "rows.jsonl", "prune", TINY[0]) == row


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--names", "no_such"], "no network is called no_such"),
        (["--workers", "0"], "must be positive"),
        (["--library", "keras"], "invalid choice: 'keras'"),
        (["--redo", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_options_are_named(options: list[str], text: str, tmp_path: Path) -> None:
    done = zoo(*options, output=tmp_path / "rows.jsonl")
    assert done.returncode == 2
    assert text in done.stderr


def test_names_may_be_patterns(tmp_path: Path) -> None:
    done = zoo("--list", "--names", "monai:*", "resnext50*", output=tmp_path / "rows.jsonl")
    assert done.stdout.split() == [
        "torchvision:resnext50_32x4d", "monai:UNet", "monai:DynUNet", "monai:SegResNet",
        "monai:UNETR", "monai:SwinUNETR", "mmpretrain:resnext50",
    ]  # fmt: skip


# attentions -------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Two attentions: of the second the channels are sorted, so that nothing of it goes."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = 4, fused
        self.first, self.second = nn.Linear(8, 24), nn.Linear(8, 24)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def one(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (0.5 * q @ k.transpose(2, 3) + 1.0).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(self.one(self.first(x)))
        return self.b(self.one(self.second(x).sort(-1).values))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "products"])
def test_what_attentions_may_lose_is_told(fused: bool) -> None:
    found = attentions(cpd.comb(Attends(fused=fused), torch.randn(2, 5, 8)))
    assert (found["attentions"], found["heads"], found["head_dims"]) == (2, 1, 1)
    whole = {kind: reason for kind, _, reason, count in found["whole"] if count == 1}
    assert set(whole) == {"heads", "head dims"}
    assert all("sort" in reason and "test_zoo.py:" in reason for reason in whole.values()), whole


def test_products_of_activations_alone_are_no_attention() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (self.a(x) @ self.table).softmax(-1)  # a layer
            return (y @ x.transpose(1, 2)) @ x  # no softmax

    assert attentions(cpd.comb(Gated(), torch.randn(2, 5, 8)))["attentions"] == 0


def test_a_row_has_the_limit_of_its_proof_and_the_operators() -> None:
    rows: list[dict[str, Any]] = []
    worker.prune(entry(), rows.append)
    assert rows[-1]["modes"]["kept"]["limit"] == 1e-9
    assert "aten.conv2d.default" in rows[-1]["ops"]
    assert rows[-1]["ops"] == sorted(set(rows[-1]["ops"]))


# pages ------------------------------------------------------------------------------------------


def test_the_pages_say_what_the_rows_say(tmp_path: Path) -> None:
    kept = {
        "status": "sound", "stage": "done", "seconds": {"trace": 1.0, "comb": 0.25}, "error": 1e-15,
        "macs": 0.71, "params": 0.6, "reached": False, "proved": True, "groups": 3, "nodes": 99,
        "kinds": {"heads": [1, 8, 4]}, "frozen": [["sorted | along", 1234]], "message": "",
        "checks": {"batch": "ok", "train": "as before: ValueError"},
    }  # fmt: skip
    runner.keep(
        tmp_path / "rows.jsonl", "prune", {"name": "timm:resnet18", "modes": {"kept": kept}}
    )
    onnx = {"kept": {"status": "error", "stage": "onnx", "message": "ExportError: no"}}
    runner.keep(tmp_path / "rows.jsonl", "onnx", {"name": "timm:resnet18", "modes": onnx})
    told = {
        "status": "sound", "stage": "done", "seconds": {}, "error": 3e-6, "proved": True,
        "macs": 0.4, "params": 0.6, "reached": True, "attentions": 5, "heads": 2, "head_dims": 5,
        "whole": [["heads", "layers.0", "sorted | along (sort in layers.0, a.py:3)", 3]],
    }  # fmt: skip
    row = {"name": "timm:beit_base_patch16_224", "modes": {"kept": {**told, "limit": 2e-4}}}
    runner.keep(tmp_path / "rows.jsonl", "prune", row)
    same = {"kept": {"status": "sound", "stage": "done", "message": "as before: no"}}
    runner.keep(
        tmp_path / "rows.jsonl", "onnx", {"name": "timm:beit_base_patch16_224", "modes": same}
    )
    before = {"name": "monai:DynUNet", "modes": {"kept": told}}  # a row without a limit
    runner.keep(tmp_path / "rows.jsonl", "prune", before)
    late = {"name": "monai:UNet", "stage": "build", "modes": {}, "ended": {"seconds": 300.0}}
    runner.keep(tmp_path / "rows.jsonl", "prune", late)

    markdown, table = page.write(tmp_path / "rows.jsonl", tmp_path / "docs")
    text = markdown.read_text()
    assert "| timm | 98 | 2 | 2 | 0 | 0 | 1 | 0 | 1 |" in text
    assert "| monai | 5 | 2 | 1 | 0 | 1 | 1 | 0 | 0 |" in text
    assert "lacks: timm:beit_base_patch16_224 (limit 2e-04), monai:DynUNet (limit not kept)" in text
    assert "| 3e-06 (limit 2e-04) |" in text
    assert "2 tried, 0 equal with an open batch, 0 with a fixed batch only; 1 as before" in text
    assert "Of 10 attentions in 2 networks (PyTorch's fused ones, and products" in text
    assert "4 may lose heads" in text
    assert (
        "- **monai:DynUNet**: no heads in layers.0 and 2 more: sorted / along (sort in layers.0, a"
    ) in text
    assert (
        "| resnet18 | sound | 0.71 | 0.60 |  | 1e-15 |  | 3 | 4/8 heads | 99 | 1.00 | 0.25 |  |  | "
        "train as before | fails |"
    ) in text
    assert "MACs at 0.71; what stays: sorted / along (1,234 parameters)" in text
    assert "- **timm:resnet18**: ONNX: ExportError: no" in text
    assert "- **monai:UNet**: over 300 s, in build" in text
    assert "non-maximum suppression" in text
    assert "4 of 4 rows were made by the code as it was earlier" in text
    assert "not run yet: timm:" in text

    with table.open() as stream:
        found = {row["network"]: row for row in csv.DictReader(stream)}
    assert set(found) == set(registry())
    assert found["timm:resnet18"]["note"] == "models/resnet.py"
    assert found["timm:vgg11_bn"]["status"] == "not run"
    assert str(tmp_path) not in text
    assert json.loads(json.dumps(found["monai:UNet"]))["not reached"].startswith("over 300 s")


def test_every_measure_of_the_house_holds_here(tmp_path: Path) -> None:
    import house
    import test_house

    for path in sorted((ROOT / "zoo").glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= house.LINES_OF_FILE, path.name
        for name, function in test_house.functions(test_house.tree(path)):
            assert test_house.length(function) <= house.LINES_OF_FUNCTION, name
            assert test_house.nesting(function) <= house.NESTING, name
            assert test_house.parameters(function) <= house.PARAMETERS, name


def test_randomise_leaves_whole_numbers_and_single_values() -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(3.0))
    module.register_buffer("index", torch.arange(4))
    network.randomise(module)
    assert module.scale.item() == 3
    assert module.index.tolist() == [0, 1, 2, 3]
