"""Latency as a budget, with clocks that are functions: no verdict hangs on a real one."""

from __future__ import annotations

import json
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import cpd
from cpd.errors import InputError, UnknownName
from cpd.measure import Clock, Measurer, measurer
from cpd.onecall import OneCall, Slot, as_onnx
from cpd.planning import alive_of
from cpd.table import Table, alignment, ladder
from laws import random_scores

X = torch.randn(1, 3, 32, 32)


def stairs(width: int) -> Any:
    """A clock that counts blocks of `width` rows and columns of every weight; a network takes more
    than its calls do: 0.2 ms for each of its weights that no narrowing makes less.
    """

    def clock(module: nn.Module, inputs: Any) -> float:
        weights = [p for p in module.parameters() if p.ndim > 1]
        blocks = [ceil(p.shape[0] / width) * ceil(p.shape[1] / width) for p in weights]
        more = 0.0 if isinstance(module, OneCall) else 0.2 * len(weights)
        return width * width * sum(blocks) / 1000 + more

    return clock


def net() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
              nn.Conv2d(96, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
              nn.Linear(64, 10)]  # fmt: skip
    return nn.Sequential(*layers)


@pytest.mark.parametrize("target", ["latency=0.5", "latency_ms=7", "latency=0.7,params=0.4"])
@pytest.mark.parametrize("strategy", ["oneshot", "knapsack"])
def test_what_the_cut_network_takes_is_near_the_target(target: str, strategy: str) -> None:
    """Though calls alone, and lines between rungs, tell something else."""
    model, clock = net(), stairs(4)
    groups = cpd.comb(model, X)
    whole = clock(model, X)
    plan = cpd.choose(groups, random_scores(groups, 0), target, strategy=strategy, measure=clock)
    real = clock(cpd.cut(model, plan), X)
    assert plan.costs["latency_ms"] == (whole, real)
    asked = plan.options["target"]
    limit = asked.get("latency_ms", asked.get("latency", 1) * whole)
    (note,) = [note for note in plan.notes if note.startswith("latency")]
    assert f"{real:.4g} ms measured" in note
    if "params" in asked:  # which decides here
        assert plan.costs["params"][1] <= 0.4 * plan.costs["params"][0]
        assert real <= 1.03 * limit
    else:
        assert 0.97 * limit <= real <= 1.03 * limit
    assert ("not within 3%: another budget decides" in note) == (real < 0.97 * limit)
    again = cpd.Plan.from_json(plan.to_json())
    assert again.costs == plan.costs


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_real_networks(name: str) -> None:
    if name == "vit":
        model: nn.Module = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10
        )
    else:
        model = torchvision.models.resnet18(weights=None, num_classes=10)
    groups, clock = cpd.comb(model.eval(), X), stairs(8)
    plan = cpd.choose(groups, random_scores(groups, 0), "latency=0.6", measure=clock)
    small = cpd.cut(model, plan)
    ratio = clock(small, X) / clock(model, X)
    assert 0.58 <= ratio <= 0.62


@pytest.mark.parametrize("strategy", ["oneshot", "greedy", "knapsack"])
def test_branches_count_with_the_time_that_they_take(strategy: str) -> None:
    """Whole branches go, and the network without them takes what was asked."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=6, num_classes=10
    ).eval()
    groups, clock = cpd.comb(model, X, depth=True), stairs(8)
    assert len(groups.branches) == 12
    scores = random_scores(groups, 0)
    inside = {c for branch in groups.branches[6:] for c in branch.inside.tolist()}
    for group in groups:
        scores[group.name][torch.tensor([c in inside for c in group.classes.tolist()])] *= 1e-3
    options: dict[str, Any] = {"strategy": strategy, "measure": clock, "min_keep": 0.3}
    plan = cpd.choose(groups, scores, "latency=0.5", **options)
    assert plan.branches
    small = cpd.cut(model, plan)
    ratio = clock(small, X) / clock(model, X)
    assert 0.485 <= ratio <= 0.515
    assert plan.costs["latency_ms"] == (clock(model, X), clock(small, X))


def test_every_call_can_be_made_at_other_widths() -> None:
    """Each call of the graph runs alone, at all its rungs; inputs and weights fit each other."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10
    )
    made = []

    def clock(module: nn.Module, inputs: Any) -> float:
        if isinstance(module, OneCall):
            made.append(module(*inputs))
        return 1.0

    groups = cpd.comb(model, X)
    table = Table(groups, measurer(clock))
    for seed, share in enumerate((0.9, 0.6, 0.3)):
        plan = cpd.choose(groups, random_scores(groups, seed), {"params": share}, ranking="global")
        table.values(table.sizes(alive_of(groups, plan)[groups.units.label]))
    assert len(table.calls) > 10
    assert len(made) > 3 * len(table.calls)


