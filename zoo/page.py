"""docs/coverage.md and docs/coverage.csv, made of the rows."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from .census import extend
from .network import Network
from .registry import registry
from .runner import ROOT, Row, fingerprint, reached, read, status_of

DOCS = ROOT / "docs"
PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "smp": "segmentation-models-pytorch",
    "ultralytics": "ultralytics",
    "monai": "monai",
    "mmpretrain": "mmpretrain",
    "mmsegmentation": "mmsegmentation",
}
COLUMNS = (
    "network", "status", "MACs", "params", "exact MACs", "error", "exact error", "groups", "units",
    "nodes", "trace", "comb", "choose", "cut", "checks", "ONNX",
)  # fmt: skip
INTRO = """\
# Coverage

What `make zoo` found; not written by hand. Each network has random weights and statistics of
norms that keep its signals alive, two samples as inputs, and a process of its own with a time
limit. It is combed, brought to half of its MACs with random scores (`macs=0.5`, or what is
closest) and cut, in the default mode and with `exact=True`. **sound**: in both modes
`cpd.verify` proves the cut network (in float64 to 1e-9 where its operators have that; those proved
in another type are listed below with their limit), its first samples come out the same in a larger
batch, it trains one step with gradients, what is random or different in training still is, a
deep copy, a state dict and an artefact give the same outputs bit for bit, and names and flags are
as before. **unsound**: the proof fails (`cpd.cut` refuses to return such a network). **error**:
anything raises, or a further check fails.

**MACs**, **params**: share left. **error**: largest relative difference to the masked original.
**groups**: coupling groups. **units**: kinds of units with how many of all are left. **trace**,
**comb**, **choose**, **cut**: processor seconds on one thread in the default mode. **checks**: what
the network itself cannot do either is marked "as before".
**ONNX**: the cut network of the default mode (the exact one is not tried) in ONNX Runtime equals
it; "fixed batch" where an open one fails, "as before" where the uncut network cannot either.
Of torchvision one network of every family has images of its native size, the other depths and
widths of it small ones."""


def rows(output: Path) -> list[tuple[Network, Row | None, Row | None]]:
    """Return (network, row of the job "prune", row of the job "onnx") for the whole registry."""
    return [
        (network, read(output, "prune", name), read(output, "onnx", name))
        for name, network in registry().items()
    ]


EDGES = (1, 100, 200, 400, 800, 1600, 3200, 6400)
SLOW = 5


def write(output: Path, docs: Path = DOCS) -> list[Path]:
    """Write both files and add to the census of operators; return their paths."""
    found = rows(output)
    docs.mkdir(parents=True, exist_ok=True)
    paths = [docs / "coverage.md", docs / "coverage.csv"]
    paths[0].write_text(page(found), encoding="utf-8")
    paths[1].write_text(table(found), encoding="utf-8")
    return [*paths, *([extend(row for _, row, _ in found if row)] if docs == DOCS else [])]


def cells(network: Network, row: Row | None, onnx: Row | None) -> dict[str, str]:
    """Return one text for each of `COLUMNS`."""
    if row is None:
        return {"network": network.name, "status": "not run", "ONNX": in_onnx(onnx)}
    kept, exact = (row.get("modes", {}).get(key, {}) for key in ("kept", "exact"))
    seconds = kept.get("seconds", {})
    return {
        "network": network.name,
        "status": status_of(row),
        "MACs": _share(kept, "macs"),
        "params": _share(kept, "params"),
        "exact MACs": _share(exact, "macs"),
        "error": _small(kept),
        "exact error": _small(exact),
        "groups": str(kept.get("groups", "")),
        "units": ", ".join(
            f"{after}/{before} {kind}" for kind, (_, before, after) in kept.get("kinds", {}).items()
        ),
        "nodes": str(kept.get("nodes", "")),
        **{key: _seconds(seconds.get(key)) for key in ("trace", "comb", "choose", "cut")},
        "checks": _checked(kept),
        "ONNX": in_onnx(onnx),
    }


def _share(mode: dict[str, Any], key: str) -> str:
    return f"{mode[key]:.2f}" if key in mode else ""


def _small(mode: dict[str, Any]) -> str:
    text = f"{mode['error']:.0e}" if "error" in mode else ""
    return f"{text} ({loose(mode)})" if text and loose(mode) else text


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _checked(mode: dict[str, Any]) -> str:
    found = mode.get("checks", {})
    failed = [key for key, answer in found.items() if not answer.startswith(("ok", "as before"))]
    before = [key for key, answer in found.items() if answer.startswith("as before")]
    words = [*failed, *(f"{key} as before" for key in before)]
    return ", ".join(words) or ("ok" if found else "")


def in_onnx(row: Row | None) -> str:
    """Return what the export gave, in a word or two."""
    if row is None:
        return ""
    if status_of(row) != "sound":
        return "timeout" if status_of(row) == "timeout" else "fails"
    answer = str(row["modes"]["kept"]["message"])
    return "as before" if answer.startswith("as before") else answer


def table(found: Iterable[tuple[Network, Row | None, Row | None]]) -> str:
    """Return the CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, "note", "not reached"], lineterminator="\n")
    writer.writeheader()
    for network, row, onnx in found:
        note = network.part or network.note
        writer.writerow(
            {**cells(network, row, onnx), "note": note, "not reached": "; ".join(why(row, onnx))}
        )
    return text.getvalue()


