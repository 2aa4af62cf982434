"""Studies: every combination once, broken off and gone on with, means and figures by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import house
from cpd import costs, data
from cpd.cli import main
from cpd.cli.flags import checked, read
from cpd.cli.origins import settled
from cpd.compress import CompressConfig
from cpd.errors import InputError, UnknownName
from cpd.losses import resolve
from cpd.report import Measures, Report
from cpd.study import Costs, Outcome, Study, records, run, table, write
from cpd.study.figures import apart, bars, curves, knee
from recipe import options_exist, teacher_of

RECIPES = house.ROOT / "recipes"
PAPER = [*RECIPES.glob("paper/figure?.yaml"), *RECIPES.glob("paper/table?.yaml")]
SMALL = [path for kind in ("table", "figure") for path in RECIPES.glob(f"study/*{kind}*.yaml")]
STUDIES = sorted([*SMALL, *PAPER])


def small(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, 11, 1)
    )


def scenes() -> data.Data:
    return data.scenes(train=8, val=4, test=4)


STAGE = {"batch_size": 4, "optimizer": {"name": "SGD", "lr": 0.05}}
RECIPE = {
    "model": "test_study:small",
    "data": "test_study:scenes",
    "task": {"segmentation": {"per_class": True}},
    "losses": "cwd",
    "target": "macs=0.5",
    "interval": 1,
    "events": 1,
    "prune": STAGE,
    "recover": {**STAGE, "epochs": 1},
    "onnx": False,
}


def grid(folder: Path, **changes: Any) -> Study:
    axes = {
        "seed": {0: {"seed": 0}, 1: {"seed": 1}},
        "size": {"half": {}, "most": {"target": "macs=0.8", "recover": {"epochs": 0}}},
    }
    values = {"title": "T", "recipe": RECIPE, "axes": axes, "over": "seed", "output": str(folder)}
    return Study.of({**values, **changes}, lambda path: read(RECIPES / path))


def settle(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return settled(checked(values))


# the grid ----------------------------------------------------------------------------------------


def test_every_combination_is_a_cell(tmp_path: Path) -> None:
    cells = grid(tmp_path).cells()
    assert [cell.name for cell in cells] == [
        *("seed 0, size half", "seed 0, size most", "seed 1, size half", "seed 1, size most")
    ]
    assert cells[1].values["target"] == "macs=0.8"
    assert cells[0].values["target"] == "macs=0.5"
    assert cells[1].values["recover"] == {**STAGE, "epochs": 0}, "a stage is changed key by key"
    assert cells[2].values["seed"] == 1
    losses = {"loss": {"kd": {"losses": {"kd": {}}}}}
    assert grid(tmp_path, axes=losses, over=None).cells()[0].values["losses"] == {"kd": {}}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"axis": {}}, UnknownName, "key of a study"),
        ({"title": ""}, InputError, "title is missing"),
        ({"axes": {"a": [1]}}, InputError, "axis a must be a mapping"),
        ({"over": "seeds"}, UnknownName, "did you mean 'seed'"),
        ({"figures": [{"kind": "curve"}]}, InputError, "needs a name"),
        ({"figures": [{"name": "a", "kind": "pie"}]}, UnknownName, "kind of figure"),
        ({"figures": [{"name": "a", "kind": "curve", "of": 1}]}, UnknownName, "key of a figure"),
        ({"figures": [{"name": "a", "kind": "curve", "series": "x"}]}, UnknownName, "axis of a"),
        ({"axes": {"a": {"b": {"weights": "{bas}"}}}, "over": None}, UnknownName, "base"),
    ],
)
def test_what_a_study_refuses(tmp_path: Path, changes: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        grid(tmp_path, **changes)


# running -----------------------------------------------------------------------------------------


def test_cells_run_once_and_a_study_goes_on(tmp_path: Path) -> None:
    study, asked = grid(tmp_path), []

    def counting(values: dict[str, Any]) -> Any:
        asked.append(values["seed"])
        return settle(values)

    none = run(study, counting, minutes=-1.0)
    assert not asked
    assert [outcome.report for outcome in none] == [None] * 4
    first = grid(tmp_path, axes={**study.axes, "seed": {0: {"seed": 0}}})
    run(first, counting, only={"size": "half"})
    assert asked == [0]
    run(study, counting, only={"seed": 0})
    assert asked == [0, 0]
    with pytest.raises(UnknownName, match="level of seed"):
        run(study, counting, only={"seed": 7})
    with pytest.raises(UnknownName, match="axis"):
        run(study, counting, only={"seeds": 0})
    names: list[str] = []
    found = run(study, counting, told=lambda _, name: names.append(name))
    assert asked == [0, 0, 1, 1], "what another study has run in the same folder is not run again"
    assert names == ["seed 1, size half", "seed 1, size most", ""]
    again = run(study, counting)
    assert asked == [0, 0, 1, 1]
    assert [o.report for o in again] == [o.report for o in found]
    for outcome in found:
        assert outcome.report is not None
        left = outcome.report.after.macs / outcome.report.before.macs
        assert left <= float(outcome.cell.values["target"].removeprefix("macs="))
        assert outcome.report.config["seed"] == outcome.cell.values["seed"]


def test_reports_that_are_kept_outlive_their_runs(tmp_path: Path) -> None:
    """Without pictures, under the runs' addresses; what is there is not run again."""
    asked = []

    def counting(values: dict[str, Any]) -> Any:
        asked.append(values["seed"])
        return settle(values)

    study = grid(tmp_path, kept=str(tmp_path / "kept"))
    run(study, counting, only={"seed": 0})
    addresses = {study.address(cell.values) for cell in study.cells()}
    assert {path.stem for path in (tmp_path / "kept").iterdir()} < addresses
    shutil.rmtree(study.folder)
    found = run(study, counting, only={"seed": 0})
    assert asked == [0, 0]
    assert [outcome.report is not None for outcome in found] == [True, True, False, False]
    assert all(not outcome.report.pictures for outcome in found if outcome.report is not None)
    for path in (tmp_path / "kept").iterdir():  # run again, what is kept is what came out
        path.unlink()
    run(study, counting, only={"seed": 0})
    path = next((tmp_path / "kept").iterdir())
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"title": "', '"title": "old '), encoding="utf-8")
    run(study, counting, only={"seed": 0})
    assert path.read_text(encoding="utf-8") == text
    assert asked == [0, 0, 0, 0]


