"""The value a run ends with: measures, history, widths, configuration; prints itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpd.costs.latency import Latency
from cpd.errors import ArtefactError
from cpd.files import write_text
from cpd.plan import Width
from cpd.reading import bounded
from cpd.report.measures import HEAD, Measures, plain, rows
from cpd.report.pictures import STYLE, Picture, section
from cpd.stays import Frozen

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report"]

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """What a compression did.

    ``history`` holds one record for each event of the run, {"step": int, "phase": "base" | "prune"
    | "recover", "event": "step" | "prune" | "eval" | "checkpoint", …} with whatever numbers were
    taken (loss, lr, macs, params, metrics). ``widths`` are the channels of each group before and
    after, ``frozen`` the axes that could not go and why, ``proof`` the text of ``verify``,
    ``notes`` how far below its budgets the plan is, and why, ``pictures`` test samples, where the
    task can be shown.

    History, configuration and environment become plain JSON values here: tensors and numpy scalars
    numbers, non-finite numbers None, functions and paths their names. So a report read back from
    its JSON equals the one written.
    """

    before: Measures
    after: Measures
    history: list[dict[str, Any]] = field(default_factory=list)
    widths: tuple[Width, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    proof: str = ""
    title: str = "Compression"
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        for name in ("history", "config", "environment"):
            object.__setattr__(self, name, _jsonable(getattr(self, name)))
        for name in ("widths", "frozen", "notes", "pictures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __str__(self) -> str:
        lines = [row[:4] for row in rows(self.before, self.after)]
        text = f"{self.title}\n\n{plain(HEAD, lines)}\n"
        text += "".join(f"\n{note}\n" for note in self.notes)
        return f"{text}\n{self.proof.strip()}\n" if self.proof else text

    def table(self) -> Table:
        """The table of before, after and ratio for a terminal (needs rich)."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left")
        for index, name in enumerate(HEAD):
            table.add_column(Text(name), justify="right" if index else "left")
        styles = {True: "green", False: "yellow", None: ""}
        for row in rows(self.before, self.after):
            cells = [Text(cell) for cell in row[:3]]
            table.add_row(*cells, Text(row.ratio, style=styles[row.better]))
        return table

    def to_json(self) -> str:
        """JSON text; :meth:`from_json` reads it back to an equal report."""
        content = {
            "schema": SCHEMA,
            "title": self.title,
            "before": _jsonable(asdict(self.before)),
            "after": _jsonable(asdict(self.after)),
            "widths": [_jsonable(asdict(width)) for width in self.widths],
            "frozen": [_jsonable(asdict(frozen)) for frozen in self.frozen],
            "proof": self.proof,
            "notes": list(self.notes),
            "config": self.config,
            "environment": self.environment,
            "pictures": [_jsonable(asdict(picture)) for picture in self.pictures],
            "history": self.history,
        }
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report in ``text``.

        Raises:
            ArtefactError: it is no JSON, of another schema, lacks or has other entries, or is far
                larger than reports are.
        """
        try:
            content = json.loads(bounded(text))
            schema = content.pop("schema", None)
            if schema != SCHEMA:
                raise ArtefactError(
                    f"report: schema {schema!r}, but this version reads {SCHEMA}. Use the version "
                    "of cpd that wrote it."
                )
            before, after = (_measures(content.pop(name)) for name in ("before", "after"))
            widths = tuple(Width(**entry) for entry in content.pop("widths"))
            frozen = tuple(Frozen(**entry) for entry in content.pop("frozen"))
            pictures = tuple(Picture(**entry) for entry in content.pop("pictures", ()))
            return cls(before, after, widths=widths, frozen=frozen, pictures=pictures, **content)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                f"report: not written by this library, or damaged: {type(error).__name__}: "
                f"{error}. Copy it again, or write it again."
            ) from error

    def html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page with tables and plots (needs matplotlib); returns ``path``.

        Raises:
            OutputError: the file cannot be written.
        """
        from cpd.report import page, plots

        lines = [tuple(row[:4]) for row in rows(self.before, self.after)]
        widths = [(w.group, w.family, str(w.before), str(w.after)) for w in self.widths]
        frozen = [
            (f.tensor, str(f.axis), str(f.count), f.reason, f.place)
            for f in sorted(self.frozen, key=lambda item: item.of_kernel)
        ]
        before = {"macs": self.before.macs, "params": self.before.params}
        sections = [
            page.section("Before and after", page.table(HEAD, lines)),
            page.section("Budgets", page.text("\n".join(self.notes))),
            page.section("The run", plots.run(self.history, list(self.before.accuracy), before)),
            page.section("Widths", plots.widths(self.widths)),
            page.section("Width of each group", page.table(_WIDTH_HEAD, widths), folded=True),
            page.section("What stays, and why", page.table(_FROZEN_HEAD, frozen), folded=True),
            page.section("Proof", page.text(self.proof)),
            page.section("Configuration", page.text(_pretty(self.config)), folded=True),
            page.section("Environment", page.text(_pretty(self.environment)), folded=True),
        ]
        if self.pictures:
            sections.insert(1, page.section("Pictures", section(self.pictures)))
        return write_text(path, page.document(self.title, sections, style=STYLE))


_WIDTH_HEAD = ("group", "kind", "before", "after")
_FROZEN_HEAD = ("tensor", "axis", "indices", "reason", "demanded by")


def _measures(entry: dict[str, Any]) -> Measures:
    latency = entry.pop("latency", None)
    return Measures(latency=None if latency is None else Latency(**latency), **entry)


def _pretty(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) if value else ""


def _jsonable(value: Any) -> Any:
    """``value`` in what JSON has; anything else by its name."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(entry) for entry in value]
    if callable(getattr(value, "tolist", None)):  # tensors, arrays and their scalars
        return _jsonable(value.tolist())
    if value is None or isinstance(value, (bool, int, str, float)):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)
