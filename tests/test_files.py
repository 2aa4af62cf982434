"""Files are untrusted: no pickle, no code, no path, no memory without bound; old formats load."""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cpd
import house
from cpd import errors
from cpd.cli import main
from cpd.cli.models import LIBRARIES, Source
from cpd.cli.origins import restored
from cpd.cli.trusted import network
from cpd.compress import compress
from cpd.distill import read, write
from cpd.plan import Plan
from test_compress import SGD, keywords, normed, same
from test_idioms import IDIOMS

TENSORS, PLAN, MANIFEST = "model.safetensors", "plan.json", "manifest.json"
GOLDEN = Path(__file__).parent / "golden" / "artefacts"

# --- no pickle


def refused(path: Path) -> Iterator[str]:
    """What in a file of source code could read or write a pickle, or run a text as code."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "eval", "exec"}
    calls |= {"yaml.unsafe_load", "yaml.full_load", "torch.hub.load"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            yield from (f"{path.name}:{node.lineno}" for n in names if n.split(".")[0] in modules)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
            yield f"{path.name}:{node.lineno}"


def test_no_source_reads_or_writes_a_pickle(tmp_path: Path) -> None:
    found = [each for path in house.SOURCE.rglob("*.py") for each in refused(path)]
    assert not found
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle as p\nimport torch\ntorch.save(1, 'x')\neval('1')\n")
    assert list(refused(bad)) == ["bad.py:1", "bad.py:3", "bad.py:4"]


def test_no_run_reads_or_writes_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run, broken off and resumed, with the optimizer's state; saved, loaded, cut."""

    def blocked(*args: Any, **options: Any) -> Any:
        raise AssertionError("a pickle was read or written")

    class Stop:
        def after_step(self, state: Any) -> None:
            if (state.stage, state.step) == ("prune", 7):
                os.kill(os.getpid(), signal.SIGTERM)

    class Blocked:
        __init__ = blocked

    compress(normed(), **keywords())  # libraries may pickle while they are imported
    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, blocked)
    for name in ("Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, Blocked)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, blocked)
        monkeypatch.setattr(torch.serialization, name, blocked)
    with pytest.raises(AssertionError, match="pickle"):
        torch.save(1, tmp_path / "x")
    adam = {"batch_size": 16, "optimizer": {"name": "AdamW", "lr": 1e-3}}
    base = {"batch_size": 16, "optimizer": SGD, "epochs": 1}
    given = keywords(output=tmp_path / "out", resume=True, prune=adam, base=base)
    with pytest.raises(errors.Interrupted):
        compress(normed(), **given, callbacks=(Stop(),))
    saved = read(tmp_path / "out" / "checkpoints" / "last.safetensors")
    assert "exp_avg" in saved["loop"]["optimizer"]["state"][0]
    result = compress(normed(), **given)
    assert same(cpd.load(tmp_path / "out", normed()), result.model)
    pruner = cpd.Pruner(normed(), torch.zeros(2, 3, 8, 8), target="macs=0.5")
    write(tmp_path / "pruner", pruner.state_dict())
    pruner.load_state_dict(read(tmp_path / "pruner"))


# --- no code


HOSTILE = "x=open('canary', 'w')"


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph[0].update(name=HOSTILE),
        lambda graph: next(d for d in graph if d["op"] == "child")["args"].update(
            list=['a" + open("canary", "w") + "']
        ),
        lambda graph: graph[-2]["kwargs"]["dict"].update({"a=open('canary', 'w'), b": 1}),
        lambda graph: graph[0].update(name="__class__"),
        lambda graph: graph[-2].update(op="aten.save.default"),
        lambda graph: graph[-2]["args"]["list"].append({"dtype": "load"}),
    ],
)
def test_a_forged_forward_runs_nothing(
    change: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = IDIOMS["talking heads"].make()
    _, plan = cpd.prune(model, IDIOMS["talking heads"].inputs, target="params=0.6")
    data = json.loads(plan.to_json())
    assert Plan.from_json(json.dumps(data)).forwards
    (forward,) = data["forwards"].values()
    change(forward["graphs"]["eval"])
    with pytest.raises(errors.ArtefactError):
        Plan.from_json(json.dumps(data))
    assert not (tmp_path / "canary").exists()


CODE = """
from transformers import PretrainedConfig
open({canary!r}, "w")
class Config(PretrainedConfig):
    model_type = "art"
"""
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
VIT |= {"intermediate_size": 24, "hidden_act": "relu"}


@pytest.mark.parametrize(
    ("noted", "said"),
    [
        ({"model": "os:getcwd"}, "only what you type is imported"),
        ({"model": "hf:art/net", "model_args": {"trust_remote_code": True}}, "no network that hf"),
        ({"model": "hf:art", "model_args": {"trust_remote_code": True}}, "no network that hf"),
        ({"model": "hf:owner/name"}, "no network that hf lists"),
        ({"model": "hf:../art/config.json"}, "no network that hf lists"),
        ({"model": "hf:vit", "model_args": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"model": "hf:vit", "model_args": {"auto_map": {"AutoModel": "art--x.Y"}}}, "auto_map"),
        ({"model": "hf:vit", "model_args": {"hidden_act": "../art/net"}}, "../art/net"),
        ({"model": "hf:vit", "model_args": {"_attn_implementation": "owner/net"}}, "owner/net"),
        ({"model": "hf:vit", "model_args": {"hidden_size": 10**12}}, "hidden_size"),
        ({"model": "hf:vit", "model_args": ["hidden_size"]}, "model_args are list"),
        ({"model": "timm:local-dir:art"}, "no network that timm lists"),
        ({"model": "timm:resnet18", "model_args": {"checkpoint_path": "x.pt"}}, "checkpoint_path"),
        ({"model": "timm:resnet18", "model_args": {"checkpoint_path": 0}}, "checkpoint_path"),
        ({"model": "timm:resnet18", "model_args": {"cache_dir": None}}, "cache_dir"),
        ({"model": "timm:resnet18", "model_args": {"pretrained_cfg": {"file": "x"}}}, "x"),
        ({"model": "torchvision:resnet18", "model_args": {"weights": "DEFAULT"}}, "weights"),
        ({"model": "torchvision:resnet18", "model_args": {"pretrained": True}}, "pretrained"),
        ({"model": "cpd:segformer_b0", "model_args": {"size": "b1"}}, "size"),
    ],
)
@pytest.mark.parametrize("place", [MANIFEST, "config.yaml"])
def test_an_artefact_imports_nothing(
    place: str,
    noted: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("art", "art/net"):  # code that lies beside, as a copied folder may have it
        Path(name).mkdir()
        Path(name, "configuration.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
        head = {"model_type": "art", "auto_map": {"AutoConfig": "configuration.Config"}}
        Path(name, "config.json").write_text(json.dumps(head))
    Path("folder").mkdir()
    held = {"extra": noted} if place == MANIFEST else noted
    Path("folder", place).write_text(json.dumps(held))
    assert main(["export", "folder"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("canary").exists()


def test_an_artefact_of_a_known_library_is_exported_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that came from a hub do not come from there again: the folder has its own."""
    seen, made = [], Source("hf:vit", VIT)()
    pixels = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    small, plan = cpd.prune(made, pixels, target="params=0.8")
    note = {"model": "hf:vit", "model_args": VIT}
    cpd.save(small, plan, tmp_path / "hf", extra=note)
    assert main(["export", str(tmp_path / "hf"), "--kind", "pt2"]) == 0
    note = {"model": "timm:any", "model_args": {"pretrained": True, "num_classes": 3}}
    cpd.save(small, plan, tmp_path / "timm", extra=note)

    def make(name: str, args: dict[str, Any]) -> nn.Module:
        seen.append(args)
        return made

    monkeypatch.setitem(LIBRARIES, "timm", make)
    assert main(["export", str(tmp_path / "timm"), "--kind", "pt2"]) == 0
    assert seen == [{"num_classes": 3}] * 2  # its shapes, then itself


def named_artefact(folder: Path, model: str, **args: Any) -> Path:
    """An artefact of a small vision transformer, whose manifest names a network."""
    torch.manual_seed(0)
    pixels = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    small, plan = cpd.prune(Source("hf:vit", VIT)(), pixels, target="params=0.8")
    return cpd.save(small, plan, folder, extra={"model": model, "model_args": args})


def exported(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of an export, and what it says."""
    code = main(["export", str(folder), "--kind", "pt2"])
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (MANIFEST, lambda text: text.replace('"format": 1', '"format": 9'), "format 9"),
        (TENSORS, lambda text: b"", "has 0 bytes"),
        (PLAN, lambda text: text.replace("{", "[", 1), "another sha256"),
    ],
)
def test_no_network_is_made_for_a_folder_that_is_damaged(
    name: str,
    change: Callable[[Any], Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = named_artefact(tmp_path / "out", "hf:vit", **VIT)
    monkeypatch.setitem(LIBRARIES, "hf", lambda *_: pytest.fail("a network was made"))
    changed = change(b"" if name == TENSORS else (folder / name).read_text())
    (folder / name).write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    code, text = exported(folder, capsys)
    assert code == 6
    assert said in text


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        ("hf:vit", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("hf:vit", {"hidden_act": "nope"}, "KeyError"),
        ("hf:vit", {"hidden_size": 1.5}, "--model_args"),
        ("hf:vit", {"hidden_size": 32}, "made for a ViTForImageClassification"),
        ("timm:resnet18", {"num_classes": -5}, "--model_args"),
        ("timm:nothing", {}, "unknown network of timm"),
        ("torchvision:resnet18", {"groups": 3}, "ValueError"),
        ("cpd:segformer_b0", {"heads": [0]}, "--model_args"),
    ],
)
def test_what_a_folder_names_and_no_library_makes_is_the_folders_fault(
    model: str,
    args: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = named_artefact(tmp_path / "out", model, **args)
    code, text = exported(folder, capsys)
    assert code == 6
    assert text.startswith(f"ArtefactError: {folder} names {model} with")
    assert said in text
    assert "give --model and --model_args" in text


class Wide(nn.Module):
    """16 GB where it takes memory."""

    def __init__(self, width: int = 1 << 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))


def test_a_folder_gets_no_more_memory_than_its_tensors_may_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither shapes of another plan nor those of a forged one are allocated."""
    made: list[str] = []

    def make(name: str, args: dict[str, Any]) -> nn.Module:
        model = Wide()
        made.append(model.weight.device.type)
        return model

    def forged(text: str) -> str:
        nothing = {"kept": {}, "rescale": {}, "aliases": {}, "attributes": {}}
        plan = json.loads(text) | nothing | {"model": "Wide"}
        return json.dumps(plan | {"shapes": {"weight": [1 << 16, 1 << 16]}})

    folder = named_artefact(tmp_path / "out", "timm:wide")
    monkeypatch.setitem(LIBRARIES, "timm", make)
    for change in (str, forged):
        (folder / PLAN).write_text(change((folder / PLAN).read_text()))
        signed(folder)
        code, text = exported(folder, capsys)
        assert code == 6
        assert "names a network of 17,179,869,184 bytes" in text
    monkeypatch.setattr(Wide.__init__, "__defaults__", (8,))
    code, text = exported(folder, capsys)
    assert code == 6
    assert "weight is (8, 8) here and (65536, 65536) in the plan" in text
    assert made == ["meta"] * 3


def test_a_network_that_needs_values_while_it_is_made_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(name: str, args: dict[str, Any]) -> nn.Module:
        assert torch.linspace(0, 1, 3).tolist() == [0, 0.5, 1]
        return Source("hf:vit", VIT)()

    folder = named_artefact(tmp_path / "out", "timm:any")
    monkeypatch.setitem(LIBRARIES, "timm", make)
    assert exported(folder, capsys) == (0, "")


def test_the_layers_of_all_stages_are_limited_together(tmp_path: Path) -> None:
    note = {"model": "timm:convnext_tiny", "model_args": {"depths": [3, 3, 500, 3]}}
    assert network(tmp_path, note) == ("timm:convnext_tiny", note["model_args"])
    note["model_args"] = {"depths": [512, 512, 512, 512]}
    with pytest.raises(errors.InputError, match="depths"):
        network(tmp_path, note)


@pytest.mark.parametrize("name", [MANIFEST, PLAN, TENSORS, "config.yaml", "report.json"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = named_artefact(tmp_path / "out", "hf:vit", **VIT)
    if name in (TENSORS, PLAN):
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name]["bytes"] = 0  # as a pipe has
        (folder / MANIFEST).write_text(json.dumps(manifest))
    if name == "config.yaml":
        signed(folder, extra={})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

    def read_it() -> None:
        signal.alarm(30)
        assert main(["report" if name == "report.json" else "export", str(folder)]) == 6
        if name in (MANIFEST, PLAN, TENSORS):
            with pytest.raises(errors.ArtefactError, match="it is no regular file"):
                cpd.load(folder, Source("hf:vit", VIT)())

    assert apart(read_it) == 0


BOMB = "a: &a [1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.yaml", "#" * (1 << 18) + "\n", "is larger than"),
        (MANIFEST, " " * (1 << 20) + "{}", "is larger than"),
        ("config.yaml", BOMB + "model: *i\n", "refers to parts of itself"),
        ("config.yaml", "a: &a {b: 1}\nmodel: {<<: [*a, *a]}\n", "refers to parts of itself"),
        ("config.yaml", "model: 1-1-1\na: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("config.yaml", "[" * 100000, "nested too deep"),
        (MANIFEST, "[" * 100000, "cannot be read"),
        (MANIFEST, "{", "cannot be read"),
    ],
)
def test_notes_of_a_folder_are_read_within_bounds(
    name: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["export", str(tmp_path)]) == 6
    assert said in " ".join(capsys.readouterr().err.split())


# --- old formats load for ever


class Skip(nn.Module):
    """x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def residual() -> nn.Sequential:
    """A network that may lose depth."""
    blocks = [Skip() for _ in range(3)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *ends)


@pytest.mark.parametrize("name", ["plan-1", "plan-2", "plan-3"])
def test_artefacts_of_earlier_versions_load(name: str) -> None:
    model = (
        residual()
        if name == "plan-3"
        else nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    )
    assert json.loads((GOLDEN / name / PLAN).read_text())["format"] == int(name[-1])
    wanted = load_file(GOLDEN / name / "expected.safetensors")
    small = cpd.load(GOLDEN / name, model).eval()
    torch.testing.assert_close(small(wanted["x"]), wanted["y"])


def test_an_artefact_of_another_patch_version_loads(tmp_path: Path) -> None:
    """What is read is the format; the version is there for the text of an error."""
    shutil.copytree(GOLDEN / "plan-3", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    for version in ("0.1.99", "9.0.0"):
        (tmp_path / "out" / MANIFEST).write_text(json.dumps({**manifest, "cpd": version}))
        wanted = load_file(GOLDEN / "plan-3" / "expected.safetensors")
        small = cpd.load(tmp_path / "out", residual()).eval()
        torch.testing.assert_close(small(wanted["x"]), wanted["y"])
    later = {**manifest, "format": 2, "cpd": "9.0.0"}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(later))
    with pytest.raises(errors.ArtefactError, match=r"version of cpd that wrote it \('9.0.0'\)"):
        cpd.load(tmp_path / "out", residual())


# --- fuzz: plans, tensors, manifests and checkpoints, changed at random

JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2,
    2**20,
    2**31,
    10**12,
    10**400,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "0-999999999999",
    "../../canary",
    "/etc/passwd",
    HOSTILE,
    "a" * 100000,
    [],
    {},
    [[]],
    {"list": [1]},
    {"device": "cuda:99"},
    [10**9] * 3,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The address of every value in a nest."""
    if at:
        yield at
    listed = enumerate(value) if isinstance(value, list) else ()
    for key, inner in value.items() if isinstance(value, dict) else listed:
        yield from places(inner, (*at, key))


def mutated(value: Any, draw: random.Random) -> Any:
    """One to three places of a nest changed."""
    for _ in range(draw.randint(1, 3)):
        found = list(places(value))
        if not found:
            return draw.choice(JUNK)
        *way, last = draw.choice(found)
        held = value
        for key in way:
            held = held[key]
        kind = draw.random()
        if kind < 0.6:
            held[last] = copy.deepcopy(draw.choice(JUNK))
        elif kind < 0.75 and isinstance(held[last], int):
            held[last] = held[last] + draw.choice((-1, 1, 7))
        elif kind < 0.9:
            del held[last]
        else:
            other = draw.choice(found)
            held[last] = json.loads(json.dumps(value[other[0]]))
    return value


def scrambled(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut off or put in."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(len(made), 1))
        kind = draw.random()
        if kind < 0.6 and made:
            made[place] = draw.randrange(256)
        elif kind < 0.8:
            del made[place : place + draw.choice((1, 8, 10**6))]
        else:
            made[place:place] = draw.randbytes(draw.choice((1, 8, 64)))
    return bytes(made)


def text_of(data: bytes, draw: random.Random) -> bytes:
    """JSON with places changed, or its bytes scrambled; sometimes nested too deep to read."""
    kind = draw.random()
    if kind < 0.02:
        return b"[" * 200000
    if kind < 0.2:
        return scrambled(data, draw)
    return json.dumps(mutated(json.loads(data), draw)).encode()


def tensors_of(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose head is changed as text, or whose bytes are scrambled."""
    if draw.random() < 0.4:
        return scrambled(data, draw)
    (length,) = struct.unpack("<Q", data[:8])
    head = text_of(data[8 : 8 + length], draw)
    size = len(head) if draw.random() < 0.9 else draw.choice((0, 2**63, 10**9))
    return struct.pack("<Q", size) + head + data[8 + length :]


def signed(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the files again, as a forger would."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    for name in (TENSORS, PLAN):
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


class Targets:
    """Artefacts of a few networks and a checkpoint, and how each is read."""

    NAMES = ("talking heads", "fused projection", "grouped transposed", "nn.MultiheadAttention")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {}
        for number, name in enumerate(self.NAMES):
            torch.manual_seed(0)
            model, inputs = IDIOMS[name].make(), IDIOMS[name].inputs
            for parameter in model.parameters():
                nn.init.normal_(parameter)
            options = {"target": "params=0.6", "unreachable": "closest", "verify": False}
            small, plan = cpd.prune(model, inputs, **options)
            cpd.save(small, plan, folder / str(number))
            self.models[number] = (model, inputs)
        torch.manual_seed(0)
        whole, x = residual(), torch.randn(2, 3, 6, 6)
        small, plan = cpd.prune(whole, x, target="params=0.5", depth=True, min_keep=0)
        assert plan.branches
        cpd.save(small, plan, folder / str(len(self.models)))
        self.models[len(self.models)] = (whole, x)
        values = {"a": torch.arange(6.0), "b": [1, {"c": (2.5, None)}], "d": "text"}
        write(folder / "checkpoint", values)
        named_artefact(folder / "named", "hf:vit", **VIT, num_labels=3, patch_size=8)

    def case(self, number: int) -> None:
        """Read one file changed at random; what comes must be an error of the tree, or a value."""
        draw = random.Random(number)
        kind = number % 9
        if kind == 8:
            self._named(draw)
            return
        if kind == 7:
            data = tensors_of((self.folder / "checkpoint").read_bytes(), draw)
            path = self.folder / "changed"
            path.write_bytes(data)
            with refused_or_read():
                read(path)
            return
        which = number // 9 % len(self.models)
        name = TENSORS if kind in (4, 5) else MANIFEST if kind == 6 else PLAN
        folder = self.folder / str(which)
        before = {each: (folder / each).read_bytes() for each in (TENSORS, PLAN, MANIFEST)}
        change = tensors_of if name == TENSORS else text_of
        (folder / name).write_bytes(change(before[name], draw))
        if name != MANIFEST:
            signed(folder)
        model, inputs = self.models[which]
        with refused_or_read():
            small = cpd.load(folder, model)
            with contextlib.suppress(Exception):  # it may not run, but it must not run code
                small(*inputs) if isinstance(inputs, tuple) else small(inputs)
        for each, data in before.items():
            (folder / each).write_bytes(data)

    def _named(self, draw: random.Random) -> None:
        """What the manifest says of the network is changed, and the command line makes it."""
        path = self.folder / "named" / MANIFEST
        before = path.read_bytes()
        extra = mutated(json.loads(before)["extra"], draw)
        path.write_text(json.dumps(json.loads(before) | {"extra": extra}))
        with refused_or_read():
            restored(path.parent, None, None)
        path.write_bytes(before)


@contextlib.contextmanager
def refused_or_read() -> Iterator[None]:
    """An error of the tree is as good as none, but for one that came of too little memory."""
    try:
        yield
    except errors.CPDError as error:
        if starved(error):
            raise AssertionError("memory ran out") from error


def starved(error: BaseException | None) -> bool:
    """Whether memory ran out, in an error or in what it came of."""
    if error is None or isinstance(error, MemoryError) or "allocate memory" in str(error):
        return error is not None
    return starved(error.__cause__) or starved(error.__context__)


def apart(work: Callable[[], None]) -> int:
    """Work in a process of its own; 0 where it went well."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - of the child, told to the parent
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def at_most_a_gigabyte() -> None:
    """More than this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limited(folder: Path, numbers: range, seconds: int = 30) -> int:
    """Cases in a process that may take 1 GB, and 30 s for each; 0 where all went well."""
    number = -1

    def late(signum: int, frame: Any) -> None:  # no error: a reader could make another of it
        stack = "".join(traceback.format_stack(frame))
        os.write(2, f"case {number}: more than {seconds} s\n{stack}".encode())
        os._exit(9)

    def work() -> None:
        nonlocal number
        os.chdir(folder)
        targets = Targets(folder)
        signal.signal(signal.SIGALRM, late)
        at_most_a_gigabyte()
        for number in numbers:
            signal.alarm(seconds)
            try:
                targets.case(number)
            except BaseException as error:
                error.add_note(f"case {number}")
                raise
            signal.alarm(0)

    return apart(work)


def fuzzed(folder: Path, numbers: range) -> None:
    data = folder / "inside" / "data"
    data.mkdir(parents=True)
    assert limited(data, numbers) == 0
    assert not list(folder.rglob("*canary*"))
    assert [path.name for path in folder.iterdir()] == ["inside"]
    assert [path.name for path in (folder / "inside").iterdir()] == ["data"]
    names = {path.name for path in data.iterdir()}
    assert names <= {"0", "1", "2", "3", "4", "checkpoint", "changed", "named"}


def hangs(*args: Any, **options: Any) -> None:
    time.sleep(60)


def starves(*args: Any, **options: Any) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def starves_plainly(*args: Any, **options: Any) -> None:
    np.empty(1 << 40)


@pytest.mark.parametrize(
    ("place", "fault", "code", "said"),
    [
        ("_tensors.safe_open", hangs, 9, "case 13: more than 2 s"),
        ("artefact.Plan.from_json", hangs, 9, "case 13: more than 2 s"),
        ("_tensors.safe_open", starves, 1, "memory ran out\ncase 13"),
        ("artefact.cut", starves, 1, "memory ran out\ncase 13"),
        ("artefact.Plan.from_json", starves_plainly, 1, "memory ran out\ncase 13"),
    ],
)
def test_the_fuzz_sees_what_readers_turn_into_refusals(
    place: str,
    fault: Any,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(f"cpd.exporters.{place}", fault)
    assert limited(tmp_path, range(13, 14), seconds=2) == code
    assert said in capfd.readouterr().err


def test_changed_files_are_refused_or_harmless(tmp_path: Path) -> None:
    fuzzed(tmp_path, range(200))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_five_thousand_changed_files(part: int, tmp_path: Path) -> None:
    fuzzed(tmp_path, range(200 + 500 * part, 700 + 500 * part))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": [' + "0," * (1 << 24) + "0]}", "letters"),
        ('{"a": [' + "{}," * (1 << 20) + "0]}", "lists and mappings"),
        ('{"a": [' + "999," * ((1 << 23) - 3) + "0]}", "no format|not a plan"),
        ('{"a": ["' + "\U0001f600" * 1000 + '", ' + '"ab",' * 6000000 + "0]}", "not a plan"),
    ],
)
def test_the_largest_plans_take_no_more_than_a_gigabyte(text: str, said: str) -> None:
    def work() -> None:
        at_most_a_gigabyte()
        with pytest.raises(errors.ArtefactError, match=said) as found:
            Plan.from_json(text)
        assert not starved(found.value)

    assert apart(work) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": {"0.weight": [10**12, 3]}, "kept": {"0.weight": [[0], [10**12], "0"]}},
        {"rescale": {"0.weight": {"rows": "0", "factor": float("nan")}}},
        {"aliases": {"0.bias": "0.weird"}},
        {"costs": {"macs": [float("inf"), 1]}},
        {"kept": {"0.weight": [[0, 0], [4, 4], "0"]}},
    ],
)
def test_plans_that_ask_for_too_much(change: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    _, plan = cpd.prune(model, torch.zeros(2, 3), target="params=0.8")
    data = json.loads(plan.to_json())
    for key, value in change.items():
        if key == "kept":
            (name, (axes, shape, kept)), *_ = value.items()
            value = {name: [{"axes": axes, "shape": shape, "kept": kept}]}
        data[key] = {**data[key], **value}
    with pytest.raises(errors.ArtefactError, match="not a plan"):
        Plan.from_json(json.dumps(data))
