"""`python -m bench`: measure, print, write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from .networks import NETWORKS
from .table import page, table
from .worker import TOOLS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "timm", "numpy", "torch-pruning")


class Worker:
    """One tool on one network, in its own process."""

    def __init__(self, tool: str, network: str) -> None:
        paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", tool, network],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, what: str) -> dict[str, Any]:
        """Send one line, and return the answer to it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": f"ended with {self.process.wait()}"}

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def measure(network: str, repeats: int, step: Any) -> dict[str, Any]:
    """Return what both tools do with one network: a warm-up each, then rounds in turn."""
    workers = {tool: Worker(tool, network) for tool in TOOLS}
    results: dict[str, Any] = {}
    rounds: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
    for tool, worker in workers.items():
        results[tool] = worker.ask("warm_up")
        step()
    for number in range(repeats):
        for tool in TOOLS if number % 2 == 0 else reversed(TOOLS):
            if "error" not in results[tool]:
                answer = workers[tool].ask("round")
                if "error" in answer:
                    results[tool] |= answer
                else:
                    rounds[tool].append(answer)
            step()
    for tool, worker in workers.items():
        worker.close()
        done = rounds[tool]
        results[tool]["rounds"] = done
        results[tool]["seconds"] = {k: median(r[k] for r in done) for k in done[0]} if done else {}
    return {"network": network, **results, "ratios": _ratios(rounds)}


def _ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Torch-Pruning's pruner and step over CPD's steps, round by round: how many times faster."""
    with_trace, without = [], []
    for ours, theirs in zip(rounds["cpd"], rounds["torch_pruning"], strict=False):
        steps = ours["comb"] + ours["choose"] + ours["cut"]
        total = theirs["construct"] + theirs["step"]
        without.append(total / steps)
        with_trace.append(total / (steps + ours["trace"]))
    if not without:
        return {}
    return {"without_trace": median(without), "with_trace": median(with_trace)}


def machine() -> dict[str, str]:
    """Describe the machine without its name."""
    kind, memory = platform.machine(), ""
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        found = [x.partition(":")[2] for x in cpu.read_text().splitlines() if "model name" in x]
        kind = found[0].strip() if found else kind
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f"{total / 2**30:.0f} GiB"
    return {
        "processor": kind,
        "cores": str(os.cpu_count()),
        "memory": memory,
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Versions of all that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help="timm:NAME, torchvision:NAME or NAME of the ten",
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds after one warm-up")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "bench.json")
    parser.add_argument("--write-docs", action="store_true", help="write docs/bench.md as well")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give at least 1")
    short = {name.partition(":")[2]: name for name in NETWORKS}
    options.networks = [short.get(name, name) for name in options.networks or NETWORKS]
    wrong = [name for name in options.networks if ":" not in name]
    if wrong:
        parser.error(f"{wrong[0]} is none of {', '.join(short)}; or write timm:{wrong[0]}")
    return options


def main() -> None:
    """Measure all networks, print the table, write the files."""
    options = arguments()
    console = Console()
    steps = len(options.networks) * len(TOOLS) * (1 + options.repeats)
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=steps)
        for network in options.networks:
            progress.update(task, description=network.partition(":")[2])
            results.append(measure(network, options.repeats, lambda: progress.advance(task)))
    report = {
        "command": " ".join(["python -m bench", *_given()]),
        "date": date.today().isoformat(),
        "repeats": options.repeats,
        "machine": machine(),
        "versions": versions(),
        "networks": results,
    }
    wide = Console(width=max(console.width, 150)) if not console.is_terminal else console
    wide.print(table(report))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.write_docs:
        (ROOT / "docs" / "bench.md").write_text(page(report))


def _given() -> list[str]:
    """The options as typed, without where the result goes."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word.startswith("--output"):
            skip = word == "--output"
        else:
            words.append(word)
    return words


if __name__ == "__main__":
    main()
