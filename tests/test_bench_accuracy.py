"""The grid of accuracies: what decides a cell names it, records stay, the page says what is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("torch_pruning")

from bench.accuracy import records, work
from bench.accuracy.cells import FORMS, MAIN, SEEDS, SETTINGS, SHELF, TARGETS, Cell, grid, mark
from bench.accuracy.networks import INPUTS, NETWORKS
from bench.accuracy.page import write_page
from bench.accuracy.summary import mean


def test_no_cell_is_twice_in_the_grid_and_seed_0_comes_first() -> None:
    cells = grid()
    assert len({cell.key for cell in cells}) == len(cells)
    seeds = [cell.seed for cell in cells]
    assert seeds == sorted(seeds)
    assert set(seeds) == set(SEEDS)
    assert {cell.target for cell in cells if cell.tool != "base"} == set(TARGETS)


def test_the_comparison_has_every_importance_with_every_seed_and_target() -> None:
    """What `--more` adds are other forms, rankings and floors; nothing of Torch-Pruning's."""
    main = [cell for cell in grid() if not cell.more]
    wanted = {(n, s, t) for n in NETWORKS for s in SEEDS for t in TARGETS}
    for name in {*MAIN, *SHELF} - {*FORMS}:
        assert {(c.network, c.seed, c.target) for c in main if c.importance == name} >= wanted
    others = [cell for cell in grid() if cell.more]
    assert {cell.tool for cell in others} == {"cpd"}
    assert {cell.importance for cell in others} == {*FORMS, "fisher", "magnitude"}


def test_other_settings_are_other_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A record made with other settings is not read; those of one network leave the others'."""
    cells = [Cell("ViT", 0, "base"), Cell("ResNet", 0, "base")]
    path = tmp_path / "results.jsonl"
    records.write(path, cells, {cell.key: {"accuracy": 0.9} for cell in cells})
    assert set(records.read(path)) == {cell.key for cell in cells}
    before = mark("ResNet")
    monkeypatch.setitem(SETTINGS, "epochs", {**SETTINGS["epochs"], "ViT": 1})
    assert mark("ResNet") == before
    assert set(records.read(path)) == {cells[1].key}


def test_records_are_written_in_order_and_forgotten_by_pattern(tmp_path: Path) -> None:
    cells = grid()[:3]
    found = {cell.key: {"accuracy": k} for k, cell in enumerate(cells)}
    path = tmp_path / "results.jsonl"
    records.write(path, cells, dict(reversed(found.items())))
    assert list(records.read(path).items()) == list(found.items())
    left = records.without(found, f'*"network": "{cells[0].network}"*')
    assert len(left) == sum(cell.network != cells[0].network for cell in cells)


def test_means_say_how_many_seeds_they_are_of() -> None:
    cell = Cell("ViT", 0, "cpd", "fisher", 0.5)
    found: dict[str, dict[str, Any]] = {}
    assert str(mean(found, cell, "cut")) == "·"
    found[cell.key] = {"cut": 0.5}
    assert str(mean(found, cell, "cut")) == "50.0 (1)"
    for seed, value in ((1, 0.6), (2, 0.7)):
        found[replace(cell, seed=seed).key] = {"cut": value}
    assert str(mean(found, cell, "cut")) == "60.0 ± 10.0"
    found[cell.key] = {"error": "ValueError: no"}
    assert str(mean(found, cell, "cut")) == "exception"


def test_the_page_shows_what_has_not_been_run(tmp_path: Path) -> None:
    cells = grid()
    ours = next(c for c in cells if c.tool == "cpd" and c.repair)
    theirs = next(c for c in cells if c.tool == "torch-pruning" and c.target == ours.target)
    stages = ("cut", "recovered", "distilled")
    found = {ours.key: {"macs": 0.1, "time": 0.5, **dict.fromkeys(stages, 0.75)}}
    found[theirs.key] = {"macs": 0.1, "time": 0.5, **dict.fromkeys(stages, 0.25)}
    write_page(tmp_path, cells, found)
    text = (tmp_path / "results.md").read_text()
    assert f"2 of {len(cells)} cells have a record" in " ".join(text.split())
    assert f"| {ours.network} | · | · | · | · | · | · | +50.0 (1) | +50.0 (1) | +50.0 (1) |" in text
    assert "75.0 (1)" in text
    for axis in ("macs", "time"):
        assert (tmp_path / "results" / f"accuracy-{axis}.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_are_small_and_end_in_ten_classes(name: str) -> None:
    model = NETWORKS[name]().eval()
    with torch.no_grad():
        assert model(INPUTS).shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 120_000


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["cpd", "torch-pruning", "scratch"])
def test_a_cell_runs(tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(work, "BASES", tmp_path)
    monkeypatch.setattr(work, "_contexts", {})
    for name in ("epochs", "recovery_epochs"):
        monkeypatch.setitem(SETTINGS, name, {"": 1} if name == "epochs" else 1)
    cell = Cell("DenseNet", 0, tool, "magnitude", 0.25, "isomorphic", "oneshot")
    found = work.run(cell)
    assert "error" not in found
    assert 0.2 < found["macs"] < 0.3
    assert 0 <= found["recovered"] <= 1
