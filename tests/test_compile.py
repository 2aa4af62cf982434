"""What is cut compiles in one graph, whichever way its code follows the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cpd
from cpd.attention import CutMultiheadAttention
from laws import difference, flat, random_scores, randomised, wide
from test_idioms import IDIOMS
from test_replace import network

# name of an idiom -> how its code follows
FOLLOWED = {
    "attention": "attributes",
    "nn.MultiheadAttention": "a layer of its own",
    "nn.GRU both ways": "weights that a layer holds twice",
    "inverted residual": "convolutions",
    "grouped queries by one op": "attributes, of groups of heads",
    "squeeze and excite": "gates",
}


def cut(model: nn.Module, inputs: Any, share: float = 0.6) -> nn.Module:
    groups = cpd.comb(model, inputs)
    plan = cpd.choose(groups, random_scores(groups, 1), {"params": share}, unreachable="closest")
    assert plan.masks()
    return cpd.cut(model, plan)


def compiled_as_it_is(small: nn.Module, inputs: Any, backend: str) -> None:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        wanted = flat(small(*inputs))
        got = flat(torch.compile(small, backend=backend, fullgraph=True)(*inputs))
    assert difference(got, wanted) <= 1e-12


@pytest.mark.parametrize("name", FOLLOWED)
def test_idioms_compile(name: str) -> None:
    one = IDIOMS[name]
    small = cut(randomised(one.make()), wide(one.inputs))
    held = any(isinstance(part, CutMultiheadAttention) for part in small.modules())
    assert held == (name == "nn.MultiheadAttention")
    compiled_as_it_is(small, wide(one.inputs), "eager")


def test_a_replaced_forward_compiles() -> None:
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    small = cut(network().double(), x)
    assert any(hasattr(type(part), "cut_from") for part in small.modules())
    compiled_as_it_is(small, x, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nn.MultiheadAttention", "inverted residual"])
def test_ahead_of_time(name: str) -> None:
    one = IDIOMS[name]
    small = cut(randomised(one.make()), wide(one.inputs))
    compiled_as_it_is(small, wide(one.inputs), "aot_eager")
    torch._dynamo.reset()
    inputs = wide(one.inputs)
    outs = flat(torch.compile(small, backend="aot_eager")(inputs))
    sum(out.square().sum() for out in outs).backward()
    assert any(p.grad is not None for p in small.parameters())
