"""The side-by-side measurement runs, on one small network, and says what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("rich")
pytest.importorskip("torch_pruning")

ROOT = Path(__file__).resolve().parent.parent


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "bench", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_one_small_network(tmp_path: Path) -> None:
    output = tmp_path / "new" / "bench.json"
    done = bench("--networks", "timm:test_resnet", "--repeats", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "test_resnet" in done.stdout
    assert "TP prune" in done.stdout

    report = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()  # no paths in what is published
    assert set(report) >= {"command", "date", "repeats", "machine", "versions", "networks"}
    (result,) = report["networks"]
    ours, theirs = result["cpd"], result["torch_pruning"]
    assert set(ours["seconds"]) == {"trace", "comb", "choose", "cut", "verify"}
    assert set(theirs["seconds"]) == {"build", "construct", "step"}
    assert all(value > 0 for value in [*ours["seconds"].values(), *theirs["seconds"].values()])
    assert ours["equal"] is True
    assert ours["macs"] <= 0.5
    assert set(result["ratios"]) == {"without_trace", "with_trace"}


def test_an_exception_is_a_result(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    done = bench("--networks", "timm:no_such_network", "--repeats", "1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(output.read_text())["networks"]
    for tool in ("cpd", "torch_pruning"):
        assert "no_such_network" in result[tool]["error"]
        assert result[tool]["seconds"] == {}
    assert "exception" in done.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--networks", "resnet5"], "resnet5 is none of resnet50"),
        (["--repeats", "0"], "--repeats is 0; give at least 1"),
    ],
)
def test_wrong_options_are_named(options: list[str], text: str) -> None:
    done = bench(*options)
    assert done.returncode == 2
    assert text in done.stderr


def test_cutting_while_training_against_masks(tmp_path: Path) -> None:
    output = tmp_path / "loop.json"
    words = ["--width", "32", "--interval", "2", "--events", "2", "--after", "1"]
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.loop", *words, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the same final plan: yes" in done.stdout
    result = json.loads(output.read_text())["result"]
    assert result["same_plan"] is True
    assert result["left"] < 0.31
    for name in ("masks", "cut"):
        rows = result["rows"][name]
        assert [row["event"] > 0 for row in rows] == [True, True, False]
        assert rows[0]["left"] == 1.0
        assert rows[2]["left"] == result["left"]
        total = sum(row["seconds"] for row in rows) + result["finish"][name]
        assert result["total"][name] == pytest.approx(total)
    assert result["ratio"] == pytest.approx(result["total"]["masks"] / result["total"]["cut"])
