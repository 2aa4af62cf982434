"""Plans: JSON both ways, what is no plan, and how plans print."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import cpd
from cpd.errors import ArtefactError, PlanMismatch
from cpd.plan import Plan
from laws import random_scores

X = torch.randn(2, 3, 6, 6)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(),
        nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    groups = cpd.comb(network(), X)
    return cpd.choose(groups, random_scores(groups, 0), "params=0.5", min_keep=0)


def test_json_both_ways(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert again.groups is None
    for name, mask in plan.masks().items():
        assert torch.equal(mask, again.masks()[name])
        assert again.new_shape(name) == plan.new_shape(name)


def test_a_plan_from_json_cuts_and_verifies(plan: Plan) -> None:
    model = network()
    again = Plan.from_json(plan.to_json())
    small = cpd.cut(model, again)
    for name, tensor in small.state_dict().items():
        assert tuple(tensor.shape) == plan.new_shape(name)
    assert cpd.verify(model, small, again, X)


def damaged(data: dict[str, Any]) -> list[tuple[str, Any]]:
    first = next(iter(data["kept"]))
    part = data["kept"][first][0]

    def with_part(**changes: Any) -> dict[str, Any]:
        return {**data, "kept": {**data["kept"], first: [{**part, **changes}]}}

    return [
        ("a list", []),
        ("a number", 3),
        ("nothing", {}),
        ("another format", {**data, "format": 4}),
        ("no kept", {key: value for key, value in data.items() if key != "kept"}),
        ("a tensor that is not there", {**data, "kept": {"nowhere": data["kept"][first]}}),
        ("runs out of range", with_part(kept="0-900")),
        ("runs backwards", with_part(kept="3-1")),
        ("runs that are words", with_part(kept="all")),
        ("another shape", with_part(shape=[3])),
        ("an axis that is not there", with_part(axes=[9])),
        ("costs that are words", {**data, "costs": {"macs": ["a", "b"]}}),
        ("half a width", {**data, "widths": [["0", "channels", 8]]}),
        ("rows of no tensor", {**data, "rescale": {"nowhere": {"rows": "0", "factor": 1.0}}}),
    ]


def test_what_is_no_plan(plan: Plan) -> None:
    for name, data in damaged(json.loads(plan.to_json())):
        with pytest.raises(ArtefactError, match="this is not a plan of format 3"):
            pytest.fail(f"{name} was read as {Plan.from_json(json.dumps(data))}")
    text = plan.to_json()
    for end in (0, 1, len(text) // 2, len(text) - 2):
        with pytest.raises(ArtefactError, match=r"Give the text that Plan\.to_json wrote, whole"):
            Plan.from_json(text[:end])


def test_a_plan_prints_itself(plan: Plan) -> None:
    lines = str(plan).splitlines()
    assert lines[0] == "Plan for Sequential"
    before, after = plan.costs["macs"]
    assert lines[1] == f"  macs: {before:,} -> {after:,} ({after / before:.1%})"
    changed = [w for w in plan.widths if w.before != w.after]
    assert lines[3] == f"  {plan.notes[0]}"
    assert len(lines) == 4 + len(changed)
    assert lines[-1].endswith(f"{changed[-1].before} -> {changed[-1].after} {changed[-1].family}")


def test_what_differs_is_named(plan: Plan) -> None:
    plan.check(network())
    other = network()
    other[4] = nn.Linear(32, 7)
    with pytest.raises(
        PlanMismatch, match=r"2 tensors differ; 4\.weight is \(7, 32\) here and \(6, 32\)"
    ):
        plan.check(other)

    class Sub(nn.Sequential):
        pass

    with pytest.raises(PlanMismatch, match="made for a Sequential, not for this Sub"):
        plan.check(Sub(*network()))


def test_only_what_follows_composes(plan: Plan) -> None:
    with pytest.raises(PlanMismatch, match="the later plan was not made for what this plan leaves"):
        plan.then(plan)


def test_sizes_of_rows_that_keep_different_columns(plan: Plan) -> None:
    """The flattened image: the linear layer loses all places of a channel."""
    mask = plan.masks()["4.weight"]
    assert mask.shape == (6, 32)
    rows, columns = plan.new_shape("4.weight")
    assert int(mask.sum()) == rows * columns
    assert columns % 4 == 0
