"""Modules whose code computes sizes: their forwards follow a cut, or their channels stay."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.errors import ArtefactError, InputError
from cpd.forward import Forward
from laws import zeroed


class Counted(nn.Module):
    """Attention that computes its head size from the input's width."""

    extra = 0.1

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).unbind(2)
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) * (width // self.heads) ** -0.5
        scores = scores if mask is None else scores + mask
        weights = F.dropout(self.drop(scores.softmax(-1)), self.extra, self.training)
        return self.proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, width))


class Written(nn.Module):
    """Heads as bare numbers in the code, positions from the input's resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.query = nn.Linear(24, 24)
        self.key = nn.Linear(24, 24)
        self.value = nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, height, width = x.shape
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (
            f(x).view(n, -1, 3, 8).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(n, height // 2 * (width // 2), 24)
        scale = torch.ones(1, dtype=x.dtype, device=x.device)
        return self.head((x * scale).mean(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), Counted(), nn.Tanh(), nn.Linear(24, 5)).eval()


def pruned(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[nn.Module, cpd.Plan]:
    return cpd.prune(model, x, importance="random", target="macs=0.5", **options)


def test_heads_of_a_computed_size_go() -> None:
    groups = cpd.comb(network(), torch.randn(2, 7, 6))
    assert {f.kind for g in groups for f in g.families} >= {"heads"}
    model, x = network(), torch.randn(2, 7, 6)
    small, plan = pruned(model, x)
    assert list(plan.forwards) == ["1"]
    assert isinstance(small[1], Counted)
    assert type(small[1]).__name__ == "Counted"
    assert list(small.state_dict()) == list(model.state_dict())
    assert type(model[1]) is Counted


@pytest.mark.parametrize("shape", [(1, 7, 6), (5, 7, 6), (2, 3, 6), (3, 19, 6)])
def test_batch_and_length_stay_free(shape: tuple[int, ...]) -> None:
    model, x = network().double(), torch.randn(2, 7, 6, dtype=torch.float64)
    small, plan = pruned(model, x, exact=True)
    other = torch.randn(shape, dtype=torch.float64)
    assert cpd.verify(model, small, plan, other)


def test_resolution_stays_free() -> None:
    torch.manual_seed(0)
    model, x = Written().eval().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small, plan = pruned(model, x)
    assert list(plan.forwards) == [""]
    assert cpd.verify(model, small, plan, torch.randn(3, 3, 12, 6, dtype=torch.float64))


def test_dropout_and_training_stay_alive() -> None:
    x = torch.randn(2, 7, 6)
    small, _ = pruned(network(), x)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    small[1].drop.p = 0.0
    assert not torch.equal(small(x), small(x))  # the functional one is left
    small.eval()
    assert torch.equal(small(x), small(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_follow_the_inputs(dtype: torch.dtype) -> None:
    model, x = Written().eval(), torch.randn(2, 3, 8, 8)
    small, _ = pruned(model, x)
    assert small.to(dtype)(x.to(dtype)).dtype is dtype


def test_copies_and_files_and_exports() -> None:
    model, x = network(), torch.randn(2, 7, 6)
    small, plan = pruned(model, x)
    wanted = small(x)
    assert torch.equal(copy.deepcopy(small)(x), wanted)
    again = cpd.cut(model, cpd.Plan.from_json(plan.to_json()))
    assert torch.equal(again(x), wanted)
    again.load_state_dict(small.state_dict())
    exported = torch.export.export(small, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), wanted)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)


def test_cut_twice() -> None:
    model, x = network().double(), torch.randn(2, 7, 6, dtype=torch.float64)
    small, first = pruned(model, x)
    smaller, second = cpd.prune(small, x, importance="random", target="macs=0.6")
    at_once = cpd.cut(model, first.then(second))
    torch.testing.assert_close(at_once(x), smaller(x), rtol=1e-9, atol=1e-12)


def test_the_class_is_kept_where_asked() -> None:
    model, x = network(), torch.randn(2, 7, 6)
    groups = cpd.comb(model, x, keep_class="strict")
    assert "heads" not in {f.kind for g in groups for f in g.families}
    assert any("cannot follow" in frozen.reason for frozen in groups.frozen)
    small, plan = pruned(model, x, keep_class="strict", unreachable="closest")
    assert not plan.forwards
    assert type(small[1]) is Counted


class Measured(Counted):
    """Code that asks for the batch as a plain number, which a trace cannot leave open."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x.view(len(x), -1, x.shape[-1]), mask)


