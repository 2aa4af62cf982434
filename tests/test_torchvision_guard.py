"""The guard: it mends one fault, and touches nothing else."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

import house
from cpd import _torchvision

RUN_TWICE = """
from cpd import _torchvision
_torchvision.ensure()
_torchvision.ensure()
import torchvision
assert torchvision.ops.nms and torchvision.models
"""


def test_in_a_fresh_process_torchvision_imports_and_twice_is_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_TWICE],
        env=os.environ | {"PYTHONPATH": str(house.SOURCE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def fake_import(monkeypatch: pytest.MonkeyPatch, *results: Exception | None) -> list[str]:
    """Let `import torchvision` end in each of the results in turn; return the list of imports."""
    asked: list[str] = []
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)

    def import_module(name: str) -> None:
        asked.append(name)
        result = results[len(asked) - 1]
        if result is not None:
            raise result

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(_torchvision, "_library", [])
    return asked


def test_absent_is_left_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_import(monkeypatch, ModuleNotFoundError(name="torchvision"))
    _torchvision.ensure()
    assert asked == ["torchvision"]


def test_healthy_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_import(monkeypatch, None)
    _torchvision.ensure()
    assert asked == ["torchvision"]
    assert not _torchvision._library


def test_missing_operators_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[str] = []

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "DEF")

        def define(self, schema: str) -> None:
            declared.append(schema.partition("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    fault = RuntimeError("operator torchvision::nms does not exist")
    asked = fake_import(monkeypatch, fault, None)
    monkeypatch.setitem(sys.modules, "torchvision.half", sys)
    _torchvision.ensure()
    assert asked == ["torchvision"] * 2
    assert declared == ["nms", "qnms"]
    assert "torchvision.half" not in sys.modules
    assert len(_torchvision._library) == 1


@pytest.mark.parametrize(
    "fault", [ModuleNotFoundError("no PIL", name="PIL"), RuntimeError("something else")]
)
def test_other_faults_pass(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    fake_import(monkeypatch, fault)
    with pytest.raises(type(fault), match=str(fault)):
        _torchvision.ensure()
