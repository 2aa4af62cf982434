"""The shell: names become networks, flags and YAML are one, and errors are one clean line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import house
from cpd import errors
from cpd.cli import main
from cpd.cli.flags import parser, settings
from cpd.cli.models import Source, named
from cpd.compress import CompressConfig
from cpd.plan import Plan
from two_processes import of_gloo

RECIPES = sorted((house.ROOT / "recipes").glob("*.yaml"))


def run(*words):
    return main([str(word) for word in words])


def small(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 4))


def nothing_but_a_number() -> int:
    return 3


# --- names


def test_comb_shows_groups_and_what_stays(capsys):
    code = run("comb", "test_cli:small", "--model_args.width", 6, "--input_shape", "3,8,8")
    shown = capsys.readouterr().out
    assert code == 0
    assert "1 coupling group" in shown
    assert "6 channels" in shown
    assert "model output" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["timm:test_resnet", "--model_args.in_chans", "1"],
        ["torchvision:squeezenet1_1"],
        [
            *["hf:vit", "--model_args.hidden_size", "16", "--model_args.num_hidden_layers", "1"],
            *["--model_args.num_attention_heads", "2", "--model_args.intermediate_size", "24"],
            *["--model_args.image_size", "32"],
        ],
    ],
)
def test_comb_knows_libraries(capsys, words):
    assert run("comb", *words) == 0
    assert "coupling groups" in capsys.readouterr().out


def test_shapes_of_inputs():
    made = Source("timm:test_vit", {"img_size": 32, "in_chans": 1})
    assert made.inputs(made(), None).shape == (2, 1, 32, 32)
    assert made.inputs(made(), [3, 4]).shape == (2, 3, 4)
    assert Source("hf:distilbert", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 8})
    with pytest.raises(errors.InputError, match="--input_shape"):
        Source("test_cli:small").inputs(small(), None)
    for shape in ("3,a", "", "0,3"):
        with pytest.raises(errors.InputError, match="--input_shape"):
            made.inputs(small(), shape)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("resnet50", "timm:NAME"),
        ("timm:resnet5", "did you mean 'resnet5"),
        ("torchvision:resnet5", "did you mean 'resnet50'"),
        ("hf:vitt", "did you mean 'vit'"),
        ("hf:no/such.json", "network of transformers"),
        ("cpd:nothing", "network of cpd"),
        ("no.such.module:make", "cannot import"),
        ("test_cli:nothing", "has no 'nothing'"),
        ("test_cli:RECIPES", "cannot make"),
        ("test_cli:nothing_but_a_number", "not a network"),
    ],
)
def test_names_that_mean_nothing(capsys, spec, text):
    assert run("comb", spec) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


def test_objects_by_name():
    assert named("data", "digits") == "digits"
    assert named("data", {"digits": {"size": 8}}) == {"digits": {"size": 8}}
    assert named("data", "two_processes:Split").num_classes == 4
    assert named("importance", "test_cli:small").__name__ == "small"
    assert isinstance(named("teacher", {"test_cli:small": {"width": 3}}), nn.Sequential)
    assert named("losses", {"kd": {"weight": 1}, "dist": None})["kd"] == {"weight": 1}


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(errors.InputError):
        run("comb", "resnet50", "--debug")


@pytest.mark.parametrize("words", [["--help"], ["comb", "--help"], ["compress", "--help"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: cpd" in shown
    assert "object at" not in shown


def test_every_key_has_a_help_text():
    texts = {action.dest: action.help for action in parser()._actions}
    for name in ("target", "interval", "recover.warmup", "prune.clip", "bench.runs", "seed"):
        assert len(texts[name]) > 5, name
    from dataclasses import fields

    assert {item.name for item in fields(CompressConfig)} <= set(texts)


def test_unknown_commands_and_flags(capsys):
    for words in (["shrink"], ["comb", "test_cli:small", "--colour", "red"]):
        with pytest.raises(SystemExit) as caught:
            run(*words)
        assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# --- flags and YAML


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: test_cli:small\ndata: two_processes:Split\ntarget: macs=0.5\n"
        "losses: {kd: {weight: 2.0, temperature: 4.0}}\n"
        "recover: {epochs: 2, optimizer: {name: SGD, lr: 1e-2}}\n"
    )
    return str(path)


def test_flags_win_however_deep(recipe):
    found = settings(
        [
            *[recipe, "--target", "macs=0.3", "--losses.kd.weight=3", "--recover.optimizer.lr"],
            *["1e-3", "--base.epochs", "4", "--exact", "--ignore", "[head]", "--onnx", "false"],
            *["--prune.optimizer.lr", "0.5", "--teacher", "null", "--model_args.width", "6"],
        ]
    )
    assert found["target"] == "macs=0.3"
    assert found["losses"] == {"kd": {"weight": 3, "temperature": 4.0}}
    assert found["recover"]["optimizer"] == {"name": "SGD", "lr": 0.001}
    assert found["recover"]["epochs"] == 2
    assert found["base"]["epochs"] == 4
    assert found["exact"] is True
    assert found["onnx"] is False
    assert found["ignore"] == ["head"]
    assert found["prune"]["optimizer"] == {"name": "SGD", "lr": 0.5, "momentum": 0.9}
    assert found["teacher"] is None
    assert found["model_args"] == {"width": 6}


def test_names_become_mappings_where_a_flag_goes_inside(recipe):
    words = [recipe, "--losses", "dist", "--losses.dist.weight", "2"]
    words += ["--recover.optimizer", "AdamW", "--recover.optimizer.lr", "0.1"]
    found = settings(words)
    assert found["losses"] == {"dist": {"weight": 2}}
    assert found["recover"]["optimizer"] == {"name": "AdamW", "lr": 0.1}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--recover.epoch", "3"], "did you mean 'epochs'"),
        (["--targets", "macs=0.3"], "did you mean 'target'"),
        (["--min_keep", "lots"], "min_keep"),
        (["--seed.x", "1"], "has no keys"),
        (["--target", "macs=2"], "at most 1"),
        (["stray"], "cannot read"),
        (["--seed", "1", "stray"], "no flag"),
        (["--model", "null"], "model is missing"),
    ],
)
def test_bad_flags(recipe, words, text, capsys):
    assert run("compress", recipe, *words) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1", ""])
def test_files_that_are_no_recipe(tmp_path, text, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert run("compress", path) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid(path):
    found = settings([str(path)])
    config = CompressConfig.of(**found)
    made = Source(config.model, config.model_args)()
    assert sum(p.numel() for p in made.parameters()) > 0
    assert config.output is not None


def test_there_are_recipes():
    assert {path.name for path in RECIPES} >= {"demo.yaml", "digits-resnet.yaml"}


def test_a_network_of_torchvision_downloads_no_backbone(monkeypatch):
    def never(*args, **more):
        raise AssertionError("something is downloaded")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", never)
    with torch.device("meta"):
        made = Source("torchvision:deeplabv3_mobilenet_v3_large", {"num_classes": 3})()
    assert made.classifier[-1].out_channels == 3


def test_heads_of_transformers():
    tiny = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8}
    names = {"architectures": ["SegformerForSemanticSegmentation"]}
    with torch.device("meta"):
        plain, asked = (Source("hf:segformer", {**tiny, **more})() for more in ({}, names))
    assert type(plain).__name__ == "SegformerForImageClassification"
    assert type(asked).__name__ == "SegformerForSemanticSegmentation"


# --- the commands


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "recipe.yaml"
    path.write_text(
        "model: test_cli:small\n"
        "data: test_cli:Data\n"
        "target: macs=0.5\n"
        "interval: 2\nevents: 2\n"
        "recover: {epochs: 1, batch_size: 32}\n"
        "prune: {batch_size: 32}\n"
        "bench: {runs: 10, warmup: 1, threads: 1}\n"
    )
    out = folder / "out"
    assert run("compress", path, "--output", out, "--model_args.width", 12) == 0
    return path, out


class Data:
    """The blobs of the two-process test in float32."""

    def __init__(self):
        from two_processes import Split

        split = Split()
        for name in ("train", "val", "test"):
            x, y = getattr(split, name).tensors
            setattr(self, name, torch.utils.data.TensorDataset(x.float(), y))


def test_compress_ends_with_the_table(artefact, capsys):
    path, out = artefact
    assert run("compress", path, "--output", out, "--model_args.width", 12) == 5
    assert "not empty" in capsys.readouterr().err
    code = run("compress", path, "--output", out, "--model_args.width", 12, "--resume")
    shown = capsys.readouterr().out
    assert code == 0
    for row in ("top1", "parameters", "MACs", "ONNX file", "latency median", "p90", "p99"):
        assert row in shown
    assert "verified" in shown


def test_report_bench_and_export_of_an_artefact(artefact, capsys, tmp_path):
    _, out = artefact
    (out / "report.html").unlink()
    assert run("report", out) == 0
    assert "top1" in capsys.readouterr().out
    assert (out / "report.html").exists()
    assert run("bench", out, "--runs", 10, "--warmup", 1, "--threads", 1) == 0
    assert "latency" in capsys.readouterr().out
    typed = ("--model", "test_cli:small", "--model_args.width", 12)
    assert run("export", out, "--to", tmp_path / "again.onnx", *typed) == 0
    assert (tmp_path / "again.onnx").stat().st_size > 1000


def grey():
    """For digits."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU())
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128, 10))


