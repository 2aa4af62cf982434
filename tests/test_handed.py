"""Attributes that share a value: only those that reach a call hold its literal."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.groups import Groups
from laws import random_plans, randomised


class Around(nn.Module):
    """A module around others; `axis` and `count` are 2, and so may be what its children use."""

    def __init__(self, inner: nn.Module, **held: Any) -> None:
        super().__init__()
        self.axis, self.count, self.inner = 2, 2, inner
        for name, value in held.items():
            setattr(self, name, value)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.inner(x), x.mean(self.axis, keepdim=True).expand(-1, -1, 4)], 1)
        return self.head(x)


class Written(nn.Module):
    """The first two of four channels are halved, in place; nothing holds the bound."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.make(x).clone()
        x[..., :2].mul_(0.5)
        return x


class Heads(nn.Module):
    """Heads that the module around tells it, as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.back = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        n, length, _ = x.shape
        q = self.make(x).view(n, length, count, -1).transpose(1, 2)
        return self.back((q @ q.transpose(-1, -2) @ q).transpose(1, 2).flatten(2))


class Told(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x, self.count).mean(self.axis - 1))


class Asking(Told):
    """Code that asks for a value, which the meta device has not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            known = torch.compiler.is_compiling() or bool(torch.ones(1).cpu().sum() > 0)
        return super().forward(x) if known else x


class Strict(Told):
    """Code that takes no other kind of number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.count) is not int:
            raise TypeError("an int is needed")
        return super().forward(x)


class SameNumber(nn.Module):
    """As many heads as head dims, and a width that is computed from one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 3, 3
        self.qkv, self.proj = nn.Linear(6, 27), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        y = self.qkv(x).view(n, length, self.heads, 3 * self.dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(*y.chunk(3, -1))
        return self.proj(y.transpose(1, 2).reshape(n, length, -1))


def proved(model: nn.Module, x: torch.Tensor) -> Groups:
    """The groups of a model whose random plans are all proved, and remove something."""
    groups = cpd.comb(model, x)
    plans = list(random_plans(groups, 6))
    assert any(plan.masks() for plan in plans)
    for plan in plans:
        assert cpd.verify(model, cpd.cut(model, plan, verify=False), plan, x)
    return groups


def held(groups: Groups) -> set[tuple[str, str]]:
    return {(site.path, site.attribute) for site in groups.sites}


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_an_axis_is_no_bound_of_a_slice():
    model = randomised(Around(nn.Sequential(Written())))
    groups = proved(model, sample(2, 5, 6))
    assert not held(groups)


@pytest.mark.parametrize("kind", [Told, Asking])
def test_what_is_handed_on_follows(kind):
    model = randomised(kind(Heads()))
    groups = proved(model, sample(2, 5, 6))
    assert ("", "count") in held(groups)
    assert ("", "axis") not in held(groups)
    assert any(f.kind == "heads" for f in groups.units.families)
    assert type(model.count) is int  # nothing marked is left behind


def test_code_that_takes_no_marked_number_is_believed():
    groups = proved(randomised(Strict(Heads())), sample(2, 5, 6))
    assert {("", "count"), ("", "axis")} <= held(groups)


def test_of_two_attributes_of_one_value_the_one_that_reaches_the_call():
    groups = proved(randomised(SameNumber()), sample(2, 5, 6))
    assert held(groups) == {("", "heads")}


def test_a_number_that_values_are_divided_by_keeps_its_size():
    class Points(nn.Module):
        """Offsets of four points for each head, over the number of points."""

        def __init__(self) -> None:
            super().__init__()
            self.points, self.heads = 4, 3
            self.make, self.back = nn.Linear(6, 12), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            offsets = self.make(x).view(len(x), self.heads, self.points)
            return self.back((offsets / self.points).tanh().amax(2) * 2)

    groups = proved(randomised(Points()), sample(4, 6))
    assert [(f.kind, f.size) for f in groups.units.families] == [("channels", 3)]
    assert "computes with this size" in str(groups)


@pytest.mark.parametrize("way", [int, lambda n: n * 1, lru_cache(lambda n: n)])
def test_a_number_that_code_computes_with_may_be_handed_on(way):
    way(2)  # a cache knows the answer for an equal number

    class Computed(Told):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x, way(self.count)).mean(1))

    groups = proved(randomised(Computed(Heads())), sample(2, 5, 6))
    assert ("", "count") in held(groups)
    assert any(f.kind == "heads" for f in groups.units.families)


