"""What the user says: limits by pattern, module or function, channels kept by hand, vetoes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cpd
from cpd.errors import InputError, UnknownName
from cpd.groups import CouplingGroup, Groups
from cpd.limits import limits_of
from cpd.plan import Plan
from laws import random_scores


class Residual(nn.Module):
    """Two convolutions that share their output channels, and one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.outer, self.head = nn.Conv2d(24, 16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 48), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, 16))


@pytest.fixture
def groups() -> Groups:
    return cpd.comb(Residual(), torch.randn(2, 3, 6, 6))


def widths(plan: Plan) -> dict[str, int]:
    return {w.group: w.after for w in plan.widths}


def chosen(groups: Groups, target: Any = "macs=0.01", **options: Any) -> Plan:
    more = {"unreachable": "closest", "min_keep": 0, **options}
    return cpd.choose(groups, random_scores(groups, 0), target, **more)


def test_a_module_stands_for_the_group_of_its_outputs(groups: Groups) -> None:
    assert limits_of(groups, {"outer": 0.25}) == {"stem": 0.25}
    assert limits_of(groups, {"out*": 0.25, "stem": 0.5}) == {"stem": 0.25}
    assert limits_of(groups, {"outer.bias": 0}) == {"stem": 0}
    assert widths(chosen(groups, limits={"outer": 0.25, "inner": 0})) == {"stem": 12, "inner": 24}


def test_a_function_of_groups(groups: Groups) -> None:
    def narrow(group: CouplingGroup) -> float | None:
        return 0.5 if group.size == 24 else None

    plan = chosen(groups, limits=narrow)
    assert widths(plan) == {"stem": 1, "inner": 12}
    assert plan.options["limits"] == {"inner": 0.5}
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(InputError, match="limit stem=2; give the largest share"):
        chosen(groups, limits=lambda group: 2)


def test_channels_kept_by_hand(groups: Groups) -> None:
    for keep in (
        {"outer": [2, 3, 15]},
        {"stem.bias": [2, 3, 15]},
        {"stem": torch.tensor([15, 2, 3])},
    ):
        plan = chosen(groups, keep=keep)
        assert plan.masks()["stem.bias"].nonzero().flatten().tolist() == [2, 3, 15]
        assert widths(plan) == {"stem": 3, "inner": 1}
    assert widths(chosen(groups, keep={"inner": "all"})) == {"stem": 1, "inner": 24}


def test_a_head_with_a_kept_channel_stays() -> None:
    """Of a head that holds one, the channel stays in it; other heads lose as many, and may go."""
    model, x = Heads(), torch.randn(2, 5, 6)
    groups = cpd.comb(model, x)
    plan = chosen(groups, keep={"qkv": [5]})  # head 1, dim 1 of the query
    rows = plan.masks()["qkv.weight"][:, 0].reshape(3, 4, 4)
    assert rows[0, 1, 1]
    assert rows[0].any(1).tolist() == [False, True, False, False]
    assert cpd.verify(model, cpd.cut(model, plan), plan)


@pytest.mark.parametrize(
    ("keep", "error", "text"),
    [
        ({"nowhere": [1]}, UnknownName, "unknown module or tensor to keep channels of 'nowhere'"),
        ({"inner": [24]}, InputError, r"keep inner=\[24\]: give whole numbers from 0 to 23"),
        ({"inner": [-1]}, InputError, r"keep inner=\[-1\]: give whole numbers"),
        ({"inner": [0.5]}, InputError, r"keep inner=\[0.5\]: give whole numbers"),
        ({"inner": "most"}, InputError, "keep inner='most': give numbers of channels, or \"all\""),
    ],
)
def test_what_cannot_be_kept(groups: Groups, keep: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        chosen(groups, keep=keep)


# --- steps ---------------------------------------------------------------------------------------


def test_steps_lead_to_the_target(groups: Groups) -> None:
    going = cpd.steps(groups, random_scores(groups, 0), "params=0.4", count=4)
    seen = []
    for step in going:
        before, after = step.plan.costs["params"]
        assert after <= (1 - 0.6 * step.number / 4) * before
        assert str(step).startswith(f"step {step.number} of 4: macs ")
        seen.append(dict(step.removed))
    assert len(seen) == 4
    assert going.plan is not None
    for name, width in widths(going.plan).items():
        assert groups[name].width - width == sum(step.get(name, 0) for step in seen)


def test_a_veto_holds_from_then_on(groups: Groups) -> None:
    going = cpd.steps(groups, random_scores(groups, 0), "params=0.5", count=4, min_keep=0)
    numbers, kept = [], None
    for step in going:
        numbers.append(step.number)
        if step.number == 2 and kept is None:
            assert going.plan is not None
            kept = widths(going.plan)["stem"]
            assert kept < 16
            step.veto("st*")
        elif step.number >= 2:
            assert "stem" not in step.removed
            assert widths(step.plan)["stem"] == kept
    assert numbers == [1, 2, 2, 3, 4]
    assert going.plan is not None
    assert going.plan.costs["params"][1] <= 0.5 * going.plan.costs["params"][0]


def test_vetoes_may_leave_too_little(groups: Groups) -> None:
    going = iter(cpd.steps(groups, random_scores(groups, 0), "params=0.5", count=1))
    step = next(going)
    step.veto(*step.removed)
    with pytest.raises(cpd.UnreachableTarget):
        next(going)
    step = next(iter(cpd.steps(groups, random_scores(groups, 0), "params=0.5")))
    with pytest.raises(InputError, match="veto 'head': nothing of that name goes in this step"):
        step.veto("head")
    with pytest.raises(InputError, match="count is 0"):
        cpd.steps(groups, random_scores(groups, 0), "params=0.5", count=0)
