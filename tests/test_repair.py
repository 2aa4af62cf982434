"""Repair: exact where it can be, better where it cannot, for every kind of reader."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.aliases import op_name
from cpd.data.digits import digits
from cpd.errors import InputError, PlanMismatch, UnknownName
from cpd.readers import readers_of
from cpd.trace import trace
from importance.networks import NETWORKS, combed, images, network


def chosen(groups: cpd.Groups, share: float = 0.5, seed: int = 0, **options: Any) -> cpd.Plan:
    scores = {"random": {"seed": seed}}
    return cpd.choose(
        groups, cpd.importance.score(scores, groups.model, groups), {"params": share},
        unreachable="closest", **options,
    )  # fmt: skip


class Reading(nn.Module):
    """A layer of 8 channels, of which some repeat others, and one reader of them."""

    def __init__(self, reader: nn.Module, space: int) -> None:
        super().__init__()
        kind = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[space]
        self.make = kind(3, 8, *([1] if space else []))
        self.read = reader
        with torch.no_grad():
            self.make.weight[4:] = self.make.weight[:4] * 2
            self.make.bias[4:] = self.make.bias[:4] * 2  # behind a ReLU: twice the channel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(F.relu(self.make(x)))


class Product(nn.Module):
    """x @ W with a parameter of its own, and addmm: a weight's columns are its outputs."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))
        self.bias = nn.Parameter(torch.randn(5)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return x @ self.weight
        return torch.addmm(self.bias, x.reshape(-1, 8), self.weight)


class First(nn.Module):
    """The first of what a recurrent layer puts out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class Einsum(nn.Module):
    """An einsum with a weight of its own, as its first operand where it is `turned`."""

    def __init__(self, equation: str, *shape: int, turned: bool = False) -> None:
        super().__init__()
        self.equation, self.turned = equation, turned
        self.weight = nn.Parameter(torch.randn(shape[::-1] if turned else shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.turned:
            return torch.einsum(self.equation, x, self.weight)
        left, right = self.equation.partition("->")[0].split(",")
        out = self.equation.partition("->")[2]
        return torch.einsum(f"{right},{left}->{out}", self.weight, x)


class Left(nn.Module):
    """W @ x, over channels that come first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight @ x.transpose(1, 2)


class Stacked(nn.Module):
    """A weight for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight)


class Crossed(nn.Module):
    """Keys and values are made of the channels, by parts of one weight; queries are not."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0]


READERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 5), 0, (7, 3)),
    "linear of tokens": (lambda: nn.Linear(8, 5, bias=False), 0, (7, 4, 3)),
    "matmul": (lambda: Product(False), 0, (7, 4, 3)),
    "addmm": (lambda: Product(True), 0, (7, 4, 3)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 3, padding=1, stride=2), 1, (7, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 2), padding=(2, 1), dilation=(2, 1)), 2, (7, 3, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(8, 6, (3, 4), padding="same"), 2, (7, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 5, 2), 3, (7, 3, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 5, 3, stride=2, padding=1), 1, (7, 3, 9)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(
            8, 6, (3, 2), stride=(2, 3), dilation=(2, 1), output_padding=(1, 1)
        ),
        2,
        (7, 3, 5, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(8, 5, 2, bias=False), 3, (7, 3, 3, 4, 3)),
    "lstm": (lambda: First(nn.LSTM(8, 5, bidirectional=True, batch_first=True)), 0, (7, 4, 3)),
    "gru": (lambda: First(nn.GRU(8, 5, batch_first=True)), 0, (7, 4, 3)),
    "rnn": (lambda: First(nn.RNN(8, 5, bias=False)), 0, (30, 4, 3)),
    "lstm cell": (lambda: First(nn.LSTMCell(8, 5)), 0, (30, 3)),
    "einsum": (lambda: Einsum("bni,io->bno", 8, 5), 0, (7, 4, 3)),
    "einsum, turned and summed": (lambda: Einsum("b...i,oi->bo", 8, 5, turned=True), 0, (30, 6, 3)),
    "product from the left": (lambda: Left(), 0, (7, 4, 3)),
    "cross attention": (lambda: Crossed(), 0, (7, 4, 3)),
    "bmm": (lambda: Stacked(), 0, (3, 20, 3)),
}


def without_twins(groups: cpd.Groups) -> cpd.Plan:
    """The plan that removes the channels 4 to 7, which repeat 0 to 3, and nothing else."""
    scores = {g.name: torch.arange(g.size, 0, -1, dtype=torch.float64) for g in groups}
    kept = {g.name: 0.0 for g in groups if g.name != "make"}
    target = {"params": 0.01}
    return cpd.choose(groups, scores, target, min_keep=0.5, limits=kept, unreachable="closest")


