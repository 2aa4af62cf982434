"""A study's page: its table as Markdown, its numbers as JSON, its figures as SVG."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpd.files import write_text
from cpd.report import Measures
from cpd.study import figures
from cpd.study.grid import Study
from cpd.study.run import Outcome

__all__ = ["records", "table", "write"]

Record = dict[str, Any]


def write(study: Study, outcomes: Sequence[Outcome], folder: str | Path) -> list[Path]:
    """Write README.md, records.json and every figure; return their paths.

    Cells that have not been run are counted on the page and left out of means and figures.
    Figures need matplotlib.

    Raises OutputError where a file cannot be written.
    """
    place, found = Path(folder), records(study, outcomes)
    done = sum(outcome.report is not None for outcome in outcomes)
    lines = [f"# {study.title}", ""]
    lines += [study.about.strip(), ""] if study.about else []
    lines += [f"{done} of {len(outcomes)} runs are done.", "", table(study, found), ""]
    written = [write_text(place / "records.json", json.dumps(found, indent=1) + "\n")]
    for figure in study.figures:
        drawn = figures.drawn(study, found, figure)
        if drawn is None:
            lines += [f"{figure['name']}: nothing to draw yet.", ""]
            continue
        svg, said = drawn
        written.append(write_text(place / f"{figure['name']}.svg", svg))
        lines += [f"![{figure['name']}]({figure['name']}.svg)", "", *said, ""]
    written.append(write_text(place / "README.md", "\n".join(lines).rstrip() + "\n"))
    return written


def records(study: Study, outcomes: Iterable[Outcome]) -> list[Record]:
    """One flat record for each cell that has been run: its place and what was measured."""
    found = []
    for outcome in outcomes:
        report = outcome.report
        if report is None:
            continue
        sides = {"before": report.before, "after": report.after}
        numbers = {side: _numbers(measures) for side, measures in sides.items()}
        found.append({"place": dict(outcome.cell.place), **numbers})
    assert all(set(record["place"]) == set(study.axes) for record in found)
    return found


def _numbers(measures: Measures) -> Record:
    latency = measures.latency
    timed = {"latency_ms": latency.median_ms, "runs": latency.runs} if latency is not None else {}
    threads = {"threads": latency.threads} if latency is not None else {}
    counts = {"params": measures.params, "macs": measures.macs}
    return {**counts, **timed, **threads, "metrics": dict(measures.accuracy)}


def table(study: Study, found: Sequence[Record]) -> str:
    """Markdown: a line for each cell, or for all levels of the axis that is averaged over."""
    shown = [axis for axis in study.axes if axis != study.over]
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in found:
        groups.setdefault(tuple(record["place"][axis] for axis in shown), []).append(record)
    if not groups:
        return "Nothing has been run yet."
    judged = any(record["after"]["metrics"] for record in found)
    timed = any("latency_ms" in record["after"] for record in found)
    head = [*shown, *(["runs"] if study.over else []), "MACs", "parameters"]
    head += [f"{study.metric} before", "after", "points"] if judged else []
    head += ["less MACs", "latency", "timed runs", "faster", "of what MACs say"] if timed else []
    lines = [head, ["---"] * len(head)]
    for place, group in groups.items():
        line = [*place, *([str(len(group))] if study.over else [])]
        line += [_change(group, "macs"), _change(group, "params")]
        line += _judged(group, study.metric) if judged else []
        line += _timed(group) if timed else []
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _judged(group: Sequence[Record], metric: str) -> list[str]:
    pairs = [(r["before"]["metrics"].get(metric), r["after"]["metrics"].get(metric)) for r in group]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        return ["–"] * 3
    before, after = zip(*known, strict=True)
    gaps = [b - a for a, b in known]
    return [_spread(before), _spread(after), _spread(gaps, sign="+")]


def _timed(group: Sequence[Record]) -> list[str]:
    known = [record for record in group if "latency_ms" in record["after"]]
    if not known:
        return ["–"] * 5
    mean = statistics.fmean
    times = [mean(r[side]["latency_ms"] for r in known) for side in ("before", "after")]
    fewer = mean(r["before"]["macs"] / r["after"]["macs"] for r in known)
    faster = times[0] / times[1]
    runs = min(r["after"]["runs"] for r in known)
    shown = f"{times[0]:.4g} → {times[1]:.4g} ms"
    return [f"{fewer:.2f}×", shown, f"{runs}", f"{faster:.2f}×", f"{faster / fewer:.0%}"]


def _change(group: Sequence[Record], cost: str) -> str:
    before, after = (statistics.fmean(r[side][cost] for r in group) for side in ("before", "after"))
    return f"{_amount(before)} → {_amount(after)} ({after / before:.1%})"


def _amount(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample deviation in percent or points; the mean alone of one value."""
    mean = f"{statistics.fmean(values) * 100:{sign}.2f}".replace("-", "−")
    return f"{mean} ± {statistics.stdev(values) * 100:.2f}" if len(values) > 1 else mean