def test_a_cell_broken_off_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    study = grid(tmp_path, axes={"seed": {0: {"seed": 0}}})
    whole = run(grid(tmp_path / "whole", axes=study.axes), settle)[0].report

    class Stop:
        def on_event(self, name: str, details: Any) -> None:
            if name == "cut":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, settle, callbacks=(Stop(),))
    folder = study.folder / study.address(study.cells()[0].values)
    assert (folder / "checkpoints" / "last.safetensors").is_file()
    report = run(study, settle)[0].report
    assert report is not None
    assert report.after == whole.after


def test_bases_are_trained_once_for_each_seed(tmp_path: Path) -> None:
    recipe = {**RECIPE, "weights": "{base}"}
    bases = {"base": {"base": {**STAGE, "epochs": 1}}, "wide": {"model_args": {"width": 16}}}
    bases["wide"]["base"] = bases["base"]["base"]
    wide = {"test_study:small": {"width": 16, "weights": "{wide}"}}
    axes = {
        "seed": {0: {"seed": 0}, 1: {"seed": 1}},
        "teacher": {"self": {"teacher": "self"}, "wide": {"teacher": wide}},
    }
    study = grid(tmp_path, recipe=recipe, bases=bases, axes=axes)
    found = [outcome.report for outcome in run(study, settle)]
    files = sorted(path.name for path in (study.folder / "bases").glob("*.safetensors"))
    assert [name.partition("-")[0] for name in files] == ["base", "base", "wide", "wide"]
    before = [report.before.accuracy["pixel_accuracy"] for report in found if report is not None]
    assert before[0] == before[1], "one base for both"
    assert before[2] == before[3]
    assert before[0] != before[2]
    untrained = grid(tmp_path / "b", recipe=recipe, bases={"base": {"model": "test_study:small"}})
    with pytest.raises(InputError, match="the base 'base' has no 'base'"):
        run(untrained, settle)


