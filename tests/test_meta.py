"""Networks without weights: on the meta device all but the weights' values is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cpd
from cpd.labels import squeeze_constant


class Reads(nn.Module):
    """Attention whose code asks for a value unless it is traced, as causal masks do."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.embed = nn.Embedding(50, width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        fake = isinstance(ids, torch._subclasses.FakeTensor)
        if not fake and not torch.compiler.is_compiling() and bool((ids < 0).any()):
            ids = ids.abs()
        x = self.embed(ids).to(ids.device)
        shape = (*ids.shape, -1, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x + self.down(torch.relu(self.up(x))))


class Bare(nn.Module):
    """Code that asks for a value even when nothing has one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.lin = nn.Linear(8, 24)
        self.out = nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and float(x.sum()) > 1e30:
            return x
        y = self.lin(x).view(x.shape[0], 4, 6)
        return self.out(torch.relu(y).flatten(1))


def on_meta(make: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def chosen(model: nn.Module, inputs: torch.Tensor) -> tuple[cpd.Groups, cpd.Plan]:
    groups = cpd.comb(model, inputs)
    scores = cpd.importance.score("random", model, groups)
    return groups, cpd.choose(groups, scores, "params=0.6")


def test_the_plan_is_that_of_the_network_with_weights() -> None:
    empty, whole = on_meta(Reads), Reads()
    without, plan = chosen(empty, torch.zeros(2, 5, dtype=torch.long, device="meta"))
    with_weights, same = chosen(whole, torch.zeros(2, 5, dtype=torch.long))
    assert plan == same
    assert [group.name for group in without] == [group.name for group in with_weights]
    assert "head dims" in {family.kind for group in without for family in group.families}
    assert plan.attributes
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    small = cpd.cut(whole, plan, verify=False)
    assert cpd.verify(whole, small, plan, torch.arange(10).view(2, 5))


def test_a_network_without_weights_can_be_cut() -> None:
    model = on_meta(Reads)
    _, plan = chosen(model, torch.zeros(2, 5, dtype=torch.long, device="meta"))
    small = cpd.cut(model, plan, verify=False)
    wanted = cpd.cut(Reads(), plan, verify=False)
    shapes = {name: tensor.shape for name, tensor in wanted.state_dict().items()}
    assert {name: tensor.shape for name, tensor in small.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in small.parameters())


def test_code_that_cannot_be_tried_without_values_says_so() -> None:
    """No crash where there are no values to try the code with; the proof comes with the weights."""
    groups = cpd.comb(on_meta(Bare), torch.zeros(2, 8, device="meta"))
    scores = cpd.importance.score("random", groups.model, groups)
    plan = cpd.choose(groups, scores, "params=0.7", unreachable="closest")
    model = Bare()
    assert cpd.verify(model, cpd.cut(model, plan, verify=False), plan, torch.randn(2, 8))


def test_weights_are_never_made() -> None:
    """Four million million parameters: any attempt to make them would fail."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**10, 2**31), nn.ReLU(), nn.Linear(2**31, 2**10))
    with pytest.raises((RuntimeError, MemoryError)):
        torch.empty_like(model[0].weight, device="cpu")
    with torch.device("meta"):
        wide = nn.Sequential(*(nn.Linear(2**16, 2**16, bias=False) for _ in range(2)), nn.ReLU())
    groups = cpd.comb(wide, torch.zeros(1, 2**16, device="meta"))
    plan = cpd.choose(groups, {g.name: torch.rand(g.size) for g in groups}, "params=0.5")
    before, after = plan.costs["params"]
    assert before == 2**33
    assert after <= before / 2


def test_an_empty_slice_carries_nothing() -> None:
    layer = squeeze_constant((0, 1), torch.zeros(3, 0, dtype=torch.long).numpy())
    assert layer.axes == ()


class Rest(nn.Module):
    """What is left of the channels after the rotated ones is empty here, and is joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x).view(*x.shape[:-1], 3, 4)
        y = torch.cat([torch.relu(y[..., :4]), y[..., 4:]], dim=-1)
        return self.down(y.flatten(-2))


def test_an_empty_rest_is_joined() -> None:
    model, x = Rest(), torch.randn(2, 6)
    small, plan = cpd.prune(model, x, importance="random", target="params=0.8")
    assert plan.costs["params"][1] < plan.costs["params"][0]
    assert cpd.verify(model, small, plan, x)


class Joins(nn.Module):
    """Coupled rows joined with a part that is the same in every row."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.common = nn.Linear(8, 12), nn.Linear(8, 3)
        self.other = nn.Linear(8, 21)
        self.out = nn.Linear(7, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.own(x).unflatten(-1, (3, 4))
        common = self.common(x).unsqueeze(-2).expand(-1, 3, -1)
        joined = torch.cat([own, common], dim=-1)
        return self.out((joined * self.other(x).unflatten(-1, (3, 7))).sum(-2))


@pytest.mark.parametrize("exact", [False, True])
def test_rows_joined_with_what_is_the_same_in_each(exact: bool) -> None:
    model, x = Joins(), torch.randn(5, 8)
    groups = cpd.comb(model, x, exact=exact)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores = {g.name: torch.rand(g.size, generator=generator) for g in groups}
        plan = cpd.choose(groups, scores, "params=0.7", unreachable="closest", min_keep=0.0)
        proof = cpd.verify(model, cpd.cut(model, plan, verify=False), plan, x)
        assert proof, proof