@pytest.mark.parametrize("kind", READERS)
def test_channels_that_others_can_stand_for_are_not_missed(kind: str) -> None:
    """Half of the channels are twins of the others: with them removed, refitting loses nothing."""
    make, space, shape = READERS[kind]
    model, x = Reading(make(), space).double(), torch.randn(shape, dtype=torch.float64)
    plan = without_twins(cpd.comb(model, x))
    repaired = cpd.repair(model, plan, [x], damping=1e-9)
    small = cpd.cut(repaired, plan)
    wanted = model(x).detach()
    assert (cpd.cut(model, plan)(x) - wanted).abs().max() > 0.1 * wanted.abs().max()
    assert (small(x) - wanted).abs().max() < 1e-6 * wanted.abs().max()
    fresh = torch.randn_like(x)
    assert (small(fresh) - model(fresh)).abs().max() < 1e-5 * wanted.abs().max()


def test_refit_is_the_ridge_regression_of_the_formula() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    plan = chosen(cpd.comb(model, x), 0.6)
    keep = plan.masks()["0.bias"]
    h = torch.relu(model[0](x)).detach()
    weight, bias = model[2].weight.detach(), model[2].bias.detach()
    lost = h @ weight.t() - h[:, keep] @ weight[:, keep].t()
    read = h[:, keep] - h[:, keep].mean(0)
    gram = read.t() @ read / 40
    ridge = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    change = torch.linalg.solve(ridge, read.t() @ (lost - lost.mean(0)) / 40).t()
    repaired = cpd.repair(model, plan, x.split(20))
    torch.testing.assert_close(repaired[2].weight[:, keep].detach(), weight[:, keep] + change)
    shift = lost.mean(0) - change @ h[:, keep].mean(0)
    torch.testing.assert_close(repaired[2].bias.detach(), bias + shift)
    shifted = cpd.repair(model, plan, [x], steps=["shift"])
    torch.testing.assert_close(shifted[2].bias.detach(), bias + lost.mean(0))
    assert torch.equal(shifted[2].weight, model[2].weight)


def test_shift_keeps_the_mean_of_every_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)).double()
    x = images(5)
    plan = chosen(cpd.comb(model, x), 0.6)
    for steps in (["shift"], ["shift", "refit"]):
        small = cpd.cut(cpd.repair(model, plan, [x], steps=steps), plan)
        torch.testing.assert_close(small(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)))


def test_recalibration_gives_a_norm_the_statistics_of_its_input() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
    ).double()
    x = images(30)
    with torch.no_grad():
        model[3].momentum = 1.0
        model.train()(x)
        model.eval()
    plan = chosen(cpd.comb(model, x), 0.6)
    small = cpd.cut(
        cpd.repair(model, plan, [x[:10], x[10:20], x[20:]], steps=["shift", "recalibrate"]), plan
    )
    out = small(x)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(6).double(), atol=1e-9, rtol=0)
    variance = out.var((0, 2, 3), correction=0)
    assert (variance - 1).abs().max() < 0.01


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_network_comes_nearer_to_what_it_was(kind: str, seed: int) -> None:
    """Convolutions of all kinds, norms, attention: on inputs that repair has not seen."""
    model, plan = network(kind, seed), chosen(combed(kind), 0.5, seed)
    batches = [images(32, seed=k) for k in range(10, 18)]
    x = images(64, seed=5)
    repaired = cpd.repair(model, plan, batches)
    small = cpd.cut(repaired, plan)
    assert cpd.verify(repaired, small, plan, x[:2])

    def away(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(x) - model(x)).square().mean())

    assert away(small) < 0.6 * away(cpd.cut(model, plan))


def trained(seed: int, train: Any) -> nn.Module:
    """A residual network with norms, a few epochs on digits."""

    class Block(nn.Module):
        def __init__(self, width: int, groups: int) -> None:
            super().__init__()
            self.a = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False, groups=groups)
            self.b = nn.Conv2d(2 * width, width, 1, bias=False)
            self.n, self.m = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x + self.m(self.b(F.relu(self.n(self.a(x))))))

    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), Block(12, 1),
        nn.Conv2d(12, 24, 2, stride=2), nn.ReLU(), Block(24, 4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    inputs, targets = train
    for _ in range(6):
        for index in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[index]), targets[index]).backward()
            optimizer.step()
    return model.eval()


def samples(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*(part[k] for k in range(len(part))), strict=True)
    return torch.stack(inputs), torch.tensor(targets)


