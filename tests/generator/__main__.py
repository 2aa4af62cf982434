"""`make fuzz`: run networks, write docs/fuzz.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .fuzz import Sums, chunks, page

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sums", type=Path, default=ROOT / "docs" / "fuzz.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "fuzz.md")
    options = parser.parse_args()
    sums, failures = Sums.read(options.sums), []
    for one in chunks(sums, options.nets, options.jobs):
        failures += one["failures"]
        failed = sum(f["times"] for f in one["failures"])
        print(f"seed {one['seed']}: {len(one['specs'])} networks, {failed} failures", flush=True)
        sums.write(options.sums)
        options.page.write_text(page(sums, failures))
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
