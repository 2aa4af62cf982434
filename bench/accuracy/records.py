"""Records: one line of JSON for each cell, kept in the repository."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cpd.files import write_text

from .cells import Cell, mark

DEFAULTS = {field.name: field.default for field in fields(Cell)}
Records = dict[str, dict[str, Any]]  # key of a cell -> what came of it


def read(path: Path) -> Records:
    """Return all records of a file that were made with the settings of today."""
    if not path.exists():
        return {}
    found: Records = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        settings = record.pop("settings")
        named = {name: record.pop(name) for name in DEFAULTS if name in record}
        cell = Cell(**named)
        if settings == mark(cell.network):
            found[cell.key] = record
    return found


def write(path: Path, cells: Iterable[Cell], found: Records) -> None:
    """Write the records in the order of the cells, so that changes of the file are small."""
    lines = []
    for cell in cells:
        if cell.key in found:
            named = {k: v for k, v in asdict(cell).items() if v != DEFAULTS[k]}
            line = {**named, "settings": mark(cell.network), **found[cell.key]}
            lines.append(json.dumps(line, separators=(",", ":"), ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def without(found: Records, pattern: str) -> Records:
    """Return the records but for those whose key matches a pattern."""
    return {key: value for key, value in found.items() if not fnmatchcase(key, pattern)}
