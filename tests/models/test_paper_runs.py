"""The paper's recipes run from file to report: networks, images, losses and options as they are.

Only paths and lengths differ: tiny folders of the official layout, random weights, a step or two.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import house
from cpd.cli import main
from cpd.cli.flags import read
from cpd.cli.models import Source
from cpd.study import Study

# PyTorch says so of the recipes' eight data workers wherever there are fewer cores.
FEW_CORES = "ignore:This DataLoader will create 8 worker processes:UserWarning"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(FEW_CORES)]

PAPER = house.ROOT / "recipes" / "paper"
NOISE = np.random.default_rng(0)
LENGTHS = {"epochs": 1, "steps": 1, "warmup": 1, "evaluate_every": 1}
# All that may differ from the recipe as it is in the repository: where things are, and how long.
MAY_DIFFER = {
    *("data.imagenet.root", "data.ade20k.root", "weights", "output"),
    "teacher.cpd:upernet_deit_b.weights",
    *("interval", "events", "bench.runs", "bench.warmup"),
    *(f"{stage}.{key}" for stage in ("prune", "recover") for key in LENGTHS),
}


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def noise(high: int, wide: int) -> Any:
    return NOISE.integers(0, 256, (high, wide, 3))


def ade20k(root: Path) -> None:
    for part, sides in {"training": [(512, 683)] * 2, "validation": [(530, 512)]}.items():
        for number, (high, wide) in enumerate(sides):
            save(root / "images" / part / f"{number}.jpg", noise(high, wide))
            labels = NOISE.integers(0, 151, (high, wide))
            save(root / "annotations" / part / f"{number}.png", labels)


def imagenet(root: Path) -> None:
    for part, count in (("train", 2), ("val", 1)):
        for name in ("n01440764", "n01443537"):
            for number in range(count):
                save(root / part / name / f"{number}.jpg", noise(375, 500))


def untrained(spec: str, args: dict[str, Any], path: Path) -> str:
    """Write a file of weights in place of the trained ones."""
    save_file(Source(spec, args)().state_dict(), path)
    return str(path)


def leaves(recipe: Any, path: str = "") -> dict[str, Any]:
    """Return path of keys -> value."""
    if not isinstance(recipe, dict):
        return {path[1:]: recipe}
    return {k: v for key in recipe for k, v in leaves(recipe[key], f"{path}.{key}").items()}


def ran(name: str, folder: Path) -> dict[str, Any]:
    """Run a recipe by the command and return its report."""
    return ran_as(read(PAPER / f"{name}.yaml"), folder)


def ran_as(original: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run it with nothing but paths and lengths changed."""
    recipe = copy.deepcopy(dict(original))
    torch.manual_seed(0)
    ((shelf, options),) = recipe["data"].items()
    {"ade20k": ade20k, "imagenet": imagenet}[shelf](folder / "data")
    options["root"] = str(folder / "data")
    for stage in (recipe["prune"], recipe["recover"]):
        stage.update({key: value for key, value in LENGTHS.items() if key in stage})
    recipe |= {"interval": 1, "events": 2, "output": str(folder / "out")}
    recipe["bench"] |= {"runs": 3, "warmup": 1}
    recipe["weights"] = untrained(
        recipe["model"], recipe.get("model_args", {}), folder / "network.safetensors"
    )
    if isinstance(recipe["teacher"], dict):
        ((spec, args),) = recipe["teacher"].items()
        path = folder / "teacher.safetensors"
        args["weights"] = untrained(spec, {k: v for k, v in args.items() if k != "weights"}, path)
    before, now = leaves(dict(original)), leaves(recipe)
    assert {key for key in before | now if before.get(key) != now.get(key)} <= MAY_DIFFER
    written = folder / "recipe.yaml"
    written.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["compress", str(written)]) == 0
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    cost, _, share = recipe["target"].partition("=")
    assert report["after"][cost] <= float(share) * report["before"][cost]
    assert "verified" in report["proof"]
    assert report["after"]["latency"]["runs"] == 3
    return report


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet50", "resnext50"])
def test_a_classifier(name: str, tmp_path: Path) -> None:
    report = ran(f"table1-{name}", tmp_path)
    assert {"top1", "top5"} <= set(report["after"]["accuracy"])
    # of a grouped convolution whole groups go, and channels of each: neither comes in multiples
    widths = [x["after"] for x in report["widths"] if x.get("family") == "channels"]
    assert widths
    assert all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("name", ["table2-seaformer_l", "table2-upernet_deit_s"])
def test_a_segmenter(name: str, tmp_path: Path) -> None:
    report = ran(name, tmp_path)
    assert 0 <= report["after"]["accuracy"]["miou"] <= 1


@pytest.mark.parametrize(
    "name",
    [
        *("table3-self", "table3-sibling"),
        *(
            f"table4-{loss}"
            for loss in ("none", "kd", "cwd", "cirkd", "dist", "skd", "ifvd", "mgd")
        ),
        "table4-af_dcd",
    ],
)
def test_teachers_and_losses(name: str, tmp_path: Path) -> None:
    ran(name, tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    terms = {term for entry in steps for term in entry.get("terms", {})}
    named = {"table3-self": "cwd", "table3-sibling": "cwd", "table4-none": "task"}
    loss = named.get(name, name.partition("-")[2])
    assert any(term.startswith(loss) for term in terms), terms


@pytest.mark.parametrize(("network", "sparsity"), [("DeiT-S", "20 %"), ("DeiT-B", "80 %")])
def test_the_ends_of_figure_5(network: str, sparsity: str, tmp_path: Path) -> None:
    """By parameters; the larger network where most of them go."""
    study = Study.of(read(PAPER / "figure5.yaml"), lambda name: read(PAPER / name))
    place = {"network": network, "sparsity": sparsity}
    (cell,) = (cell for cell in study.cells() if cell.place == place)
    report = ran_as(cell.values, tmp_path)
    assert 0 <= report["after"]["accuracy"]["miou"] <= 1
    assert cell.values["target"] == f"params={1 - int(sparsity[:2]) / 100:.1g}"