def test_a_batch_is_never_written_down() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), Measured(), nn.Linear(24, 5)).eval()
    x = torch.randn(2, 7, 6)
    small, plan = pruned(model, x, unreachable="closest")
    assert not plan.forwards
    assert cpd.verify(model, small, plan, torch.randn(5, 7, 6))
    groups = cpd.comb(model, x)
    assert "len()" in groups.replaced.why_not["1"]
    assert any("len()" in frozen.reason for frozen in groups.frozen)


class Gridded(nn.Module):
    """Computes a number by values for each new shape, as detectors do their boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 5)
        self.register_buffer("stride", torch.tensor([8.0, 16.0]))
        self.shape: object = None
        self.grid = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shape != x.shape:
            self.shape, self.grid = x.shape, float(self.stride[1])
        return self.linear(x) * self.grid


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_network_has_kept_since_it_was_traced_tells_nothing(device: str) -> None:
    """Without values this one runs at the batch of before alone; there are as many heads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), Counted(heads=2), Gridded()).eval()
    x = torch.randn(2, 7, 6)
    model(x)
    groups = cpd.comb(model.to(device), x.to(device))
    if device == "meta":
        assert not groups.replaced.active
        assert "one batch alone" in groups.replaced.why_not["1"]
        return
    plan = cpd.choose(groups, cpd.importance.score("random", model, groups), "macs=0.5")
    assert list(plan.forwards) == ["1"]
    small = cpd.cut(model, plan)
    assert cpd.verify(model, small, plan)
    assert small(torch.randn(5, 7, 6)).shape == (5, 7, 5)


class Twice(nn.Module):
    """Calls a layer once for each two rows of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counted(heads=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(part) for part in x.split(2)])


def test_code_that_the_batch_calls_more_often_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), Twice(), nn.Linear(24, 5)).eval()
    groups = cpd.comb(model, torch.randn(2, 7, 6))
    assert not groups.replaced.active
    assert "inputs decide" in groups.replaced.why_not["1.inner"]


class Folded(nn.Module):
    """Heads beside the batch, as `bmm` wants them, with another axis left open (-1)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 4, 6
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.proj = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        folded = (n * self.heads, -1, self.dim)
        q, k, v = (
            layer(x).view(n, -1, self.heads, self.dim).transpose(1, 2).reshape(*folded)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.bmm(q, k.transpose(1, 2))
        if scores.shape != (n * self.heads, length, length):
            raise ValueError(f"scores are {tuple(scores.shape)}")
        y = torch.bmm(scores.softmax(-1), v).view(n, self.heads, length, self.dim)
        return self.proj(y.transpose(1, 2).reshape(n, length, width))


def test_heads_that_are_folded_into_the_batch_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), Folded(), nn.Tanh(), nn.Linear(24, 5)).eval()
    x = torch.randn(2, 7, 6)
    small, plan = pruned(model, x)
    assert list(plan.forwards) == ["1"]
    lost = {w.family for w in plan.widths if w.after < w.before}
    assert {"heads", "head dims"} <= lost
    for shape in ((1, 7, 6), (5, 7, 6), (3, 11, 6)):
        assert cpd.verify(model, small, plan, torch.randn(shape))
    assert small.train()(torch.randn(4, 7, 6)).shape == (4, 7, 5)


