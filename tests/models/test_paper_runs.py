"""The paper's recipes run from file to report: official folders, small networks, two steps."""

from __future__ import annotations

import json
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
from cpd.cli.models import Source

pytestmark = pytest.mark.slow

NOISE = np.random.default_rng(0)
SIZE = 64
LENGTHS = {"batch_size": 2, "workers": 0, "epochs": 2, "steps": 2, "warmup": 1}
SMALL: dict[str, dict[str, Any]] = {
    "cpd:seaformer_l": {
        "stem": 8,
        "stages": [
            [[3, 1, 8, 1], [3, 2, 16, 2]],
            [[5, 2, 16, 2]],
            [[3, 2, 16, 2]],
            [[5, 2, 24, 2]],
            [[3, 2, 24, 2]],
        ],
        "depths": [1, 1, 1],
        "key_dims": [4, 4, 4],
        "heads": 2,
        "ratios": [2, 2, 2],
        "fused": [16, 16, 16],
    },
    "cpd:upernet_deit_s": {
        "image_size": SIZE,
        "taken": [0, 1, 2, 3],
        "channels": 32,
        "options": {"embed_dim": 48, "depth": 4, "num_heads": 3},
    },
    "timm:mobilenetv2_100": {},
    "timm:resnet50": {},
    "timm:resnext50_32x4d": {},
}
SMALL["cpd:upernet_deit_b"] = SMALL["cpd:upernet_deit_s"]


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def noise(high: int, wide: int) -> Any:
    return NOISE.integers(0, 256, (high, wide, 3))


def ade20k(root: Path) -> dict[str, Any]:
    """Validation images that are not square, and that patches do not fill."""
    for part, sides in {"training": [(80, 96)] * 3, "validation": [(64, 85), (91, 70)]}.items():
        for number, (high, wide) in enumerate(sides):
            save(root / "images" / part / f"{number}.jpg", noise(high, wide))
            labels = NOISE.integers(0, 151, (high, wide))
            save(root / "annotations" / part / f"{number}.png", labels)
    return {"root": str(root)}


def imagenet(root: Path) -> dict[str, Any]:
    for part, count in (("train", 2), ("val", 1)):
        for name in ("n01440764", "n01443537"):
            for number in range(count):
                save(root / part / name / f"{number}.jpg", noise(70, 90))
    return {"root": str(root), "resize": 72}


def trained(spec: str, args: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write weights of the small network; return the arguments that make it."""
    args = {**args, **SMALL[spec]}
    save_file(Source(spec, args)().state_dict(), path)
    return args


def ran(name: str, folder: Path, *, size: int = SIZE, **changes: Any) -> dict[str, Any]:
    """Run a recipe by the command and return its report; only sizes and lengths differ."""
    path = house.ROOT / "recipes" / "paper" / f"{name}.yaml"
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    ((shelf, options),) = recipe["data"].items()
    made = {"ade20k": ade20k, "imagenet": imagenet}[shelf](folder / "data")
    recipe["data"] = {shelf: {**options, **made, "size": size}}
    for stage in (recipe["prune"], recipe["recover"]):
        stage.update({key: value for key, value in LENGTHS.items() if key in stage})
    recipe |= {"interval": 1, "events": 1, "output": str(folder / "out"), **changes}
    recipe["bench"] = {"runs": 3, "warmup": 1, "threads": 1}
    recipe["weights"] = str(folder / "network.safetensors")
    args = trained(recipe["model"], recipe.get("model_args", {}), folder / "network.safetensors")
    recipe["model_args"] = args
    if isinstance(recipe["teacher"], dict):
        ((spec, options),) = recipe["teacher"].items()
        options.pop("weights")
        options = trained(spec, options, folder / "teacher.safetensors")
        options["weights"] = str(folder / "teacher.safetensors")
        recipe["teacher"] = {spec: options}
    written = folder / "recipe.yaml"
    written.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["compress", str(written)]) == 0
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    share = float(recipe["target"].removeprefix("macs="))
    assert report["after"]["macs"] <= share * report["before"]["macs"]
    assert "verified" in report["proof"]
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
    assert report["after"]["latency"]["runs"] == 3


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
    size = 2 * SIZE if name == "table4-af_dcd" else SIZE  # it compares patches of patches
    ran(name, tmp_path, size=size, onnx=False)
    steps = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    terms = {term for entry in steps for term in entry.get("terms", {})}
    named = {"table3-self": "cwd", "table3-sibling": "cwd", "table4-none": "task"}
    loss = named.get(name, name.partition("-")[2])
    assert any(term.startswith(loss) for term in terms), terms
