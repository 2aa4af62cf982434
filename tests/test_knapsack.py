"""The knapsack loses least; uniform plans keep the same number in layers that are alike."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import cpd
from cpd.groups import Groups
from cpd.plan import Plan
from cpd.planning import alive_of
from laws import random_scores


def lost(groups: Groups, scores: dict[str, torch.Tensor], plan: Plan) -> float:
    """The importance of every channel that a plan removes, each once."""
    alive = alive_of(groups, plan)
    gone = {g.name: torch.from_numpy(~alive[g.classes]) for g in groups}
    return sum(float(scores[name].double()[mask].sum()) for name, mask in gone.items())


def chain(*widths: int) -> Groups:
    layers = [nn.Linear(a, b) for a, b in zip((4, *widths), (*widths, 2), strict=True)]
    return cpd.comb(nn.Sequential(*layers), torch.randn(2, 4))


def least_loss(widths: tuple[int, ...], scores: dict[str, torch.Tensor], share: float) -> float:
    """The best of all widths, one by one."""
    losses = [np.r_[0, np.cumsum(np.sort(scores[str(k)].numpy()))] for k in range(len(widths))]

    def macs(sizes: tuple[int, ...]) -> int:
        every = (4, *sizes, 2)
        return sum(a * b for a, b in itertools.pairwise(every))

    return min(
        sum(loss[n - k] for loss, n, k in zip(losses, widths, kept, strict=True))
        for kept in itertools.product(*(range(1, n + 1) for n in widths))
        if macs(kept) <= share * macs(widths)
    )


@pytest.mark.parametrize("widths", [(8, 8), (12, 6, 10), (16, 5, 9, 7)])
def test_it_is_near_the_best_of_all(widths: tuple[int, ...]) -> None:
    groups = chain(*widths)
    ratios = []
    for seed, share in itertools.product(range(4), (0.7, 0.5, 0.3)):
        scores = random_scores(groups, seed)
        plan = cpd.choose(groups, scores, {"macs": share}, strategy="knapsack", min_keep=0)
        assert plan.costs["macs"][1] <= share * plan.costs["macs"][0]
        ratios.append(lost(groups, scores, plan) / least_loss(widths, scores, share))
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) <= 1.1
    assert np.mean(ratios) <= 1.02


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "resnet18":
        made = torchvision.models.resnet18(weights=None, num_classes=10)
        return made.eval(), torch.randn(1, 3, 64, 64)
    made = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4)
    return made.eval(), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "target"),
    [("resnet18", "macs=0.5"), ("vit", "params=0.4,macs=0.6"), ("vit", "memory=0.6")],
)
def test_it_beats_greedy_and_oneshot(name: str, target: str) -> None:
    model, x = network(name)
    groups = cpd.comb(model, x)
    magnitude = cpd.importance.score("magnitude", model, groups)
    for scores in (magnitude, random_scores(groups, 0)):
        losses = {}
        for strategy in ("knapsack", "greedy", "oneshot"):
            plan = cpd.choose(groups, scores, target, strategy=strategy, ranking="global")
            losses[strategy] = lost(groups, scores, plan)
            for cost, share in plan.options["target"].items():
                before, after = plan.costs[cost]
                assert after <= share * before
        assert losses["knapsack"] < 0.9 * min(losses["greedy"], losses["oneshot"])


def test_its_cut_is_proved_and_it_repeats() -> None:
    model, x = network("vit")
    groups = cpd.comb(model, x)
    scores = random_scores(groups, 1)
    plans = [cpd.choose(groups, scores, "macs=0.5", strategy="knapsack") for _ in range(2)]
    assert plans[0] == plans[1]
    assert cpd.verify(model, cpd.cut(model, plans[0]), plans[0])
    assert plans[0].costs["macs"][1] > 0.49 * plans[0].costs["macs"][0]


def test_multiples_limits_and_a_start_hold() -> None:
    groups = chain(32, 24, 40)
    options: dict[str, Any] = {"strategy": "knapsack", "multiple_of": 8, "limits": {"1": 0}}
    first = cpd.choose(groups, random_scores(groups, 0), "macs=0.8", **options)
    plan = cpd.choose(groups, random_scores(groups, 1), "macs=0.4", start=first, **options)
    assert all(w.after % 8 == 0 for w in plan.widths)
    assert plan.widths[1].after == 24
    before, after = first.masks(), plan.masks()
    assert all(not (after[name] & ~mask).any() for name, mask in before.items())


def test_out_of_reach_takes_all_that_may_go() -> None:
    groups = chain(8, 8)
    with pytest.raises(cpd.UnreachableTarget):
        cpd.choose(groups, random_scores(groups, 0), "macs=0.01", strategy="knapsack")
    plan = cpd.choose(
        groups, random_scores(groups, 0), "macs=0.01", strategy="knapsack", unreachable="closest"
    )
    assert {w.after for w in plan.widths} == {1}


# --- uniform -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["uniform", "oneshot", "greedy", "knapsack"])
def test_layers_that_are_alike_keep_the_same_number(strategy: str) -> None:
    model, x = network("vit")
    groups = cpd.comb(model, x)
    options: dict[str, Any] = {} if strategy == "uniform" else {"uniform": True}
    plan = cpd.choose(groups, random_scores(groups, 0), "macs=0.5", strategy=strategy, **options)
    left: dict[tuple[object, ...], set[int]] = {}
    for group, width in ((groups[w.group], w) for w in plan.widths):
        left.setdefault((group.kind, width.family, width.before), set()).add(width.after)
    assert len(left) == 4  # embedding, heads, head dims, hidden
    assert all(len(after) == 1 for after in left.values())
    masks = plan.masks()
    hidden = [
        masks[f"blocks.{k}.mlp.fc1.bias"] for k in range(4) if f"blocks.{k}.mlp.fc1.bias" in masks
    ]
    if hidden:
        assert not all(torch.equal(hidden[0], other) for other in hidden[1:])  # each its own best
    assert cpd.verify(model, cpd.cut(model, plan), plan)


class Blocks(nn.Module):
    """Six residual blocks that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 32), nn.Linear(32, 2)
        self.up = nn.ModuleList(nn.Linear(32, 128) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(128, 32) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        out: torch.Tensor = self.last(x)
        return out


@pytest.mark.parametrize("ranking", ["isomorphic", "global", "uniform"])
def test_in_step_each_kind_loses_what_it_loses_otherwise(ranking: str) -> None:
    """Six that go at once are neither six times as important as one, nor as few as one."""
    groups = cpd.comb(Blocks(), torch.randn(2, 4))
    scores = random_scores(groups, 0)

    def widths(uniform: bool) -> tuple[float, float]:
        plan = cpd.choose(groups, scores, "macs=0.5", ranking=ranking, uniform=uniform)
        left = {group.name: group.size for group in groups}
        left |= {w.group: w.after for w in plan.widths}
        hidden = [n for name, n in left.items() if name.startswith("up")]
        assert len(hidden) == 6
        return left["first"] / 32, sum(hidden) / 6 / 128

    assert widths(uniform=True) == pytest.approx(widths(uniform=False), abs=0.06)


def test_the_uniform_strategy_takes_the_same_share_everywhere() -> None:
    groups = chain(40, 20, 80)
    plan = cpd.choose(groups, random_scores(groups, 0), "params=0.4", strategy="uniform")
    shares = [w.after / w.before for w in plan.widths]
    assert max(shares) - min(shares) < 0.06


def test_the_uniform_strategy_takes_the_same_share_of_branches() -> None:
    """And not all branches at once, as soon as half of the rest is gone."""
    groups = cpd.comb(Blocks(), torch.randn(2, 4), depth=True)
    scores = random_scores(groups, 0)
    for target in ("macs=0.5", "macs=0.1"):
        plan = cpd.choose(groups, scores, target, strategy="uniform")
        gone = sum(w.after == 0 for w in plan.widths if w.family == "branches")
        (first,) = (w for w in plan.widths if w.group == "first")
        assert abs(gone / 6 - (1 - first.after / first.before)) <= 1 / 6


def test_a_limit_on_one_holds_all_that_are_alike() -> None:
    model, x = network("vit")
    groups = cpd.comb(model, x)
    plan = cpd.choose(
        groups, random_scores(groups, 0), "macs=0.7", uniform=True, limits={"blocks.2.mlp.fc1": 0}
    )
    assert {w.after for w in plan.widths if ".mlp." in w.group} == {768}
