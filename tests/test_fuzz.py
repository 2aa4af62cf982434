"""The sums of many random networks: kept, read again, and never counting what failed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from zoo import runner

from generator import fuzz


def _chunk(seed: int, failures: int = 0) -> dict[str, Any]:
    return {
        "seed": seed, "specs": [f"{seed:010x}", "00000000ff"], "idioms": Counter(linear=2),
        "units": 5, "of": 9, "share": 0.5, "seconds": 1.5,
        "failures": [{"times": failures, "text": "E: no", "spec": {}, "wish": {}}] * bool(failures),
    }  # fmt: skip


def test_sums_come_back(tmp_path: Path) -> None:
    """As they were written."""
    sums = fuzz.Sums()
    for seed in (0, 3):
        sums.add(_chunk(seed), runner.fingerprint())
    sums.write(tmp_path / "sums.json")
    again = fuzz.Sums.read(tmp_path / "sums.json")
    assert vars(again) == vars(sums)
    assert (again.seeds, again.nets, again.different) == ([0, 3], 4, 3)
    assert fuzz.Sums.read(tmp_path / "none.json") == fuzz.Sums()
    text = fuzz.page(again, [])
    assert "| networks | 4 (3 different) |" in text
    label = f"| of them with the code of the last run, `{runner.fingerprint()}` |"
    assert f"{label} 4 (3 different) |" in text
    again.codes, again.specs = {"other": 4}, {"other": {"a"}}
    assert f"{label} 0 (0 different) |" in fuzz.page(again, [])


def test_sums_of_an_earlier_time_are_read(tmp_path: Path) -> None:
    """They did not say which code a network passed with: it counts, and not for the code of now."""
    held = {"seeds": [4], "specs": "00000000ff00000000aa", "codes": {"x": 2}, "idioms": {}}
    (tmp_path / "sums.json").write_text(json.dumps(held))
    sums = fuzz.Sums.read(tmp_path / "sums.json")
    assert sums.different == 2
    assert not sums.specs.get(runner.fingerprint())


def _pools(monkeypatch: pytest.MonkeyPatch) -> None:

    class Pool:
        def __init__(self, jobs: int) -> None:
            assert jobs == 2

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def apply_async(self, _: object, args: tuple[int]) -> Any:
            made = _chunk(args[0], failures=args[0] == 2)
            return type("Result", (), {"get": lambda self: made})()

    monkeypatch.setattr(fuzz, "get_context", lambda _: type("Context", (), {"Pool": Pool}))


def test_a_run_goes_on_and_counts_what_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that are known are left out; one that failed is not known."""
    _pools(monkeypatch)
    sums = fuzz.Sums()
    sums.add(_chunk(1), runner.fingerprint())
    ran = [found["seed"] for found in fuzz.chunks(sums, 5, 2)]
    assert ran[:4] == [0, 2, 3, 4]
    assert sums.seeds == [1, 0, 3, 4]
    text = fuzz.page(sums, _chunk(2, failures=1)["failures"])
    assert "- 1 times: E: no" in text


def test_another_code_starts_anew_with_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passed with earlier code is no step towards the goal; a finished run does nothing."""
    _pools(monkeypatch)
    sums = fuzz.Sums()
    for seed in (0, 1, 3, 4, 5):
        sums.add(_chunk(seed), "earlier")
    ran = [found["seed"] for found in fuzz.chunks(sums, 4, 2)]
    assert ran == [2, 6, 7, 8]
    assert len(sums.specs[runner.fingerprint()]) == 4
    assert sums.different == 9
    assert not list(fuzz.chunks(sums, 4, 2))
