"""`python -m bench.accuracy`: run what has no record yet; make the page of all records."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "docs" / "results.jsonl"

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TIMM_FUSED_ATTN"] = "0"  # Torch-Pruning needs it; for both tools alike

from . import records, work  # noqa: E402
from .cells import Cell, grid  # noqa: E402
from .page import write_page  # noqa: E402


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cells whose key matches")
    parser.add_argument("--again", metavar="PATTERN", help="forget the records that match, first")
    parser.add_argument("--more", action="store_true", help="also what is beside the comparison")
    parser.add_argument("--page", action="store_true", help="only make the page")
    return parser.parse_args()


def main() -> None:
    """Run, record, and write the page; Ctrl-C ends the run, not the page."""
    options = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    cells = grid()
    found = records.read(RECORDS)
    if options.again:
        found = records.without(found, options.again)
        records.write(RECORDS, cells, found)
    if not options.page:
        meant = (c for c in cells if (options.more or not c.more) and c.key not in found)
        wanted = [c for c in meant if fnmatchcase(c.key, options.only)]
        try:
            _run(wanted, cells, found, options)
        except KeyboardInterrupt:
            print("stopped; what is recorded stays", file=sys.stderr)
    write_page(ROOT / "docs", cells, found)


def _run(wanted: list[Cell], cells: list[Cell], found: records.Records, options: Any) -> None:
    """Keep the workers busy until the cells or the minutes are used up."""
    end = monotonic() + 60 * (options.minutes or float("inf"))
    left = iter(wanted)
    pools = [_pool() for _ in range(options.workers)]
    running: dict[Future[Any], tuple[int, Cell]] = {}
    done = 0
    try:
        while True:
            busy = {place for place, _ in running.values()}
            for place in set(range(len(pools))) - busy:
                cell = next(left, None) if monotonic() < end else None
                if cell is not None:
                    running[pools[place].submit(work.run, cell)] = place, cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place, cell = running.pop(future)
                try:
                    found[cell.key] = future.result()
                except BrokenProcessPool:
                    found[cell.key] = {"error": "the process died"}
                    pools[place] = _pool()
                done += 1
                found |= {k: v for k, v in records.read(RECORDS).items() if k not in found}
                records.write(RECORDS, cells, found)
                print(f"{done}/{len(wanted)} {_line(cell)}: {found[cell.key]}", flush=True)
    finally:
        for pool in pools:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)


def _pool() -> ProcessPoolExecutor:
    """One process, so that it is known which cell it died of."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=work.begin)


def _line(cell: Cell) -> str:
    parts = [cell.network, cell.seed, cell.tool, cell.importance, cell.target, cell.ranking]
    parts += [cell.strategy, "repaired" if cell.repair else "", f"floor {cell.min_keep:g}"]
    return " ".join(str(part) for part in parts if part != "")


if __name__ == "__main__":
    main()