def test_half_of_a_trained_network_is_won_back_without_training() -> None:
    """On digits: what is cut away is near chance, what is repaired is near what it was."""
    data = digits(16)
    train, (inputs, targets) = samples(data.train), samples(data.test)

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(inputs).argmax(1) == targets).double().mean())

    found = []
    for seed in range(3):
        model = trained(seed, train)
        groups = cpd.comb(model, inputs[:2])
        plan = cpd.choose(groups, cpd.importance.score("magnitude", model, groups), "macs=0.5")
        repaired = cpd.repair(model, plan, train[0][:256].split(64))
        nets = (model, cpd.cut(model, plan, verify=False), cpd.cut(repaired, plan, verify=False))
        found.append([accuracy(net) for net in nets])
    whole, cut, mended = torch.tensor(found).T
    assert (mended > cut + 0.2).all(), found
    assert (mended - cut).mean() > 0.4, found
    assert mended.mean() > 0.8 * whole.mean(), found


def test_nothing_changes_where_nothing_goes_or_can_be_mended() -> None:
    """An empty plan; a weight used twice; one computed from others; and what is removed."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.scale = nn.Parameter(torch.rand(2, 1) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.b(torch.relu(self.b(self.a(x)))))
            return F.linear(h, self.c.weight * self.scale)

    model, x = Shared().double(), torch.randn(9, 3).double()
    groups = cpd.comb(model, x)
    nothing = cpd.choose(groups, {g.name: torch.ones(g.size) for g in groups}, "params=1.0")
    plan = chosen(groups)
    for made in (cpd.repair(model, nothing, [x]), cpd.repair(model, plan, [x])):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, made.state_dict()[name]), name
    assert chosen(groups).masks()


def test_the_model_given_is_left_alone() -> None:
    model = network("residual").train()
    model.bn1.eval()
    groups = combed("residual")
    plan, before = chosen(groups), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    batches = [images(4)]
    made = cpd.repair(model, plan, batches)
    assert torch.equal(batches[0], images(4))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert [m.training for m in made.modules()] == [m.training for m in model.modules()]
    assert type(made) is type(model)
    masks = plan.masks()
    for name, tensor in made.state_dict().items():  # what goes is as it was
        if name in masks:
            assert torch.equal(tensor[~masks[name]], before[name][~masks[name]])
    again = cpd.repair(model, plan, batches)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in made.state_dict().items())


def test_few_rows_are_drawn_where_there_are_many() -> None:
    model = Reading(nn.Conv2d(8, 5, 3), 2).double()
    x = torch.randn(20, 3, 12, 12, dtype=torch.float64)
    plan = without_twins(cpd.comb(model, x))
    small = cpd.cut(cpd.repair(model, plan, [x], damping=1e-9, rows=300), plan)
    assert (small(x) - model(x)).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_batches_from_which_no_row_is_drawn_change_nothing(rows: int) -> None:
    model, plan = network("residual"), chosen(combed("residual"))
    made = cpd.repair(model, plan, [images(4, seed=seed) for seed in range(4)], rows=rows)
    assert all(bool(tensor.isfinite().all()) for tensor in made.state_dict().values())


def test_a_plan_from_json_and_batches_of_another_size() -> None:
    model, plan = network("residual"), chosen(combed("residual"))
    again = cpd.Plan.from_json(plan.to_json())
    made = [cpd.repair(model, p, [images(4)]).state_dict() for p in (plan, again)]
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], rtol=1e-9, atol=1e-12)


def test_prune_repairs() -> None:
    model = network("layer")
    options: Any = {"importance": "variance", "target": "macs=0.6"}
    small, plan = cpd.prune(model, images(6), repair=[images(32)], **options)
    plain, same = cpd.prune(model, images(6), **options)
    assert plan == same
    repaired = cpd.repair(model, plan, [images(32)])
    assert cpd.verify(repaired, small, plan)
    x = images(32, seed=9)
    with torch.no_grad():
        lost = [float((net(x) - model(x)).square().mean()) for net in (small, plain)]
    assert lost[0] < 0.7 * lost[1]


def test_bad_input() -> None:
    model, plan = network("residual"), chosen(combed("residual"))
    with pytest.raises(InputError, match="no batch to repair with"):
        cpd.repair(model, plan, [])
    with pytest.raises(InputError, match="must have one shape"):
        cpd.repair(model, plan, [images(4), images(3)])
    with pytest.raises(InputError, match="damping must be a finite number > 0, got 0"):
        cpd.repair(model, plan, [images(4)], damping=0)
    with pytest.raises(InputError, match="rows must be a whole number of at least 1, got 0"):
        cpd.repair(model, plan, [images(4)], rows=0)
    with pytest.raises(UnknownName, match="unknown step of repair 'shifts'; did you mean 'shift'"):
        cpd.repair(model, plan, [images(4)], steps=["shifts"])
    with pytest.raises(PlanMismatch):
        cpd.repair(network("tokens"), plan, [images(4)])


def test_a_repair_counts_where_it_helps_on_other_samples() -> None:
    """As with repair="auto" of `compress`; one batch of noise mends what real inputs never show."""
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)).double().eval()
    torch.manual_seed(3)
    near, far = torch.randn(64, 6).double(), 100 + torch.randn(64, 6).double()
    options: dict[str, Any] = {"target": "params=0.6", "importance": {"random": {"seed": 1}}}
    plain, plan = cpd.prune(model, near, **options)
    assert not any("repair" in note for note in plan.notes)
    helped, plan = cpd.prune(
        model, near, **options, repair={"batches": [near], "judge": [torch.randn_like(near)]}
    )
    assert not any("repair" in note for note in plan.notes)
    wanted = model(near)
    assert (helped(near) - wanted).square().sum() < (plain(near) - wanted).square().sum()
    left, plan = cpd.prune(model, near, **options, repair={"batches": [near[:2]], "judge": [far]})
    kept = cpd.prune(model, near, **options, repair=[near[:2]])[0]
    spoils = (kept(far) - model(far)).square().sum() >= (plain(far) - model(far)).square().sum()
    assert spoils
    assert any("repair: left out" in note for note in plan.notes)
    assert torch.equal(left(near), plain(near))
    with pytest.raises(UnknownName, match=r"option of repair.*Valid names"):
        cpd.prune(model, near, **options, repair={"batches": [near], "judges": [far]})
    with pytest.raises(InputError, match="no batch to repair with"):
        cpd.prune(model, near, **options, repair={"damping": 0.1})


CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "conv": (lambda: nn.Conv2d(6, 9, (3, 2), (2, 1), (1, 0), (1, 2), 3), (2, 6, 7, 8)),
    "conv same": (lambda: nn.Conv1d(6, 4, 4, padding="same", groups=2), (2, 6, 9)),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 9, (3, 2), (2, 3), (2, 1), (1, 2), 3, dilation=(2, 1)),
        (2, 6, 5, 4),
    ),
    "transposed, cropped": (lambda: nn.ConvTranspose1d(6, 4, 2, 2, 1, groups=2), (2, 6, 5)),
    "einsum of groups": (lambda: Einsum("bgni,gio->bgno", 3, 6, 5), (2, 3, 4, 6)),
    "einsum without arrow": (lambda: Einsum("ani, io", 6, 5), (2, 4, 6)),
    "einsum, two letters each": (lambda: Einsum("bhni,hino->bo", 3, 6, 4, 5), (2, 3, 4, 6)),
    "from the left": (lambda: Left(), (2, 4, 8)),
    "bmm": (lambda: Stacked(), (3, 4, 8)),
}


@pytest.mark.parametrize("kind", CALLS)
def test_what_is_read_times_the_weight_is_what_comes_out(kind: str) -> None:
    """Whatever the call, it is one product of matrices; a weight comes back as it was."""
    make, shape = CALLS[kind]
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    weight = dict(model.named_parameters())["weight"].detach()
    bias = dict(model.named_parameters()).get("bias")
    found = trace(model, x)
    held = {name: node for node in found.graph.nodes if (name := found.tensors.get(node.name))}
    (reader,) = [
        reader
        for node in found.graph.nodes
        for reader in readers_of(node, op_name(node))
        if reader.weight is held["weight"]
    ]
    assert reader.bias is held.get("bias")
    matrix = reader.matrix(weight)
    assert torch.equal(reader.weight_of(matrix, weight), weight)
    source = x.transpose(1, 2) if kind == "from the left" else x
    out = torch.einsum("egi,goi->ego", reader.inputs(source), matrix).detach()
    wanted = reader.outputs(model(x).detach())
    if bias is not None:
        out = out + bias.detach().reshape(matrix.shape[:2])
    torch.testing.assert_close(out, wanted)


def test_a_bias_that_outputs_share_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 5))
            self.b = nn.Parameter(torch.randn(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.b, F.relu(self.a(x)), self.w)

    model, x = Shared().double().eval(), torch.randn(40, 6).double()
    plan = chosen(cpd.comb(model, x), 0.6)
    repaired = cpd.repair(model, plan, [x])
    assert torch.equal(repaired.b, model.b)
    assert not torch.equal(repaired.w, model.w)
    assert cpd.verify(repaired, cpd.cut(repaired, plan), plan, x)


@pytest.mark.parametrize("seed", range(3))
def test_both_operands_may_be_mended(seed: int) -> None:
    """The second one makes good for what the first one has left."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.a @ self.b)

    torch.manual_seed(seed)
    model, x = Both().double().eval(), torch.randn(9, 5).double()
    groups = cpd.comb(model, x)
    plan = chosen(groups, 0.6)
    repaired = cpd.repair(model, plan, [x])
    plain, small = cpd.cut(model, plan), cpd.cut(repaired, plan)
    away = [float((net(x) - model(x)).detach().square().sum()) for net in (plain, small)]
    assert away[1] < 0.4 * away[0]  # 0.6 and more, where both make good for all of it
