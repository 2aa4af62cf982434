"""Code that takes another way while it is traced: both follow a cut, or the channels stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import cpd
from cpd.calls import Uncapturable
from cpd.errors import ArtefactError, InputError
from cpd.forward import Forward
from cpd.graph import Step
from cpd.partners import apart
from laws import prove, random_plans, randomised, run, zeroed

HEADS, GROUPS, DIM = 6, 2, 4
Copies = Callable[[torch.Tensor], torch.Tensor]


def expanded(x: torch.Tensor) -> torch.Tensor:
    n, groups, length, dim = x.shape
    times = HEADS // GROUPS
    x = x[:, :, None].expand(n, groups, times, length, dim)
    return x.reshape(n, groups * times, length, dim)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(HEADS // GROUPS, dim=1)


def indexed(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, k // 3] for k in range(HEADS)], 1)


class Fused(nn.Module):
    """Grouped queries of one projection, sliced at products of numbers that no attribute holds.

    The kernel for groups is taken where there is no mask, copies of the keys where there is one.
    """

    def __init__(self, copies: Copies | None = None) -> None:
        super().__init__()
        self.numbers, self.copies = SimpleNamespace(heads=HEADS, groups=GROUPS), copies
        self.dim = DIM
        self.qkv = nn.Linear(12, (HEADS + 2 * GROUPS) * DIM)
        self.out = nn.Linear(HEADS * DIM, 12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.dim)
        first = self.numbers.heads * self.dim
        second = first + self.numbers.groups * self.dim
        x = self.qkv(x)
        q, k, v = (
            part.view(shape).transpose(1, 2)
            for part in (x[..., :first], x[..., first:second], x[..., second:])
        )
        grouped = mask is None and self.copies is None
        copies = expanded if mask is not None else self.copies
        if copies is not None:
            k, v = copies(k), copies(v)
        x = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=grouped, scale=0.4
        )
        return self.out(x.transpose(1, 2).reshape(*shape[:2], -1))


class Causal(nn.Module):
    """Makes no mask where the kernel needs none; a trace cannot know that it does not."""

    def __init__(self, copies: Copies | None = None, *, again: bool = False) -> None:
        super().__init__()
        self.stem, self.attention, self.again = nn.Linear(6, 12), Fused(copies), again
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        length = x.shape[1]
        if mask is None and isinstance(x, FakeTensor):
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        x = self.stem(x)
        x = x + self.attention(x, mask)
        if self.again:
            x = x + self.attention(x, mask)
        return self.head(x)


def inputs(batch: int = 2, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 6, generator=generator, dtype=torch.float64)


def kinds(groups: cpd.Groups) -> set[str]:
    return {family.kind for group in groups for family in group.families}


def masks(length: int) -> list[torch.Tensor | None]:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    other = causal.clone()
    other[2:, 1] = False
    return [None, causal, other]


def test_heads_go_by_either_way() -> None:
    model = randomised(Causal())
    groups = cpd.comb(model, inputs())
    assert kinds(groups) >= {"heads", "head groups", "head dims"}
    assert len(groups.replaced.active["attention"].others) == 1
    _, removed = prove(model, inputs(), exact=True, count=4)
    assert removed > 0
    for plan in random_plans(groups, 3):
        small, whole = cpd.cut(model, plan), zeroed(model, plan)
        for batch, length in ((1, 7), (3, 7), (2, 11)):
            for mask in masks(length):
                (mine,) = run(small, (inputs(batch, length), mask))
                torch.testing.assert_close(
                    mine, run(whole, (inputs(batch, length), mask))[0], rtol=1e-9, atol=1e-9
                )


def test_both_ways_train_and_are_kept_in_files() -> None:
    small, plan = cpd.prune(randomised(Causal()), inputs(), importance="random", target="macs=0.5")
    forward = plan.forwards["attention"]
    assert len(forward.others) == 1
    assert Forward.from_data(json.loads(json.dumps(forward.to_data()))) == forward
    again = cpd.cut(randomised(Causal()), cpd.Plan.from_json(plan.to_json()))
    for mask in masks(7):
        torch.testing.assert_close(again(inputs(), mask), small(inputs(), mask), rtol=0, atol=0)
        again.train()(inputs(), mask).sum().backward()
        assert all(parameter.grad is not None for parameter in again.parameters())
        again.eval().zero_grad()


def test_cut_twice() -> None:
    model = randomised(Causal())
    first, _ = cpd.prune(model, inputs(), importance="random", target="macs=0.8")
    groups, removed = prove(first, inputs(), exact=True, count=2)
    assert removed > 0
    assert kinds(groups) & {"heads", "head dims", "head groups"}


def test_a_file_holds_operators_only_in_every_form() -> None:
    _, plan = cpd.prune(randomised(Causal()), inputs(), importance="random", target="macs=0.5")
    data = json.loads(plan.to_json())
    data["forwards"]["attention"]["others"][0]["graphs"]["eval"][3]["op"] = "os.system"
    with pytest.raises(ArtefactError, match="no operator that a forward may call"):
        cpd.Plan.from_json(json.dumps(data))


def test_what_is_neither_form_is_refused() -> None:
    small, _ = cpd.prune(randomised(Causal()), inputs(), importance="random", target="macs=0.5")
    with pytest.raises(InputError, match=r"mask is True, but .* cut for None"):
        small.attention(torch.randn(2, 7, small.stem.out_features), True)


def test_pairs_read_from_pairs() -> None:
    """Two calls that are alike, in the other order: what reads them tells that they are not."""

    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.view(2, 4).sub(y.view(2, 4))

    program = torch.export.export(Two(), (torch.ones(8), torch.ones(8)), strict=False)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    steps = [Step(node, None) for node in calls]
    graph = [
        {"name": name, "op": op, "args": {"list": args}, "kwargs": {"dict": {}}}
        for name, op, args in (
            ("a", "aten.view.default", [{"node": "x"}, {"list": [2, 4]}]),
            ("b", "aten.view.default", [{"node": "y"}, {"list": [2, 4]}]),
            ("out", "aten.sub.Tensor", [{"node": "a"}, {"node": "b"}]),
        )
    ]
    assert [number for number, _ in apart(graph, steps)] == [0, 1, 2]
    graph[2]["args"]["list"].reverse()
    with pytest.raises(Uncapturable, match=r"disagree about aten\.sub"):
        apart(graph, steps)


@pytest.mark.parametrize("copies", [interleaved, indexed])
def test_a_number_that_the_trace_does_not_know_is_not_left_as_it_is(copies: Copies) -> None:
    """The code as it runs holds how often a key is copied; its trace has no such call."""
    model = randomised(Causal(copies))
    groups = cpd.comb(model, inputs())
    assert "does not say what the numbers" in groups.replaced.why_not["attention"]
    assert not kinds(groups) & {"heads", "head groups", "head dims"}
    prove(model, inputs(), exact=True, count=2)


def test_a_module_that_is_called_twice_takes_one_way() -> None:
    groups = cpd.comb(randomised(Causal(again=True)), inputs())
    assert "called more than once" in groups.replaced.why_not["attention"]
    assert not kinds(groups) & {"heads", "head groups", "head dims"}


def test_the_class_is_kept_where_asked() -> None:
    groups = cpd.comb(randomised(Causal()), inputs(), keep_class="strict")
    assert not groups.replaced.active
    small, _ = cpd.prune(
        randomised(Causal()), inputs(), importance="random", target="macs=0.9",
        keep_class="strict", unreachable="closest",
    )  # fmt: skip
    assert type(small.attention) is Fused
    mixed: Any = small(inputs(), masks(7)[1])
    assert mixed.shape == (2, 7, 5)
