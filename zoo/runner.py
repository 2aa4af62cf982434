"""Run jobs in processes of their own with a time limit, and keep their rows.

They are kept in the repository: a run is an hour or two, more than some machines have at a time.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from cpd.files import write_text

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "coverage.jsonl"
PATIENCE = 6
REDO = ("failed", "short", "stale", "all")

Row = dict[str, Any]
_LOCK = Lock()
_BESIDE = {
    "adapters", "cli", "compress", "data", "distill", "losses",
    "models", "pruner", "report", "study", "tasks",
    "importance", "sensitivity.py", "steps.py", "repair.py", "refit.py", "readers.py", "views.py",
    "choose.py", "candidates.py", "strategies.py", "knapsack.py", "budgets.py", "limits.py",
    "timing.py", "table.py", "measure.py", "onecall.py", "_numbers.py",
}  # fmt: skip


def fingerprint() -> str:
    """Return a hash of the code that makes the rows: the core's, without comments and docstrings.

    What only trains, teaches, mends or reports is no part of it: no row goes through that. Nor is
    what decides which units go: here they are random ones, and any would have to do.
    """
    digest = hashlib.sha256()
    home = ROOT / "src" / "cpd"
    for path in sorted(home.rglob("*.py")):
        if path.relative_to(home).parts[0] not in _BESIDE:
            digest.update(without_words(path.read_text()).encode())
    return digest.hexdigest()[:12]


@cache
def without_words(source: str) -> str:
    """Return what a source does, whatever its comments, docstrings and line breaks are."""
    tree = ast.parse(source)
    bodies = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, bodies) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.unparse(tree)


def rows(output: Path) -> dict[tuple[str, str], Row]:
    """Return (job, name of the network) -> row, of a file with a line for each."""
    if not output.exists():
        return {}
    state = output.stat()
    return _parsed(output, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _parsed(output: Path, *_: int) -> dict[tuple[str, str], Row]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {(line.pop("job"), line["name"]): line for line in lines}


def read(output: Path, job: str, name: str) -> Row | None:
    """Return the row that is kept, or None."""
    return rows(output).get((job, name))


def status_of(row: Row) -> str:
    """Return the worst status of a row's modes: timeout, error, unsound, then sound."""
    if "ended" in row:
        return "timeout" if "seconds" in row["ended"] else "error"
    states = [mode.get("status", "error") for mode in row.get("modes", {}).values()] or ["error"]
    return next((s for s in ("error", "unsound") if s in states), "sound")


def reached(row: Row, mode: str = "kept") -> bool:
    """Whether a mode comes down to half of the MACs, in a network that is proved."""
    found = row.get("modes", {}).get(mode, {})
    return bool(found.get("reached") and found.get("proved"))


def wanted(row: Row | None, redo: str | None, job: str) -> bool:
    """Whether a network has to run (again)."""
    if row is None or redo == "all":
        return True
    failed = status_of(row) != "sound"
    if redo == "failed":
        return failed
    if redo == "short":
        return failed or (job == "prune" and not reached(row))
    return redo == "stale" and row.get("fingerprint") != fingerprint()


def run(job: str, name: str, limit: float, worker: str = "zoo.worker") -> Row:
    """Run one job of one network; its row, as far as it came within `limit` seconds.

    The seconds are of the processor where the system can count them, so that what else the machine
    does takes none; on the clock they may be `PATIENCE` times as many.
    """
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    code_of = fingerprint()
    with tempfile.TemporaryFile("w+") as answers, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", worker, job, name, str(math.ceil(limit))],
            stdout=answers,
            stderr=errors,
            env=environment,
            cwd=ROOT,
        )
        try:
            code = process.wait(limit * PATIENCE)
            late = sys.platform == "linux" and code == -signal.SIGXCPU
            ended = {"seconds": limit} if late else {"code": code} if code else None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = {"seconds": limit}
        answers.seek(0)
        row = _last(answers.read(), name)
        if ended is not None:
            errors.seek(0)
            row["ended"] = {**ended, "message": (errors.read().strip().splitlines() or [""])[-1]}
    return {**row, "fingerprint": code_of}


def _last(text: str, name: str) -> Row:
    for line in reversed(text.splitlines()):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue  # cut off in the middle
    return {"name": name, "stage": "start"}


def keep(output: Path, job: str, row: Row) -> None:
    """Write a row among the others, in one step."""
    with _LOCK:
        found = {**rows(output), (job, row["name"]): row}
        lines = [json.dumps({"job": key[0], **found[key]}) for key in sorted(found)]
        write_text(output, "".join(f"{line}\n" for line in lines))


def run_all(
    names: Iterable[str], job: str, output: Path, limit: float, workers: int = 1
) -> Iterator[Row]:
    """Run one job of many networks and keep each row as soon as it is there."""

    def one(name: str) -> Row:
        row = run(job, name, limit)
        keep(output, job, row)
        return row

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, names)


def summary(row: Row) -> str:
    """Return a row on one line."""
    text = f"{row['name']:<50} {status_of(row):<8}"
    for key, mode in row.get("modes", {}).items():
        share = f" {mode['macs']:.2f}" if "macs" in mode else ""
        error = f" {mode['error']:.0e}" if mode.get("error") is not None else ""
        message = f" [{mode['stage']}] {mode['message']}" if mode.get("message") else ""
        text += f" | {key}{share}{error}{message[:160]}"
    if "message" in row:
        text += f" | [{row['stage']}] {row['message'][:160]}"
    if "ended" in row:
        stages = [mode["stage"] for mode in row.get("modes", {}).values()]
        text += f" | ended {row['ended']} in {row.get('stage')} {stages}"
    return text
