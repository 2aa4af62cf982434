"""The laws of DESIGN.md on random networks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

import cpd
from cpd.plan import Plan
from laws import TIGHT, difference, prove, random_plans, random_scores, randomised, run, zeroed

IMAGE, SIZE = 3, 6


class Add(nn.Module):
    """A residual branch; a 1x1 convolution where the widths differ."""

    def __init__(self, a: int, b: int, gate: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        self.short = nn.Identity() if a == b else nn.Conv2d(a, b, 1, bias=False)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, short = self.body(x), self.short(x)
        return y * torch.sigmoid(short) if self.gate else y + short


class Dense(nn.Module):
    """cat of the input and of what is made from it, then a norm over both."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.make, self.norm = nn.Conv2d(a, b - a, 3, padding=1), nn.BatchNorm2d(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.cat([self.make(x), x], 1)).relu()


class Gated(nn.Module):
    """Two equal parts, one through a depthwise convolution."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.make = nn.Conv2d(a, 2 * b, 1)
        self.depth = nn.Conv2d(b, b, 3, padding=1, groups=b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.make(x).chunk(2, dim=1)
        return self.depth(a) * b.tanh()


class Parts(nn.Module):
    """Parts of given sizes, handled apart and put together in another order."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.make, self.sizes = nn.Conv2d(a, b, 1), [b // 3, b - b // 3]
        self.turn = nn.Conv2d(b // 3, b // 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.make(x).split(self.sizes, dim=1)
        return torch.cat([b, self.turn(a)], 1)


class Shuffle(nn.Module):
    def __init__(self, a: int, b: int, groups: int) -> None:
        super().__init__()
        self.make, self.groups = nn.Conv2d(a, b, 1), groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.make(x)
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2)
        return x.reshape(n, c, h, w)