class Averaged(Folded):
    """Also divides by the number by which it folds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        folded = n * self.heads
        q, k, v = (
            layer(x).view(n, -1, self.heads, self.dim).transpose(1, 2).reshape(folded, -1, self.dim)
            for layer in (self.query, self.key, self.value)
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v) / folded
        y = y.view(n, self.heads, length, self.dim).transpose(1, 2)
        return self.proj(y.reshape(n, length, x.shape[2]))


def test_a_number_that_code_computes_with_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), Averaged(), nn.Tanh(), nn.Linear(24, 5)).eval()
    x = torch.randn(2, 7, 6)
    groups = cpd.comb(model, x)
    assert "computes with a size" in groups.replaced.why_not["1"]
    small, plan = pruned(model, x, unreachable="closest")
    assert cpd.verify(model, small, plan, torch.randn(5, 7, 6))


class Noisy(Folded):
    """In training, another product comes before the one that folds the heads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = (
            layer(x).view(n, -1, self.heads, self.dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        if self.training:
            y = y + 0 * x.new_zeros(n * self.heads).mean()
        y = y.reshape(n * self.heads, -1, self.dim)
        y = (y - y.mean(1, keepdim=True)).view(n, self.heads, length, self.dim)
        return self.proj(y.transpose(1, 2).reshape(n, length, width))


class Trained(Folded):
    """In training, its code folds heads once more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x.reshape(x.shape[0], -1, 4, 6).flatten(2)
        return super().forward(x)


class Padded(Counted):
    """Tokens first, padded to a multiple of eight by a child that keeps what is one."""

    class Pad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x.new_zeros(-x.shape[0] % 8, *x.shape[1:])])

    def __init__(self) -> None:
        super().__init__()
        self.pad = self.Pad()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        length, padded = x.shape[0], self.pad(x)
        y = super().forward(padded.transpose(0, 1), mask).transpose(0, 1)
        return y if padded.shape[0] == length else y[:length]


class Numbered(Counted):
    """Reads a number from a tensor; `mean` divides by the length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.tensor(2.0))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x * self.number.item(), mask)
        return y.sum(1, keepdim=True) / x.shape[1]


class Meaned(Counted):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, mask).sum(1, keepdim=True) / x.shape[1]


class Scaled(nn.Module):
    """Runs on its values alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.number.item()


class Cached(nn.Module):
    """Bears two samples at most."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.randn(2, 1, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > len(self.cache):
            raise ValueError("too many")
        return x + self.cache[: x.shape[0]]


class Chunked(nn.Module):
    """Calls a layer once for each eight of its length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Counted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(part) for part in x.split(8, 1)], 1)


class Asking(Folded):
    """Branches on the number by which it folds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        folded, y = x.shape[0] * self.heads, super().forward(x)
        y = y.reshape(folded, -1, self.dim).reshape(y.shape)
        return 3 * y if folded == 8 else y


