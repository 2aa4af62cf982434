"""Sensitivity: loss against share of one group at a time, as measured by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.errors import ArtefactError, InputError
from cpd.sensitivity import Sensitivity, sensitivity
from laws import random_scores
from test_depth import Block, Net

X, Y = torch.randn(16, 4), torch.randint(0, 3, (16,))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_it_is_the_loss_with_the_least_zeroed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    before = copy.deepcopy(model.state_dict())
    groups = cpd.comb(model, X)
    scores = random_scores(groups, 0)
    batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    found = sensitivity(model, groups, scores, batches, loss, ratios=(0.5, 0.25, 0.05))
    with torch.no_grad():
        assert found.base == pytest.approx(float(loss(model, (X, Y))), rel=1e-5)
    assert list(found.losses) == ["0", "2"]
    assert [share for share, _ in found.losses["0"]] == [0.25, 0.5]
    assert [share for share, _ in found.losses["2"]] == [1 / 6, 0.5]
    for name, points in found.losses.items():
        for share, value in points:
            twin = copy.deepcopy(model)
            gone = scores[name].argsort()[: round(share * len(scores[name]))]
            with torch.no_grad():
                layer = twin[int(name)]
                layer.weight[gone] = 0
                layer.bias[gone] = 0
                assert value == pytest.approx(float(loss(twin, (X, Y))), rel=1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_limits_hold_back_what_bears_little(tmp_path: Path) -> None:
    found = Sensitivity(1.0, {"0": ((0.25, 1.05), (0.5, 1.4), (0.75, 1.05)), "2": ((0.5, 1.1),)})
    assert found.limits(0.1) == {"0": 0.25, "2": 0.5}
    assert found.limits(0.01) == {"0": 0.0, "2": 0.0}
    assert Sensitivity.from_json(found.to_json()) == found
    assert "25%: 1.05" in str(found)
    assert found.plot(tmp_path / "a.svg").read_text().startswith("<?xml")
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    groups = cpd.comb(model, X)
    plan = cpd.choose(
        groups, random_scores(groups, 0), "macs=0.1", limits={"0": found.limits(0.1)["0"]},
        unreachable="closest",
    )  # fmt: skip
    assert plan.widths[0].after == 6


class Attending(nn.Module):
    """Heads, their dims and hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.attention = nn.Linear(5, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_each_family_is_measured_by_itself() -> None:
    """Heads, and the dims inside them: as with the rows of queries, keys and values zeroed."""
    model, x = Attending().eval(), torch.randn(16, 4, 5)
    groups = cpd.comb(model, x)
    scores = random_scores(groups, 0)
    found = sensitivity(model, groups, scores, [(x, Y)], loss, ratios=(0.34,))
    names = ["attention heads", "attention head dims"]
    assert set(found.losses) == {"into", *names}
    assert found.groups == dict.fromkeys(found.losses.keys() - {"into"}, "attention")
    members = {member.tensor: member.channel for member in groups["attention"].members}
    of_row = scores["attention"][members["attention.in_proj_weight"].reshape(-1)].view(3, 3, 4)
    head = int((of_row[0] + of_row[2]).sum(1).argmin())
    rows = torch.arange(36).view(3, 3, 4)
    for name, share, gone in (
        (names[0], 1 / 3, rows[:, head]),
        (names[1], 1 / 4, rows.gather(2, of_row.argmin(2, keepdim=True))),
    ):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.attention.in_proj_weight[gone.flatten()] = 0
            twin.attention.in_proj_bias[gone.flatten()] = 0
            wanted = float(loss(twin, (x, Y)))
        assert found.losses[name] == ((pytest.approx(share), pytest.approx(wanted, rel=1e-5)),)
    assert Sensitivity.from_json(found.to_json()) == found
    assert cpd.choose(groups, scores, "macs=0.9", limits=found.limits(10.0))


def test_each_branch_is_measured_by_itself() -> None:
    """As with its last layer zeroed; a limit of 0 keeps it."""
    model, x = Net(Block(), Block(), Block()).eval(), torch.randn(16, 4, 5)
    groups = cpd.comb(model, x, depth=True)

    def told(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    found = sensitivity(model, groups, random_scores(groups, 0), [(x, Y)], told, ratios=(0.5,))
    for number in range(3):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.blocks[number].scale.zero_()
            wanted = float(told(twin, (x, Y)))
        assert found.losses[f"blocks.{number}:1"] == ((1.0, pytest.approx(wanted, rel=1e-5)),)
    worst = max(range(3), key=lambda number: found.losses[f"blocks.{number}:1"][0][1])
    rise = found.losses[f"blocks.{worst}:1"][0][1] / found.base - 1 - 1e-4
    assert rise > 0, "a network that is better without any of its branches shows nothing here"
    limits = {k: v for k, v in found.limits(rise).items() if k.startswith("blocks")}
    assert limits[f"blocks.{worst}:1"] == 0.0
    scores = random_scores(groups, 0)
    for strategy in ("oneshot", "greedy", "knapsack"):
        plan = cpd.choose(
            groups, scores, "params=0.3", limits=limits, min_keep=0.0, strategy=strategy,
            unreachable="closest",
        )  # fmt: skip
        assert f"blocks.{worst}:1" not in plan.branches


def test_a_limit_is_that_of_the_family_that_bears_least() -> None:
    points = {"a heads": ((0.5, 1.05),), "a head dims": ((0.25, 1.0), (0.5, 3.0)), "a rest": ()}
    found = Sensitivity(1.0, points, dict.fromkeys(points, "a"))
    assert found.limits(0.1) == {"a": 0.25}
    assert found.limits(5.0) == {"a": 0.5}
    assert Sensitivity(1.0, {"a": ()}).limits(0.1) == {"a": 0.0}
    with pytest.raises(InputError, match="rise is -1"):
        found.limits(-1)


def test_what_makes_no_sense() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    groups = cpd.comb(model, X)
    with pytest.raises(InputError, match="at least one batch"):
        sensitivity(model, groups, random_scores(groups, 0), [], loss)
    with pytest.raises(InputError, match=r"ratios are \[1.5\]"):
        sensitivity(model, groups, random_scores(groups, 0), [(X, Y)], loss, ratios=[1.5])
    with pytest.raises(ArtefactError, match="no sensitivity"):
        Sensitivity.from_json("{}")
