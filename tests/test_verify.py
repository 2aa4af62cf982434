"""The proof can fail: one wrong number, mask, scale or rule, and it does."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.errors import InputError, PlanMismatch, VerifyError
from cpd.kept import Kept
from cpd.labels import Labels
from cpd.plan import Plan
from cpd.rules import base
from laws import random_scores, randomised


class Block(nn.Module):
    """Convolutions, a norm across channels, attention with a default scale, a shuffle, a roll."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 12, 1)
        self.groups, self.heads = 4, 2
        self.norm = nn.LayerNorm(12)
        self.qkv, self.proj, self.head = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.a(x)))
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.b(x).flatten(2).transpose(1, 2)
        y = self.qkv(self.norm(x)).reshape(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = y.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, -1)
        return self.head(x + self.proj(out))


class Roll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).roll(2, -1).relu())


class Written(nn.Module):
    """Heads whose keys are written into memory that holds anything; a norm across them reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = 5, 3
        self.a, self.b = nn.Linear(4, 3 * self.own), nn.Linear(4, self.shared)
        self.c = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x).unflatten(-1, (-1, self.own))
        y = a.new_empty(*a.shape[:-1], self.own + self.shared)
        y[..., : self.own] = a
        y[..., self.own :] = self.b(x).unsqueeze(-2)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return self.c(y.flatten(-2))


IMAGE = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def planned(*, exact: bool) -> tuple[nn.Module, Plan]:
    model = randomised(Block())
    groups = cpd.comb(model, IMAGE, exact=exact)
    return model, cpd.choose(groups, random_scores(groups, 3), "params=0.6", min_keep=0)


@pytest.mark.parametrize("exact", [True, False])
def test_a_proof_says_what_it_compared(exact: bool) -> None:
    model, plan = planned(exact=exact)
    proof = cpd.verify(model, cpd.cut(model, plan), plan, IMAGE)
    assert proof
    assert proof.max_error <= 1e-12
    assert proof.mode == ("exact" if exact else "masked statistics")
    assert str(proof).startswith(f"verified ({proof.mode}): largest relative difference")
    assert "output 0" in proof.checks


@pytest.mark.parametrize("exact", [True, False])
def test_every_altered_weight_is_seen(exact: bool) -> None:
    model, plan = planned(exact=exact)
    small = cpd.cut(model, plan)
    for name, parameter in small.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        proof = cpd.verify(model, small, plan, IMAGE)
        assert not proof, name
        assert "NOT verified" in str(proof)
        with torch.no_grad():
            parameter.copy_(kept)
    assert cpd.verify(model, small, plan, IMAGE)


@pytest.mark.parametrize("exact", [True, False])
def test_a_swapped_mask_is_seen(exact: bool) -> None:
    """Of one tensor another channel is kept than of those that it belongs with."""
    model, plan = planned(exact=exact)
    for name, parts in plan.kept.items():
        if len(parts[0].axes) > 1 or parts[0].mask.all() or name.startswith("bn.running"):
            continue
        mask = parts[0].mask.copy()
        on, off = mask.nonzero()[0][0], (~mask).nonzero()[0][0]
        mask[[on, off]] = mask[[off, on]]
        wrong = dataclasses.replace(
            plan, kept={**plan.kept, name: (Kept(parts[0].axes, mask), *parts[1:])}
        )
        small = cpd.cut(model, wrong, verify=False)
        assert not cpd.verify(model, small, plan, IMAGE), name


def test_a_dropped_rescale_is_seen() -> None:
    model, plan = planned(exact=True)
    assert plan.rescale
    small = cpd.cut(model, dataclasses.replace(plan, rescale={}), verify=False)
    assert not cpd.verify(model, small, plan, IMAGE)


def test_a_forgotten_attribute_is_seen() -> None:
    model, plan = planned(exact=True)
    assert plan.attributes
    small = cpd.cut(model, dataclasses.replace(plan, attributes={}), verify=False)
    assert not cpd.verify(model, small, plan, IMAGE)


def passing(call: Any) -> Labels:
    """A wrong rule: the ids stay where they are, though the values move."""
    return Labels(call.shape, call.args["self"].layers)


@pytest.mark.parametrize("exact", [True, False])
def test_a_wrong_rule_for_roll_is_seen(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Roll())
    groups = cpd.comb(model, ROWS, exact=exact)
    cpd.cut(model, cpd.choose(groups, random_scores(groups, 0), "params=0.6"))
    monkeypatch.setitem(base._RULES, "roll", passing)
    groups = cpd.comb(model, ROWS, exact=exact)
    plan = cpd.choose(groups, random_scores(groups, 0), "params=0.6")
    with pytest.raises(VerifyError, match="is not what the plan promises"):
        cpd.cut(model, plan)


@pytest.mark.parametrize("exact", [True, False])
def test_a_shuffle_that_does_not_tie_is_seen(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Block())

    def untied(layer: Any, axes: tuple[int, ...], channels: Any) -> Any:
        order = sorted(range(len(axes)), key=lambda k: axes[k])
        return dataclasses.replace(layer, axes=tuple(sorted(axes)), ids=layer.ids.transpose(order))

    monkeypatch.setattr(sys.modules["cpd.labels"], "place", untied)
    monkeypatch.setattr(sys.modules["cpd.rules.base"], "place", untied)
    groups = cpd.comb(model, IMAGE, exact=exact)
    found = []
    for seed in range(8):
        plan = cpd.choose(groups, random_scores(groups, seed), "params=0.7", unreachable="closest")
        found.append(bool(cpd.verify(model, cpd.cut(model, plan, verify=False), plan, IMAGE)))
    assert not all(found)


def test_a_cut_that_does_not_run_is_a_finding() -> None:
    model, plan = planned(exact=True)
    small = cpd.cut(model, plan)
    small.heads = 7
    proof = cpd.verify(model, small, plan, IMAGE)
    assert not proof
    assert "the cut network does not run: RuntimeError: shape" in str(proof)
    proof = cpd.verify(model, nn.Linear(1, 1), plan, IMAGE)
    assert not proof
    assert "has other tensors than the plan: 'a.bias' is in one only" in str(proof)


def test_another_number_of_outputs_is_a_finding() -> None:
    model, plan = planned(exact=True)
    small = cpd.cut(model, plan)
    forward = small.forward
    small.forward = lambda x: (forward(x), forward(x))
    assert not cpd.verify(model, small, plan, IMAGE)


def test_not_a_number_is_not_a_proof() -> None:
    model, plan = planned(exact=True)
    small = cpd.cut(model, plan)
    with torch.no_grad():
        small.head.bias.fill_(float("nan"))
    assert not cpd.verify(model, small, plan, IMAGE)


def test_another_model_is_refused() -> None:
    model, plan = planned(exact=True)
    with pytest.raises(PlanMismatch, match="made for a Block, not for this Roll"):
        cpd.verify(Roll(), model, plan, ROWS)


def test_without_inputs_some_are_made() -> None:
    model, plan = planned(exact=False)
    plain = Plan.from_json(plan.to_json())
    assert cpd.verify(model, cpd.cut(model, plan), plain)
    odd = dataclasses.replace(plain, inputs={"args": [{"type": "Graph"}]})
    with pytest.raises(InputError, match="the plan's inputs hold a Graph; give example_inputs"):
        cpd.verify(model, cpd.cut(model, plan), odd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_type_of_the_model(dtype: torch.dtype) -> None:
    model, plan = planned(exact=True)
    low, x = model.to(dtype), IMAGE.to(dtype)
    small = cpd.cut(low, plan)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert cpd.verify(low, small, plan, x)


def test_memory_that_is_written_later_may_hold_anything() -> None:
    """The reference reads what was written, in the places where it was written."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory taken is full of nan
    try:
        model = randomised(Written())
        groups = cpd.comb(model, ROWS)
        assert [family.size for group in groups for family in group.families] == [5, 3, 3]
        for seed in range(3):
            plan = cpd.choose(groups, random_scores(groups, seed), {"params": 0.5})
            small = cpd.cut(model, plan, verify=False)
            assert cpd.verify(model, small, plan, ROWS)
    finally:
        torch.use_deterministic_algorithms(False)
