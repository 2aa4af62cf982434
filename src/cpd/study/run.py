"""Verb: run what of a study has not been run yet, one cell after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from cpd import data as data_shelf
from cpd.compress import CompressConfig, compress, plain
from cpd.compress.run import built
from cpd.distill import distill, isolated, snapshot
from cpd.errors import InputError, UnknownName
from cpd.files import publish, save_file, staging, write_text
from cpd.report import Report, environment
from cpd.study.costs import costed
from cpd.study.grid import Cell, Study, laid, names_in

__all__ = ["Costs", "Outcome", "run"]

Settle = Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]
_OF_A_BASE = ("model", "model_args", "data", "task", "base", "seed")
_OF_COSTS = (
    "model",
    "model_args",
    "target",
    "ignore",
    "exact",
    "unknown",
    "keep_class",
    "depth",
    "bench",
)
_OF_TIMES = ("machine", "onnxruntime")
_OF_CHOICE = (
    "strategy",
    "ranking",
    "multiple_of",
    "measure",
    "min_keep",
    "limits",
    "keep",
    "uniform",
    "unreachable",
    "seed",
)


@dataclass(frozen=True)
class Costs:
    """How costs are measured.

    Attributes:
        seconds: the longest a pair of networks is timed; where that is too short for the runs that
            the recipe asks for they are fewer, and the report says how many. The next ``run`` adds
            to them.
        threads: of the runtime; nothing: as the recipe says.
    """

    seconds: float = 600.0
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A cell and what came of it: its report, or nothing where it has not been run."""

    cell: Cell
    report: Report | None


def run(
    study: Study,
    settle: Settle,
    *,
    minutes: float | None = None,
    only: Mapping[str, Any] | None = None,
    costs: Costs | None = None,
    told: Callable[[list[Outcome], str], None] | None = None,
    callbacks: tuple[Any, ...] = (),
) -> list[Outcome]:
    """Run every cell that has not been run; what is there already is read.

    A cell broken off goes on from its last checkpoint, as does the training of a base.

    Args:
        settle: turns keys of a recipe into a callable that makes the network, and keywords of
            ``compress``; called when a cell begins.
        minutes: no cell is begun after so many. only: axis → level; other cells are not begun.
        costs: measure parameters, MACs and latency alone, of networks with random weights that are
            cut by magnitude: no data, no training.
        told: called with all outcomes and the next cell's name before each, and at the end with "".

    Raises what ``compress`` raises, and UnknownName for an axis or a level that does not exist.
    """
    wanted = _levels(study, only or {})
    begun = monotonic()
    threads = None if costs is None else costs.threads
    changed = {} if threads is None else {"bench": {"threads": threads}}
    cells = [Cell(cell.place, laid(cell.values, changed)) for cell in study.cells()]
    found = [Outcome(cell, _done(study, cell, costs is not None)) for cell in cells]
    measured: set[Path] = set()
    for number, cell in enumerate(cells):
        late = minutes is not None and monotonic() - begun > 60 * minutes
        out = any(cell.place[axis] != level for axis, level in wanted.items())
        # Looked up again: an equal cell before it, or another process, may have run it since.
        report = _done(study, cell, costs is not None)
        found[number] = Outcome(cell, report)
        place = _place(study, cell, cost_only=costs is not None)
        more = costs is not None and place not in measured and _short(report)
        if (report is not None and not more) or late or out:
            continue
        measured.add(place)
        if told is not None:
            told(found, cell.name)
        if costs is not None:
            _costed(study, cell, settle, costs)
        else:
            _trained(study, cell, settle, callbacks)
        found[number] = Outcome(cell, _done(study, cell, costs is not None))
    if told is not None:
        told(found, "")
    return found


def _short(report: Report | None) -> bool:
    """Whether networks were timed here less often than the recipe asks for: there is more to do."""
    here = environment()
    if report is None or any(report.environment.get(key) != here[key] for key in _OF_TIMES):
        return False
    time, wanted = report.after.latency, report.config.get("bench", {}).get("runs", 0)
    return time is not None and time.runs < wanted