def test_one_module_by_two_names():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = Told(Heads())
            self.between = nn.Linear(3, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.between(self.first(x))
            return self.second(y[:, None])

    groups = proved(randomised(Twice()), sample(2, 5, 6))
    assert held(groups) == {("first", "count"), ("second", "count")}


def test_the_run_leaves_the_model_alone():
    class Counting(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
            self.calls += 1
            return super().forward(x, count)

    model = Asking(Counting()).double().eval()
    assert ("", "count") in held(cpd.comb(model, sample(2, 5, 6)))
    assert not model.inner.calls


def test_a_container_that_cannot_be_made_again_is_believed_alone():
    class Own(list):
        def __init__(self, *, entries: list[int]) -> None:
            super().__init__(entries)

    model = randomised(Told(Heads(), shape=Own(entries=[2, 7])))
    assert held(proved(model, sample(2, 5, 6))) == {("", "count"), ("", "shape")}


def test_sizes_that_are_computed_beside_open_ones_follow_by_themselves():
    class Folded(nn.Module):
        """Heads in the batch, as sizes that the tensors tell; -1 in `expand` is no open size."""

        def __init__(self) -> None:
            super().__init__()
            self.heads = 2
            self.q, self.k, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, length, _ = x.shape
            parts = (f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k))
            q, k = (t.reshape(-1, length, t.shape[-1]) for t in parts)
            y = (q @ k.transpose(1, 2) @ k).view(n, -1, length, q.shape[-1])
            y = y + k[:1, :1, :1, None].expand(n, y.shape[1], -1, -1) * 0
            return self.o(y.transpose(1, 2).flatten(2))

    groups = proved(randomised(Folded()), sample(2, 5, 6))
    assert not groups.replaced.active
    assert {"heads", "head dims"} <= {f.kind for f in groups.units.families}


def test_tied_tensors_are_no_hindrance():
    class Tied(SameNumber):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.again = self.table

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.again(x))

    groups = proved(randomised(Tied()), torch.arange(6).view(2, 3))
    assert held(groups) == {("", "heads")}


@pytest.mark.parametrize("entry", ["tuple", "list"])
def test_entries_are_told_apart(entry):
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shape = {"tuple": tuple, "list": list}[entry]([3, 3])
            self.make, self.back = nn.Linear(6, 9), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.back(self.make(x).view(len(x), *self.shape).amax(1))

    groups = proved(randomised(Shaped()), sample(4, 6))
    assert {(site.index, size.index) for site in groups.sites for size in site.sizes} == {
        (0, 1),
        (1, 2),
    }


def test_a_stale_size_beside_an_open_one_is_not_left_to_chance():
    """Rows in runs of two, summed up: with -1 any number of runs fits what is left of them."""

    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.back = nn.Linear(6, 6), nn.Linear(3, 3)
            self.own = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.back(self.make(x).unflatten(-1, (-1, 2)).amax(-1) + self.own(x))

    groups = proved(randomised(Runs()), sample(4, 6))
    assert "left open" in groups.replaced.why[""]


def test_modules_of_one_class_that_call_other_functions_are_captured_apart():
    class Applied(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self._function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._function(x)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    layers = [nn.Linear(6, 8), Applied(split), Applied(apart), nn.Linear(8, 3)]
    groups = proved(randomised(nn.Sequential(*layers)), sample(4, 6))
    forwards = [groups.replaced.active[path].forward for path in ("1", "2")]
    assert str(forwards[0].graphs) != str(forwards[1].graphs)
