"""`python -m zoo`: run, print, write."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

from .registry import libraries, registry
from .runner import OUTPUT, REDO, read, run_all, summary, wanted
from .worker import JOBS


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("--library", nargs="+", choices=libraries(), help="these only")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="these only; patterns allowed")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="default: both")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time, default 1")
    parser.add_argument(
        "--limit", type=float, default=300, help="processor seconds for one, default 300"
    )
    parser.add_argument("--redo", choices=REDO, help="also those that have a row")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the rows")
    parser.add_argument("--list", action="store_true", help="name the networks, run nothing")
    parser.add_argument("--write-docs", action="store_true", help="write docs/coverage.*")
    options = parser.parse_args()
    if options.workers < 1 or options.limit <= 0:
        parser.error("--workers and --limit must be positive")
    options.selected = [
        name
        for name, network in registry().items()
        if (not options.library or network.library in options.library)
        and (not options.names or _meant(name, options.names))
    ]
    if not options.selected:
        parser.error(f"no network is called {', '.join(options.names or [])}; see --list")
    return options


def _meant(name: str, patterns: list[str]) -> bool:
    short = name.partition(":")[2]
    return any(fnmatchcase(name, p) or fnmatchcase(short, p) for p in patterns)


def main() -> None:
    """Run what is not known yet, and write the pages if asked for."""
    options = arguments()
    if options.list:
        print("\n".join(options.selected))
        return
    for job in options.jobs:
        names = [n for n in options.selected if wanted(_row(options, job, n), options.redo, job)]
        kept = len(options.selected) - len(names)
        print(f"{job}: {len(names)} networks to run, {kept} have a row", flush=True)
        for row in run_all(names, job, options.output, options.limit, options.workers):
            print(summary(row), flush=True)
    if options.write_docs:
        from .page import write

        for path in write(options.output):
            print(f"written: {path}")


def _row(options: argparse.Namespace, job: str, name: str) -> dict[str, object] | None:
    return read(options.output, job, name)


if __name__ == "__main__":
    main()
