"""The operators that the networks use: `tests/rules/census.csv`, added to by the rows."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import fx

from .runner import ROOT, Row

CENSUS = ROOT / "tests" / "rules" / "census.csv"


def operators(graph: fx.Graph) -> list[str]:
    """Return the names of the operators of a trace, sorted."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    return sorted(
        {str(t) if hasattr(t, "_schema") else str(getattr(t, "__name__", t)) for t in targets}
    )


def extended(text: str, rows: Iterable[Row]) -> str:
    """Return the census with the operators of rows that it has not met, in how many networks."""
    held = {r["op"]: int(r["networks"]) for r in csv.DictReader(text.splitlines())}
    found = Counter(op for row in rows for op in row.get("ops", ()))
    held.update({op: count for op, count in found.items() if op not in held})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("op", "networks"))
    writer.writerows(sorted(held.items(), key=lambda item: -item[1]))
    return out.getvalue()


def extend(rows: Iterable[Row], path: Path = CENSUS) -> Path:
    """Add to the census what rows have met; a rule for it is what the tests then ask for."""
    path.write_text(extended(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return path
