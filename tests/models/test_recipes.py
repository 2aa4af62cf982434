"""The paper's recipes: every key is known, every loss resolves, every point is a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import house
from cpd import losses, tasks
from cpd.cli.models import Source, named
from cpd.compress import CompressConfig
from cpd.distill.optim import try_out
from cpd.errors import InputError, UnknownName
from recipe import options_exist, teacher_of

RECIPES = sorted((house.ROOT / "recipes" / "paper").glob("*-*.yaml"))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def test_every_table_has_its_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert {name.partition("-")[0] for name in names} == {"table1", "table2", "table3", "table4"}
    outputs = [read(path)["output"] for path in RECIPES]
    assert len(set(outputs)) == len(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_run(path: Path) -> None:
    recipe = read(path)
    teacher = teacher_of(recipe.pop("teacher"))
    config = CompressConfig.of(**recipe, teacher=teacher)
    options_exist(config.data)
    resolved = losses.resolve(config.losses)
    task = tasks.resolve(config.task)
    assert config.bench.runs >= 1000
    assert recipe["weights"].endswith(".safetensors")
    assert task.primary == ("top1" if "classification" in recipe["task"] else "miou")
    with torch.device("meta"):
        model = Source(recipe["model"], recipe.get("model_args", {}))()
    for network in (model, teacher):
        if isinstance(network, torch.nn.Module):
            assert set(resolved.points) <= set(dict(network.named_modules()))
    for stage in (config.prune, config.recover):
        try_out(torch.nn.Linear(1, 1), stage.optimizer, stage.schedule)


def test_what_these_tests_find() -> None:
    with pytest.raises(UnknownName, match="did you mean 'size'"):
        options_exist({"ade20k": {"root": "nowhere", "sice": 512}})
    with pytest.raises(UnknownName, match="did you mean 'upernet_deit_b'"):
        teacher_of({"cpd:upernet_deit_bb": {"weights": "a.safetensors"}})
    with pytest.raises(InputError, match="num_clases"):
        teacher_of({"cpd:upernet_deit_b": {"weights": "a.safetensors", "num_clases": 150}})


def test_a_teacher_of_its_own_comes_with_its_weights(tmp_path: Path) -> None:
    options = {"num_classes": 3, "depths": [1, 1]}
    source = Source("cpd:seaformer_t", options)()
    save_file(source.state_dict(), tmp_path / "teacher.safetensors")
    options = {**options, "weights": str(tmp_path / "teacher.safetensors")}
    teacher = named("teacher", {"cpd:seaformer_t": options})
    first, second = source.state_dict(), teacher.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert options["weights"]