def test_an_artefact_is_exported_in_every_format_and_int8_is_measured(tmp_path, capsys):
    from cpd import exporters
    from cpd.cli.formats import FORMATS

    out, typed = tmp_path / "pruned", ("--model", "test_cli:grey")
    given = ("--input_shape", "1,8,8", "--output", out)
    assert run("prune", "test_cli:grey", "--target", "macs=0.5", *given) == 0
    data = ("--data", "{digits: {size: 8}}")
    assert run("export", out, *typed, "--kind", "int8") == 2
    assert "--data digits" in capsys.readouterr().err
    for kind, name in FORMATS.items():
        assert run("export", out, *typed, "--kind", kind, *data, "--batches", 2) == 0
        assert (out / name).stat().st_size > 1000
    assert "ranges of 2 batches" in capsys.readouterr().out
    assert run("export", out, *typed, "--kind", "int9") == 2
    assert "did you mean 'int8'" in " ".join(capsys.readouterr().err.split())
    exporters.onnx(grey(), torch.zeros(2, 1, 8, 8), out / "base.onnx")
    assert run("bench", out, "--runs", 5, "--warmup", 1, "--threads", 1, *data) == 0
    shown = capsys.readouterr().out
    assert "then quantized to int8" in shown
    assert shown.count("top1") == 2