def page(found: list[tuple[Network, Row | None, Row | None]]) -> str:
    """Return the page of the documentation."""
    libraries = dict.fromkeys(network.library for network, *_ in found)
    by_library = {name: [x for x in found if x[0].library == name] for name in libraries}
    lines = [INTRO, "", f"Versions: {_versions(libraries)}.", *_stale(found), ""]
    lines += _summary(by_library)
    lines += ["", *_onnx(found), *_other_types(found)]
    lines += ["", "## Attentions", "", *_attentions(found)]
    lines += ["", "## Speed", "", *_speed(found)]
    lines += ["", "## What is not reached", "", *_not_reached(found)]
    for name, part in by_library.items():
        lines += ["", f"## {name}", "", *_section(part)]
    return "\n".join(lines).rstrip() + "\n"


def _versions(libraries: Iterable[str]) -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "onnxruntime", *(PACKAGES.get(name, name) for name in libraries)):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def _stale(found: list[tuple[Network, Row | None, Row | None]]) -> list[str]:
    """Say which rows the code as it is now did not make."""
    made = [row for _, row, _ in found if row]
    old = sum(row.get("fingerprint") != fingerprint() for row in made)
    if not old:
        return []
    text = f"{old} of {len(made)} rows were made by the code as it was earlier"
    return ["", f"{text}; `python -m zoo --redo stale` renews them."]


