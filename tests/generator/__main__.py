"""`make fuzz`: run networks, write docs/fuzz.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .fuzz import chunks, page

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "fuzz")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "fuzz.md")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = []
    for one in chunks(options.nets, options.folder, options.jobs):
        found.append(one)
        failed = sum(f["times"] for f in one["failures"])
        print(f"seed {one['seed']}: {len(one['specs'])} networks, {failed} failures")
        options.page.write_text(page(found))
    raise SystemExit(1 if any(x["failures"] for x in found) else 0)


if __name__ == "__main__":
    main()