def test_costs_alone(tmp_path: Path) -> None:
    recipe = {**RECIPE, "weights": "none.safetensors", "data": {"imagenet": {"root": "nowhere"}}}
    axes = {"size": {"half": {}, "most": {"target": "macs=0.8"}}}
    study = grid(tmp_path, recipe=recipe, axes=axes, over=None, input_shape=[3, 16, 16])
    found = run(study, settle, costs=Costs(seconds=0.0, threads=1))
    inputs = torch.randn(2, 3, 16, 16)
    for outcome, most in zip(found, (0.5, 0.8), strict=True):
        report = outcome.report
        assert report is not None
        assert report.before.macs == costs.macs(small(), inputs)
        assert report.before.params == costs.params(small())
        assert report.after.macs <= most * report.before.macs
        assert report.after.latency.runs == 10, "the fewest, as there is no time"
        assert report.after.latency.threads == 1
        assert report.title == f"test_study:small → {outcome.cell.values['target']}"
    shown = table(study, records(study, found))
    assert "timed runs" in shown
    assert "miou" not in shown
    assert not run(study, settle, minutes=-1.0)[0].report, "costs are no training"


def test_costs_are_timed_in_turns(tmp_path: Path, monkeypatch: Any) -> None:
    axes = {"size": {"half": {}, "again": {}}}
    recipe = {**RECIPE, "bench": {"runs": 1000}}
    options = {"recipe": recipe, "axes": axes, "over": None, "input_shape": [3, 16, 16]}
    study = grid(tmp_path, kept=str(tmp_path / "kept"), **options)

    def timed(seconds: float) -> dict[str, list[int]]:
        found = run(study, settle, costs=Costs(seconds=seconds, threads=1))
        (path,) = (tmp_path / "kept").glob("*.times.json")
        taken: dict[str, list[int]] = json.loads(path.read_text())["taken"]
        counts = [each.report.after.latency.runs for each in found if each.report is not None]
        assert counts == [len(taken["before"])] * 2 == [len(taken["after"])] * 2
        return taken

    few = timed(0.0)
    assert len(few["after"]) == 10
    all_of_them = timed(600.0)
    assert len(all_of_them["after"]) == 1000
    assert all(all_of_them[name][:10] == few[name] for name in few), "those taken before count"
    asked = counted(monkeypatch)
    assert timed(600.0) == all_of_them
    assert not asked, "nothing is left to be done"


def test_costs_of_another_machine_stay(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = {**RECIPE, "bench": {"runs": 1000}}
    options = {"recipe": recipe, "axes": {"size": {"half": {}}}, "over": None}
    study = grid(tmp_path, input_shape=[3, 16, 16], **options)
    run(study, settle, costs=Costs(seconds=0.0, threads=1))
    asked = counted(monkeypatch)
    here = run.__globals__["environment"]()
    monkeypatch.setitem(run.__globals__, "environment", lambda: {**here, "machine": "another"})
    run(study, settle, costs=Costs(seconds=0.0, threads=1))
    assert not asked
    monkeypatch.setitem(run.__globals__, "environment", lambda: here)
    run(study, settle, costs=Costs(seconds=0.0, threads=1))
    assert asked


def counted(monkeypatch: Any) -> list[str]:
    """The targets for which costs were measured; nothing is measured."""
    asked: list[str] = []

    def costed(source: Any, config: CompressConfig, **_: Any) -> Report:
        asked.append(config.target)
        return Report(Measures({}, 100, 1000), Measures({}, 50, 500))

    monkeypatch.setitem(run.__globals__, "costed", costed)
    return asked


def test_costs_of_equal_cells_are_measured_once(tmp_path: Path, monkeypatch: Any) -> None:
    asked = counted(monkeypatch)
    axes = {
        "loss": {name: {"losses": name} for name in ("kd", "cwd", "dist")},
        "size": {"half": {}, "most": {"target": "macs=0.8"}},
    }
    study = grid(tmp_path, axes=axes, over=None, input_shape=[3, 16, 16])
    found = run(study, settle, costs=Costs())
    assert asked == ["macs=0.5", "macs=0.8"]
    assert all(outcome.report is not None for outcome in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"measure": "eager"},
        {"keep": {"0": "all"}},
        {"uniform": True},
        {"strategy": "greedy"},
        {"input_shape": [3, 32, 32]},
    ],
)
def test_costs_of_another_cut_are_measured_anew(
    tmp_path: Path, monkeypatch: Any, changes: dict[str, Any]
) -> None:
    asked = counted(monkeypatch)
    axes = {"size": {"half": {}}}
    shape = changes.pop("input_shape", [3, 16, 16])
    for values, sides in (({}, [3, 16, 16]), ({}, [3, 16, 16]), (changes, shape)):
        study = grid(tmp_path, recipe={**RECIPE, **values}, axes=axes, over=None, input_shape=sides)
        run(study, settle, costs=Costs())
    assert len(asked) == 2


