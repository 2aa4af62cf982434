"""Plots: accuracy against MACs, and against measured time; one panel for each network."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cpd.files import write_text

from .cells import SEEDS, TARGETS, Cell
from .networks import NETWORKS
from .records import Records

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "results",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
SERIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "ours, fisher, knapsack, repaired",
        "tab:blue",
        {"tool": "cpd", "importance": "fisher", "strategy": "knapsack", "repair": True},
    ),
    ("ours, fisher", "tab:cyan", {"tool": "cpd", "importance": "fisher"}),
    ("ours, magnitude", "tab:green", {"tool": "cpd", "importance": "magnitude"}),
    ("TP, Taylor, isomorphic", "tab:red", {"importance": "taylor", "ranking": "isomorphic"}),
    ("TP, Taylor, local", "tab:orange", {"importance": "taylor", "ranking": "local"}),
    ("TP, magnitude, local", "tab:brown", {"importance": "magnitude", "ranking": "local"}),
    ("scratch", "tab:gray", {"tool": "scratch", "importance": "fisher", "strategy": "knapsack"}),
)


def write_plots(folder: Path, found: Records) -> list[str]:
    """Write the plots that there is data for; return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for axis, label in (("macs", "MACs left"), ("time", "time of a pass, share of the unpruned")):
        if any(axis in record and "recovered" in record for record in found.values()):
            write_text(folder / f"accuracy-{axis}.svg", _svg(found, axis, label))
            names.append(f"accuracy-{axis}.svg")
    return names


def _cell(network: str, target: float, options: dict[str, Any]) -> Cell:
    cell = Cell(network, 0, "torch-pruning", "", target)
    if options.get("tool") in ("cpd", "scratch"):
        cell = replace(cell, ranking="isomorphic", strategy="oneshot")
    return replace(cell, **options)


def _svg(found: Records, axis: str, label: str) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        panels = figure.subplots(2, 3, sharex=True).ravel()
        for axes, network in zip(panels, NETWORKS, strict=False):
            for name, color, options in SERIES:
                points = _points(found, lambda t, o=options, n=network: _cell(n, t, o), axis)
                if points:
                    axes.plot(
                        *zip(*points, strict=True), "o-", color=color, label=name, ms=3, lw=1.2
                    )
            base = [found.get(Cell(network, s, "base").key, {}).get("accuracy") for s in SEEDS]
            there = [100 * value for value in base if value is not None]
            if there:
                axes.axhline(fmean(there), color="black", lw=0.8, ls=":")
            axes.set_title(network, loc="left", fontsize=10)
            axes.set_xlabel(label)
        panels[0].set_ylabel("accuracy after recovery, %")
        panels[3].set_ylabel("accuracy after recovery, %")
        handles = {h.get_label(): h for axes in panels for h in axes.get_lines()}
        shown = {name: handles[name] for name, _, _ in SERIES if name in handles}
        panels[-1].axis("off")
        panels[-1].legend(shown.values(), shown.keys(), loc="center")
        stream = io.StringIO()
        figure.set_canvas(FigureCanvasSVG(figure))
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _points(
    found: Records, cell_of: Callable[[float], Cell], axis: str
) -> list[tuple[float, float]]:
    """Mean cost and accuracy of each target that has records."""
    points = []
    for target in TARGETS:
        records = [found.get(replace(cell_of(target), seed=s).key, {}) for s in SEEDS]
        there = [(r[axis], r["recovered"]) for r in records if "recovered" in r and axis in r]
        if there:
            points.append((fmean(x for x, _ in there), 100 * fmean(y for _, y in there)))
    return sorted(points)
