"""Figures of a study: a metric against what was removed, and the best classes side by side."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cpd.study.grid import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["apart", "bars", "curves", "drawn", "knee"]

Record = Mapping[str, Any]
Curve = list[tuple[float, float, float]]  # removed, mean, deviation
Point = tuple[float, float, float | None]  # removed, metric, its change where that is known
_COSTS = {"macs": "MACs", "params": "parameters"}


def drawn(
    study: Study, found: Sequence[Record], figure: Mapping[str, Any]
) -> tuple[str, list[str]] | None:
    """The figure as SVG with what is to be said of it, or nothing where there is no data."""
    where = figure.get("where", {})
    records = [
        record
        for record in found
        if record["after"]["metrics"]
        and all(record["place"][axis] == str(level) for axis, level in where.items())
    ]
    if not records:
        return None
    series = figure.get("series")
    if figure["kind"] == "classes":
        named = bars(records, series, figure.get("count", 16))
        return _svg(_classes(named)), apart(named)
    cost = figure.get("against", "macs")
    lines = curves(records, series, study.metric, study.over, cost)
    said = []
    for name, curve in lines.items():
        at = knee([(x, y) for x, y, _ in curve])
        if at is not None:
            said.append(f"- {name}: the knee is at {at:.0%} of the {_COSTS[cost]} removed.")
    return _svg(_lines(lines, study.metric, _COSTS[cost])), said


def curves(
    records: Sequence[Record],
    series: str | None,
    metric: str,
    over: str | None = None,
    cost: str = "macs",
) -> dict[str, Curve]:
    """Line → points in order of the share removed of a ``cost``, each a mean over the levels of
    ``over``.

    The first point is the unpruned network, with nothing removed. The others lie as far from it as
    their runs, on average, from the networks that these began with: not all points need have the
    same ones (levels that have not run yet, networks trained on another machine).
    """
    found: dict[str, dict[tuple[str, ...], list[Point]]] = {}
    whole: set[tuple[str, str | None, float]] = set()
    for record in records:
        named = record["place"]
        places = found.setdefault(named[series] if series else metric, {})
        place = tuple(level for axis, level in named.items() if axis != over)
        removed = 1 - record["after"][cost] / record["before"][cost]
        before, after = (record[side]["metrics"].get(metric) for side in ("before", "after"))
        same = (named[series] if series else metric, named.get(over or ""), before)
        if before is not None and same not in whole:  # runs of one network count it once
            whole.add(same)
            places.setdefault((), []).append((0.0, before, 0.0))
        if after is not None:
            change = None if before is None else after - before
            places.setdefault(place, []).append((removed, after, change))
    return {name: _means(places) for name, places in found.items()}


def _means(places: Mapping[tuple[str, ...], Sequence[Point]]) -> Curve:
    points = []
    unpruned = [score for _, score, _ in places.get((), ())]
    for values in places.values():
        removed, scores, changes = zip(*values, strict=True)
        known = [change for change in changes if change is not None]
        paired = unpruned and len(known) == len(changes)
        level = statistics.fmean(unpruned) + statistics.fmean(known) if paired else None
        spread = statistics.stdev(scores) if len(set(scores)) > 1 else 0.0
        mean = statistics.fmean(scores) if level is None else level
        points.append((statistics.fmean(removed), mean, spread))
    return sorted(points)


def knee(points: Sequence[tuple[float, float]]) -> float | None:
    """Where a falling curve bends: the x farthest above the chord from its first to its last point.

    Both axes are scaled to [0, 1] first. Nothing for fewer than three points, or where no point
    lies above the chord. V. Satopää et al., "Finding a 'Kneedle' in a Haystack", ICDCSW 2011.
    """
    if len(points) < 3:
        return None
    ordered = sorted(points)
    (left, top), (right, bottom) = ordered[0], ordered[-1]
    high, low = max(y for _, y in ordered), min(y for _, y in ordered)
    if right == left or high == low:
        return None

    def above(x: float, y: float) -> float:
        chord = top + (bottom - top) * (x - left) / (right - left)
        return (y - chord) / (high - low)

    height, place = max((above(x, y), x) for x, y in ordered)
    return place if height > 1e-9 else None


def bars(records: Sequence[Record], series: str | None, count: int) -> dict[str, dict[str, float]]:
    """Series → class → mean intersection over union, for the classes best on average, best first.

    Classes are the metrics "iou_0", "iou_1", …; one that a series lacks is left out of it.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for record in records:
        name = record["place"][series] if series else ""
        for metric, value in record["after"]["metrics"].items():
            if metric.startswith("iou_") and value == value:  # a class that never occurs has none
                values.setdefault(metric, {}).setdefault(name, []).append(value)
    means = {
        metric: {name: statistics.fmean(each) for name, each in named.items()}
        for metric, named in values.items()
    }
    best = sorted(means, key=lambda metric: -statistics.fmean(means[metric].values()))[:count]
    names = {name: None for metric in best for name in means[metric]}
    return {
        name: {
            metric.removeprefix("iou_"): means[metric][name]
            for metric in best
            if name in means[metric]
        }
        for name in names
    }


def apart(named: Mapping[str, Mapping[str, float]]) -> list[str]:
    """How far the series lie apart on the classes of `bars`: on the better and the worse half."""
    classes = dict.fromkeys(each for values in named.values() for each in values)
    gaps = {}
    for each in classes:
        there = [values[each] for values in named.values() if each in values]
        if len(there) > 1:
            gaps[each] = 100 * (max(there) - min(there))
    if len(gaps) < 2:
        return []
    most = max(gaps, key=lambda each: gaps[each])
    halves = list(gaps.values())[: len(gaps) // 2], list(gaps.values())[len(gaps) // 2 :]
    better, worse = (f"{statistics.fmean(half):.1f}" for half in halves)
    return [
        f"- From the best to the worst of {', '.join(named)}: {better} points on average on the "
        f"better half of the classes, {worse} on the others; most on {most} ({gaps[most]:.1f})."
    ]


def _lines(lines: Mapping[str, Curve], metric: str, cost: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in lines.items():
        removed, values, spread = zip(*curve, strict=True)
        percent = [100 * x for x in removed]
        scaled = [[100 * y for y in each] for each in (values, spread)]
        bar = axes.errorbar(percent, scaled[0], scaled[1], marker="o", capsize=3, label=name)
        at = knee(list(zip(removed, values, strict=True)))
        if at is not None:
            axes.axvline(100 * at, color=bar[0].get_color(), linestyle=":", linewidth=1)
    axes.set_xlabel(f"{cost} removed, %; dotted: the knee")
    axes.set_ylabel(f"{metric}, %")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    return figure


def _classes(named: Mapping[str, Mapping[str, float]]) -> Figure:
    from matplotlib.figure import Figure

    classes = list(dict.fromkeys(each for values in named.values() for each in values))
    figure = Figure(figsize=(max(7, 0.7 * len(classes)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(named)
    for number, (name, values) in enumerate(named.items()):
        places = [place + width * (number - (len(named) - 1) / 2) for place in range(len(classes))]
        heights = [100 * values.get(each, 0.0) for each in classes]
        axes.bar(places, heights, width, label=name or None)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_xlabel("class, best on average first")
    axes.set_ylabel("intersection over union, %")
    axes.grid(axis="y", alpha=0.3)
    if len(named) > 1:
        axes.legend(fontsize=8, ncols=3)
    return figure


def _svg(figure: Figure) -> str:
    """The figure as a file of its own, the same each time."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
