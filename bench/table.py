"""The results as a table on the screen and as a page of the documentation."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = (
    "network",
    "trace",
    "comb",
    "choose",
    "cut",
    "c+c+c",
    "verify",
    "MACs",
    "= masked",
    "TP graph",
    "TP prune",
    "TP MACs",
    "TP = masked",
    "× c+c+c",
    "× all",
)
NOTES = """\
Seconds on one thread, medians. **trace**: `torch.export`; **comb**: the rest of `cpd.comb`;
**choose**: random scores and `macs=0.5`; **cut**: without its proof; **c+c+c**: comb + choose +
cut; **verify**: the proof that `cpd.cut` makes by default. **TP graph**:
`DependencyGraph().build_dependency`; **TP prune**: `MetaPruner(...)` and `step()` with random
importance, which traces and builds its graph again. **MACs**: share left, counted by PyTorch's
own counter on the result. **= masked**: the result equals the original with everything removed at
zero (largest relative difference in float64; networks with norms across channels: statistics over
kept channels for CPD, not checked for Torch-Pruning). **× c+c+c**, **× all**: TP prune over CPD's
c+c+c, and over trace + c+c+c, median of the rounds' ratios; over 1 CPD is faster."""


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Return one list of texts for each network, as long as `COLUMNS`."""
    return [_row(result) for result in report["networks"]]


def _row(result: dict[str, Any]) -> list[str]:
    ours, theirs = result["cpd"], result["torch_pruning"]
    times, other, ratios = ours["seconds"], theirs["seconds"], result["ratios"]
    cells = [result["network"].partition(":")[2]]
    if times:
        cells += [f"{times[step]:.2f}" for step in ("trace", "comb", "choose", "cut")]
        cells += [f"{times['comb'] + times['choose'] + times['cut']:.2f}", f"{times['verify']:.2f}"]
    else:
        cells += ["–"] * 6
    cells += [_share(ours), _equal(ours)]
    cells += (
        [f"{other['build']:.2f}", f"{other['construct'] + other['step']:.2f}"]
        if other
        else ["–"] * 2
    )
    cells += [_share(theirs), _equal(theirs)]
    cells += [
        f"{ratios[key]:.1f}" if key in ratios else "–" for key in ("without_trace", "with_trace")
    ]
    return cells


def _share(result: dict[str, Any]) -> str:
    return f"{result['macs']:.0%}" if "macs" in result else "–"


def _equal(result: dict[str, Any]) -> str:
    if "error" in result:
        return "exception"
    if not result["runs"]:
        return "does not run"
    if result["equal"] is None:
        return "not checked"
    return f"{'yes' if result['equal'] else 'NO'} ({result['difference']:.0e})"


def failures(report: dict[str, Any]) -> list[str]:
    """Return what did not work, with the texts of the exceptions."""
    lines = []
    for result in report["networks"]:
        for tool in ("cpd", "torch_pruning"):
            text = result[tool].get("error") or result[tool].get("failure")
            if text:
                what = "raises" if "error" in result[tool] else "leaves a network that raises"
                lines.append(f"{tool} on {result['network']} {what}: {text}")
    return lines


def table(report: dict[str, Any]) -> Table:
    """Return the table for the screen."""
    made = Table(title="Seconds on one thread", title_justify="left")
    for column in COLUMNS:
        first = column == "network"
        made.add_column(column, justify="left" if first else "right", no_wrap=first)
    for row in rows(report):
        made.add_row(*row)
    notes = NOTES.replace("\n", " ")
    made.caption = "\n".join([notes.replace("**", "").replace("`", ""), *failures(report)])
    made.caption_justify = "left"
    return made


def page(report: dict[str, Any]) -> str:
    """Return the page of the documentation."""
    machine, versions = report["machine"], report["versions"]
    lines = [
        "# Measured: CPD beside Torch-Pruning",
        "",
        f"Made by `{report['command']}` on {report['date']}; not written by hand.",
        "",
        f"Machine: {_listed(machine)}. One thread, a process for each network and tool, "
        f"median of {report['repeats']} rounds after a warm-up, the tools in turn.",
        "",
        f"Versions: {_listed(versions)}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(report)),
        "",
        NOTES,
        "",
        *(f"- {line}" for line in failures(report)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _listed(facts: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value)