class Rewired(Counted):
    """The same operators in training, on other results and by other numbers."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x, mask)
        z = y.tanh() / (2 * x.shape[1] if self.training else x.shape[1])
        return y if self.training else z


class Telling(Counted):
    """A child tells it what to do."""

    class Child(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, bool, int]:
            return x[:, :8], x.shape[1] > 6, min(x.shape[0], 2)

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x, long, least = self.child(x)
        y = super().forward(x, mask).sum(1, keepdim=True) / x.shape[1]
        return y * (2 if long else 1) * least


@pytest.mark.parametrize(
    ("parts", "shapes"),
    [
        ([Asking], [(3, 8, 6), (2, 8, 6), (4, 8, 6)]),
        ([Telling], [(2, 8, 6), (1, 8, 6), (3, 5, 6), (2, 12, 6)]),
        ([Meaned], [(2, 3, 6), (1, 9, 6), (3, 2, 6)]),
        ([Noisy], [(1, 8, 6), (3, 12, 6)]),
        ([Trained], [(1, 8, 6), (3, 12, 6)]),
        ([Averaged], [(1, 8, 6), (5, 12, 6)]),
        ([Padded], [(16, 8, 6), (13, 8, 6), (20, 8, 6)]),
        ([Numbered], [(1, 8, 6), (3, 12, 6)]),
        ([Scaled, Meaned], [(1, 8, 6), (3, 12, 6)]),
        ([Cached, Counted], [(1, 8, 6), (2, 12, 6)]),
        ([Chunked], [(1, 8, 6), (3, 20, 6)]),
    ],
    ids=lambda parts: "+".join(x.__name__ for x in parts if isinstance(x, type)),
)
def test_what_was_captured_is_right_or_says_so(
    parts: list[Callable[[], nn.Module]], shapes: list[tuple[int, ...]]
) -> None:
    """At other sizes than the traced ones, and in training as in evaluation: what the zeroed
    network computes, or the error that names them.
    """
    torch.manual_seed(0)
    example = {Padded: (16, 8, 6), Asking: (3, 8, 6), Meaned: shapes[0]}.get(parts[0], (2, 8, 6))
    model = nn.Sequential(nn.Linear(6, 24), *(part() for part in parts), nn.Linear(24, 5))
    model = without_dropout(model.double())
    groups = cpd.comb(model, torch.randn(example).double())
    scores = cpd.importance.score("random", model, groups)
    plan = cpd.choose(groups, scores, "macs=0.5", unreachable="closest")
    small, gone = cpd.cut(model, plan), zeroed(model, plan)
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        for net in (small, gone):
            net.eval()
        expected = gone(x)
        try:
            assert torch.allclose(small(x), expected, atol=1e-12), shape
        except RuntimeError as error:
            assert "cut for other sizes" in str(error)  # noqa: PT017 - either is right
            assert shape != shapes[0]
            continue
        assert torch.allclose(small.train()(x), expected, atol=1e-12), shape


def test_training_is_another_graph_where_it_is_wired_otherwise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), Rewired(), nn.Linear(24, 5))
    model = without_dropout(model.double())
    small, plan = pruned(model, torch.randn(2, 8, 6).double())
    assert list(plan.forwards) == ["1"]
    gone = zeroed(model, plan)
    for shape in ((2, 8, 6), (3, 12, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        for trains in (False, True):
            small.train(trains), gone.train(trains)
            torch.testing.assert_close(small(x), gone(x), rtol=1e-9, atol=1e-9)


class Masked(nn.Module):
    """A mask has the length twice; the output divides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.core, self.head = nn.Linear(6, 24), Counted(), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(self.stem(x), mask).sum(1) / x.shape[1])


def test_a_mask_of_the_length_leaves_it_free() -> None:
    torch.manual_seed(0)
    model = Masked().eval()

    def inputs(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(batch, length, 6), torch.randn(length, length)

    small, plan = pruned(model, inputs(2, 8))
    assert list(plan.forwards) == ["core"]
    for batch, length in ((1, 8), (3, 5), (2, 12)):
        assert cpd.verify(model, small, plan, inputs(batch, length))


class Dropping(Counted):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x, mask)
        return x if self.training and random.random() < 0.5 else y


def test_random_numbers_of_python_are_not_written_down() -> None:
    model = nn.Sequential(nn.Linear(6, 24), Dropping(), nn.Linear(24, 5)).eval()
    before = random.getstate()
    groups = cpd.comb(model, torch.randn(2, 7, 6))
    assert random.getstate() == before
    assert "random numbers of Python" in groups.replaced.why_not["1"]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Counted):
            module.drop = nn.Identity()
            module.extra = 0.0
    return model.eval()


class Remembering(Counted):
    """A module that says by itself what a copy of it holds."""

    def __getstate__(self) -> dict[str, object]:
        return {"heads": self.heads, "modules": self._modules}

    def __setstate__(self, state: dict[str, object]) -> None:
        nn.Module.__init__(self)
        self.heads, self._modules = state["heads"], state["modules"]  # type: ignore[assignment]


def test_a_module_with_a_copying_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), Remembering(), nn.Linear(24, 5)).eval()
    x = torch.randn(2, 7, 6)
    small, plan = pruned(model, x)
    assert list(plan.forwards) == ["1"]
    assert not any(module.training for module in small.modules())
    assert torch.equal(copy.deepcopy(small)(x), small(x))


