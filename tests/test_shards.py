"""Cutting a checkpoint file by file: the same tensors as cutting the network, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cpd
import house
from cpd.cut import cut_tensor
from cpd.plan import Plan
from cpd.shards import cut_shards

IDS = torch.zeros(1, 5, dtype=torch.long)


class Tower(nn.Module):
    """An embedding tied to the head, attention with the default scale, a table no file holds."""

    def __init__(self, width: int = 24, heads: int = 4, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(50, width, dtype=dtype)
        self.query = nn.Linear(width, width, bias=False, dtype=dtype)
        self.key = nn.Linear(width, width, bias=False, dtype=dtype)
        self.value = nn.Linear(width, width, bias=False, dtype=dtype)
        self.out = nn.Linear(width, width, dtype=dtype)
        self.up = nn.Linear(width, 3 * width, dtype=dtype)
        self.down = nn.Linear(3 * width, width, dtype=dtype)
        self.head = nn.Linear(width, 50, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("gain", torch.ones(3 * width, dtype=dtype), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return self.head(x + self.down(torch.relu(self.up(x)) * self.gain))


def planned(model: nn.Module, target: str = "params=0.3") -> Plan:
    groups = cpd.comb(model, (IDS.to(next(model.parameters()).device),))
    return cpd.choose(groups, cpd.importance.score("random", model, groups), target)


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int) -> dict[str, str]:
    """Write a state as Hugging Face does: `count` files and an index."""
    folder.mkdir(parents=True)
    names, files = sorted(state), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        mine = names[number::count]
        files |= dict.fromkeys(mine, file)
        save_file({n: state[n].contiguous() for n in mine}, folder / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total, "total_parameters": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def checkpoint(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state in which a tied tensor is held once."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name != "head.weight"}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shards_are_what_cutting_the_network_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Tower(dtype=dtype)
    plan = planned(model)
    assert plan.rescale, "the attention's scale has to be pinned for this test to mean something"
    files = write_shards(tmp_path / "whole", checkpoint(model), 3)
    cut_shards(tmp_path / "whole", plan, tmp_path / "cut")

    got, small = read_all(tmp_path / "cut"), cpd.cut(model, plan, verify=False)
    assert set(got) == set(files)
    for name, tensor in checkpoint(small).items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in got.values())
    before, after = plan.costs["params"]
    assert index["metadata"]["total_parameters"] == after - before
    for name, file in files.items():
        with safe_open(tmp_path / "cut" / file, "pt") as reader:
            assert name in reader.keys()  # noqa: SIM118 - it is no mapping
            assert reader.metadata() == {"format": "pt"}

    fresh = cpd.cut(Tower(dtype=dtype), plan, verify=False)
    fresh.load_state_dict(got, strict=False)
    assert torch.equal(fresh(IDS), small(IDS))


def test_a_plan_from_the_meta_device_cuts_a_checkpoint(tmp_path: Path) -> None:
    model = Tower()
    with torch.device("meta"):
        whole = Tower()
    plan = planned(whole)
    write_shards(tmp_path / "whole", checkpoint(model), 2)
    again = Plan.from_json(plan.to_json())
    cut_shards(tmp_path / "whole", again, tmp_path / "cut", model=whole)
    small = cpd.cut(model, again, verify=False)
    assert cpd.verify(model, small, plan, (IDS,))
    got = read_all(tmp_path / "cut")
    assert all(torch.equal(got[name], tensor) for name, tensor in checkpoint(small).items())
    assert Plan.from_json((tmp_path / "cut" / "plan.json").read_text()) == plan


def test_one_file_without_an_index_and_ties_under_each_name(tmp_path: Path) -> None:
    model = Tower()
    plan = planned(model)
    (tmp_path / "whole").mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "whole" / "weights.safetensors")
    cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "plan.json",
        "weights.safetensors",
    ]
    got = read_all(tmp_path / "cut")
    for name, tensor in cpd.cut(model, plan, verify=False).state_dict().items():
        assert torch.equal(got[name], tensor), name


def test_a_checkpoint_may_know_tensors_by_other_names(tmp_path: Path) -> None:
    model = Tower()
    plan = planned(model)
    state = {f"base.{name}": tensor for name, tensor in checkpoint(model).items()}
    write_shards(tmp_path / "whole", state, 2)
    cut_shards(
        tmp_path / "whole", plan, tmp_path / "cut", names=lambda name: name.removeprefix("base.")
    )
    got = read_all(tmp_path / "cut")
    small = checkpoint(cpd.cut(model, plan, verify=False))
    assert {name.removeprefix("base.") for name in got} == set(small)
    assert all(torch.equal(got[f"base.{name}"], tensor) for name, tensor in small.items())
    with pytest.raises(cpd.PlanMismatch, match=r"'base.down.bias' is no tensor of Tower.*names="):
        cut_shards(tmp_path / "whole", plan, tmp_path / "again")


def test_eight_bit_weights_keep_their_type(tmp_path: Path) -> None:
    model = Tower()
    plan = planned(model)
    small = torch.float8_e4m3fn
    state = {
        name: tensor.to(small) if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint(model).items()
    }
    write_shards(tmp_path / "whole", state, 1)
    cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    got = read_all(tmp_path / "cut")
    assert got["up.weight"].dtype == got["query.weight"].dtype == small
    assert tuple(got["query.weight"].shape) == plan.new_shape("query.weight")
    rows, factor = plan.rescale["query.weight"]
    kept = plan.masks()["query.weight"]
    wanted = state["query.weight"].float()
    wanted[list(rows)] *= factor
    got_values = got["query.weight"].float().flatten()
    assert torch.equal(got_values, wanted.to(small).float()[kept])


def test_extra_tensors_are_refused_or_left_out(tmp_path: Path) -> None:
    model = Tower()
    plan = planned(model)
    write_shards(tmp_path / "whole", checkpoint(model) | {"rope": torch.ones(3)}, 2)
    with pytest.raises(cpd.PlanMismatch, match="'rope' is no tensor of Tower"):
        cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    cut_shards(tmp_path / "whole", plan, tmp_path / "cut", extra="drop")
    assert "rope" not in read_all(tmp_path / "cut")
    with pytest.raises(cpd.UnknownName, match="extra tensors"):
        cut_shards(tmp_path / "whole", plan, tmp_path / "again", extra="keep")


def test_missing_and_mismatched_tensors_are_named(tmp_path: Path) -> None:
    model = Tower()
    plan = planned(model)
    state = checkpoint(model)
    state["up.weight"] = torch.zeros(2, 24)
    del state["embed.weight"], state["out.bias"]
    write_shards(tmp_path / "whole", state, 2)
    with pytest.raises(cpd.PlanMismatch) as caught:
        cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    text = str(caught.value)
    assert "'up.weight' has shape (2, 24), the plan says (72, 24)" in text
    assert "'embed.weight' is missing" in text
    assert "'out.bias' is missing" in text


def test_a_plan_without_its_network_asks_for_it(tmp_path: Path) -> None:
    model = Tower()
    plan = Plan.from_json(planned(model).to_json())
    write_shards(tmp_path / "whole", checkpoint(model), 1)
    with pytest.raises(cpd.PlanMismatch, match=r"'gain' is missing. Give model="):
        cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    with pytest.raises(cpd.PlanMismatch, match="made for a Tower, not for this Linear"):
        cut_shards(tmp_path / "whole", plan, tmp_path / "cut", model=nn.Linear(2, 2))


def _no_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _lost_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _truncated(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-7])


def _not_safetensors(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"pickle, perhaps")


def _wrong_index(content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return write


def _moved(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"]["up.weight"] = files[files[0] == content["weight_map"]["up.weight"]]
    path.write_text(json.dumps(content))


def _two_checkpoints(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file({"up.bias": torch.ones(72)}, folder / "old.safetensors")


def _two_indices(folder: Path) -> None:
    (folder / "model.fp16.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_no_files, r"has no \*.safetensors file"),
        (_lost_file, "00002-of-00002.safetensors cannot be read"),
        (_truncated, "00001-of-00002.safetensors cannot be read"),
        (_not_safetensors, "00001-of-00002.safetensors cannot be read"),
        (_wrong_index([]), "holds no JSON object"),
        (_wrong_index({"weight_map": {}}), "has no weight_map"),
        (_wrong_index({"weight_map": {"a": "../a.safetensors"}}), "is no file beside it"),
        (_wrong_index({"weight_map": {"a": 3}}), "is no file beside it"),
        (_moved, "lacks 'up.weight', which the index says is there"),
        (_two_checkpoints, "is in model-.* and in old.safetensors"),
        (_two_indices, "more than one index"),
    ],
)
def test_damaged_checkpoints_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], text: str
) -> None:
    model = Tower()
    plan = planned(model)
    write_shards(tmp_path / "whole", checkpoint(model), 2)
    damage(tmp_path / "whole")
    with pytest.raises(cpd.ArtefactError, match=text):
        cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_no_folder_and_a_folder_in_the_way(tmp_path: Path) -> None:
    model = Tower()
    plan = planned(model)
    with pytest.raises(cpd.ArtefactError, match="is not a folder"):
        cut_shards(tmp_path / "nowhere", plan, tmp_path / "cut")
    write_shards(tmp_path / "whole", checkpoint(model), 1)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "note.txt").write_text("mine")
    with pytest.raises(cpd.OutputError, match="new or empty"):
        cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    (tmp_path / "cut" / "note.txt").unlink()
    cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    assert (tmp_path / "cut" / "plan.json").is_file()


def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tower()
    plan = planned(model)
    write_shards(tmp_path / "whole", checkpoint(model), 2)
    done = []

    def failing(tensor: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
        done.append(name)
        if len(done) == 5:
            raise KeyboardInterrupt
        return cut_tensor(tensor, plan, name)

    monkeypatch.setattr("cpd.shards.cut_tensor", failing)
    with pytest.raises(KeyboardInterrupt):
        cut_shards(tmp_path / "whole", plan, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


# The peak that the system reports for a process includes its parent's at the start.
SMALL_PARENT = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
MEASURED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cpd.plan import Plan
from cpd.shards import cut_shards
from test_shards import Wide, read_all
folder = Path(sys.argv[1])
with torch.device("meta"):
    model = Wide()
plan = Plan.from_json((folder / "plan.json").read_text())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "shards":
    cut_shards(folder / "whole", plan, folder / "cut", model=model)
else:
    state = {k: v.clone() for k, v in read_all(folder / "whole").items()}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


class Wide(nn.Module):
    """Ten layers of 8 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 2048, bias=False) for _ in range(5))
        self.backs = nn.ModuleList(nn.Linear(2048, 1024, bias=False) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.layers, self.backs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


@pytest.mark.slow
def test_the_peak_of_memory_stays_below_one_shard(tmp_path: Path) -> None:
    model = Wide()
    groups = cpd.comb(model, torch.zeros(1, 1024))
    plan = cpd.choose(groups, cpd.importance.score("random", model, groups), "params=0.7")
    (tmp_path / "plan.json").write_text(plan.to_json())
    write_shards(tmp_path / "whole", model.state_dict(), 2)
    paths = [str(house.SOURCE.parent), str(Path(__file__).parent)]
    grown = {}
    for how in ("shards", "whole"):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                SMALL_PARENT,
                sys.executable,
                "-c",
                MEASURED,
                str(tmp_path),
                how,
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        grown[how] = int(done.stdout)
    layer = 8 * 2**20
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 2
    assert grown["shards"] < 5 * layer < grown["whole"], grown