@pytest.mark.parametrize(
    "words",
    [
        ("--importance", "fisher"),
        ("--importance", '{"taylor": {"multivariable": false}}', "--repair", 2),
        ("--importance", '{"magnitude": {"p": 1}}', "--repair", "auto", "--batch_size", 32),
    ],
)
def test_prune_scores_and_repairs_on_data(words, tmp_path, capsys):
    import cpd

    given = ("prune", "test_cli:grey", "--target", "macs=0.5", "--input_shape", "1,8,8")
    greedy = ("--strategy", '{"greedy": {"ranked": true}}')
    assert run(*given, *words) == 2
    assert "give --data" in " ".join(capsys.readouterr().err.split())
    out, data = tmp_path / "out", ("--data", "{digits: {size: 8}}")
    assert run(*given, *greedy, *words, *data, "--output", out) == 0
    small = cpd.load(out, grey())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in grey().parameters())
    for wrong in ("often", -1):
        assert run(*given, "--repair", wrong, *data) == 2
        assert "number of batches" in " ".join(capsys.readouterr().err.split())


def test_prune_saves_what_export_reads(tmp_path, capsys):
    out = tmp_path / "pruned"
    words = ["--target", "macs=0.5", "--input_shape", "3,8,8", "--output", out]
    assert run("prune", "test_cli:small", *words) == 0
    shown = capsys.readouterr().out
    assert "macs" in shown
    assert "channels" in shown
    assert json.loads((out / "manifest.json").read_text())["extra"]["model"] == "test_cli:small"
    assert run("export", out) == 2  # code of one's own is imported only where it is typed
    assert run("export", out, "--model", "test_cli:small") == 0
    assert (out / "model.onnx").exists()
    assert run("export", out, "--model", "test_cli:small", "--model_args.width", 9) == 2


def test_folders_that_are_no_artefact(tmp_path, capsys):
    for command, code in (("export", 2), ("bench", 6), ("report", 6)):
        assert run(command, tmp_path) == code
        shown = capsys.readouterr().err
        assert "Error" in shown
        assert "Traceback" not in shown
    (tmp_path / "report.json").write_text("{}")
    assert run("report", tmp_path) == 6
    for large in (" " * (1 << 25) + "{}", '{"a": [' + "[]," * (1 << 19) + "0]}", "\udc80"):
        (tmp_path / "report.json").write_text(large, errors="surrogateescape")
        assert run("report", tmp_path) == 6
        assert "Traceback" not in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    def absent(*args):
        raise ModuleNotFoundError("no", name="timm")

    monkeypatch.setattr("cpd.cli._run", absent)
    assert run("comb", "timm:resnet18") == 2
    assert "timm" in capsys.readouterr().err


def test_interrupting_says_how_to_go_on(monkeypatch, capsys):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("cpd.cli._run", stopped)
    assert run("comb", "x:y") == 130
    assert "--resume" in capsys.readouterr().err


