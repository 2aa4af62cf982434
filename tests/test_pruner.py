"""Pruning inside a loop of one's own: the plan of `compress`, state that is cut along, resume."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import cpd
from cpd import errors
from cpd.distill import Batches, LoopOptions, derive, isolated, read, write
from cpd.distill.optim import optimizers
from cpd.pruner import Schedule, carry
from laws import randomised, run, wide
from test_compress import Data, keywords, normed, same
from test_distill import launched
from test_idioms import IDIOMS

X = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
TIMES = {"interval": 2, "events": 4}


def network():
    """Batch norms and two branches, without dropout: the same numbers at any width.

    A bias before a batch norm has the gradient zero, of which some optimizers make steps of
    rounding; so there is none.
    """
    model = normed().double()
    model.drop.p = 0.0
    model.stem[0].bias = model.side[0].bias = None
    return model


def batches(count, size=16):
    data = Data().train
    inputs, targets = data.tensors[0].double(), data.tensors[1]
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randperm(len(inputs), generator=generator)[:size]
        yield inputs[rows], targets[rows]


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def trained(model, optimizer, pruner, steps=10, **more):
    events = []
    model.train()
    for batch in batches(steps):
        loss = cross_entropy(model, batch)  # the graph before it is still held
        loss.backward()
        event = pruner.step(optimizer, **more)
        events += [event] if event is not None else []
    return events


def pruned(cut_every=0, make=sgd, **options):
    model = network()
    optimizer = make(model.parameters())
    given = {"target": "macs=0.4", **TIMES, "cut_every": cut_every, **options}
    pruner = cpd.Pruner(model, X, **given)
    events = trained(model, optimizer, pruner)
    return pruner.finish(), pruner, optimizer, events


def near(one, two, limit=1e-9):
    pairs = zip(one.named_parameters(), two.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=limit, msg=name)


# --- the plan


def test_the_plan_and_the_weights_are_those_of_compress():
    wanted = {}

    class Last:
        def on_event(self, name, details):
            wanted["events"] = wanted.get("events", 0) + (name == "prune")

        def on_end(self, state):
            if state.stage == "prune":
                wanted["weights"] = copy.deepcopy(state.student.state_dict())

    stage = {"batch_size": 16, "optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9}}
    given = keywords(teacher=None, prune=stage, recover={"epochs": 0}, data=Data())
    result = cpd.compress(normed(), **given, callbacks=(Last(),))
    model = normed().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with isolated(1):
        pruner = cpd.Pruner(
            model, torch.zeros(2, 3, 8, 8), target="macs=0.5", interval=3, events=3, seed=1
        )
        seed = derive(1, "prune")
        source, step = Batches(Data().train, LoopOptions(batch_size=16).batch_size, seed), 0
        for epoch in range(2):
            for batch in source.epoch(epoch):
                torch.manual_seed(derive(seed, "step", step, 0))
                step += 1
                if step <= 9:
                    cross_entropy(model, batch).backward()
                    pruner.step(optimizer)
    assert wanted["events"] == 3
    assert pruner.plan.to_json() == result.plan.to_json()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted["weights"][name], rtol=0, atol=0)


def test_what_comes_out_is_small_proved_and_of_the_class():
    small, pruner, _, events = pruned()
    assert [event.step for event in events] == [2, 4, 6, 8]
    assert str(events[-1]).startswith("event 4 of 4 after step 8: masked, macs 3")
    assert type(small) is type(pruner.model)
    assert cpd.costs.macs(small, X) == pruner.plan.costs["macs"][1]
    assert cpd.verify(pruner.model, small, pruner.plan, X)
    held = dict(pruner.model.named_parameters())
    for name, mask in pruner.plan.masks().items():
        if name in held:
            assert not held[name][~mask].any()
    assert not any(m._forward_hooks for m in pruner.model.modules())


@pytest.mark.parametrize("importance", ["hessian", "fisher", "taylor", "magnitude", "variance"])
def test_cutting_while_training_changes_no_decision(importance):
    masked, one, *_ = pruned(importance=importance)
    for every in (1, 3):
        cut, two, _, events = pruned(cut_every=every, importance=importance)
        assert [e.cut for e in events] == [k % every == 0 or k == 4 for k in range(1, 5)]
        assert one.plan.to_json() == two.plan.to_json()
        assert cut is two.model
        near(masked, cut)


IDIOMATIC = (
    "grouped transposed",
    "depthwise multiplier",
    "gru",
    "tied embedding",
    "spectral norm",
    "shuffle",
    "pixel shuffle",
    "nn.MultiheadAttention",
)


@pytest.mark.parametrize("name", [name for name in IDIOMATIC if name in IDIOMS])
def test_cutting_while_training_of_idioms(name):
    found = []
    for every in (0, 1):
        torch.manual_seed(0)
        model = randomised(IDIOMS[name].make()).double().train()
        inputs = wide(IDIOMS[name].inputs)
        options = {"exact": True, "unreachable": "closest", "interval": 1, "events": 3}
        pruner = cpd.Pruner(
            model, inputs, target="params=0.6", importance="taylor", cut_every=every, **options
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        for _ in range(4):
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            out = model(*args)
            out = out if isinstance(out, torch.Tensor) else out[0]
            out.square().mean().backward()
            pruner.step(optimizer)
        found.append((pruner.plan, pruner.finish()))
    (one, masked), (two, cut) = found
    assert one.to_json() == two.to_json()
    assert any(w.after < w.before for w in two.widths)
    if not two.rescale:  # a query that is rescaled goes down its slope at another pace
        near(masked, cut)


# --- what an optimizer knows

ELEMENTWISE = sorted(set(optimizers()) - {"SparseAdam", "Muon", "Adafactor"})


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_state_of_every_optimizer_is_cut_along(name):
    def make(parameters):
        return optimizers()[name](parameters, lr=1e-3)

    masked, one, *_ = pruned(make=make)
    cut, two, optimizer, _ = pruned(cut_every=1, make=make)
    assert one.plan.to_json() == two.plan.to_json()
    near(masked, cut)
    for parameter, state in optimizer.state.items():
        assert all(v.shape in ((), parameter.shape) for v in state.values() if hasattr(v, "shape"))


FORMS = {
    "momentum and nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "centred": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_optimizers(form):
    masked, one, *_ = pruned(make=FORMS[form])
    cut, two, optimizer, _ = pruned(cut_every=2, make=FORMS[form])
    assert one.plan.to_json() == two.plan.to_json()
    near(masked, cut)
    shapes = {tuple(p.shape) for p in two.model.parameters()}
    states = [s for state in optimizer.state.values() for s in state.values()]
    assert {tuple(s.shape) for s in states if isinstance(s, torch.Tensor) and s.ndim} <= shapes


def test_factored_state_is_cut_along():
    def make(parameters):
        return torch.optim.Adafactor(parameters, lr=1e-3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, pruner, optimizer, _ = pruned(cut_every=1, make=make)
    held = dict(pruner.model.named_parameters())
    sizes = optimizer.state[held["head.weight"]]["row_var"].shape, held["head.weight"].shape
    assert sizes[0] == (4, 1)
    assert optimizer.state[held["head.weight"]]["col_var"].shape == (1, sizes[1][1])


def test_momentum_of_matrices_is_cut_along():
    """Muon mixes all of a matrix, so a step at another width is another one; its state follows."""

    def make(parameters):
        return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*are in none of the optimizers")
        small, pruner, optimizer, _ = pruned(cut_every=1, make=make)
    assert cpd.costs.params(small) == pruner.plan.costs["params"][1]
    assert optimizer.state
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
        assert state["momentum_buffer"].any()


def test_two_optimizers_are_cut_along_as_one():
    one, alone, *_ = pruned(cut_every=2)
    model = network()
    weights = [p for p in model.parameters() if p.ndim > 1]
    pair = sgd(weights), sgd([p for p in model.parameters() if p.ndim < 2])
    pruner = cpd.Pruner(model, X, target="macs=0.4", **TIMES, cut_every=2)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(10):
            cross_entropy(model, batch).backward()
            pruner.observe()
            for each in pair:
                each.step()
            pruner.advance(*pair)
            model.zero_grad()
    assert pruner.plan.to_json() == alone.plan.to_json()
    near(one, pruner.finish(), 1e-12)
    for each in pair:
        assert each.state
        assert all(s["momentum_buffer"].shape == p.shape for p, s in each.state.items())


def test_an_optimizer_that_is_not_cut_along_is_noticed():
    model = network()
    told, untold = sgd(model.stem.parameters()), sgd(model.head.parameters())
    pruner = cpd.Pruner(model, X, target="macs=0.4", **TIMES, cut_every=1)
    pruner.attach(told)
    first, second = batches(2)
    for optimizer in (untold, told):
        cross_entropy(model, first).backward()
        optimizer.step()
    cross_entropy(model, second).backward()
    with pytest.warns(UserWarning, match=r"are in none of the optimizers.*advance\(\*optimizers"):
        told.step()


def test_state_of_a_form_of_its_own_begins_anew_with_a_warning():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["sketch"] = torch.zeros(3, 5, 7)
            return super().step(closure)

    with pytest.warns(UserWarning, match=r"Odd keeps of .* as 'sketch' cannot be cut"):
        pruned(cut_every=4, make=lambda p: Odd(p, lr=0.01))


def test_rescaled_rows_rescale_what_the_optimizer_knows():
    from cpd.cut import Slice

    layer = nn.Linear(2, 3, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[layer.weight].items()}
    carry(optimizer, layer, {"weight": Slice((), (0, 2), 2.0)}, {"weight": torch.Size((3, 2))})
    after = optimizer.state[layer.weight]
    factors = torch.tensor([[2.0], [1.0], [2.0]])
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"] / factors)
    torch.testing.assert_close(after["exp_avg_sq"], before["exp_avg_sq"] / factors**2)
    assert after["step"] == before["step"]


def test_groups_of_parameters_schedules_ties_and_what_is_frozen_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = model.double()
    model[2].bias = model[0].bias  # tied
    model[4].weight.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": learning[:1], "lr": 0.01}, {"params": learning[1:], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    inputs = torch.randn(5, 6, dtype=torch.float64)
    pruner = cpd.Pruner(
        model, inputs, target="params=0.6", importance="magnitude", cut_every=1, **TIMES
    )
    ids = [id(p) for p in model.parameters()]
    for _ in range(9):
        model(inputs).square().mean().backward()
        pruner.step(optimizer)
        schedule.step()
    small = pruner.finish()
    assert [id(p) for p in small.parameters()] == ids
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, len(learning) - 1]
    assert optimizer.param_groups[0]["lr"] == 0.01 * 0.5**4
    assert small[2].bias is small[0].bias
    assert not small[4].weight.requires_grad
    assert small[0].weight.shape[0] == small[0].out_features < 8


def test_copies_of_other_names_or_shapes_are_refused():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.ema = network()

    wider = network()
    layer = next(module for module in wider.modules() if isinstance(module, nn.Conv2d))
    layer.weight = nn.Parameter(torch.zeros(99, *layer.weight.shape[1:]))
    for each in (Holder(), wider):
        with pytest.raises(errors.InputError, match=r"copies\[0\].*has not the network's"):
            cpd.Pruner(network(), X, target="macs=0.4", copies=[each], **TIMES)


def test_an_optimizer_that_writes_after_its_inner_one_is_refused():
    pytest.importorskip("timm")
    from timm.optim import Lookahead

    model = network()
    lookahead = Lookahead(sgd(model.parameters()))
    pruner = cpd.Pruner(model, X, target="macs=0.4", **TIMES)
    for use in (pruner.attach, pruner.step):
        with pytest.raises(errors.InputError, match="Lookahead writes the weights after"):
            use(lookahead)


def test_averages_are_masked_and_cut_along():
    model = network()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer = sgd(model.parameters())
    pruner = cpd.Pruner(model, X, target="macs=0.4", cut_every=2, copies=[average], **TIMES)
    model.train()
    for batch in batches(9):
        cross_entropy(model, batch).backward()
        pruner.step(optimizer)
        average.update_parameters(model)
        held = dict(average.module.named_parameters())
        for name, mask in pruner.shrinking.masks(pruner.plan).items() if pruner.plan else ():
            if name in held:
                assert not held[name][~mask].any()
    small = pruner.finish()
    for one, two in zip(small.parameters(), average.module.parameters(), strict=True):
        assert one.shape == two.shape
    assert average(X).shape == (2, 4)


@pytest.mark.parametrize("importance", ["hessian", "fisher", "kfac"])
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_give_the_same_plan_and_bad_steps_do_not_count(fused, importance):
    """The scale is a power of two; a step with a gradient that is not finite is left out."""

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, fused=fused)

    _, plain, *_ = pruned(make=adam, importance=importance)
    model = network()
    optimizer = adam(model.parameters())
    given = {"target": "macs=0.4", "cut_every": 2, "importance": importance, **TIMES}
    pruner = cpd.Pruner(model, X, **given)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    model.train()
    for number, batch in enumerate(batches(10)):
        if number in (0, 3, 5):
            scaler.scale(cross_entropy(model, batch) * float("inf")).backward()
            steps = pruner.steps
            assert pruner.step(optimizer, scaler=scaler) is None
            assert pruner.steps == steps
        scaler.scale(cross_entropy(model, batch)).backward()
        pruner.step(optimizer, scaler=scaler)
    assert pruner.plan.to_json() == plain.plan.to_json()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("importance", ["hessian", "fisher", "kfac"])
def test_scores_do_not_depend_on_the_scale_that_changes_between_steps(importance):
    scores = []
    for scales in ((1.0, 1.0, 1.0), (2.0**10, 2.0**4, 2.0**12)):
        model = network().eval()
        pruner = cpd.Pruner(model, X, target="macs=0.4", importance=importance, **TIMES)
        for scale, batch in zip(scales, batches(3), strict=True):
            model.zero_grad()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(cross_entropy(model, batch)).backward()
            scaler.unscale_(optimizer)
            pruner.observe(scaler=scaler)
        scores.append(pruner.rounds.importance.scores())
    for name, wanted in scores[0].items():
        torch.testing.assert_close(scores[1][name], wanted, rtol=1e-12, atol=0)


def test_an_optimizer_whose_state_is_one_vector_is_refused_where_the_network_is_cut():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    pruner = cpd.Pruner(model, X, target="macs=0.4", cut_every=2, **TIMES)
    for call in (pruner.attach, pruner.advance):
        with pytest.raises(errors.InputError, match=r"LBFGS keeps .* one vector.*cut_every=0"):
            call(optimizer)
    assert pruner.steps == 0
    masked = network()
    masks = cpd.Pruner(masked, X, target="macs=0.4", **TIMES)
    masks.attach(torch.optim.LBFGS(masked.parameters())).remove()


# --- who steps


def test_attached_to_an_optimizer_it_sees_every_step():
    wanted, one, *_ = pruned()
    model = network().train()
    optimizer = sgd(model.parameters())
    pruner = cpd.Pruner(model, X, target="macs=0.4", **TIMES)
    handle = pruner.attach(optimizer)
    for batch in batches(10):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    handle.remove()
    assert pruner.steps == 10
    assert pruner.plan.to_json() == one.plan.to_json()
    assert same(pruner.finish(), wanted)


@pytest.mark.parametrize("importance", ["hessian", "fisher"])
def test_accumulated_parts_give_the_plan_of_whole_batches(importance):
    torch.manual_seed(0)
    plans = []
    for parts in (1, 4):
        model = network().eval()  # statistics of a part are not those of the batch
        optimizer = sgd(model.parameters())
        pruner = cpd.Pruner(model, X, target="macs=0.4", importance=importance, **TIMES)
        for inputs, targets in batches(8):
            cuts = zip(inputs.chunk(parts), targets.chunk(parts), strict=True)
            for number, part in enumerate(cuts, start=1):
                (cross_entropy(model, part) / parts).backward()
                if number < parts:
                    pruner.observe(whole=False)
            pruner.step(optimizer)
        plans.append(pruner.plan.to_json())
    assert plans[0] == plans[1]


def test_an_importance_of_curvature_is_shown_the_loss():
    model = network()
    pruner = cpd.Pruner(model, X, target="macs=0.8", importance="hutchinson", interval=2, events=1)
    optimizer = sgd(model.parameters())
    for batch in batches(2):
        loss = cross_entropy(model.train(), batch)
        pruner.before_backward(loss)
        loss.backward()
        pruner.step(optimizer)
    assert pruner.finish().stem[0].out_channels < 12


# --- pause and go on


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("at", [0, 3, 4, 9])
def test_resume_is_exact(every, at, tmp_path):
    wanted, whole, *_ = pruned(cut_every=every, make=lambda p: torch.optim.AdamW(p, lr=1e-3))

    def begun():
        model = network().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return (
            model,
            optimizer,
            cpd.Pruner(model, X, target="macs=0.4", cut_every=every, **TIMES),
        )

    model, optimizer, pruner = begun()
    for number, batch in enumerate(batches(10)):
        if number == at:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(tmp_path / "checkpoint", {**state, "pruner": pruner.state_dict()})
            state = read(tmp_path / "checkpoint")
            model, optimizer, pruner = begun()
            pruner.load_state_dict(state["pruner"])
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        cross_entropy(model, batch).backward()
        pruner.step(optimizer)
    assert pruner.plan.to_json() == whole.plan.to_json()
    assert same(pruner.finish(), wanted)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"importance": "taylor"}, "importance was 'hessian', is 'taylor'"),
        (
            {"importance": {"hessian": {"mended": True}}},
            r"importance's options was '\[\]', is .*mended",
        ),
        ({"interval": 5}, "interval was 2, is 5"),
        ({"events": 3}, "events was 4, is 3"),
        ({"target": "macs=0.9"}, r"target was \{'macs': 0.4\}, is \{'macs': 0.9\}"),
    ],
)
def test_a_state_of_another_pruner_is_refused(changes, text):
    given = {"target": "macs=0.4", "importance": "hessian", **TIMES}
    state = cpd.Pruner(network(), X, **given).state_dict()
    with pytest.raises(errors.InputError, match=f"of another Pruner: {text}.*without the state"):
        cpd.Pruner(network(), X, **{**given, **changes}).load_state_dict(state)
    alike = {"target": {"macs": 0.4}, "importance": {"hessian": {}}, "interval": TIMES["interval"]}
    cpd.Pruner(network(), X, **alike, events=TIMES["events"]).load_state_dict(state)
    del state["run"]  # as older ones are
    cpd.Pruner(network(), X, **{**given, **changes}).load_state_dict(state)


def test_states_that_do_not_fit():
    _, pruner, *_ = pruned(cut_every=1)
    state = pruner.state_dict()
    given = {"target": "macs=0.4", **TIMES}
    with pytest.raises(errors.InputError, match="has begun"):
        pruner.load_state_dict(state)
    with pytest.raises(errors.InputError, match="not the state of a Pruner"):
        cpd.Pruner(network(), X, **given).load_state_dict({"steps": 1})
    with pytest.raises(errors.PlanMismatch, match="set cut_every"):
        cpd.Pruner(network(), X, **given).load_state_dict(state)
    other = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    with pytest.raises(errors.PlanMismatch, match="made for"):
        cpd.Pruner(other, torch.zeros(2, 3), **given).load_state_dict(state)


# --- several processes


def test_two_processes_prune_as_one(tmp_path):
    from safetensors.torch import load_file

    from two_processes import pruned as alone

    launched("pruner", tmp_path)
    weights = alone(tmp_path / "one")
    plans = [(tmp_path / at / "run" / "plan.json").read_text() for at in ("", "one")]
    assert plans[0] == plans[1]
    found = load_file(tmp_path / "weights")
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)


def test_a_plan_that_did_not_arrive_whole_is_refused(monkeypatch):
    """Two processes whose hashes differ; the exchange itself is stood in for."""
    from cpd.pruner import rounds

    def gathered(every, mine):
        every[0].copy_(mine)
        every[1].copy_(mine + 1)

    for name, value in (("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_gather", gathered)
    with pytest.raises(errors.PlanMismatch, match="process 0 has another plan than process 1"):
        rounds._agreed("text", torch.device("cpu"))


# --- bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": "macs=1.5"}, "at most 1"),
        ({"target": "macs=0.0001"}, "cannot be reached"),
        ({"interval": 0}, "at least 1"),
        ({"events": 2, "step": 0.1}, "not both"),
        ({"cut_every": -1}, "at least 0"),
        ({"cut_every": 0.5}, "whole number"),
        ({"importance": "hesian"}, "did you mean 'hessian'"),
        ({"intervall": 3}, "did you mean 'interval'"),
        ({"start": None}, "whole network"),
    ],
)
def test_bad_input(changes, text):
    with pytest.raises(errors.CPDError, match=text):
        cpd.Pruner(network(), X, **{"target": "macs=0.5", **changes})


def test_wrappers_and_no_network():
    with pytest.raises(errors.InputError, match=r"not a torch\.nn\.Module"):
        cpd.Pruner(3, X, target="macs=0.5")
    with pytest.raises(errors.InputError, match="wrap it anew"):
        cpd.Pruner(nn.DataParallel(network()), X, target="macs=0.5", cut_every=1)
    wrapped = nn.DataParallel(network())
    assert cpd.Pruner(wrapped, X, target="macs=0.5").model is wrapped.module


def test_finished_early_it_says_so_and_gives_what_there_is():
    model = network()
    optimizer = sgd(model.parameters())
    pruner = cpd.Pruner(model, X, target="macs=0.4", cut_every=3, **TIMES)
    trained(model, optimizer, pruner, steps=5)
    with pytest.warns(UserWarning, match="2 of 4 events in 5 of 8 steps"):
        small = pruner.finish(optimizer)
    assert cpd.costs.macs(small, X) == pruner.plan.costs["macs"][1]
    assert run(small, X)[0].shape == (2, 4)
    untouched = network()
    with pytest.warns(UserWarning, match="0 of 4"):
        copied = cpd.Pruner(untouched, X, target="macs=0.4", **TIMES).finish()
    assert same(copied, untouched)


def test_the_schedule_is_one():
    schedule = Schedule("macs=0.4,params=1", interval=5, step=0.1)
    assert (schedule.count, schedule.steps) == (6, 30)
    assert [step for step in range(1, 40) if schedule.due(step)] == [5, 10, 15, 20, 25, 30]
    assert schedule.target_at(3) == pytest.approx({"macs": 0.7, "params": 1.0})


def test_milliseconds_fall_towards_the_target_and_never_under_it():
    """The whole network's time is not known: event k of K gets K / k times the last."""
    schedule = Schedule({"latency_ms": 7, "macs": 0.4}, events=4)
    assert [schedule.target_at(k)["latency_ms"] for k in (1, 2, 3, 4)] == [28, 14, 28 / 3, 7]
    assert schedule.target_at(2) == {"latency_ms": 14, "macs": 0.7}
    assert Schedule("latency_ms=7,macs=0.4", step=0.2).count == 3
    with pytest.raises(errors.InputError, match="step is a share, but latency_ms is none"):
        Schedule("latency_ms=7", step=0.2)


def test_a_latency_target_while_training_leaves_the_model_as_it_is():
    """The clock sees the model at every event; what it does to time it must not show."""
    seen = []

    def clock(module, inputs):
        seen.append(module)
        return float(sum(p.numel() for p in module.parameters()))

    model = network().train()
    optimizer = sgd(model.parameters())
    whole = clock(model, X)
    target = {"latency_ms": 0.6 * whole}
    pruner = cpd.Pruner(model, X, target=target, measure=clock, cut_every=1, **TIMES)
    trained(model, optimizer, pruner, steps=8)
    assert model.training
    assert len(seen) > 4
    assert 0.5 * whole < clock(pruner.finish(optimizer), X) <= 0.62 * whole
