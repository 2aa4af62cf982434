"""Write docs/rules.md: every operator with a rule, and what it does to channels.

python tools/rules_page.py            # writes the page
python tools/rules_page.py --check    # fails where the page is not up to date
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

from cpd import rules

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "rules.md"
CENSUS = ROOT / "tests" / "rules" / "census.csv"

HEAD = """# Op rules

How channels pass through each operator. `tools/rules_page.py` writes this page from the rules' own
docstrings; `tests/rules` proves each of them by numbers, but for those that no trace shows or whose
values are random, which it names with the reason. How to add one:
[the playbook](playbook/op-rule.md).

An operator that PyTorch tags as pointwise needs no rule of its own. One that is neither here nor
tagged keeps every channel that it touches, and `comb(..., unknown="error")` refuses it. An in-place
operator (`relu_`) has the rule of its twin. The numbers in brackets: how many of the networks that
were counted use the operator.
"""


def networks() -> dict[str, int]:
    """Return operator -> how many networks of the census use it, its overloads together."""
    found: dict[str, int] = {}
    with CENSUS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            op = rules.bare(row["op"])
            found[op] = max(found.get(op, 0), int(row["networks"]))
    return found


def page() -> str:
    """Return the text of docs/rules.md."""
    used, parts = networks(), [HEAD]
    for kind, entries in rules.shelf().items():
        parts.append(f"## {kind.title}\n\n{kind.text}\n")
        parts.append("| operators | what it does to channels |\n|---|---|")
        for ops, text in entries:
            names = ", ".join(f"`{op}`" + (f" ({used[op]})" if op in used else "") for op in ops)
            parts.append(f"| {names} | {re.sub(r'(?<!`)[|]', chr(92) + '|', text)} |")
        parts.append("")
    tagged = [op for op in sorted(used) if rules.status(op) == "pointwise"]
    names = ", ".join(f"`{op}` ({used[op]})" for op in tagged)
    parts.append(f"## Tagged as pointwise by PyTorch\n\nThose that the census met: {names}.\n")
    parts.append("## No channel passes\n\n| what | why |\n|---|---|")
    parts += [f"| `{op}` | {why} |" for op, why in sorted(rules.NO_CHANNELS.items())]
    return "\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args(arguments).check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        sys.stdout.write("up to date\n" if same else "docs/rules.md: run tools/rules_page.py\n")
        return int(not same)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
