"""Every operator that the counted networks use is known, and docs/rules.md says what is."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from zoo import census, runner

import cpd
from cpd import rules

ROOT = Path(__file__).resolve().parents[2]
CENSUS = Path(__file__).with_name("census.csv")
OPS = [r["op"] for r in csv.DictReader(CENSUS.read_text(encoding="utf-8").splitlines())]


@pytest.mark.parametrize("op", OPS)
def test_every_op_seen_is_known(op: str) -> None:
    assert rules.status(op), f"{op} has no rule and is no declared barrier"


def test_the_census_names_each_once() -> None:
    assert len(OPS) == len(set(OPS)) > 100


def test_every_op_of_the_zoo_is_known() -> None:
    """Rows that a checkout holds may be newer than the census."""
    met = {op for row in runner.rows(runner.OUTPUT).values() for op in row.get("ops", ())}
    unknown = sorted(op for op in met if not rules.status(op))
    assert not unknown, f"no rule and no declared barrier: {unknown}"


def test_the_census_grows_by_what_rows_have_met() -> None:
    rows = [{"ops": ["aten.new.default", "aten.add.Tensor"]}, {"ops": ["aten.new.default"]}, {}]
    text = "op,networks\naten.add.Tensor,153\naten.abs.default,1\n"
    wanted = "op,networks\naten.add.Tensor,153\naten.new.default,2\naten.abs.default,1\n"
    assert census.extended(text, rows) == wanted
    assert census.extended(wanted, rows) == wanted


def test_the_census_is_as_it_is_written() -> None:
    assert census.extended(CENSUS.read_text(encoding="utf-8"), []) == CENSUS.read_text("utf-8")


def test_an_unknown_op_is_unknown() -> None:
    assert rules.status("aten.linalg_matrix_exp.default") == ""
    assert rules.status("aten.relu_.default") == "pointwise"
    assert rules.status("aten.linear.default") == "rule"
    assert rules.status("getitem") == "none"


def test_an_unknown_op_is_refused_or_freezes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.linalg.matrix_exp(self.a(x)))

    with pytest.raises(cpd.TraceError, match="no rule for operator"):
        cpd.comb(Net(), torch.randn(4, 4), unknown="error")
    groups = cpd.comb(Net(), torch.randn(4, 4))
    assert not len(groups)
    assert any("without a rule" in item.reason for item in groups.frozen)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rules_page", ROOT / "tools" / "rules_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert generator().main(["--check"]) == 0, "run: python tools/rules_page.py"
    assert capsys.readouterr().out == "up to date\n"


def test_a_stale_page_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = generator()
    monkeypatch.setattr(module, "PAGE", tmp_path / "rules.md")
    assert module.main(["--check"]) == 1
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0


def test_the_page_has_every_rule() -> None:
    text = generator().page()
    assert all(f"`{op}`" in text for op in rules.known())


def test_every_rule_says_what_it_does() -> None:
    for kind, entries in rules.shelf().items():
        assert kind.text
        for ops, text in entries:
            assert ops
            assert text.endswith("."), (ops, text)
