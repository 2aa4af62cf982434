"""Importance: every score against its formula, written out again by loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.errors import InputError, MissingGradient, UnknownName
from cpd.groups import Groups
from cpd.importance import resolve, score


class Tiny(nn.Module):
    """One group of 3 channels: made by `a` and its bias, read by `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Readers(nn.Module):
    """One tensor read by a convolution, a grouped convolution and, flattened, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1, groups=2)
        self.d = nn.Linear(6 * 16, 5)

    def forward(
        self, x: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor] = lambda h: h
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.relu(self.bn(self.a(x)))
        return self.b(mask(h)) * self.c(mask(h)), self.d(mask(h).flatten(1))


def tiny() -> tuple[Tiny, torch.Tensor, Groups]:
    model, x = Tiny().double(), torch.randn(5, 2).double()
    return model, x, cpd.comb(model, x)


def step(model: nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


# --- formulas --------------------------------------------------------------------------------


def test_hessian() -> None:
    """Summed over passes: squared sums by size and width, mean, by members and readers."""
    model, x, groups = tiny()
    importance = resolve("hessian")
    importance.start(model, groups)
    wanted = torch.zeros(3).double()
    for k in range(3):
        step(model, x + k)
        importance.observe()
        a, kept = model.a, 3
        weight = (a.weight * a.weight.grad).sum(1).square() / (1 * kept)
        bias = (a.bias * a.bias.grad).square() / (1 * kept)
        wanted += (weight + bias) / 2 / (2 + 1)
    assert torch.allclose(importance.scores()["a"], wanted, rtol=1e-12)
    importance.reset()
    assert not importance.scores()


def test_hessian_counts_places() -> None:
    """A convolution puts out 4 x 4 places for each channel; a linear layer after it one."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False), nn.Flatten(), nn.Linear(48, 2, bias=False)
    )
    model, x = model.double(), torch.randn(3, 2, 4, 4).double()
    groups = cpd.comb(model, x)
    step(model, x)
    weight = model[0].weight
    wanted = (weight * weight.grad).sum((1, 2, 3)).square() / (16 * 3) / 1 / (1 + 1)
    assert torch.allclose(score("hessian", model, groups)["0"], wanted, rtol=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_magnitude(p: float) -> None:
    model, _, groups = tiny()
    parts = [
        model.a.weight.abs().pow(p).sum(1),
        model.a.bias.abs().pow(p),
        model.b.weight.abs().pow(p)[0],
    ]
    wanted = torch.stack(parts).sum(0) / 3
    assert torch.allclose(score({"magnitude": {"p": p}}, model, groups)["a"], wanted, rtol=1e-12)


@pytest.mark.parametrize("together", [True, False])
def test_taylor(together: bool) -> None:
    model, x, groups = tiny()
    step(model, x)
    products = model.a.weight * model.a.weight.grad
    weight = products.sum(1).abs() if together else products.abs().sum(1)
    wanted = (weight + (model.a.bias * model.a.bias.grad).abs()) / 2
    got = score({"taylor": {"multivariable": together}}, model, groups)["a"]
    assert torch.allclose(got, wanted, rtol=1e-12)


def test_fisher() -> None:
    """The gradient of each sample's mask, summed over all readers before it is squared."""
    model = Readers().double().train()
    x = torch.randn(4, 3, 4, 4).double()
    groups = cpd.comb(model, x)
    assert [group.name for group in groups] == ["a"]
    importance = resolve("fisher")
    importance.start(model, groups)
    wanted = torch.zeros(6).double()
    for k in range(2):
        image, flat = model(x + k)
        (image.square().mean() + flat.mean()).backward()
        importance.observe()
    importance.close()
    for k in range(2):
        mask = torch.ones(4, 6, 1, 1).double().requires_grad_()
        image, flat = model(x + k, lambda h, m=mask: h * m)
        (gradient,) = torch.autograd.grad(image.square().mean() + flat.mean(), mask)
        wanted += gradient.square().sum(0).flatten()
    assert torch.allclose(importance.scores()["a"], wanted, rtol=1e-9)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fisher_by_samples() -> None:
    """The same by one backward pass for each sample of the batch's loss."""
    model, x, groups = tiny()
    importance = resolve("fisher")
    importance.start(model, groups)
    model(x).square().mean().backward()
    importance.observe()
    wanted = torch.zeros(3).double()
    for k in range(len(x)):
        h = torch.tanh(model.a(x[k])).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model.b(h).square().sum() / len(x), h)
        wanted += (h * gradient).square()
    assert torch.allclose(importance.scores()["a"], wanted, rtol=1e-12)


def test_fisher_without_a_reader_scores_what_is_put_out() -> None:
    """Also where the output is changed in place afterwards."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = nn.Linear(2, 3), nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (F.relu(self.a(x), inplace=True) * self.w).sum(-1)

    model, x = Alone().double(), torch.randn(5, 2).double()
    groups = cpd.comb(model, x)
    importance = resolve("fisher")
    importance.start(model, groups)
    model(x).square().mean().backward()
    importance.observe()
    h = model.a(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad((F.relu(h) * model.w).sum(-1).square().mean(), h)
    wanted = (h * gradient).square().sum(0)
    assert torch.allclose(importance.scores()[groups.groups[0].name], wanted, rtol=1e-12)


def test_random_is_the_same_for_the_same_seed() -> None:
    model, _, groups = tiny()
    one, two, other = (score({"random": {"seed": k}}, model, groups)["a"] for k in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert ((one >= 0) & (one < 1)).all()


# --- what all have in common ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hessian", "fisher", "taylor", "magnitude"])
def test_scores_follow_their_channels(name: str) -> None:
    """Channels in another order have the same scores in that order."""
    torch.manual_seed(3)
    x = torch.randn(4, 3, 4, 4).double()
    order = torch.randperm(6)
    order = torch.cat([order[order < 3], order[order >= 3]])  # inside the groups of `c`
    model, turned = Readers().double().eval(), Readers().double().eval()
    state = dict(model.state_dict())
    for key in ("a.weight", "a.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        state[key] = state[key][order]
    state["b.weight"] = state["b.weight"][:, order]
    halves = [state["c.weight"][:2][:, order[:3]], state["c.weight"][2:][:, order[3:] - 3]]
    state["c.weight"] = torch.cat(halves)
    state["d.weight"] = state["d.weight"].view(5, 6, 16)[:, order].reshape(5, 96)
    turned.load_state_dict(state)
    found = []
    for net in (model, turned):
        groups = cpd.comb(net, x)
        importance = resolve(name)
        importance.start(net, groups)
        image, flat = net(x)
        (image.square().mean() + flat.mean()).backward()
        importance.observe()
        found.append(importance.scores()["a"])
        importance.close()
    assert torch.allclose(found[0][order], found[1], rtol=1e-9)


@pytest.mark.parametrize("name", ["hessian", "taylor", "fisher"])
def test_a_missing_gradient_is_named(name: str) -> None:
    model, _, groups = tiny()
    with pytest.raises(MissingGradient, match=r"no gradient .* of group 'a'.*after loss"):
        score(name, model, groups)


def test_state_goes_on() -> None:
    model, x, groups = tiny()
    step(model, x)
    for name in ("hessian", "taylor", "magnitude"):
        one, two = resolve(name), resolve(name)
        for importance in (one, two):
            importance.start(model, groups)
        one.observe()
        two.load_state(one.state())
        one.observe()
        two.observe()
        assert torch.equal(one.scores()["a"], two.scores()["a"])


def test_ones_own() -> None:
    model, _, groups = tiny()

    def mine(net: nn.Module, found: Groups) -> dict[str, Any]:
        assert net is model
        return {group.name: range(group.size) for group in found}

    assert score(mine, model, groups)["a"].tolist() == [0, 1, 2]
    _, plan = cpd.prune(model, torch.randn(5, 2).double(), importance=mine, target="params=0.8")
    assert plan.masks()["a.bias"].tolist() == [False, True, True]
    with pytest.raises(InputError, match="the importance returned no scores for group 'a'"):
        score(lambda model, groups: {}, model, groups)
    with pytest.raises(InputError, match=r"returned shape \(2,\) for group 'a' of 3 channels"):
        score(lambda model, groups: {"a": [1, 2]}, model, groups)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        (
            "best",
            UnknownName,
            "unknown importance 'best'.*fisher, fpgm, hessian, .*, wanda",
        ),
        ({"magnitude": {"q": 1}}, UnknownName, "option of importance 'magnitude' 'q'.*p"),
        ({"magnitude": {"p": 0}}, InputError, "p must be a finite number > 0, got 0"),
        (
            {"hutchinson": {"probes": 1.5}},
            InputError,
            "probes must be a whole number of at least 1",
        ),
        ({"activation": {"statistic": [1]}}, UnknownName, "unknown statistic of activation"),
        ({"magnitude": {"aggregate": ["x"]}}, UnknownName, "unknown aggregate"),
        (3, InputError, "a importance is given by a name|an importance is given by a name"),
    ],
)
def test_what_is_no_importance(spec: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        resolve(spec)


def test_scores_leave_the_model_alone() -> None:
    model, x, groups = tiny()
    step(model, x)
    before = [(p.clone(), p.grad.clone()) for p in model.parameters()]
    state = torch.get_rng_state()
    for name in ("hessian", "taylor", "magnitude", "random"):
        score(name, model, groups)
    for (value, grad), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, p)
        assert torch.equal(grad, p.grad)
    assert torch.equal(state, torch.get_rng_state())
