"""The laws of the design, on one network given as a spec."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import torch
from torch import nn

import cpd
from cpd.groups import Groups
from cpd.plan import Plan
from laws import TIGHT, difference, random_scores, run, zeroed

from .network import Spec, build, inputs, random

TRAINS = 1e-7  # statistics of a batch in training divide by what can be small


@dataclass(frozen=True)
class Removed:
    """What the plans of one network removed: units, of how many; the share of parameters."""

    units: int
    of: int
    share: float


def wishes() -> st.SearchStrategy[dict[str, Any]]:
    """Options of `choose`, as data."""
    shares = st.sampled_from((0.5, 0.75, 0.3, 0.05))
    costs = st.sampled_from((("params",), ("macs",), ("params", "macs")))
    target = costs.flatmap(lambda names: st.fixed_dictionaries(dict.fromkeys(names, shares)))
    return st.fixed_dictionaries(
        {
            "target": target,
            "ranking": st.sampled_from(("isomorphic", "global", "uniform")),
            "strategy": st.sampled_from(("oneshot", "greedy")),
            "min_keep": st.sampled_from((0.0, 0.1, 0.4)),
            "multiple_of": st.sampled_from((1, 1, 1, 2)),
            "seed": st.integers(0, 99),
        }
    )


def check(spec: Spec, wish: dict[str, Any]) -> Removed:
    """Prove all laws on the network of a spec, combed both ways. Raises where one does not hold."""
    model, x = build(spec), inputs(spec)
    before = copy.deepcopy(model.state_dict())
    with traced_once():
        found = [_check(spec, model, x, wish, exact=exact) for exact in (True, False)]
    _same_state(before, model.state_dict(), "the model given in")
    assert not model.training
    return Removed(
        sum(r.units for r in found), sum(r.of for r in found), sum(r.share for r in found) / 2
    )


@contextmanager
def traced_once() -> Iterator[None]:
    """Comb one model several times on one trace: tracing takes most of the time."""
    module = sys.modules["cpd.comb"]
    made = module.trace
    kept: dict[Any, Any] = {}

    def trace(model: nn.Module, x: Any, **options: Any) -> Any:
        key = (id(model), id(x), str(options))
        if key not in kept:
            kept[key] = (made(model, x, **options), model, x)
        return kept[key][0]

    with patch.object(module, "trace", trace):
        yield


def _check(
    spec: Spec, model: nn.Module, x: tuple[Any, ...], wish: dict[str, Any], *, exact: bool
) -> Removed:
    state = torch.get_rng_state()
    groups = cpd.comb(model, x, exact=exact)
    scores = random_scores(groups, wish["seed"])
    plan = cpd.choose(groups, scores, **wish, unreachable="closest")
    small = cpd.cut(model, plan, verify=False)
    told = f"exact={exact}\n{groups}\n{plan}"
    proof = cpd.verify(model, small, plan, x)
    assert proof, f"{proof}\n{told}"
    assert proof.max_error <= TIGHT
    assert cpd.costs.params(small) == plan.costs["params"][1], f"parameters\n{told}"
    if wish["seed"] % 4 == 0 and exact == bool(wish["seed"] % 8):  # it takes a trace more
        assert cpd.costs.macs(small, x) == plan.costs["macs"][1], f"MACs\n{told}"
    assert torch.equal(torch.get_rng_state(), state), "the random state moved"
    _shapes_are_the_plan(model, small, plan)
    if exact:
        _is_zeroed(spec, model, small, plan)
        _nothing_is_identity(model, groups, scores)
    _copies(small, plan, x)
    _trains(model, small, spec)
    units = [(w.before - w.after, w.before) for w in plan.widths]
    left = plan.costs["params"][1] / max(plan.costs["params"][0], 1)
    return Removed(sum(u for u, _ in units), sum(n for _, n in units), 1 - left)


def _same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str) -> None:
    assert list(a) == list(b), what
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), f"{what}: {name} changed"


def _shapes_are_the_plan(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Names, types and shapes of all tensors are those that the plan says, no more and no less."""
    assert getattr(type(small), "cut_from", type(small)) is type(model)
    masks = plan.masks()
    held, full = small.state_dict(), model.state_dict()
    assert list(held) == list(full)
    for name, tensor in held.items():
        kept = int(masks[name].sum()) if name in masks else full[name].numel()
        assert tensor.numel() == kept, f"{name} has {tensor.numel()} entries, the plan keeps {kept}"
        assert tuple(tensor.shape) == plan.new_shape(name)
        assert tensor.dtype == full[name].dtype
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    assert grads == {name: p.requires_grad for name, p in small.named_parameters()}


def _is_zeroed(spec: Spec, model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Law 1 by no code of the library, on other inputs and batch sizes, and in training mode."""
    twin = zeroed(model, plan)
    for batch in (2, 3):
        other = inputs(spec, batch, seed=7)
        worst = difference(run(small, other), run(twin, other))
        assert worst <= TIGHT, f"cut differs from zeroed by {worst:.1e} at batch {batch}\n{plan}"
    if not random(spec):
        x = inputs(spec, 4, seed=8)
        worst = difference(run(copy.deepcopy(small).train(), x), run(twin.train(), x))
        assert worst <= TRAINS, f"cut differs from zeroed by {worst:.1e} in training\n{plan}"


def _nothing_is_identity(model: nn.Module, groups: Groups, scores: dict[str, torch.Tensor]) -> None:
    """Law 3: an empty plan changes nothing."""
    nothing = cpd.choose(groups, scores, "params=1")
    assert not nothing.masks()
    _same_state(
        model.state_dict(), cpd.cut(model, nothing, verify=False).state_dict(), "cut(nothing)"
    )


def _copies(small: nn.Module, plan: Plan, x: tuple[Any, ...]) -> None:
    """Copies and plans written as JSON are the same."""
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    for a, b in zip(run(small, x), run(copy.deepcopy(small), x), strict=True):
        assert torch.equal(a, b)


def _trains(model: nn.Module, small: nn.Module, spec: Spec) -> None:
    """Where the original takes a step of training, the cut network does."""
    reached = _step(copy.deepcopy(model), spec)
    mine = _step(copy.deepcopy(small), spec)
    assert mine <= reached
    assert len(mine) == len(reached), f"no gradient reaches {sorted(reached - mine)} any more"


def _step(model: nn.Module, spec: Spec) -> set[str]:
    model.train()
    loss = sum(y.square().mean() for y in _outputs(model(*inputs(spec, 4, seed=8))))
    assert loss.isfinite()
    if loss.requires_grad:  # not where everything is frozen
        loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def _outputs(out: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