def _summary(by_library: dict[str, list[tuple[Network, Row | None, Row | None]]]) -> list[str]:
    lines = [
        "| library | networks | run | sound | unsound | error | MACs ≤ 0.5 | exact ≤ 0.5 | ONNX |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    total = [0] * 8
    for name, part in by_library.items():
        states = [status_of(row) for _, row, _ in part if row]
        numbers = [
            len(part),
            len(states),
            states.count("sound"),
            states.count("unsound"),
            len(states) - states.count("sound") - states.count("unsound"),
            sum(reached(row) for _, row, _ in part if row),
            sum(reached(row, "exact") for _, row, _ in part if row),
            sum(in_onnx(onnx).startswith(("ok", "as before")) for *_, onnx in part),
        ]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
    return [*lines, "| all | " + " | ".join(map(str, total)) + " |"]


TIGHT = 1e-9  # float64


def _onnx(found: list[tuple[Network, Row | None, Row | None]]) -> list[str]:
    """Count the ways in which an export counts as good."""
    words = [in_onnx(onnx) for *_, onnx in found if onnx is not None]
    fixed, before = words.count("ok, fixed batch"), words.count("as before")
    return [
        f"ONNX: {len(words)} tried, {words.count('ok')} equal with an open batch, {fixed} with a "
        f"fixed batch only; {before} as before (the uncut network cannot either)."
    ]


def loose(mode: dict[str, Any]) -> str:
    """Return the limit of a proof that is not the one of float64, or ""; old rows tell none."""
    if "limit" in mode:
        return "" if mode["limit"] <= TIGHT else f"limit {mode['limit']:.0e}"
    return "limit not kept" if mode.get("proved") and mode.get("error", 0) > TIGHT else ""


def _other_types(found: list[tuple[Network, Row | None, Row | None]]) -> list[str]:
    """Name the networks that are proved, but not in float64."""
    told = []
    for network, row, _ in found:
        words = [loose(mode) for mode in (row or {}).get("modes", {}).values()]
        told += [f"{network.name} ({word})" for word in dict.fromkeys(filter(None, words))]
    return [
        "",
        f"Not proved in float64, which an operator of theirs lacks: {', '.join(told) or 'none'}.",
    ]


def _attentions(found: list[tuple[Network, Row | None, Row | None]]) -> list[str]:
    """Say how many attentions may lose heads and head dims, and why others may not."""
    lines, total, known = [], [0, 0, 0], 0
    for network, row, _ in found:
        mode = (row or {}).get("modes", {}).get("kept", {})
        if "heads" not in mode or not mode["attentions"]:
            continue  # no attention, or a row of an earlier time
        known += 1
        numbers = [mode[key] for key in ("attentions", "heads", "head_dims")]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        for kind, path, reason, count in mode["whole"]:
            where = f"{path} and {count - 1} more" if count > 1 else path
            text = f"- **{network.name}**: no {kind} in {where}: {reason}"
            lines.append(text.replace("|", "/"))
    counted = (
        f"Of {total[0]} attentions in {known} networks (PyTorch's fused ones, and products of two "
        f"activations before a softmax), {total[1]} may lose heads and {total[2]} head dims (of "
        "query and key, or of value) in the default mode."
    )
    return [counted, *([""] if lines else []), *lines]


def why(row: Row | None, onnx: Row | None) -> list[str]:
    """Return what a network does not reach, with reasons; empty where it reaches everything."""
    if row is None:
        return ["not run"]
    lines = []
    if "ended" in row:
        lines.append(_ended(row))
    if "message" in row:
        lines.append(f"{row['stage']}: {row['message']}")
    for key, mode in row.get("modes", {}).items():
        if mode.get("status") not in (None, "sound"):
            lines.append(f"{key}, {mode['stage']}: {mode.get('message', '')}")
    if status_of(row) == "sound" and not reached(row):
        kept = row["modes"]["kept"]
        held = [f"{reason} ({size:,} parameters)" for reason, size in kept["frozen"]]
        lines.append(f"MACs at {kept['macs']:.2f}; what stays: " + "; ".join(held))
    if onnx is not None and status_of(onnx) != "sound":
        mode = onnx.get("modes", {}).get("kept", {})
        lines.append(f"ONNX: {mode.get('message') or onnx.get('message') or _ended(onnx)}")
    return [" ".join(line.replace(str(ROOT), "").replace("|", "/").split()) for line in lines]


def _ended(row: Row) -> str:
    if "seconds" in row["ended"]:
        stages = [mode["stage"] for mode in row.get("modes", {}).values()] or [row.get("stage", "")]
        return f"over {row['ended']['seconds']:g} s, in {', '.join(stages)}"
    return f"the process ended with {row['ended']['code']}"


def _speed(found: list[tuple[Network, Row | None, Row | None]]) -> list[str]:
    """Return a table of nodes against processor seconds of comb, choose and cut, without trace."""
    measured = []
    for network, row, _ in found:
        mode = (row or {}).get("modes", {}).get("kept", {})
        seconds = [mode.get("seconds", {}).get(key) for key in ("comb", "choose", "cut")]
        if mode.get("nodes") and None not in seconds:
            measured.append((mode["nodes"], sum(seconds), network.name))
    lines = [
        "Processor seconds of comb, choose and cut, without the trace; other jobs ran beside them.",
        "",
        "| nodes | networks | median | most | median per 1000 nodes |",
        "|---|---:|---:|---:|---:|",
    ]
    for low, high in pairwise(EDGES):
        part = [(n, t) for n, t, _ in measured if low <= n < high]
        if part:
            times = [t for _, t in part]
            per = median(1000 * t / n for n, t in part)
            numbers = f"{len(part)} | {median(times):.2f} | {max(times):.2f} | {per:.2f}"
            lines.append(f"| {low} to {high - 1} | {numbers} |")
    slow = sorted(((t, name) for _, t, name in measured if t > SLOW), reverse=True)
    named = ", ".join(f"{name} {t:.1f}" for t, name in slow) or "none"
    return [*lines, "", f"Over {SLOW} s: {named}."]


def _not_reached(found: list[tuple[Network, Row | None, Row | None]]) -> list[str]:
    lines = [
        f"- **{network.name}**: {line}"
        for network, row, onnx in found
        for line in (why(row, onnx) if row is not None else [])
    ]
    missing = [network.name for network, row, _ in found if row is None]
    if missing:
        lines.append(f"- not run yet: {', '.join(missing)}")
    parts = [network for network, *_ in found if network.part]
    lines += [f"- **{network.name}** is a part: {network.part}" for network in parts]
    return lines or ["Nothing."]


def _section(part: list[tuple[Network, Row | None, Row | None]]) -> list[str]:
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---" + "|---:" * 5 + "|---:|---" + "|---:" * 5,
    ]
    lines[-1] += "|---|---|"
    for network, row, onnx in part:
        found = cells(network, row, onnx)
        found["network"] = network.name.partition(":")[2]
        lines.append("| " + " | ".join(found.get(column, "") for column in COLUMNS) + " |")
    return lines
