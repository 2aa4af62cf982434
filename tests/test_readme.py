"""The README runs: every python block in one session, its printed output as shown."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import house

README = house.ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return FENCE.findall(README.read_text(encoding="utf-8"))


def test_every_python_block_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ```text block right after a ```python block is what that block prints."""
    found = blocks()
    assert any(kind == "python" for kind, _ in found), "README.md shows no python"
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "__main__"}
    for number, (kind, code) in enumerate(found):
        if kind != "python":
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, f"README.md, block {number + 1}", "exec"), session)
        following = found[number + 1 : number + 2]
        if following and following[0][0] == "text":
            assert printed.getvalue().rstrip() == following[0][1].rstrip()