class Sliced(nn.Module):
    """All but the last of a list of layers, as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Linear(9, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[-1](self.layers[:-1](x).view(x.shape[0], -1))


def test_a_part_of_a_list_of_modules() -> None:
    torch.manual_seed(0)
    small, plan = pruned(Sliced().eval(), torch.randn(4, 6))
    assert plan.new_shape("layers.0.weight")[0] < 12
    assert small.layers[2].out_features < 9


def test_other_arguments_than_traced() -> None:
    x = torch.randn(2, 7, 6)
    small, _ = pruned(network(), x)
    with pytest.raises(InputError, match=r"mask is a tensor, but .* cut for None"):
        small[1](torch.randn(2, 7, small[0].out_features), torch.zeros(7, 7))


def test_no_code_comes_from_a_file() -> None:
    x = torch.randn(2, 7, 6)
    _, plan = pruned(network(), x)
    data = json.loads(plan.to_json())
    for op in ("aten.from_file.default", "os.system", "builtins.eval", "aten.nothing.default"):
        data["forwards"]["1"]["graphs"]["eval"][1]["op"] = op
        with pytest.raises(ArtefactError, match="no operator that a forward may call"):
            cpd.Plan.from_json(json.dumps(data))


def test_data_is_the_same_after_json() -> None:
    x = torch.randn(2, 7, 6)
    _, plan = pruned(network(), x)
    forward = plan.forwards["1"]
    assert Forward.from_data(json.loads(json.dumps(forward.to_data()))) == forward


class Grouped(nn.Module):
    """Four heads of four dims, two of them for a key: `dim` may be either by its value."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.share = 4, 2
        self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, -1, self.dim).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (self.shared(y) for y in (k, v))
        y = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        b, heads, n, dim = x.shape
        wide = x[:, :, None].expand(b, heads, self.share, n, dim)
        return wide.reshape(b, heads * self.share, n, dim)


def test_numbers_that_are_equal_by_chance_are_told_apart() -> None:
    model, x = nn.Sequential(nn.Linear(5, 12), Grouped()), torch.randn(2, 7, 5)
    groups = cpd.comb(model, x, keep_class="strict")
    group = next(group for group in groups if group.name == "1.q")
    assert {f.kind for f in group.families} >= {"heads"}
    scores = {g.name: torch.rand(g.size) for g in groups}
    plan = cpd.choose(groups, scores, "params=0.5", ranking="uniform")
    assert cpd.verify(model, cpd.cut(model, plan, verify=False), plan, x)
    assert any(w.group == "1.q" for w in plan.widths)


def test_code_that_fails_for_one_reason_is_not_tried_again_and_again(monkeypatch) -> None:
    """Widths differ, so each would be a capture of its own; three of them say enough."""
    tried = []
    capture = cpd.replace.capture
    monkeypatch.setattr(
        cpd.replace, "capture", lambda module, *more: tried.append(module) or capture(module, *more)
    )
    widths = [12, 16, 20, 24, 28]
    layers = [nn.Linear(6, widths[0])]
    for width, after in zip(widths, [*widths[1:], 3], strict=True):
        layers += [Measured(width, 4), nn.Linear(width, after)]
    groups = cpd.comb(nn.Sequential(*layers).eval(), torch.randn(2, 5, 6))
    paths = [str(k) for k, layer in enumerate(layers) if isinstance(layer, Measured)]
    assert [groups.replaced.template(path) for path in paths] == [None] * 5
    assert {groups.replaced.why_not[path] for path in paths} == {groups.replaced.why_not["1"]}
    assert "len()" in groups.replaced.why_not["1"]
    assert len(tried) == 3


class Meeting(nn.Module):
    """Computes with the width that it meets, around code that cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Measured(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        return self.inner(x.reshape(n * length, width).tanh().view(n, length, width))


class Flat(nn.Module):
    """Writes the width of its input, so that a layer inside fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.reshape(-1, 24)).tanh().mean(0, keepdim=True)