def test_lines_between_rungs() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))
    groups = cpd.comb(model, torch.randn(2, 4))
    table = Table(groups, measurer(stairs(1)))
    assert ladder(64).tolist() == [8, 16, 24, 32, 40, 48, 56, 64]
    assert ladder(3).tolist() == [1, 2, 3]
    counted = table.values(table.base).sum()
    assert counted == pytest.approx((4 * 64 + 64 * 4) / 1000)
    assert table.count(groups.everything()[groups.units.label]) == pytest.approx(table.whole)
    sizes = table.base.copy()
    sizes[sizes == 64] = 29
    assert table.values(sizes).sum() == pytest.approx(2 * 4 * 29 / 1000)
    rungs = Table(groups, measurer(stairs(8)))
    at = [rungs.values(np.where(table.base == 64, n, table.base)).sum() for n in (24, 29, 32)]
    assert at[1] == pytest.approx(at[0] + (at[2] - at[0]) * 5 / 8)


@pytest.mark.parametrize(("width", "found"), [(1, 1), (8, 8), (16, 16), (32, 32)])
def test_the_multiple_that_pays_is_found(width: int, found: int) -> None:
    groups = cpd.comb(net(), X)
    assert alignment(groups, measurer(stairs(width))) == found


def test_multiples_by_measuring() -> None:
    groups = cpd.comb(net(), X)
    plan = cpd.choose(
        groups, random_scores(groups, 0), "params=0.5", multiple_of="auto", measure=stairs(16)
    )
    assert all(w.after % 16 == 0 for w in plan.widths)
    assert plan.options["multiple_of"] == 16


def test_a_target_out_of_reach_and_one_that_asks_nothing() -> None:
    groups = cpd.comb(net(), X)
    with pytest.raises(cpd.UnreachableTarget, match=r"latency=0\.01 cannot be reached"):
        cpd.choose(groups, random_scores(groups, 0), "latency=0.01", measure=stairs(4))
    plan = cpd.choose(groups, random_scores(groups, 0), "latency=1", measure=stairs(4))
    assert not plan.masks()


@pytest.mark.parametrize("share", [0.6, 0.1])
def test_what_counts_is_the_network_not_the_table(share: float) -> None:
    """Calls by themselves cost 10 ms more each: by the table hardly any of the time can go."""
    plain = stairs(1)

    def clock(module: nn.Module, inputs: Any) -> float:
        return float(plain(module, inputs)) + (10.0 if isinstance(module, OneCall) else 0.0)

    model = net()
    groups = cpd.comb(model, X)
    scores, whole = random_scores(groups, 0), clock(model, X)
    least = cpd.choose(groups, scores, "params=0.001", unreachable="closest")
    table = Table(groups, measurer(clock))
    assert table.count(alive_of(groups, least)[groups.units.label]) > 0.8 * table.whole
    plan = cpd.choose(groups, scores, f"latency={share}", measure=clock)
    # one unit of so small a network is some per cent
    assert 0.94 * share * whole <= clock(cpd.cut(model, plan), X) <= 1.03 * share * whole
    with pytest.raises(cpd.UnreachableTarget) as caught:  # what cannot be met is the other one
        cpd.choose(groups, scores, f"latency={share},params=0.001", measure=clock)
    real = clock(cpd.cut(model, least), X)
    assert caught.value.closest["latency"] == pytest.approx(real / whole)