# the page ----------------------------------------------------------------------------------------


def outcome(study: Study, number: int, after: float, left: int, **classes: float) -> Outcome:
    before = Measures({"miou": 0.6}, 100, 1000)
    report = Report(before, Measures({"miou": after, **classes}, 50, left))
    return Outcome(study.cells()[number], report)


def test_table_by_hand(tmp_path: Path) -> None:
    study = grid(tmp_path)
    found = [outcome(study, 0, 0.50, 500), outcome(study, 1, 0.60, 800)]
    found += [outcome(study, 2, 0.54, 500), Outcome(study.cells()[3], None)]
    assert table(study, records(study, found)).splitlines() == [
        "| size | runs | MACs | parameters | miou before | after | points |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| half | 2 | 1 k → 500 (50.0%) | 100 → 50 (50.0%) | 60.00 ± 0.00 | 52.00 ± 2.83 "
        "| −8.00 ± 2.83 |",
        "| most | 1 | 1 k → 800 (80.0%) | 100 → 50 (50.0%) | 60.00 | 60.00 | +0.00 |",
    ]
    assert "Nothing" in table(study, [])


def test_curves_and_their_knee_by_hand(tmp_path: Path) -> None:
    study = grid(tmp_path)
    found = records(study, [outcome(study, 0, 0.50, 400), outcome(study, 2, 0.40, 600)])
    line = curves(found, None, "miou", "seed")["miou"]
    assert [(round(x, 6), round(y, 6)) for x, y, _ in line] == [(0, 0.6), (0.5, 0.45)]
    assert line[1][2] == pytest.approx(0.1 / 2**0.5)
    assert list(curves(found, "seed", "miou")) == ["0", "1"]
    removed = [1 - record["after"]["params"] / record["before"]["params"] for record in found]
    line = curves(found, None, "miou", "seed", "params")["miou"]
    assert [x for x, _, _ in line] == [0, pytest.approx(sum(removed) / 2)]


def test_the_unpruned_network_counts_once_for_each_seed(tmp_path: Path) -> None:
    study = grid(tmp_path)
    found = records(study, [outcome(study, k, 0.5, 500) for k in range(4)])
    for record in found:
        record["before"]["metrics"]["miou"] = {"0": 0.5, "1": 0.7}[record["place"]["seed"]]
    (_, mean, spread), *_ = curves(found, None, "miou", "seed")["miou"]
    assert (mean, spread) == (pytest.approx(0.6), pytest.approx(0.2 / 2**0.5))
    assert knee([(0, 1.0), (0.4, 0.9), (0.8, 0.2), (1, 0)]) == 0.4
    assert knee([(0, 1.0), (0.5, 0.5), (1, 0.0)]) is None, "a straight line has none"
    assert knee([(0, 1.0), (1, 0.0)]) is None
    assert knee([(0, 1.0), (0.5, 1.0), (1, 1.0)]) is None


def test_points_are_as_far_from_the_unpruned_network_as_from_their_own(tmp_path: Path) -> None:
    study = grid(tmp_path)
    found = records(study, [outcome(study, 0, 0.5, 400), outcome(study, 3, 0.5, 800)])
    for record, before in zip(found, (0.6, 0.8), strict=True):
        record["before"]["metrics"]["miou"] = before
    line = curves(found, None, "miou", "seed")["miou"]
    assert [round(y, 6) for _, y, _ in line] == [0.7, 0.4, 0.6]
    del found[0]["before"]["metrics"]["miou"]
    line = curves(found, None, "miou", "seed")["miou"]
    assert [round(y, 6) for _, y, _ in line] == [0.8, 0.5, 0.5], "what it was before is not known"


def test_best_classes_by_hand(tmp_path: Path) -> None:
    study = grid(tmp_path)
    classes = {"iou_0": 0.1, "iou_1": 0.5, "iou_2": float("nan")}
    found = [outcome(study, 0, 0.5, 500, **classes)]
    found += [outcome(study, 1, 0.5, 500, **{**classes, "iou_0": 0.9, "iou_1": 0.7})]
    shown = bars(records(study, found), "size", 2)
    assert shown == {"half": {"1": 0.5, "0": 0.1}, "most": {"1": 0.7, "0": 0.9}}
    assert list(shown["half"]) == ["1", "0"], "best on average first"
    assert bars(records(study, found), "size", 1) == {"half": {"1": 0.5}, "most": {"1": 0.7}}
    (said,) = apart(shown)
    assert "half, most: 20.0 points on average on the better half" in said
    assert "80.0 on the others; most on 0 (80.0)" in said
    assert apart({"half": shown["half"]}) == []


