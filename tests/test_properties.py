"""The laws of DESIGN.md on random networks of every idiom (tests/generator); `make fuzz` runs more.

A failing network is printed as a spec: pasted into `REGRESSIONS` it is checked for good.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

import cpd
import generator
from cpd.plan import Plan
from generator.base import BODY
from generator.check import Removed, check, wishes
from generator.shrink import PLAIN, WISH, shrunk
from laws import TIGHT, difference, random_plans, random_scores, run, zeroed

REGRESSIONS = json.loads((Path(__file__).parent / "generator" / "regressions.json").read_text())
EACH = 5  # networks with each idiom
PARTS = 16  # that workers can share
LEAST = 0.2  # of the parameters, on average: a generator that prunes nothing proves nothing


def quick(examples: int) -> Any:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = (Phase.explicit, Phase.generate)  # `make fuzz` makes a failure small
    return settings(
        max_examples=examples, suppress_health_check=quiet, database=None, phases=phases
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_laws(part: int) -> None:
    """All laws, on five networks with each idiom, the same in every run."""
    removed: list[Removed] = []
    for name in list(generator.IDIOMS)[part::PARTS]:

        @seed(part)
        @quick(EACH)
        @given(generator.specs(name), wishes())
        def laws(spec: generator.Spec, wish: dict[str, Any]) -> None:
            removed.append(check(spec, wish))

        laws()
    assert len(removed) >= EACH * (len(generator.IDIOMS) // PARTS)
    assert sum(r.share for r in removed) / len(removed) > LEAST
    assert sum(r.units for r in removed) > LEAST * sum(r.of for r in removed)


def test_networks_are_many() -> None:
    """300 networks at least."""
    assert EACH * len(generator.IDIOMS) >= 300


@pytest.mark.parametrize("name", REGRESSIONS)
def test_found_before(name: str) -> None:
    """Networks that failed once."""
    spec, wish = REGRESSIONS[name]
    check({"input": "plane", **PLAIN, **spec}, {**WISH, **wish})


def alone(found: Any, options: dict[str, Any], kind: str) -> generator.Spec:
    """A network of one idiom between two layers."""
    first = {"is": "convolution", "width": 8} if found.needs in ("image", "plane") else None
    blocks = [
        first or {"is": "linear", "width": 8},
        {"is": found.name, **options},
        {"is": "linear", "width": 6, "act": "none"},
    ]
    return {"input": kind, **PLAIN, "blocks": blocks, "head": "mean"}


def variants(found: Any) -> list[dict[str, Any]]:
    """Every value of every option once, the other options at their first."""
    inside = [{"is": "linear", "width": 8}]
    values = {k: ([inside] if v is BODY else list(v)) for k, v in found.options.items()}
    first = {name: options[0] for name, options in values.items()}
    others = [{**first, name: x} for name, options in values.items() for x in options[1:]]
    return [first, *others]


@pytest.mark.slow
@pytest.mark.parametrize("name", generator.IDIOMS)
def test_every_variant_alone(name: str) -> None:
    """All laws on every variant of every idiom."""
    found = generator.IDIOMS[name]
    for number, options in enumerate(variants(found)):
        check(alone(found, options, "plane"), {**WISH, "seed": number})


@pytest.mark.parametrize("name", generator.IDIOMS)
def test_every_idiom_runs(name: str) -> None:
    """Every variant of every idiom is a network, on some kind of input, and answers to weights."""
    found = generator.IDIOMS[name]
    kinds = ("plane", "line", "tokens", "volume", "ids", "all six", "odd plane")
    for number, options in enumerate(variants(found)):
        spec = alone(found, options, kinds[number % len(kinds)])
        model, x = generator.build(spec), generator.inputs(spec)
        out = model(*x)
        assert out.isfinite().all()
        (out * torch.rand(out.shape, dtype=out.dtype)).sum().backward()
        reached = [p.grad is not None and bool(p.grad.any()) for p in model.parameters()]
        assert sum(reached) >= 0.6 * len(reached), options


@pytest.mark.parametrize("name", generator.IDIOMS)
def test_specs_are_data(name: str) -> None:
    """A spec written as JSON is the same network, bit for bit, and has the idiom asked for."""

    @seed(0)
    @quick(3)
    @given(generator.specs(name))
    def drawn(spec: generator.Spec) -> None:
        again = json.loads(json.dumps(spec))
        assert again == spec
        assert name in set(generator.names(spec["blocks"]))
        x = generator.inputs(spec)
        one, two = run(generator.build(spec), x), run(generator.build(again), x)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    drawn()


def test_shrinking_shrinks() -> None:
    """What does not matter to a failure is left out."""
    inside = {"is": "residual", "body": [{"is": "activation"}, {"is": "prelu", "each": False}]}
    blocks = [{"is": "convolution", "width": 9}, inside, {"is": "linear", "act": "relu"}]
    spec = {"input": "volume", **PLAIN, "blocks": blocks, "head": "mean", "seed": 5}

    def fails(spec: generator.Spec, wish: dict[str, Any]) -> bool:
        return "prelu" in set(generator.names(spec["blocks"]))

    small, wish = shrunk(spec, {**WISH, "seed": 3}, fails)
    assert small == {"input": "plane", **PLAIN, "blocks": [{"is": "prelu", "each": True}]}
    assert wish == WISH


# laws that need more than one plan ----------------------------------------------------------------


@quick(16)
@given(generator.specs(), st.integers(0, 9))
def test_cutting_twice(spec: generator.Spec, number: int) -> None:
    """Law 3: cutting twice is cutting once by the composed plan."""
    model, x = generator.build(spec), generator.inputs(spec)
    first = next(random_plans(cpd.comb(model, x, exact=True), 1, number))
    middle = cpd.cut(model, first, verify=False)
    rest = cpd.comb(middle, x, exact=True)
    for later in random_plans(rest, 2, number + 5):
        twice = cpd.cut(middle, later, verify=False)
        once = cpd.cut(model, first.then(later), verify=False)
        for a, b in zip(twice.state_dict().items(), once.state_dict().items(), strict=True):
            assert a[0] == b[0]
            assert torch.allclose(a[1], b[1], rtol=1e-12, atol=0)
        assert difference(run(once, x), run(twice, x)) <= TIGHT
        costs = first.then(later).costs["params"]
        assert costs == (cpd.costs.params(model), cpd.costs.params(once))


@quick(12)
@given(generator.specs(), st.integers(0, 9))
def test_saved_is_loaded(spec: generator.Spec, number: int) -> None:
    """Law 5."""
    model, x = generator.build(spec), generator.inputs(spec)
    plan = next(random_plans(cpd.comb(model, x), 1, number))
    small = cpd.cut(model, plan, verify=False)
    with tempfile.TemporaryDirectory() as folder:
        cpd.save(small, plan, Path(folder) / "out")
        loaded = cpd.load(Path(folder) / "out", copy.deepcopy(model))
    other = generator.inputs(spec, 3)
    for a, b in zip(run(small, other), run(loaded.eval(), other), strict=True):
        assert torch.equal(a, b)


@quick(12)
@given(generator.specs(), st.integers(0, 9))
def test_masking_is_undone(spec: generator.Spec, number: int) -> None:
    """Masked is zeroed while the mask is on; afterwards the model is what it was, bit for bit."""
    model, x = generator.build(spec), generator.inputs(spec)
    plans: list[Plan] = list(random_plans(cpd.comb(model, x), 3, number))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [run(zeroed(model, plan), x) for plan in plans]
    with cpd.mask(model, plans[0]) as handle:
        for plan, outputs in zip(plans, wanted, strict=True):
            handle.update(plan)
            assert all(torch.equal(a, b) for a, b in zip(run(model, x), outputs, strict=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@quick(10)
@given(generator.specs(), st.integers(0, 9))
def test_same_seed_same_plan(spec: generator.Spec, number: int) -> None:
    """Law 6: ties are broken by the seed alone."""
    model: nn.Module = generator.build(spec)
    x = generator.inputs(spec)
    plans = []
    for groups in (cpd.comb(model, x), cpd.comb(model, x)):
        scores = {name: torch.zeros_like(s) for name, s in random_scores(groups, 0).items()}
        options: dict[str, Any] = {"seed": number, "unreachable": "closest", "min_keep": 0}
        plans.append(cpd.choose(groups, scores, "params=0.6", **options))
    assert plans[0].to_json() == plans[1].to_json()