@pytest.mark.parametrize("power", [0.1, 0.15, 0.2, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_goes_on_where_a_limit_chooses_what_was_measured(
    power: float, seed: int
) -> None:
    """Of a small network most of the time is no work: what is left has to be a small part."""
    calls = stairs(1)
    model = net()
    most = calls(model, X)

    def clock(module: nn.Module, inputs: Any) -> float:
        work = float(calls(module, inputs))
        return work if isinstance(module, OneCall) else most * (work / most) ** power

    groups = cpd.comb(model, X)
    scores = random_scores(groups, seed)
    least = cpd.choose(groups, scores, "params=0.001", unreachable="closest")
    share = (clock(cpd.cut(model, least), X) / most + 1) / 2
    plan = cpd.choose(groups, scores, f"latency={share}", measure=clock)
    assert clock(cpd.cut(model, plan), X) / most == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize("floor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("strategy", ["oneshot", "greedy", "knapsack", "uniform"])
def test_a_target_is_met_where_limits_tell_no_networks_apart(floor: float, strategy: str) -> None:
    """Calls take the same whatever their width, or down to a floor: the network does not."""
    work = stairs(1)

    def clock(module: nn.Module, inputs: Any) -> float:
        took = float(work(module, inputs))
        if not isinstance(module, OneCall):
            return took
        return max(took, floor * work(net(), X)) if floor else 1.0

    model = net()
    groups = cpd.comb(model, X)
    for share in (0.7, 0.4):
        plan = cpd.choose(
            groups, random_scores(groups, 0), {"latency": share}, strategy=strategy, measure=clock
        )
        real = clock(cpd.cut(model, plan), X) / clock(model, X)
        assert real == pytest.approx(share, rel=0.031)


@pytest.mark.parametrize(("width", "share"), [(32, 0.3), (0, 0.6)])
def test_of_networks_equally_fast_the_one_that_loses_least_is_taken(
    width: int, share: float
) -> None:
    """Clocks with a few steps: what lies on the last fast one is searched for, from both sides."""
    work = stairs(width or 1)
    most = work(net(), X)

    def clock(module: nn.Module, inputs: Any) -> float:
        if isinstance(module, OneCall):
            return 1.0
        took = float(work(module, inputs))
        return took if width else (1.0 if took > 0.45 * most else 0.2)

    model = net()
    groups = cpd.comb(model, X)
    scores = random_scores(groups, 0)
    plan = cpd.choose(groups, scores, {"latency": share}, measure=clock)
    real = plan.costs["latency_ms"][1]
    macs = plan.widths and cpd.costs.macs(cpd.cut(model, plan), X)
    assert real <= share * plan.costs["latency_ms"][0]
    more = {"macs": min(1.15 * macs / cpd.costs.macs(model, X), 1.0)}
    wider = cpd.choose(groups, scores, more)
    assert clock(cpd.cut(model, wider), X) > real


def test_budgets_that_a_second_order_cannot_meet_are_not_broken() -> None:
    """A function that gives another order each time: the first one meets what is asked."""
    work, calls = stairs(1), []

    def clock(module: nn.Module, inputs: Any) -> float:
        return 1.0 if isinstance(module, OneCall) else float(work(module, inputs))

    def own(found: Any) -> Any:
        calls.append(found)
        order = np.random.default_rng(len(calls)).permutation(len(found))
        return order if len(calls) < 2 else order[: len(order) // 10]

    groups = cpd.comb(net(), X)
    target = {"latency": 0.9, "params": 0.5}
    plan = cpd.choose(groups, random_scores(groups, 0), target, strategy=own, measure=clock)
    assert len(calls) > 1
    assert plan.costs["params"][1] <= 0.5 * plan.costs["params"][0]


@pytest.mark.parametrize("target", ["latency_ms=20000", "latency_ms=1e9"])
def test_a_latency_that_asks_for_nothing(target: str) -> None:
    groups = cpd.comb(net(), X)
    assert not cpd.choose(groups, random_scores(groups, 0), target, measure=stairs(1)).masks()


def test_along_an_order_the_other_budgets_hold() -> None:
    """One that asks for less than the time does decides, and what it leaves is not cut further."""
    work = stairs(1)

    def clock(module: nn.Module, inputs: Any) -> float:
        return 1.0 if isinstance(module, OneCall) else float(work(module, inputs))

    model = net()
    groups = cpd.comb(model, X)
    scores = random_scores(groups, 0)
    for params, decides in ((0.3, True), (0.9, False)):
        plan = cpd.choose(groups, scores, {"latency": 0.6, "params": params}, measure=clock)
        left = plan.costs["params"][1] / plan.costs["params"][0]
        real = clock(cpd.cut(model, plan), X) / clock(model, X)
        assert left <= params
        assert (real < 0.97 * 0.6) == decides
        assert (left > 0.95 * params) == decides


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target": "latency=0.5,latency_ms=3"}, InputError, "names latency and latency_ms"),
        ({"target": "latency_ms=-1"}, InputError, "target latency_ms=-1"),
        ({"target": "latency=0.5", "measure": "clock"}, UnknownName, "unknown measurer 'clock'"),
        ({"target": "latency=0.5", "measure": {"eager": {"x": 1}}}, UnknownName, "option of meas"),
        ({"target": "latency=0.5", "measure": lambda *_: -1.0}, InputError, "gave -1.0; millise"),
        (
            {"target": "latency=0.5", "measure": {"onnx": {"runs": 0}}},
            InputError,
            "runs must be a w",
        ),
        (
            {"target": "latency=0.5", "measure": {"onnx": {"device": "cuda"}}},
            InputError,
            "onnx is measured on the CPU, not on 'cuda'",
        ),
        (
            {"target": "latency=0.5", "measure": {"eager": {"device": "abacus"}}},
            InputError,
            "cannot measure on the device 'abacus'",
        ),
        ({"target": "macs=0.5", "multiple_of": "most"}, InputError, "multiple_of is 'most'"),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], error: Any, text: str) -> None:
    groups = cpd.comb(net(), X)
    with pytest.raises(error, match=text):
        cpd.choose(groups, random_scores(groups, 0), **options)


def test_what_was_measured_is_kept_with_the_fingerprint(tmp_path: Path) -> None:
    calls = []

    def clock(module: nn.Module, inputs: Any) -> float:
        calls.append(module)
        return 2.0

    path = tmp_path / "deep" / "latency.json"
    for mark, more in (("farm A", 1), ("farm A", 0), ("farm B", 1)):
        before = len(calls)
        clock.fingerprint, clock.cache = mark, path  # type: ignore[attr-defined]
        found = measurer(clock)
        assert found("a call", lambda: (nn.Identity(), ())) == 2.0
        found.save()
        assert len(calls) - before == more
    assert json.loads(path.read_text()) == {
        "farm A": {"a call": 2.0}, "farm B": {"a call": 2.0}
    }  # fmt: skip
    path.write_text("{")
    with pytest.warns(UserWarning, match="latencies are measured anew"):
        measurer(clock)


@pytest.mark.parametrize("name", ["eager", pytest.param("onnx", marks=pytest.mark.slow)])
def test_real_clocks_tick(name: str, tmp_path: Path) -> None:
    """They give times, and note under which machine; which times is not for a test to say."""
    groups = cpd.comb(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    path = tmp_path / "latency.json"
    found = measurer({name: {"runs": 3, "warmup": 1, "threads": 1, "cache": str(path)}})
    assert isinstance(found, Measurer)
    table = Table(groups, found)
    assert len(table.calls) == (2 if name == "onnx" else 3)
    assert table.whole > 0
    assert table.count(groups.everything()[groups.units.label]) == pytest.approx(table.whole)
    found.save()
    (mark,) = json.loads(path.read_text())
    assert mark.startswith(f"{name}: ")
    assert mark.endswith("1 threads, median of 3")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_eager_latency_on_a_gpu() -> None:
    """A network on the GPU is measured there."""
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))
    groups = cpd.comb(model, torch.randn(64, 64))
    found = measurer({"eager": {"device": "cuda", "runs": 20, "cache": None}})
    assert Table(groups, found).whole > 0
    plan = cpd.choose(
        groups,
        random_scores(groups, 0),
        "latency=0.9",
        measure={"eager": {"device": "cuda", "cache": None}},
        unreachable="closest",
    )
    assert cpd.cut(model, plan)


@pytest.mark.parametrize("name", ["eager", pytest.param("onnx", marks=pytest.mark.slow)])
def test_what_is_measured_stays_as_it_is(name: str) -> None:
    """Modes, places and tensors of the user's own network, whatever a clock needs."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model.train()
    model[1].eval()  # frozen by the user
    modes = [module.training for module in model.modules()]
    held = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    same = [id(tensor) for tensor in model.parameters()]
    groups = cpd.comb(model, torch.randn(2, 4))
    measure = {name: {"runs": 5, "warmup": 1, "threads": 1, "cache": None}}
    cpd.choose(
        groups, random_scores(groups, 0), "latency=0.5", measure=measure, unreachable="closest"
    )
    assert [module.training for module in model.modules()] == modes
    assert [id(tensor) for tensor in model.parameters()] == same
    assert all(torch.equal(tensor, held[key]) for key, tensor in model.state_dict().items())


def test_networks_take_turns_so_that_a_machine_that_slows_down_hits_both() -> None:
    """The second one takes twice as long, while each run slows the machine by a tenth."""
    small, whole = nn.Linear(2, 2), nn.Linear(2, 2)
    slow, order = [1.0], []

    def prepare(module: nn.Module, inputs: Any) -> Any:
        def run(count: int) -> list[float]:
            order.append(module)
            found = []
            for _ in range(count):
                slow[0] *= 1.02
                found.append(slow[0] * (1.0 if module is small else 2.0))
            return found

        return run

    clock = Clock(prepare, runs=40, warmup=1)
    assert clock.share(small, whole, ()) == pytest.approx(0.5, rel=0.02)
    assert order.count(small) == order.count(whole) > 16
    assert slow[0] > 10  # one after the other they would have seemed to differ by more than that


def test_a_network_that_seems_near_is_measured_again() -> None:
    """A clock that is wrong the first time: what counts is the mean of both."""
    model, true, seen = net(), stairs(4), []

    class Once(Clock):
        def share(self, module: nn.Module, whole: nn.Module, inputs: Any) -> float:
            share = true(module, inputs) / true(whole, inputs) * (1.0 if seen else 0.98)
            seen.append((module, share))
            return share

    found = Measurer(true, "own", cache=None)
    found.clock = Once(lambda module, inputs: lambda count: [1.0] * count, 1, 1)
    groups = cpd.comb(model, X)
    plan = cpd.choose(groups, random_scores(groups, 0), "latency=0.5", measure=found)
    before, after = plan.costs["latency_ms"]
    assert before == true(model, X)
    pairs = pairwise(seen)
    twice = [(a + b) / 2 for (one, a), (other, b) in pairs if one is other]
    assert pytest.approx(after / before) in twice
    assert after == pytest.approx(true(cpd.cut(model, plan), X), rel=0.011)


aten = torch.ops.aten
X0, W0, W1 = Slot(None), Slot(0), Slot(1)


@pytest.mark.parametrize(
    ("target", "args", "weights", "inputs"),
    [
        (aten.conv2d.default, [X0, W0, W1, [2, 1], [1, 0], [1, 2]],
         [(6, 4, 3, 3), (6,)], [(2, 4, 9, 9)]),
        (aten.conv2d.default, [X0, W0, None, [1, 1], [1, 1], [1, 1], 4],
         [(8, 1, 3, 3)], [(2, 4, 5, 5)]),
        (aten.conv1d.default, [X0, W0], [(6, 4, 3)], [(2, 4, 9)]),
        (aten.linear.default, [X0, W0, W1], [(6, 4), (6,)], [(2, 4)]),
        (aten.linear.default, [X0, W0, W1], [(6, 4), (6,)], [(2, 5, 4)]),
        (aten.linear.default, [X0, W0], [(6, 4)], [(2, 5, 4)]),
        (aten.matmul.default, [X0, X0], [], [(2, 3, 5, 4), (2, 3, 4, 5)]),
        (aten.mm.default, [X0, W0], [(4, 6)], [(2, 4)]),
        (aten.conv2d.padding, [X0, W0, None, [1, 1], "same"], [(6, 4, 3, 3)], None),
        (aten.relu.default, [X0], [], None),
    ],
)  # fmt: skip
def test_products_written_as_onnx_compute_the_same(
    target: Any, args: list[Any], weights: list[Any], inputs: Any
) -> None:
    """What is no plain product is left to the exporter."""
    import onnx
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    call = OneCall(target, args, {})
    call.held.extend(nn.Parameter(torch.randn(s, generator=generator)) for s in weights)
    given = [torch.randn(s, generator=generator) for s in inputs or [(2, 4, 9, 9)]]
    model = as_onnx(call, given)
    if inputs is None:
        assert model is None
        return
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {f"x{k}": x.numpy() for k, x in enumerate(given)})
    torch.testing.assert_close(torch.from_numpy(found), call(*given).detach(), rtol=1e-4, atol=1e-5)
    doubles = [x.double() for x in given]
    assert as_onnx(call, doubles) is None