class Computing(nn.Module):
    """Computes how many heads there are from the width that it meets, which is wrong when their
    size goes; a layer inside fails.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm, self.out = nn.Linear(24, 128), nn.LayerNorm(16), nn.Linear(128, 24)

    def heads(self, x: torch.Tensor) -> int:
        return -(-x.shape[-1] // 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q(x)
        return self.out(self.norm(y.view(*x.shape[:2], self.heads(y), -1)).flatten(2))


class OfNumPy(Computing):
    """Has a number of NumPy in its code."""

    def heads(self, x: torch.Tensor) -> np.int64:
        return np.int64(8)


@pytest.mark.parametrize(
    ("module", "at_fault"), [(Meeting, False), (Flat, True), (Computing, True), (OfNumPy, True)]
)
def test_only_code_that_is_at_fault_is_replaced(module, at_fault, monkeypatch) -> None:
    """Around code that fails, a forward is captured only where it gave a call a wrong number."""
    tried = []
    capture = cpd.replace.capture
    monkeypatch.setattr(
        cpd.replace, "capture", lambda one, *more: tried.append(type(one)) or capture(one, *more)
    )
    model = nn.Sequential(nn.Linear(6, 24), module(), nn.Linear(24, 5)).eval()
    x = torch.randn(4, 6) if module is Flat else torch.randn(2, 7, 6)
    groups = cpd.comb(model, x)
    assert (module in tried) == at_fault
    assert ("1" in groups.replaced.active) == at_fault
    small, plan = pruned(model, x, unreachable="closest")
    assert cpd.verify(model, small, plan, x)


class Elsewhere(nn.Module):
    """Attention whose code also uses what it computed once, or reads values."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.inner, self.values = Counted(), values
        self.held: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.held is None:
            self.held = torch.ones(1)
        if self.values:
            return self.inner(x) * torch.arange(3).sum().item()
        return self.inner(x * self.held)


@pytest.mark.parametrize(("values", "place"), [(False, "meta"), (True, "bare")])
def test_trials_compute_nothing_where_that_is_possible(values, place, monkeypatch) -> None:
    """A tensor held elsewhere is taken along; code that reads values gets them."""
    used = []
    run = cpd.runs._run

    def watched(*args: object) -> object:
        used.append((args[3], error := run(*args)))
        return error

    monkeypatch.setattr(cpd.runs, "_run", watched)
    model = nn.Sequential(nn.Linear(6, 24), Elsewhere(values), nn.Linear(24, 5)).eval()
    model(torch.randn(1, 2, 6))
    groups = cpd.comb(model, torch.randn(2, 7, 6))
    assert {f.kind for g in groups for f in g.families} >= {"heads"}
    assert [at for at, error in used if error is None][-1] == place
    assert not [at for at, _ in used if at == "cpu"]
    small, plan = pruned(model, torch.randn(2, 7, 6))
    assert cpd.verify(model, small, plan, torch.randn(2, 7, 6))


@pytest.mark.parametrize("seen", [([], [("", "view", (2,))]), ([("", "view", (2,))], [])])
def test_where_no_calls_are_seen_no_code_is_cleared(seen) -> None:
    """A network that fails before anything runs tells nothing about the code of its modules."""
    model = nn.Sequential(nn.Linear(6, 24), Flat(), nn.Linear(24, 5)).eval()
    groups = cpd.comb(model, torch.randn(4, 6))
    assert cpd.opened.at_fault(groups, groups.everything(), ["1", "2"], *seen) == ["1", "2"]
    uncut = cpd.opened.calls_of(groups.everything(), cpd.runs.Runs(groups))
    assert uncut
    assert cpd.opened.at_fault(groups, groups.everything(), ["1", "2"], uncut, uncut) == []


def test_of_a_kind_only_what_passes_through_the_module_that_fails_stays() -> None:
    """Two compute head dims and follow by replaced forwards; the third has a forward of its own."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, width = x.shape
            qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2)).softmax(-1)
            return self.out((scores @ v).transpose(1, 2).reshape(batch, length, width))

    torch.manual_seed(0)
    model = nn.Sequential(Attends(), nn.ReLU(), Attends(), nn.ReLU(), Attends()).double().eval()
    model[4].forward = model[4].forward
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    groups = cpd.comb(model, x)
    free = {g.name for g in groups if any("head" in f.kind for f in g.families)}
    assert {"0.qkv", "2.qkv"} <= free, groups
    assert "4.qkv" not in free, groups
