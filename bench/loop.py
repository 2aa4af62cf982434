"""`python -m bench.loop`: a whole pruning run that cuts as it trains, against masks alone.

Both runs start from the same weights and see the same batches; they take turns, interval by
interval, so that whatever else the machine does hits both alike. Seconds are those of the
processor, on one thread. What an event itself costs is part of the run, and shown apart.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from cpd import Pruner
from cpd.data import digits

from .__main__ import ROOT, machine, versions

SIZE, BATCH = 16, 32
COLUMNS = ("interval", "MACs left", "masks", "cut", "masks: event", "cut: event", "masks / cut")
NOTES = """\
Seconds of the processor on one thread. An interval is so many steps of training (forward, backward,
scores, optimizer) and the event at its end (scores, plan; with cuts: the cut, the optimizer's
state, and tracing the smaller network again), which the columns "event" show apart. An event leads
to the share of MACs in the row after it; the last rows train on at the target. **masks / cut**: how
many times faster the run that cuts is."""


class Block(nn.Module):
    """x + two convolutions, with a wider space between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False))
        self.wide.extend([nn.BatchNorm2d(2 * width), nn.SiLU()])
        self.back = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1, bias=False))
        self.back.append(nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x + self.back(self.wide(x)))


def network(width: int) -> nn.Module:
    """Three residual blocks, smooth all through: what turns over at a threshold (ReLU, max pooling)
    makes rounding grow, and with it the last digits of scores decide.
    """
    stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
    blocks = [Block(width) for _ in range(3)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Run:
    """One run, an interval at a time."""

    def __init__(self, cut_every: int, given: argparse.Namespace) -> None:
        torch.manual_seed(given.seed)
        dtype = getattr(torch, given.dtype)
        self.model = network(given.width).train().to(dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=given.rate, momentum=0.9)
        self.interval = given.interval
        self.pruner = Pruner(
            self.model,
            torch.zeros(2, 1, SIZE, SIZE, dtype=dtype),
            importance=given.importance,
            target=given.target,
            interval=given.interval,
            events=given.events,
            cut_every=cut_every,
            multiple_of=8,  # widths that processors like
        )
        self.batches = batches(given.seed, dtype)
        inputs, _ = next(batches(given.seed, dtype))
        for _ in range(3):  # what the first steps of a process cost is not the run's
            copy.deepcopy(self.model)(inputs).sum().backward()

    def advance(self) -> dict[str, float]:
        """Train for an interval; return seconds in all and of the event at its end."""
        begun, event, left = process_time(), 0.0, self._left()
        for _ in range(self.interval):
            inputs, targets = next(self.batches)
            F.cross_entropy(self.model(inputs), targets).backward()
            before = process_time()
            if self.pruner.step(self.optimizer) is not None:
                event = process_time() - before
        return {"seconds": process_time() - begun, "event": event, "left": left}

    def _left(self) -> float:
        """Share of MACs that what has been decided leaves."""
        if self.pruner.plan is None:
            return 1.0
        before, after = self.pruner.plan.costs["macs"]
        return after / before

    def finish(self) -> float:
        """The small network, proved; seconds."""
        begun = process_time()
        self.pruner.finish()
        return process_time() - begun


def batches(seed: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Digits in an order of the seed, without end."""
    data = digits(size=SIZE).train
    inputs = torch.stack([data[k][0] for k in range(len(data))]).to(dtype)
    targets = torch.tensor([data[k][1] for k in range(len(data))])
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=generator)
        for rows in order.split(BATCH)[:-1]:
            yield inputs[rows], targets[rows]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Both runs, in turns."""
    runs = {"masks": Run(0, given), "cut": Run(1, given)}
    found: dict[str, Any] = {name: [] for name in runs}
    for number in range(given.events + given.after):
        for name in runs if number % 2 == 0 else reversed(runs):
            found[name].append(runs[name].advance())
    finish = {name: run.finish() for name, run in runs.items()}
    plans = [run.pruner.plan for run in runs.values()]
    totals = {
        name: sum(row["seconds"] for row in rows) + finish[name] for name, rows in found.items()
    }
    return {
        "rows": found,
        "finish": finish,
        "total": totals,
        "ratio": totals["masks"] / totals["cut"],
        "same_plan": plans[0].to_json() == plans[1].to_json(),  # type: ignore[union-attr]
        "left": runs["cut"]._left(),
    }


def lines(result: dict[str, Any]) -> list[list[str]]:
    """One list of texts for each interval, and the whole run."""
    made = []
    pairs = zip(result["rows"]["masks"], result["rows"]["cut"], strict=True)
    for number, (masks, cut) in enumerate(pairs, start=1):
        texts = [
            f"{x:.2f}" for x in (masks["seconds"], cut["seconds"], masks["event"], cut["event"])
        ]
        ratio = f"{masks['seconds'] / cut['seconds']:.2f}"
        made.append([str(number), f"{masks['left']:.1%}", *texts, ratio])
    finish, total = result["finish"], result["total"]
    made.append(
        ["finish, proved", "", f"{finish['masks']:.2f}", f"{finish['cut']:.2f}", "", "", ""]
    )
    whole = [f"{total['masks']:.1f}", f"{total['cut']:.1f}"]
    made.append(["whole run", f"{result['left']:.1%}", *whole, "", "", f"{result['ratio']:.2f}"])
    return made


def page(report: dict[str, Any]) -> str:
    """The page of the documentation."""
    result = report["result"]
    facts = {
        key: ", ".join(f"{k} {v}" for k, v in report[key].items())
        for key in ("machine", "versions")
    }
    same = "yes" if result["same_plan"] else "NO"
    return "\n".join(
        [
            "# Measured: cutting while training",
            "",
            f"Made by `{report['command']}` on {report['date']}; not written by hand.",
            "",
            f"Machine: {facts['machine']}. Versions: {facts['versions']}.",
            "",
            f"{report['about']} The whole run with masks takes **{result['ratio']:.2f} times** as "
            f"long as the one that cuts. The same final plan: **{same}**.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---|" + "---:|" * (len(COLUMNS) - 1),
            *("| " + " | ".join(row) + " |" for row in lines(result)),
            "",
            NOTES,
            "",
        ]
    )


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.loop", description=__doc__)
    parser.add_argument("--width", type=int, default=64, help="channels of the network's stem")
    parser.add_argument("--target", default="macs=0.3")
    parser.add_argument("--importance", default="hessian")
    parser.add_argument("--interval", type=int, default=24, help="steps between events")
    parser.add_argument("--events", type=int, default=7)
    parser.add_argument("--after", type=int, default=3, help="intervals after the last event")
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "bench-loop.json")
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/bench-loop.md as well"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    given = arguments()
    torch.set_num_threads(1)
    result = measure(given)
    steps = given.interval * (given.events + given.after)
    about = (
        f"Three residual blocks of {given.width} and {2 * given.width} channels on digits of "
        f"{SIZE}×{SIZE} in batches of {BATCH}, "
        f"importance {given.importance}, target {given.target}, widths of "
        f"multiples of 8, {given.events} events of "
        f"{given.interval} steps, {steps} steps in all, in {given.dtype}."
    )
    report = {
        "command": f"python -m bench.loop{' --write-docs' if given.write_docs else ''}",
        "date": date.today().isoformat(),
        "about": about,
        "machine": machine(),
        "versions": versions(),
        "result": result,
    }
    table = Table(*COLUMNS, title=about, title_justify="left")
    for row in lines(result):
        table.add_row(*row)
    Console().print(table)
    Console().print(f"the same final plan: {'yes' if result['same_plan'] else 'NO'}")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(report, indent=1) + "\n")
    if given.write_docs:
        (ROOT / "docs" / "bench-loop.md").write_text(page(report))


if __name__ == "__main__":
    main()
