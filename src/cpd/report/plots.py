"""Plots as inline SVG whose colours are the page's, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cpd.plan import Width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["run", "widths"]

# Stand-ins that no plot uses otherwise; in the finished SVG each becomes a colour of the page.
INK, SOFT, LINE, BEFORE, AFTER, ACCENT, THIRD = (f"#0102{index:02x}" for index in range(3, 10))
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    BEFORE: "--before",
    AFTER: "--after",
    ACCENT: "--accent",
    THIRD: "--third",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "legend.frameon": False,
}
_NAME_LENGTH = 44
_OF_A_CLASS = re.compile(r"_\d+$")
_SERIES = (AFTER, THIRD, ACCENT, SOFT)


def widths(entries: Sequence[Width]) -> str:
    """Channels of each group before (behind) and after (in front), one bar each; "" for none."""
    return _svg(widths_figure(entries), "widths") if entries else ""


def run(
    history: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    before: Mapping[str, float | None],
) -> str:
    """Metrics, loss and cost over the steps of a run, prunings marked; "" where nothing is drawn.

    ``metrics`` names the keys of ``history`` to draw, ``before`` has the costs that are 100 %.
    Metrics of single classes, "iou_0" to "iou_149", are left out: nobody could tell them apart.
    """
    figure = run_figure(history, metrics, before)
    return "" if figure is None else _svg(figure, "run")


def widths_figure(entries: Sequence[Width]) -> Figure:
    """The figure behind :func:`widths`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.2 * len(entries)), layout="constrained")
        axes = figure.subplots()
        places = range(len(entries))
        axes.barh(places, [entry.before for entry in entries], 0.78, color=BEFORE, label="before")
        axes.barh(places, [entry.after for entry in entries], 0.78, color=AFTER, label="after")
        for place, entry in zip(places, entries, strict=True):
            axes.annotate(
                f"{entry.before} → {entry.after}"
                if entry.after != entry.before
                else f"{entry.after}",
                (max(entry.before, entry.after), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=SOFT,
            )
        axes.set_yticks(places, [_label(entry) for entry in entries], fontsize=8.5)
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_ticks_position("top")
        axes.grid(axis="x", linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def run_figure(
    history: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    before: Mapping[str, float | None],
) -> Figure | None:
    """The figure behind :func:`run`; None where no record has a number to draw."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps = _steps(history)
    losses = {"loss": _series(history, steps, "loss")}
    overall = [name for name in metrics if not _OF_A_CLASS.search(name)]
    scores = {name: _series(history, steps, name) for name in overall}
    costs = {name: _relative(_series(history, steps, name), base) for name, base in before.items()}
    panels = [("accuracy", scores), ("loss", losses), ("cost, % of before", costs)]
    drawn = [(title, {k: v for k, v in named.items() if v[0]}) for title, named in panels]
    drawn = [(title, named) for title, named in drawn if named]
    if not drawn:
        return None
    prunings = [step for record, step in zip(history, steps, strict=True) if _is_pruning(record)]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.7 + 2.1 * len(drawn)), layout="constrained")
        for axes, (title, named) in zip(
            figure.subplots(len(drawn), sharex=True, squeeze=False)[:, 0], drawn, strict=True
        ):
            _draw(axes, title, named)
            _mark(axes, prunings)
            _shade(axes, history, steps)
        _name_phases(figure.axes[0], history, steps)
        figure.axes[-1].set_xlabel("step")
        if prunings:
            figure.text(1, 0, f"┆ {len(prunings)} prunings", ha="right", va="bottom", color=ACCENT)
    return figure


def _draw(axes: Axes, title: str, named: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for color, (name, (places, values)) in zip(_SERIES * len(named), named.items(), strict=False):
        few = len(places) <= 60  # single points can be told apart
        style = "steps-post" if title.startswith("cost") else "default"
        axes.plot(
            places,
            values,
            color=color,
            label=name,
            linewidth=1.4,
            marker="o" if few else "",
            markersize=3,
            drawstyle=style,
        )
    axes.set_title(title)
    axes.grid(axis="y", linewidth=0.5)
    if len(named) > 1:
        axes.legend(loc="best", fontsize=8.5)
    if title == "loss":
        _logarithmic(axes, [value for _, values in named.values() for value in values])


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where the values span more than a decade."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _mark(axes: Axes, prunings: Sequence[int]) -> None:
    """Ticks at the foot for all prunings; lines through the panel while they can be told apart."""
    transform = axes.get_xaxis_transform()
    axes.vlines(prunings, 0, 0.05, color=ACCENT, linewidth=0.8, transform=transform)
    if len(prunings) <= 40:  # more would hide the curves
        axes.vlines(
            prunings,
            0,
            1,
            color=ACCENT,
            linewidth=0.6,
            alpha=0.45,
            linestyle=":",
            transform=transform,
        )


def _shade(axes: Axes, history: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> None:
    for phase, start, end in _phases(history, steps):
        if phase == "prune":
            axes.axvspan(start, end, color=BEFORE, alpha=0.16, linewidth=0)


def _name_phases(axes: Axes, history: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> None:
    for phase, start, end in _phases(history, steps):
        axes.text(
            (start + end) / 2,
            1.02,
            phase,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=SOFT,
        )


def _phases(
    history: Sequence[Mapping[str, Any]], steps: Sequence[int]
) -> list[tuple[str, int, int]]:
    """(phase, first step, last step) of every stretch of one phase."""
    found: list[tuple[str, int, int]] = []
    for record, step in zip(history, steps, strict=True):
        phase = str(record.get("phase", ""))
        if found and found[-1][0] == phase:
            found[-1] = (phase, found[-1][1], step)
        else:
            found.append((phase, found[-1][2] if found else step, step))
    return found


def _steps(history: Sequence[Mapping[str, Any]]) -> list[int]:
    """The step of every record, going on where a phase counts from the start again."""
    steps: list[int] = []
    offset = 0
    for record in history:
        step = record.get("step")
        last = steps[-1] if steps else 0
        if not isinstance(step, int):
            steps.append(last)
            continue
        if step + offset < last:
            offset = last
        steps.append(step + offset)
    return steps


def _series(
    history: Sequence[Mapping[str, Any]], steps: Sequence[int], name: str
) -> tuple[list[int], list[float]]:
    pairs = [
        (step, float(record[name]))
        for record, step in zip(history, steps, strict=True)
        if isinstance(record.get(name), (int, float))
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _relative(
    series: tuple[list[int], list[float]], base: float | None
) -> tuple[list[int], list[float]]:
    return (series[0], [value / base * 100 for value in series[1]]) if base else ([], [])


def _is_pruning(record: Mapping[str, Any]) -> bool:
    return record.get("event") == "prune"


def _label(entry: Width) -> str:
    """The group's name from its end, which tells groups apart, and its kind if not channels."""
    name = entry.group
    name = name if len(name) <= _NAME_LENGTH else "…" + name[-_NAME_LENGTH:]
    return name if entry.family == "channels" else f"{name} · {entry.family}"


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an ``<svg>`` element; ``salt`` keeps its ids apart from other plots'."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure.set_canvas(FigureCanvasSVG(figure))
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    start, end = text.find("<metadata>"), text.find("</metadata>")
    if start >= 0:
        text = text[:start] + text[end + len("</metadata>") :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
