"""What is measured on one network, and the table that sets two of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cpd.costs.latency import Latency

__all__ = ["Measures", "Row", "plain", "rows"]

HEAD = ("", "before", "after", "after / before")


@dataclass(frozen=True)
class Measures:
    """Quality and cost of one network.

    ``accuracy`` maps names of metrics to values, shares as 0…1; ``params`` and ``macs`` are counts,
    MACs for one sample; ``memory`` is the peak in bytes at the traced batch, ``onnx_bytes`` the
    size of the exported file; None is not measured.
    """

    accuracy: Mapping[str, float] = field(default_factory=dict)
    params: int | None = None
    macs: int | None = None
    onnx_bytes: int | None = None
    latency: Latency | None = None
    memory: int | None = None


class Row(NamedTuple):
    """One line of the table, ready to be shown; ``better`` is None where nothing is to compare."""

    name: str
    before: str
    after: str
    ratio: str
    better: bool | None


def rows(before: Measures, after: Measures) -> list[Row]:
    """Accuracy, parameters, MACs, memory, ONNX size and latency; what neither has is left out."""
    names = [*before.accuracy, *(name for name in after.accuracy if name not in before.accuracy)]
    lines = [_quality(name, before.accuracy.get(name), after.accuracy.get(name)) for name in names]
    pairs: list[tuple[str, float | None, float | None, str]] = [
        ("parameters", before.params, after.params, ""),
        ("MACs", before.macs, after.macs, ""),
        ("memory", before.memory, after.memory, "B"),
        ("ONNX file", before.onnx_bytes, after.onnx_bytes, "B"),
    ]
    one, two = before.latency, after.latency
    for name, key in (("median", "median_ms"), ("p90", "p90_ms"), ("p99", "p99_ms")):
        times = [None if value is None else getattr(value, key) for value in (one, two)]
        pairs.append((f"latency {name}", times[0], times[1], "ms"))
    lines += [_cost(*pair) for pair in pairs if pair[1] is not None or pair[2] is not None]
    return lines


def plain(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """A table in plain text: the first column to the left, all others to the right."""
    cells = [head, *lines]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    text = []
    for line in cells:
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *rest]).rstrip())
    text.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(text)


def _quality(name: str, before: float | None, after: float | None) -> Row:
    shares = all(value is None or 0 <= value <= 1 for value in (before, after))
    show = _share if shares else _number
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return Row(name, show(before), show(after), "–", None)
    gap = (after - before) * (100 if shares else 1)
    change = f"({gap:+.2f} points)" if shares else f"({gap:+.4g})"
    ratio = f"{after / before:.1%} " if before else ""
    return Row(
        name,
        show(before),
        show(after),
        (ratio + change).replace("-", "−").replace("%", " %"),
        gap >= 0,
    )


def _cost(name: str, before: float | None, after: float | None, unit: str) -> Row:
    one, two = _amount(before, unit), _amount(after, unit)
    if not before or not after:
        return Row(name, one, two, "–", None)
    factor = before / after
    change = f"{factor:.2f}× less" if factor >= 1 else f"{1 / factor:.2f}× more"
    return Row(name, one, two, f"{after / before * 100:.1f} % ({change})", after <= before)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.2f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _amount(value: float | None, unit: str) -> str:
    """A count with k, M or G, bytes with kB, MB or GB, or milliseconds."""
    if value is None:
        return "–"
    if unit == "ms":
        return f"{value:.3f} ms"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()
