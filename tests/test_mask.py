"""Masking: zero while it is on, undone when it is off, whatever happens between."""

from __future__ import annotations

import torch
from torch import nn

import cpd
from cpd.plan import Plan
from laws import difference, random_scores, run, zeroed

X = torch.randn(6, 4)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def plans(model: nn.Module) -> list[Plan]:
    groups = cpd.comb(model, X)
    scores = random_scores(groups, 0)
    first = cpd.choose(groups, scores, "params=0.7", min_keep=0)
    return [first, cpd.choose(groups, scores, "params=0.3", min_keep=0, start=first)]


def test_on_and_off() -> None:
    model = network()
    first, second = plans(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = run(zeroed(model, second), X)
    handle = cpd.mask(model, first)
    handle.update(second)
    assert difference(run(model, X), wanted) == 0
    handle.remove()
    handle.remove()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_tensors_are_the_same_objects() -> None:
    model = network()
    before = {name: id(t) for name, t in model.named_parameters()}
    with cpd.mask(model, plans(model)[0]):
        assert {name: id(t) for name, t in model.named_parameters()} == before


def test_training_moves_what_is_kept_only() -> None:
    model = network().train()
    plan = plans(model)[0]
    masks = plan.masks()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    handle = cpd.mask(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        handle.apply()
    state = model.state_dict()
    for name, mask in masks.items():
        assert not state[name][~mask].any()
        assert (state[name][mask] != before[name][mask]).any()
    small = cpd.cut(model, plan)
    assert difference(run(small.eval(), X), run(model.eval(), X)) <= 1e-5
    handle.remove()
    for name, mask in masks.items():
        assert torch.equal(model.state_dict()[name][~mask], before[name][~mask])


def test_what_a_later_plan_keeps_comes_back() -> None:
    model = network()
    first, second = plans(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    handle = cpd.mask(model, second)
    handle.update(first)
    wanted = zeroed(model, first)
    for name, mask in first.masks().items():
        assert torch.equal(model.state_dict()[name], before[name] * mask)
    assert difference(run(model, X), run(wanted, X)) == 0