def test_a_group_of_processes_ends_with_the_command_that_began_it(monkeypatch, tmp_path):
    def grouped(*args):
        if not torch.distributed.is_initialized():
            file = f"file://{tmp_path / 'store'}"
            torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(small())
        wrapped(torch.zeros(1, 3, 8, 8)).sum().backward()
        raise errors.InputError("after it began")

    monkeypatch.setattr("cpd.cli._run", grouped)
    assert run("compress") == 2
    assert not torch.distributed.is_initialized()
    assert not of_gloo()
    with contextlib.suppress(errors.InputError):
        grouped()
    assert run("compress") == 2
    assert torch.distributed.is_initialized()  # somebody else's
    torch.distributed.destroy_process_group()


def test_running_as_a_module():
    assert Path(main.__code__.co_filename).with_name("__main__.py").exists()


def test_prune_uniformly_shows_the_configuration(capsys, tmp_path):
    words = ["timm:vit_tiny_patch16_224", "--target", "params=0.7", "--strategy", "knapsack"]
    args = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
    for name, value in args.items():
        words += [f"--model_args.{name}", value]
    words += ["--uniform", "true", "--limits", '{"*attn*": 0, "patch_embed*": 0}']
    assert run("prune", *words, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "the same as timm.create_model('vit_tiny_patch16_224'" in shown.replace("\n", "")
    noted = json.loads((tmp_path / "out" / "manifest.json").read_text())["extra"]["config"]
    assert set(noted["values"]) == {*args, "mlp_ratio"}


def test_prune_keeps_what_is_named(capsys):
    words = ["test_cli:small", "--input_shape", "3,8,8", "--target", "params=0.7"]
    assert run("prune", *words, "--keep", '{"0": all}') == 3
    assert "cannot be reached" in capsys.readouterr().err


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 12), nn.ReLU(), nn.Linear(12, 10))


def test_sensitivity_shows_and_writes(capsys, tmp_path):
    words = ["test_cli:classifier", "--data", "digits", "--batches", "2"]
    words += ["--output", tmp_path / "a.json", "--plot", tmp_path / "a.svg"]
    assert run("sensitivity", *words) == 0
    assert "loss of the whole network" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert [round(12 * share) for share, _ in found["losses"]["1"]] == [1, 3, 6, 9, 10]
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_sensitivity_of_branches(capsys):
    words = ["timm:vit_tiny_patch16_224", "--model_args", '{"img_size": 32, "in_chans": 1, '
             '"num_classes": 10, "depth": 1}', "--ratios", "[0.5]", "--batches", "1"]  # fmt: skip
    assert run("sensitivity", *words, "--depth", "true") == 0
    shown = capsys.readouterr().out
    assert "blocks.0:1" in shown
    assert "100%:" in shown


def limits_at(rise, model, capsys, *words):
    assert run("sensitivity", model, "--batches", "1", "--rise", rise, *words) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("limits: "))
    return line.removeprefix("limits: ")


def test_limits_of_a_sensitivity_go_back_into_prune_and_recipes(capsys, tmp_path):
    model, path = "test_cli:classifier", tmp_path / "limits.yaml"
    given = limits_at(0.02, model, capsys, "--limits", path, "--ratios", "[0.25,0.75]")
    share = json.loads(given)["1"]
    assert share in (0.0, 0.25, 0.75)
    words = [model, "--input_shape", "1,32,32", "--target", "macs=0.1", "--unreachable", "closest"]
    for limits, left in ((given, round(12 * (1 - share))), ('{"1": 0.5}', 6)):
        assert run("prune", *words, "--limits", limits, "--output", tmp_path / str(left)) == 0
        plan = Plan.from_json((tmp_path / str(left) / "plan.json").read_text())
        assert plan.widths[0].after == left
    values = settings([str(RECIPES[0]), str(path)])
    assert values["limits"] == json.loads(given)
    assert CompressConfig.of(**values).limits == {"1": share}


def test_sensitivity_scores_on_the_data_that_it_judges_by(capsys, tmp_path):
    shown = {}
    for name in ("magnitude", "taylor", "variance"):
        words = ["--importance", name, "--ratios", "[0.5]", "--output", tmp_path / name]
        limits_at(0.1, "test_cli:classifier", capsys, *words)
        shown[name] = json.loads((tmp_path / name).read_text())["losses"]["1"]
    assert shown["taylor"] != shown["magnitude"] != shown["variance"]


def test_limits_without_a_rise_are_refused(capsys, tmp_path):
    assert run("sensitivity", "test_cli:classifier", "--limits", tmp_path / "a") == 2
    assert "also give --rise" in capsys.readouterr().err