def _levels(study: Study, only: Mapping[str, Any]) -> dict[str, str]:
    """The axes that are held, as their levels are named."""
    for axis, level in only.items():
        if axis not in study.axes:
            raise UnknownName("axis", axis, study.axes)
        if str(level) not in study.axes[axis]:
            raise UnknownName(f"level of {axis}", str(level), study.axes[axis])
    return {axis: str(level) for axis, level in only.items()}


def _place(study: Study, cell: Cell, *, cost_only: bool) -> Path:
    if not cost_only:
        return study.folder / study.address(cell.values)
    values = dict(cell.values)
    if study.input_shape is not None:
        values["input_shape"] = study.input_shape
    address = study.address(values, *_OF_COSTS, *_OF_CHOICE, "input_shape")
    return study.folder / f"costs-{address}"


def _done(study: Study, cell: Cell, cost_only: bool) -> Report | None:
    place = _place(study, cell, cost_only=cost_only)
    kept = _kept(study, place)
    if (place / "report.json").is_file():
        report = Report.from_json((place / "report.json").read_text(encoding="utf-8"))
        text = replace(report, pictures=()).to_json()
        if kept is not None and not (kept.is_file() and kept.read_text(encoding="utf-8") == text):
            write_text(kept, text)
        return report
    found = kept is not None and kept.is_file()
    return Report.from_json(kept.read_text(encoding="utf-8")) if found and kept else None


def _kept(study: Study, place: Path) -> Path | None:
    return None if study.kept is None else Path(study.kept) / f"{place.name}.json"


def _without_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what costs do not depend on, above all weights and other teachers."""
    return {k: v for k, v in values.items() if k not in ("weights", "teacher", "losses", "output")}


def _costed(study: Study, cell: Cell, settle: Settle, costs: Costs) -> None:
    source, keywords = settle(_without_training(cell.values))
    config = CompressConfig.of(model=plain(source), **keywords)
    place = _place(study, cell, cost_only=True)
    kept = _kept(study, place)
    times = place / "times.json" if kept is None else kept.with_suffix(".times.json")
    report = costed(source, config, shape=study.input_shape, seconds=costs.seconds, kept=times)
    write_text(place / "report.json", report.to_json())


def _trained(study: Study, cell: Cell, settle: Settle, callbacks: tuple[Any, ...]) -> None:
    seed = cell.values.get("seed", 0)
    files = {
        name: str(_base(study, name, seed, settle, callbacks)) for name in names_in(cell.values)
    }
    values = _filled(dict(cell.values), files)
    folder = str(_place(study, cell, cost_only=False))
    source, keywords = settle({**values, "output": folder, "resume": True})
    compress(source, callbacks=callbacks, **keywords)


def _filled(value: Any, files: Mapping[str, str]) -> Any:
    """The recipe with the files of its bases in place of their names."""
    if isinstance(value, Mapping):
        return {key: _filled(item, files) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item, files) for item in value]
    named = isinstance(value, str) and value[:1] == "{" and value[1:-1] in files
    return files[value[1:-1]] if named else value


def _base(study: Study, name: str, seed: int, settle: Settle, callbacks: tuple[Any, ...]) -> Path:
    """The file with a base's weights; trained now if it is not there."""
    values = {**laid(study.recipe, study.bases[name]), "seed": seed}
    path = study.folder / "bases" / f"{name}-{study.address(values, *_OF_A_BASE)}.safetensors"
    if path.is_file():
        return path
    wanted = {key: values[key] for key in _OF_A_BASE if key in values}
    source, keywords = settle({**wanted, "target": "macs=1"})
    config = CompressConfig.of(**keywords)
    if config.base is None:
        raise InputError(f"the base {name!r} has no 'base': say how it is trained")
    with isolated(config.seed):
        network = built(source, config)
    named = isinstance(config.data, str | dict)
    trained = distill(
        network,
        data=data_shelf.resolve(config.data) if named else config.data,
        task=config.task,
        options=config.base,
        seed=config.seed,
        callbacks=callbacks,
        checkpoint=path.with_suffix(".checkpoint"),
        resume=True,
    )
    with staging(path.parent) as temporary:
        save_file(snapshot(trained.model), temporary / path.name)
        publish(temporary / path.name, path)
    for done in path.parent.glob(f"{path.stem}*.checkpoint"):  # it is never gone on with
        done.unlink()
    return path