def test_the_page(tmp_path: Path) -> None:
    figures = [
        {"name": "curve", "kind": "curve"},
        {"name": "bars", "kind": "classes", "series": "size", "where": {"seed": 0}},
        {"name": "none", "kind": "classes", "where": {"seed": 1}},
    ]
    study = grid(tmp_path, figures=figures, about="What the paper says.")
    found = [outcome(study, 0, 0.55, 500, iou_0=0.5), outcome(study, 1, 0.3, 200, iou_0=0.4)]
    found += [Outcome(cell, None) for cell in study.cells()[2:]]
    write(study, found, tmp_path / "page")
    text = (tmp_path / "page" / "README.md").read_text(encoding="utf-8")
    assert "2 of 4 runs are done." in text
    assert "What the paper says." in text
    assert "- miou: the knee is at 50% of the MACs removed." in text
    assert "none: nothing to draw yet." in text
    for name in ("curve", "bars"):
        assert f"![{name}]({name}.svg)" in text
        root = ElementTree.parse(tmp_path / "page" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
    kept = json.loads((tmp_path / "page" / "records.json").read_text(encoding="utf-8"))
    assert kept == records(study, found)
    first = (tmp_path / "page" / "bars.svg").read_bytes()
    write(study, found, tmp_path / "page")
    assert first == (tmp_path / "page" / "bars.svg").read_bytes()


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    axes = {"size": {"half": {}}}
    values = {"title": "T", "recipe": RECIPE, "axes": axes, "output": str(tmp_path / "out")}
    (tmp_path / "study.yaml").write_text(json.dumps(values))
    words = ["--minutes", "-1", "--only.size", "half"]
    assert main(["study", str(tmp_path / "study.yaml"), *words]) == 0
    assert "0 of 1 runs are done" in capsys.readouterr().out
    assert main(["study", str(tmp_path / "study.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 runs are done" in shown
    assert "| half |" in shown
    assert (tmp_path / "out" / "README.md").is_file()
    assert main(["study", str(tmp_path / "nowhere.yaml")]) == 2


# the recipes -------------------------------------------------------------------------------------


def test_there_is_a_study_for_every_table_and_figure() -> None:
    names = [f"{path.parent.name}/{path.stem}" for path in STUDIES]
    assert names == [
        *("paper/figure5", "paper/table1", "paper/table2", "paper/table3", "paper/table4"),
        *("study/digits-figure5", "study/digits-table3", "study/digits-table4"),
        *("study/figure5", "study/table3", "study/table4-more", "study/table4"),
        *("study/upernet-figure5", "study/upernet-table4"),
    ]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_cell_of_a_recipe_can_run(path: Path) -> None:
    study = Study.of(read(path), lambda name: read(path.parent / name))
    for cell in study.cells():
        values = {**cell.values, "teacher": "self"}
        teacher = teacher_of(cell.values.get("teacher", "self"))
        source, keywords = settle(values)
        config = CompressConfig.of(**{**keywords, "teacher": teacher})
        if isinstance(cell.values["data"], str | dict):
            options_exist(cell.values["data"])
        with torch.device("meta"):
            modules = dict(source(**config.model_args).named_modules())
        assert set(resolve(config.losses).points) <= set(modules)
    addresses = {study.address(cell.values) for cell in study.cells()}
    assert len(addresses) == len(study.cells())


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("table4", "figure5", 6),
        ("digits-table4", "digits-figure5", 6),
        ("digits-table4", "digits-table3", 12),
    ],
)
def test_studies_share_runs(one: str, other: str, shared: int) -> None:
    found = {}
    for name in (one, other):
        path = RECIPES / "study" / f"{name}.yaml"
        study = Study.of(read(path), lambda name, path=path: read(path.parent / name))
        found[name] = {study.address(cell.values) for cell in study.cells()}
        assert study.folder == Path("out/study/runs")
    assert len(found[one] & found[other]) == shared
