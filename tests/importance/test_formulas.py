"""The newer importances against their formulas, written out again by loops or by masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.importance import collect, resolve, score
from cpd.importance._aggregate import AGGREGATES
from cpd.importance._normalise import NORMALISERS
from importance.networks import combed, images, loss, network


class Two(nn.Module):
    """One group of 3 channels, made by `a`, scaled by `n`, read by `b` for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.n(self.a(x))))


def two(shape: tuple[int, ...] = (5, 4, 2)) -> tuple[Two, torch.Tensor, cpd.Groups]:
    model, x = Two().double(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.n.parameters():
            parameter.copy_(torch.randn(3))
    return model, x, cpd.comb(model, x)


def squared(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


def test_hessian_of_tokens_by_the_paper_and_mended() -> None:
    """The paper's divisor for (batch, tokens, channels) is channels x channels left; mended, it is
    tokens x channels left.
    """
    model, x, groups = two()
    squared(model, x).backward()
    rows = (model.a.weight * model.a.weight.grad).sum(1)
    made = [rows, *(p * p.grad for p in (model.a.bias, model.n.weight, model.n.bias))]
    wanted = sum(part.square() for part in made) / (3 * 3) / 4 / (4 + 1)
    torch.testing.assert_close(score("hessian", model, groups)["a"], wanted.detach())
    read = (model.b.weight * model.b.weight.grad)[0]
    mended = score({"hessian": {"mended": True}}, model, groups)["a"]
    torch.testing.assert_close(mended, (read.square() / (4 * 3)).detach())


def test_hessian_of_fused_rows_squares_each_row() -> None:
    """Thirds of queries and keys, gates of a recurrent layer: squared by rows, then summed."""
    model, groups, x = network("tokens"), combed("tokens"), images()
    loss(model, x).backward()
    (rows,) = (m.channel for m in groups["qkv"].members if m.tensor == "qkv.weight")
    index, size = torch.from_numpy(rows.reshape(-1)), groups["qkv"].size
    parts = [
        (model.qkv.weight * model.qkv.weight.grad).sum(1),
        model.qkv.bias * model.qkv.bias.grad,
    ]
    total = torch.zeros(size, dtype=torch.float64)
    for part in parts:  # 2 members, 1 reader
        total.index_add_(0, index, part.detach().square() / (36 * 24) / 2 / 3)
    torch.testing.assert_close(score("hessian", model, groups)["qkv"], total)
    model, groups = network("words"), combed("words")
    loss(model, x).backward()
    made = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    total = torch.zeros(5, dtype=torch.float64)
    for parameter in (getattr(model.gru, name) for name in made):
        change = (parameter * parameter.grad).detach().reshape(3, 5, -1).sum(2)
        total += change.square().sum(0)
    found = score("hessian", model, groups)["gru"]
    torch.testing.assert_close(found / found.sum(), total / total.sum())


def masked_gradient(
    model: nn.Module, x: torch.Tensor, places: list[tuple[nn.Module, str, int]], size: int
) -> torch.Tensor:
    """dL_n/dm (samples, size) of one mask on inputs ("in") or outputs of layers, by autograd."""
    mask = torch.ones(len(x), size, dtype=torch.float64, requires_grad=True)

    def shaped(value: torch.Tensor, axis: int) -> torch.Tensor:
        shape = [1] * value.ndim
        shape[0], shape[axis] = len(x), size
        return value * mask.view(shape)

    handles = []
    for module, role, axis in places:
        if role == "in":
            hook = lambda _, args, axis=axis: (shaped(args[0], axis), *args[1:])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = lambda _, args, out, axis=axis: shaped(out, axis)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    (gradient,) = torch.autograd.grad(loss(model, x), mask)
    for handle in handles:
        handle.remove()
    return gradient


def test_fisher_and_the_mended_hessian_are_gradients_of_masks() -> None:
    """Of a residual stream with several readers; of tokens; squared by sample, or by batch."""
    model, groups, x = network("residual"), combed("residual"), images()
    mask = masked_gradient(model, x, [(model.one, "in", 1), (model.group, "in", 1)], 8)
    found = collect("fisher", model, groups, [x], loss)["stem"]
    index = at(groups, "stem", "one.weight")
    torch.testing.assert_close(found[index], mask.square().sum(0), rtol=1e-9, atol=1e-12)
    mended = collect({"hessian": {"mended": True}}, model, groups, [x], loss)["stem"]
    ratio = mended[index] / mask.sum(0).square()
    torch.testing.assert_close(ratio, ratio[:1].expand(8))
    model, groups = network("tokens"), combed("tokens")
    mask = masked_gradient(model, x, [(model.down, "in", 2)], 10)
    found = collect("fisher", model, groups, [x], loss)["up"]
    index = at(groups, "up", "down.weight")
    torch.testing.assert_close(found[index], mask.square().sum(0), rtol=1e-9, atol=1e-12)


def at(groups: cpd.Groups, name: str, tensor: str) -> torch.Tensor:
    """Return the channel of a group that each input index of a reader is."""
    (member,) = (m for m in groups[name].members if m.tensor == tensor)
    return torch.from_numpy(member.channel.reshape(-1))


def test_fisher_scores_queries_and_values_of_one_group() -> None:
    """Values where they are read; queries and keys, which no weight reads, where they are made."""
    model, groups, x = network("tokens"), combed("tokens"), images()
    found = collect("fisher", model, groups, [x], loss)["qkv"]
    made = masked_gradient(model, x, [(model.qkv, "out", 2)], 36).square().sum(0)
    read = masked_gradient(model, x, [(model.proj, "in", 2)], 12).square().sum(0)
    members = {m.tensor: torch.from_numpy(m.channel.reshape(-1)) for m in groups["qkv"].members}
    rows, columns = members["qkv.weight"], members["proj.weight"]
    assert len(set(rows.tolist())) == 24  # q and k share their channels
    twice = torch.zeros(groups["qkv"].size, dtype=torch.float64).index_add_(0, rows, made)
    values = set(columns.tolist())
    torch.testing.assert_close(found[columns], read, rtol=1e-9, atol=1e-12)
    others = [k for k in set(rows.tolist()) if k not in values]
    together = torch.zeros(len(x), groups["qkv"].size, dtype=torch.float64)
    gradient = masked_gradient(model, x, [(model.qkv, "out", 2)], 36)
    together = together.index_add_(1, rows, gradient).square().sum(0)
    torch.testing.assert_close(found[others], together[others], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(twice[others], together[others])


def test_fisher_without_layers_squares_the_batch() -> None:
    """What no layer shows comes of the gradients of parameters: one mask for all samples."""
    model, groups, x = network("layer"), combed("layer"), images()
    found = collect("fisher", model, groups, [x], loss)
    mask = masked_gradient(model, x, [(model.head, "in", 1)], 6)
    raw = next(g for g in groups if any(m.tensor == "raw" for m in g.members if m.role == "out"))
    index = at(groups, raw.name, "head.weight")
    wanted = mask.square().sum(0)
    torch.testing.assert_close(found[raw.name][index], wanted, rtol=1e-9, atol=1e-12)
    attention = groups["attention"]
    loss(model, x).backward()
    weight = model.attention.out_proj.weight
    wanted = (weight * weight.grad).sum(0).square()
    index = at(groups, attention.name, "attention.out_proj.weight")
    torch.testing.assert_close(found["attention"][index], wanted.detach(), rtol=1e-9, atol=1e-12)


def test_fisher_of_windows() -> None:
    """Windows laid out along the batch are parts of their samples."""

    class Windows(nn.Module):
        def __init__(self, split: bool) -> None:
            super().__init__()
            self.a, self.b, self.split = nn.Linear(2, 3), nn.Linear(3, 2), split

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, length, width = x.shape
            x = x.reshape(2 * n, length // 2, width) if self.split else x
            return self.b(torch.tanh(self.a(x))).reshape(n, length, 2)

    apart, together = Windows(True).double(), Windows(False).double()
    apart.load_state_dict(together.state_dict())
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    found = [collect("fisher", m, cpd.comb(m, x), [x], squared)["a"] for m in (apart, together)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_obd() -> None:
    model, x, groups = two()
    squared(model, x).backward()
    parts = [(p * p.grad).square() / 2 for p in model.parameters()]
    weight, bias, scale, shift, reader, _ = parts
    wanted = weight.sum(1) + bias + scale + shift + reader[0]
    torch.testing.assert_close(score("obd", model, groups)["a"], wanted.detach())


class Mixed(nn.Module):
    """Convolutions of one position: plain, grouped, transposed, grouped and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, groups=2)
        self.c, self.d = nn.ConvTranspose2d(6, 4, 1, groups=2), nn.ConvTranspose2d(4, 4, 1)
        self.e = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.e(torch.tanh(self.d(torch.tanh(self.c(x)))).flatten(1))


def test_kfac_of_one_sample_at_one_place_is_the_squared_gradient() -> None:
    """Its factors are then the gradient's own: whichever way a layer holds its weights."""
    model, x = Mixed().double(), torch.randn(1, 3, 1, 1, dtype=torch.float64)
    groups = cpd.comb(model, torch.randn(2, 3, 1, 1).double())
    kfac = collect("kfac", model, groups, [x], squared)
    obd = collect("obd", model, groups, [x], squared)
    weights = {m.tensor for group in groups for m in group.members}
    assert weights >= {f"{layer}.weight" for layer in "abcde"}
    for name in obd:
        torch.testing.assert_close(kfac[name], obd[name], rtol=1e-9, atol=0)


def test_kfac_of_a_batch_by_hand() -> None:
    model, x, groups = two()
    kept: dict[str, torch.Tensor] = {}
    h = torch.tanh(model.n(model.a(x)))
    out = model.b(h)
    out.retain_grad()
    out.square().sum().backward()
    kept["made"], kept["read"] = out.grad.square().sum((0, 1)), h.square().mean((0, 1))
    reader = (model.b.weight[0].square() * kept["read"] * kept["made"] / 2).detach()
    found = collect({"kfac": {"members": "in"}}, model, groups, [x], squared)["a"]
    torch.testing.assert_close(found, reader)


class Diagonal(nn.Module):
    """The loss sum of |B A x|² over unit vectors x, with B orthogonal: H is diagonal, 2 each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False)
        nn.init.orthogonal_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_hutchinson_is_exact_where_the_hessian_is_diagonal() -> None:
    """Then z * Hz is the diagonal for any z; and the score is the change of the loss to second
    index, here with the first index's left out.
    """
    model, x = Diagonal().double(), torch.eye(4).double() * torch.tensor([1.0, 2, 3, 4]).double()
    groups = cpd.comb(model, x)
    model.b.requires_grad_(False)
    squares = model.a.weight.detach().square()
    scale = torch.tensor([1.0, 4, 9, 16]).double()
    diagonal = collect({"hutchinson": {"kind": "diagonal"}}, model, groups, [x], squared)["a"]
    torch.testing.assert_close(diagonal, (squares * scale).sum(1))
    trace = collect("hutchinson", model, groups, [x], squared)["a"]
    torch.testing.assert_close(trace, 2 * scale.mean() * squares.sum(1))
    less = model.a.weight.detach().clone()
    for c in range(3):
        with torch.no_grad():
            model.a.weight[c] = 0
            change = squared(model, x) - (less.square() * scale).sum()
            model.a.weight.copy_(less)
        assert float(-change) == pytest.approx(float(diagonal[c]))


def test_hutchinson_on_average_is_the_hessian() -> None:
    model, x, groups = two()
    names = dict(model.named_parameters())

    def of(weight: torch.Tensor) -> torch.Tensor:
        held = {**names, "a.weight": weight}
        return torch.func.functional_call(model, held, (x,)).square().sum()

    whole = torch.autograd.functional.hessian(of, model.a.weight.detach()).reshape(6, 6)
    exact = (whole.diagonal().reshape(3, 2) * model.a.weight.detach().square()).sum(1) / 2
    for name, parameter in names.items():
        parameter.requires_grad_(name == "a.weight")
    spec = {"hutchinson": {"kind": "diagonal", "probes": 400}}
    found = collect(spec, model, groups, [x], squared)["a"]
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_hutchinson_goes_through_attention() -> None:
    """The fused operator cannot be differentiated twice; another is used while it watches."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.proj(mixed.transpose(1, 2).flatten(2))

    model, x = Attending(), torch.randn(2, 3, 4)
    (scores,) = collect("hutchinson", model, cpd.comb(model, x), [x], squared).values()
    assert scores.isfinite().all()
    assert scores.abs().sum() > 0


def test_bn_scale() -> None:
    model, x, groups = two()
    found = score("bn_scale", model, groups)["a"]
    torch.testing.assert_close(found, model.n.weight.detach().abs())
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    found = score("bn_scale", plain, cpd.comb(plain, x[:, 0]))["0"]
    both = plain[0].weight.square().sum(1) + plain[0].bias.square()
    torch.testing.assert_close(found, both.sqrt().detach())


def test_fpgm() -> None:
    """By loops; a channel that is masked is no neighbour."""
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
    groups = cpd.comb(model, torch.randn(2, 2, 6, 6).double())
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, 0
    filters, bias = model[0].weight.detach().flatten(1), model[0].bias.detach()
    alive = [0, 1, 2, 4]
    wanted = [
        sum(float((filters[c] - filters[j]).norm() + (bias[c] - bias[j]).abs()) for j in alive) / 2
        for c in range(5)
    ]
    torch.testing.assert_close(score("fpgm", model, groups)["0"], torch.tensor(wanted).double())


def test_lamp() -> None:
    model, _, groups = two()
    masses = score("magnitude", model, groups)["a"].tolist()
    wanted = [m / sum(v for v in masses if v >= m) for m in masses]
    torch.testing.assert_close(score("lamp", model, groups)["a"], torch.tensor(wanted).double())
    from cpd.importance.lamp import shares

    torch.testing.assert_close(
        shares(torch.tensor([1.0, 2.0, 1.0, 0.0])), torch.tensor([0.25, 1.0, 0.25, 0.0])
    )


def test_statistics_of_activations() -> None:
    """Over batches of different sizes, samples and tokens; flattened positions are a channel's."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    batches = [torch.randn(n, 2, 2, 2, dtype=torch.float64) for n in (3, 5)]
    groups = cpd.comb(model, batches[0])
    with torch.no_grad():
        flows = model[:2](torch.cat(batches)).transpose(0, 1).flatten(1)
    weight = model[3].weight.detach().view(2, 3, 4)
    variance, second = flows.var(1, correction=0), flows.square().mean(1)
    power, sums = weight.square().sum((0, 2)), weight.abs().sum((0, 2))
    for spec, wanted in (
        ("variance", variance),
        ({"variance": {"weighted": True}}, variance * power),
        ("wanda", second.sqrt() * sums),
        ("activation", flows.abs().mean(1)),
        ({"activation": {"statistic": "rms"}}, second.sqrt()),
        ({"activation": {"statistic": "active"}}, (flows != 0).double().mean(1)),
    ):
        found = collect(spec, model, groups, batches, squared)["0"]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0, msg=str(spec))


def test_statistics_without_a_layer_are_those_of_white_inputs() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(torch.relu(F.linear(x, self.w)), self.v)

    model, x = Raw().double(), torch.randn(3, 4).double()
    groups = cpd.comb(model, x)
    (found,) = collect("variance", model, groups, [x], squared).values()
    torch.testing.assert_close(found, model.w.detach().square().sum(1))


class Recurrent(nn.Module):
    """A recurrent layer read by one of two directions, which a raw parameter reads; a cell."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 6, batch_first=True)
        self.lstm = nn.LSTM(6, 4, bidirectional=True, batch_first=True, **options)
        width = 2 * (options.get("proj_size") or 4)
        self.cell, self.v = nn.RNNCell(width, 3), nn.Parameter(torch.randn(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.lstm(self.gru(x)[0])[0]
        state = self.cell(seen[:, 0])
        return F.linear(self.cell(seen[:, 1], state), self.v)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"proj_size": 2}], ids=str)
def test_statistics_of_recurrent_layers(options: dict[str, int]) -> None:
    """What they read and put out, last layer and direction by direction."""
    model, x = Recurrent(**options).double(), torch.randn(7, 2, 5).double()
    groups, kept = cpd.comb(model, x), {}
    between = model.gru(x)[0].detach()
    seen = model.lstm(between)[0].detach()
    state = model.cell(seen[:, 0])
    states = torch.stack([state, model.cell(seen[:, 1], state)]).detach()
    for spec in ("variance", "activation", "wanda"):
        kept[spec] = collect(spec, model, groups, [x], squared)
    torch.testing.assert_close(kept["variance"]["gru"], between.var((0, 1), correction=0))
    torch.testing.assert_close(kept["activation"]["gru"], between.abs().mean((0, 1)))
    weights = [w for n, w in model.lstm.named_parameters() if n.startswith("weight_ih_l0")]
    weights.append(model.gru.weight_hh_l0)
    assert len(weights) == 3
    read = sum(w.detach().abs().sum(0) for w in weights)
    torch.testing.assert_close(kept["wanda"]["gru"], between.square().mean((0, 1)).sqrt() * read)
    torch.testing.assert_close(kept["variance"]["cell"], states.var((0, 1), correction=0))
    found = next(g for g in groups if any(m.tensor == "cell.weight_ih" for m in g.members)
                 and g.name != "cell")  # fmt: skip
    index = at(groups, found.name, "cell.weight_ih")
    variance = seen.var((0, 1), correction=0)
    torch.testing.assert_close(kept["variance"][found.name][index], variance)


def test_statistics_of_projections_that_lie_apart_count_their_bias() -> None:
    """Queries, keys and values of a layer that reads others' keys; queries and keys together."""
    model, groups, x = network("mixed"), combed("mixed"), images()
    layer, kept = model.attention, []
    handle = layer.register_forward_pre_hook(lambda _, args: kept.extend(args))
    model(x)
    handle.remove()
    found = collect("activation", model, groups, [x], loss)["attention"]
    biases = layer.in_proj_bias.chunk(3)
    made = {
        letter: F.linear(value, getattr(layer, f"{letter}_proj_weight"), bias).abs().mean((0, 1))
        for letter, value, bias in zip("qkv", kept, biases, strict=True)
    }
    both = (made["q"] + made["k"]) / 2
    for letter, wanted in (("q", both), ("k", both), ("v", made["v"])):
        index = index_of(groups, f"attention.{letter}_proj_weight")
        torch.testing.assert_close(found[index], wanted.detach())


def index_of(groups: cpd.Groups, tensor: str) -> torch.Tensor:
    """Return the channel of each row that a tensor makes."""
    every = (m for group in groups for m in group.members)
    (rows,) = (m.channel for m in every if m.tensor == tensor and m.role == "out")
    return torch.from_numpy(rows.reshape(-1))


def test_outputs_of_recurrent_layers_that_no_layer_reads() -> None:
    """Also of sequences of unequal length, whose padding does not count."""
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 4, 2, bidirectional=True, batch_first=True)
            self.v, self.packed = nn.Parameter(torch.randn(2, 8)), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.packed:
                return F.linear(self.rnn(x)[0], self.v)
            made = self.rnn(pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True))[0]
            return F.linear(pad_packed_sequence(made, batch_first=True)[0], self.v)

    model, x = Padded().double(), torch.randn(2, 3, 3).double()
    groups = cpd.comb(model, x)
    whole = model.rnn(x)[0].detach()
    short = model.rnn(x[1:, :2])[0].detach()
    found = collect("activation", model, groups, [x], squared)["rnn"]
    index = at(groups, "rnn", "v")
    torch.testing.assert_close(found[index], whole.abs().mean((0, 1)))
    model.packed = True
    found = collect("activation", model, groups, [x], squared)["rnn"]
    together = torch.cat([whole[0], short[0]])
    torch.testing.assert_close(found[index], together.abs().mean(0))


def test_score_shows_one_forward_pass_in_evaluation_mode() -> None:
    """Where there are inputs; also through layers that PyTorch would fuse then."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model, x = nn.Sequential(layer, nn.Linear(8, 3)).train(), torch.randn(4, 5, 8)
    groups = cpd.comb(model, x)
    found = score("variance", model, groups, x)["0.linear1"]
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    kept: list[torch.Tensor] = []
    handle = layer.linear2.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model.eval()(x)
    handle.remove()
    wanted = kept[0].detach().double().var((0, 1), correction=0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_aggregates_and_normalisers() -> None:
    model, x, groups = two()
    squared(model, x).backward()
    rows = (model.a.weight * model.a.weight.grad).sum(1).abs()
    parts = [rows, *((p * p.grad).abs() for p in (model.a.bias, model.n.weight, model.n.bias))]
    stack = torch.stack(parts).detach()
    wanted = {"sum": stack.sum(0), "mean": stack.mean(0), "max": stack.amax(0), "first": stack[0]}
    assert set(wanted) == set(AGGREGATES)
    for how, vector in wanted.items():
        found = score({"taylor": {"aggregate": how}}, model, groups)["a"]
        torch.testing.assert_close(found, vector)
    mean = stack.mean(0)
    divided: dict[str, Any] = {
        "sum": mean / mean.sum(),
        "mean": mean / mean.mean(),
        "max": mean / mean.max(),
        "norm": mean / mean.square().sum().sqrt(),
        "minmax": (mean - mean.min()) / (mean.max() - mean.min()),
        "none": mean,
    }
    assert set(divided) == {*NORMALISERS, "none"}
    for how, vector in divided.items():
        found = score({"taylor": {"normalise": how}}, model, groups)["a"]
        torch.testing.assert_close(found, vector)
        assert not NORMALISERS.get(how, torch.abs)(torch.zeros(3)).any()
    assert resolve({"taylor": {"normalise": None}}).normalise is None