class Squeeze(nn.Module):
    def __init__(self, a: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(a, max(a // 2, 1), 1), nn.Conv2d(max(a // 2, 1), a, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * gate.sigmoid()


class Attend(nn.Module):
    """Attention over the places of an image, fused or not, and a linear layer after it."""

    def __init__(self, a: int, heads: int, dim: int, fused: bool, norm: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.fused = heads, dim, fused
        inner = heads * dim
        self.norm = nn.LayerNorm(a) if norm else nn.Identity()
        if fused:
            self.qkv = nn.Linear(a, 3 * inner)
        else:
            self.q, self.k, self.v = nn.Linear(a, inner), nn.Linear(a, inner), nn.Linear(a, inner)
        self.proj = nn.Linear(inner, a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        if self.fused:
            parts = self.qkv(y).reshape(n, h * w, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
        else:
            q, k, v = (
                m(y).view(n, h * w, self.heads, self.dim).transpose(1, 2)
                for m in (self.q, self.k, self.v)
            )
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(out.transpose(1, 2).reshape(n, h * w, -1))
        return x + out.transpose(1, 2).reshape(n, -1, h, w)


def activated(conv: nn.Module, width: int, norm: bool) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(width) if norm else nn.Identity(), nn.Hardswish())


# name -> (channels in, channels out, groups that divide both) -> layer, channels that it puts out
LAYERS: dict[str, Callable[[int, int, int], tuple[nn.Module, int]]] = {
    "conv": lambda a, b, _: (activated(nn.Conv2d(a, b, 3, padding=1), b, False), b),
    "norm": lambda a, b, _: (activated(nn.Conv2d(a, b, 1, bias=False), b, True), b),
    "depthwise": lambda a, b, _: (nn.Conv2d(a, 2 * a, 3, padding=1, groups=a), 2 * a),
    "grouped": lambda a, b, g: (nn.Conv2d(a, b, 3, padding=1, groups=g), b),
    "add": lambda a, b, _: (Add(a, b, False), b),
    "gate": lambda a, b, _: (Add(a, b, True), b),
    "dense": lambda a, b, _: (Dense(a, a + 5), a + 5),
    "gated": lambda a, b, _: (Gated(a, b), b),
    "parts": lambda a, b, _: (Parts(a, b), b),
    "shuffle": lambda a, b, _: (Shuffle(a, b, 2), b),
    "squeeze": lambda a, b, _: (Squeeze(a), a),
    "group norm": lambda a, b, g: (nn.GroupNorm(g, a), a),
    "layer norm": lambda a, b, _: (nn.LayerNorm((a, SIZE, SIZE)), a),
    "attention": lambda a, b, _: (Attend(a, 2, 3, False, False), a),
    "attention, norm": lambda a, b, _: (Attend(a, 3, 4, False, True), a),
    "attention, fused": lambda a, b, _: (Attend(a, 3, 3, True, False), a),
    "attention, fused, norm": lambda a, b, _: (Attend(a, 2, 4, True, True), a),
}


@st.composite
def networks(draw: Any) -> nn.Module:
    layers, width = [nn.Conv2d(IMAGE, 6, 1)], 6
    for _ in range(draw(st.integers(1, 4))):
        out = draw(st.sampled_from([4, 6, 8, 12]))
        fit = [g for g in (2, 3, 4) if width % g == 0 and out % g == 0] or [1]
        made, width = LAYERS[draw(st.sampled_from(sorted(LAYERS)))](
            width, out, draw(st.sampled_from(fit))
        )
        layers.append(made)
    head = draw(st.sampled_from(["flat", "mean", "conv"]))
    if head == "flat":
        layers += [nn.Flatten(), nn.Linear(width * SIZE * SIZE, 3)]
    elif head == "mean":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
    else:
        layers.append(nn.Conv2d(width, 2, 3))
    return randomised(nn.Sequential(*layers), draw(st.integers(0, 99)))


def images(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, IMAGE, SIZE, SIZE, generator=generator, dtype=torch.float64)


def laws(examples: int) -> Any:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    phases = (Phase.explicit, Phase.generate)  # networks are small as drawn: no time to shrink them
    return settings(max_examples=examples, suppress_health_check=quiet, phases=phases)


@laws(60)
@given(networks(), st.booleans(), st.integers(0, 9))
def test_cutting_is_zeroing(model: nn.Module, exact: bool, seed: int) -> None:
    """Laws 1 and 4: zeroed is cut; predicted costs are counted costs; other batches; training."""

    def each(plan: Plan, small: nn.Module) -> None:
        assert cpd.costs.params(small) == plan.costs["params"][1]
        assert cpd.costs.macs(small, images(2)) == plan.costs["macs"][1]
        if exact:
            other = images(5)
            assert difference(run(small, other), run(zeroed(model, plan), other)) <= TIGHT

    prove(model, images(2), exact=exact, count=3, seed=seed, each=each)


@laws(15)
@given(networks(), st.integers(0, 9))
def test_cutting_trains(model: nn.Module, seed: int) -> None:
    """One step of training; the forward in training mode is that of the zeroed network too."""
    groups = cpd.comb(model, images(4), exact=True)
    for plan in random_plans(groups, 1, seed):
        small, twin = cpd.cut(model, plan, verify=False).train(), zeroed(model, plan).train()
        assert difference([small(images(4))], [twin(images(4))]) <= 1e-7
        optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
        small(images(4)).square().mean().backward()
        assert all(p.grad is not None for p in small.parameters())
        optimizer.step()
        assert small(images(4)).isfinite().all()


@laws(20)
@given(networks(), st.integers(0, 9))
def test_cutting_nothing_and_cutting_twice(model: nn.Module, seed: int) -> None:
    """Law 3."""
    x = images(2)
    groups = cpd.comb(model, x, exact=True)
    nothing = cpd.choose(groups, random_scores(groups, seed), "params=1")
    same = cpd.cut(model, nothing)
    assert not nothing.masks()
    for a, b in zip(model.state_dict().items(), same.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    first = next(random_plans(groups, 1, seed))
    middle = cpd.cut(model, first, verify=False)
    rest = cpd.comb(middle, x, exact=True)
    for later in random_plans(rest, 2, seed + 5):
        twice = cpd.cut(middle, later, verify=False)
        once = cpd.cut(model, first.then(later), verify=False)
        for a, b in zip(twice.state_dict().items(), once.state_dict().items(), strict=True):
            assert a[0] == b[0]
            assert torch.allclose(a[1], b[1], rtol=1e-12, atol=0)
        assert difference(run(once, x), run(twice, x)) <= TIGHT
        assert first.then(later).costs["params"] == (
            cpd.costs.params(model),
            cpd.costs.params(once),
        )


@laws(12)
@given(networks(), st.integers(0, 9))
def test_saved_is_loaded(model: nn.Module, seed: int) -> None:
    """Law 5, and plans as JSON."""
    groups = cpd.comb(model, images(2))
    plan = next(random_plans(groups, 1, seed))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    small = cpd.cut(model, plan, verify=False)
    with tempfile.TemporaryDirectory() as folder:
        cpd.save(small, plan, Path(folder) / "out")
        loaded = cpd.load(Path(folder) / "out", copy.deepcopy(model))
    for a, b in zip(run(small, images(3)), run(loaded.eval(), images(3)), strict=True):
        assert torch.equal(a, b)


@laws(12)
@given(networks(), st.integers(0, 9))
def test_masking_is_undone(model: nn.Module, seed: int) -> None:
    """Masked is zeroed while the mask is on; afterwards the model is what it was, bit for bit."""
    groups = cpd.comb(model, images(2))
    plans = list(random_plans(groups, 3, seed))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [run(zeroed(model, plan), images(2)) for plan in plans]
    with cpd.mask(model, plans[0]) as handle:
        for plan, outputs in zip(plans, wanted, strict=True):
            handle.update(plan)
            assert difference(run(model, images(2)), outputs) == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@laws(10)
@given(networks(), st.integers(0, 9))
def test_same_seed_same_plan(model: nn.Module, seed: int) -> None:
    """Law 6: ties are broken by the seed alone."""
    groups, again = cpd.comb(model, images(2)), cpd.comb(model, images(2))
    scores = {group.name: torch.zeros(group.size) for group in groups}
    one, two = (
        cpd.choose(g, scores, "params=0.6", seed=seed, unreachable="closest", min_keep=0)
        for g in (groups, again)
    )
    assert one.to_json() == two.to_json()
