"""Combing: the traps of the design, a small network each; and the printed groups of a dozen."""

# ruff: noqa: E501 - one network, one line

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from cpd.errors import InputError, TraceError, UnknownName
from cpd.rules import pointwise
from cpd.trace import uncollected
from laws import prove, randomised

GOLDEN = Path(__file__).parent / "golden"


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Net(nn.Module):
    """A network of named parts and a forward function over them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(a: int, b: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


# --- attention of many kinds ---------------------------------------------------------------------------


class Attention(nn.Module):
    """Fused qkv, and a knob for every way in which attention is written."""

    def __init__(
        self, dim: int = 12, heads: int = 3, *, norm: str = "", scale: str = "default", rope: bool = False,
        shared: bool = False, by_hand: bool = False, size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.head_dim = heads, size or dim // heads
        inner = self.heads * self.head_dim
        self.embed = nn.Linear(5, dim)
        self.qkv = nn.Linear(dim, (2 if shared else 3) * inner)
        self.proj = nn.Linear(inner, dim)
        self.head = nn.Linear(dim, 4)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1)) if scale == "parameter" else 0.4
        self.how, self.rope, self.shared, self.by_hand = scale, rope, shared, by_hand
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if norm == "layer":
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        elif norm == "plain":
            self.q_norm = nn.LayerNorm(self.head_dim, elementwise_affine=False)
            self.k_norm = nn.LayerNorm(self.head_dim, elementwise_affine=False)
        elif norm == "rms":
            self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        parts = self.qkv(x).reshape(b, n, -1, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = (parts[0], parts[0], parts[1]) if self.shared else parts.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = self.rotated(q), self.rotated(k)
        if self.how == "parameter":
            q = q * self.scale
        if self.by_hand:
            weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
            out = weights @ v
        else:
            fixed = 0.4 if self.how == "fixed" else None
            out = F.scaled_dot_product_attention(q, k, v, scale=fixed)
        out = out.transpose(1, 2).reshape(b, n, -1)
        return self.head(x + self.proj(out))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angle.cos() + turned * angle.sin()


class Nest(nn.Module):
    """The output is flattened as (head dim, heads), as NesT does."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.scale = 0.5
        self.qkv, self.proj = nn.Linear(5, 36), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.permute(0, 2, 3, 1).reshape(b, n, -1))


class FeatureMap(nn.Module):
    """Linear attention: q and k pass a map that is not zero where a channel is gone."""

    def __init__(self, feature: Callable[[torch.Tensor], torch.Tensor], *, normal: bool) -> None:
        super().__init__()
        self.feature, self.normal, self.heads = feature, normal, 2
        self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 8)
        self.proj = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        q, k = self.feature(q), self.feature(k)
        out = q @ (k.transpose(-2, -1) @ v)
        if self.normal:
            out = out / (q @ k.sum(-2).unsqueeze(-1))
        return self.proj(out.transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """Several query heads read one key head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.kv, self.dim = how, 4, 2, 6
        self.q, self.k, self.v = nn.Linear(6, 24), nn.Linear(6, 12), nn.Linear(6, 12)
        self.proj = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv, self.dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv, self.dim).transpose(1, 2)
        times = self.heads // self.kv
        if self.how == "expand":
            k = (
                k[:, :, None]
                .expand(b, self.kv, times, n, self.dim)
                .reshape(b, self.heads, n, self.dim)
            )
            v = (
                v[:, :, None]
                .expand(b, self.kv, times, n, self.dim)
                .reshape(b, self.heads, n, self.dim)
            )
        else:
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))


class MHA(nn.Module):
    def __init__(self, *, need: bool, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.embed, self.head, self.need = nn.Linear(5, 12), nn.Linear(12, 3), need
        self.attn = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.attn(x, x, x, need_weights=self.need)[0]))


# --- convolutions, blocks, and the ways to share ----------------------------------------------------------


class Stage(nn.Module):
    """conv - bn - relu - conv - bn + shortcut."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            conv(a, b, 3),
            nn.BatchNorm2d(b),
            conv(b, b, 3),
            nn.BatchNorm2d(b),
        )
        self.short = conv(a, b) if a != b else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def shuffle(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.a(x)
    b, c, h, w = x.shape
    x = x.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
    return m.b(x)


def squeeze_excite(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.a(x)
    gate = m.up(F.silu(m.down(x.mean((2, 3), keepdim=True))))
    return m.b(x * gate.sigmoid())


def split_two(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = m.a(x).chunk(2, 1)
    return m.b(m.dw(a) * b)


def uneven(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = m.a(x).split(m.parts, 1)
    return m.b(torch.cat([m.c(a), b], 1))


def cats(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = m.a(x), m.b(x)
    y = m.bn(torch.cat([torch.cat([a, b], 1), a], 1))
    first, rest = y[:, : a.shape[1]], y[:, a.shape[1] :]
    return m.c(first).sum(1) + m.d(rest).sum(1)


def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.a(x)
    x = x + m.shared(x)
    return m.b(F.relu(m.shared(x)))


def tied(m: Any, ids: torch.Tensor) -> torch.Tensor:
    x = m.embed(ids)
    return F.linear(x + m.down(F.gelu(m.up(x))), m.embed.weight)


class Buffered(nn.Module):
    """A buffer with a channel axis, and a weight used by a function only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6, 3), conv(6, 4)
        self.register_buffer("gain", torch.rand(1, 6, 1, 1))
        self.kernel = nn.Parameter(torch.rand(6, 6, 3, 3))
        self.plain = torch.rand(6, 1, 1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.conv2d(self.a(x) * self.gain, self.kernel).relu())


class Constant(Buffered):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) * self.plain)


class Output(NamedTuple):
    y: torch.Tensor
    nothing: None
    many: list[torch.Tensor]


class Relative(nn.Module):
    """A table of biases by relative position, as windows use it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.table = nn.Parameter(torch.zeros(9, 3))
        index = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs()
        self.register_buffer("index", index)
        self.qkv, self.proj = nn.Linear(5, 36), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        out = F.scaled_dot_product_attention(q, k, v, bias.unsqueeze(0))
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        mean = w.mean((1, 2, 3), keepdim=True)
        std = w.std((1, 2, 3), keepdim=True)
        return F.conv2d(
            x, (w - mean) / (std + 0.1), self.bias, self.stride, self.padding, 1, self.groups
        )


class GroupedAndNorm(nn.Module):
    """Conv groups and norm groups that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, 3), conv(8, 4)
        self.mid = conv(8, 8, 3, groups=4)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.norm(self.mid(self.a(x)))))


IMAGE = (2, 3, 6, 6)


@dataclass
class Trap:
    """`free`: whether something may go with `exact=True`, and without."""

    make: Callable[[], nn.Module]
    shape: Any = IMAGE
    free: tuple[bool, bool] = (True, True)


def net(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Net(
        forward,
        **{k: v() if callable(v) and not isinstance(v, nn.Module) else v for k, v in parts.items()},
    )


SEQ = (2, 5, 5)
TRAPS: dict[str, Trap] = {
    "attention": Trap(lambda: Attention(), SEQ),
    "attention, heads = 3 = qkv": Trap(lambda: Attention(9, 3), SEQ),
    "attention by hand": Trap(lambda: Attention(by_hand=True), SEQ),
    "attention, fixed scale": Trap(lambda: Attention(scale="fixed"), SEQ),
    "attention, scale is a parameter": Trap(lambda: Attention(scale="parameter"), SEQ),
    "attention, shared q = k": Trap(lambda: Attention(shared=True), SEQ),
    "attention, shared q = k, fixed": Trap(lambda: Attention(shared=True, scale="fixed"), SEQ),
    "attention, rope": Trap(lambda: Attention(rope=True), SEQ),
    "attention, rope, fixed scale": Trap(lambda: Attention(rope=True, scale="fixed"), SEQ),
    "attention, layer norm on q and k": Trap(lambda: Attention(norm="layer"), SEQ),
    "attention, plain norm on q and k": Trap(lambda: Attention(norm="plain"), SEQ),
    "attention, rms norm, rope": Trap(lambda: Attention(norm="rms", rope=True), SEQ),
    "attention, wide inside": Trap(lambda: Attention(8, 2, size=6), SEQ),
    "attention, all sizes 4": Trap(lambda: Attention(4, 4, size=4), (4, 4, 5)),
    "nest": Trap(Nest, SEQ),
    "feature map sigmoid": Trap(lambda: FeatureMap(torch.sigmoid, normal=False), SEQ),
    "feature map cos": Trap(lambda: FeatureMap(torch.cos, normal=False), SEQ),
    "feature map elu + 1": Trap(lambda: FeatureMap(lambda x: F.elu(x) + 1, normal=True), SEQ),
    "feature map square, 0 / 0": Trap(lambda: FeatureMap(torch.square, normal=True), SEQ),
    "grouped queries, expand": Trap(lambda: Grouped("expand"), (2, 5, 6)),
    "grouped queries, repeat": Trap(lambda: Grouped("repeat"), (2, 5, 6)),
    "nn.MultiheadAttention": Trap(lambda: MHA(need=False), SEQ),
    "nn.MultiheadAttention, weights": Trap(lambda: MHA(need=True), SEQ),
    "nn.MultiheadAttention, sequence first": Trap(lambda: MHA(need=False, batch_first=False), SEQ),
    "nn.MultiheadAttention, bias_kv": Trap(lambda: MHA(need=False, add_bias_kv=True), SEQ),
    "relative positions": Trap(Relative, SEQ),
    "residual": Trap(lambda: nn.Sequential(Stage(3, 6), Stage(6, 6), Stage(6, 8), conv(8, 4))),
    "C = H = W = batch": Trap(lambda: nn.Sequential(Stage(6, 6), Stage(6, 6), conv(6, 6)), (6, 6, 6, 6)),
    "one sample": Trap(lambda: nn.Sequential(Stage(3, 6), conv(6, 4)), (1, 3, 6, 6)),
    "shuffle": Trap(net(shuffle, a=lambda: conv(3, 8), b=lambda: conv(8, 4), groups=2)),
    "shuffle between grouped": Trap(net(shuffle, a=lambda: conv(4, 8, groups=2), b=lambda: conv(8, 8, 3, groups=2), groups=2), (2, 4, 5, 5), free=(False, False)),
    "grouped": Trap(GroupedAndNorm),
    "depthwise": Trap(lambda: nn.Sequential(conv(3, 8), conv(8, 8, 3, groups=8), nn.BatchNorm2d(8), conv(8, 4))),
    "depthwise, two outputs each": Trap(lambda: nn.Sequential(conv(3, 4), conv(4, 8, 3, groups=4), nn.ReLU6(), conv(8, 4))),
    "squeeze and excite": Trap(net(squeeze_excite, a=lambda: conv(3, 8, 3), down=lambda: conv(8, 4), up=lambda: conv(4, 8), b=lambda: conv(8, 4))),
    "chunk and gate": Trap(net(split_two, a=lambda: conv(3, 12), dw=lambda: conv(6, 6, 3, groups=6), b=lambda: conv(6, 4))),
    "uneven split": Trap(net(uneven, a=lambda: conv(3, 9), c=lambda: conv(3, 5), b=lambda: conv(11, 4), parts=[3, 6])),
    "cat of cats, norm, split": Trap(net(cats, a=lambda: conv(3, 6), b=lambda: conv(3, 5), bn=lambda: nn.BatchNorm2d(17), c=lambda: conv(6, 2), d=lambda: conv(11, 2))),
    "one module twice": Trap(net(twice, a=lambda: conv(3, 6), shared=lambda: conv(6, 6, 3), b=lambda: conv(6, 4))),
    "tied embedding": Trap(net(tied, embed=lambda: nn.Embedding(11, 8), up=lambda: nn.Linear(8, 12), down=lambda: nn.Linear(12, 8)), "ids"),
    "buffer and function": Trap(Buffered),
    "plain tensor": Trap(Constant, free=(False, False)),
    "layer norm over (C, H, W)": Trap(lambda: nn.Sequential(conv(3, 8), nn.LayerNorm((8, 6, 6)), conv(8, 4)), free=(False, True)),
    "layer norm": Trap(lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), SEQ),
    "weight standardisation": Trap(lambda: nn.Sequential(conv(3, 6), Standardised(6, 8, 3), nn.GroupNorm(2, 8), conv(8, 4))),
    "weight norm": Trap(lambda: nn.Sequential(conv(3, 6), torch.nn.utils.parametrizations.weight_norm(conv(6, 8, 3)), nn.ReLU(), conv(8, 4))),
    "1d": Trap(lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.PReLU(8), nn.Conv1d(8, 4, 1)), (2, 3, 7)),
    "3d": Trap(lambda: nn.Sequential(nn.Conv3d(3, 6, 2), nn.InstanceNorm3d(6, affine=True), nn.Conv3d(6, 4, 1)), (2, 3, 3, 4, 3)),
    "transposed": Trap(lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ReLU(), conv(6, 4))),
    "pixel shuffle": Trap(lambda: nn.Sequential(conv(3, 12), nn.PixelShuffle(2), conv(3, 4))),
    "pixel unshuffle": Trap(lambda: nn.Sequential(conv(3, 6), nn.PixelUnshuffle(2), conv(24, 4))),
    "reflect padding": Trap(lambda: nn.Sequential(conv(3, 6, 3, padding_mode="reflect"), conv(6, 4))),
    "flatten to linear": Trap(lambda: nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10), nn.ReLU(), nn.Linear(10, 4))),
    "bilinear": Trap(lambda: Net(lambda m, x: m.c(m.b(x, x)), b=nn.Bilinear(5, 5, 6), c=nn.Linear(6, 3)), SEQ),
    "gru": Trap(lambda: Net(lambda m, x: m.c(m.b(m.a(x))[0]), a=nn.Linear(5, 6), b=nn.GRU(6, 6, batch_first=True), c=nn.Linear(6, 3)), SEQ),
    "transformer layer": Trap(lambda: nn.Sequential(nn.Linear(5, 12), nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), nn.Linear(12, 3)), SEQ),
    "transformer layer, norm first": Trap(lambda: nn.Sequential(nn.Linear(5, 12), nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True), nn.Linear(12, 3)), SEQ),
}  # fmt: skip


def example(trap: Trap) -> torch.Tensor:
    if trap.shape == "ids":
        return torch.arange(10).reshape(2, 5)
    return tokens(*trap.shape)


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("exact", [True, False])
def test_traps(name: str, exact: bool) -> None:
    trap = TRAPS[name]
    _, total = prove(randomised(trap.make()), example(trap), exact=exact, count=3)
    assert (total > 0) == trap.free[0 if exact else 1]


# --- what goes in and out --------------------------------------------------------------------------------


class Data(NamedTuple):
    image: torch.Tensor
    weight: torch.Tensor | None


@dataclass
class Result:
    score: torch.Tensor
    extra: dict[str, Any]


torch.export.register_dataclass(Result, serialized_type_name="tests.Result")


class Interface(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(
        self,
        x: torch.Tensor,
        gain: torch.Tensor | None = None,
        *,
        times: int = 1,
        how: str = "tuple",
    ) -> Any:
        y = F.gelu(self.a(x))
        if gain is not None:
            y = y * gain
        out = self.b(y) * times
        if how == "dict":
            return {"out": out, "none": None, "many": [out + 1, (out, 3)]}
        if how == "dataclass":
            return Result(out, {"mean": out.mean(0)})
        return Output(out, None, [out.exp()])


@pytest.mark.parametrize("how", ["tuple", "dict", "dataclass"])
@pytest.mark.parametrize("gain", [None, torch.full((1, 1), 2.0, dtype=torch.float64)])
def test_inputs_and_outputs_of_any_form(how: str, gain: torch.Tensor | None) -> None:
    inputs = {"x": tokens(4, 5), "gain": gain, "times": 2, "how": how}
    _, total = prove(randomised(Interface()), inputs, exact=True, count=2)
    assert total > 0


def test_arguments_in_a_tuple() -> None:
    inputs = (tokens(4, 5), torch.ones(4, 1).double())
    _, total = prove(randomised(Interface()), inputs, exact=True, count=2)
    assert total > 0


def test_a_network_whose_parameters_do_not_train() -> None:
    model = randomised(Attention()).requires_grad_(False)
    prove(model, tokens(2, 5, 5), exact=True, count=2)
    small, _ = cpd.prune(model, tokens(2, 5, 5), target="macs=0.6")
    assert not any(p.requires_grad for p in small.parameters())


def snapshot(model: nn.Module) -> Any:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(t), t.clone(), t.requires_grad, t.grad) for name, t in tensors.items()},
        {
            name: (m.training, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        },
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(training: bool) -> None:
    model = nn.Sequential(
        Stage(3, 6), nn.Dropout(0.5), Stage(6, 8), nn.Flatten(), nn.Linear(288, 4)
    ).double()
    model.train(training)
    model[1].eval()
    handle = model[0].register_forward_hook(lambda *_: None)
    x = tokens(2, 3, 6, 6)
    before = snapshot(model)
    for exact in (True, False):
        groups = cpd.comb(model, x, exact=exact)
        scores = cpd.importance.score("magnitude", model, groups)
        plan = cpd.choose(groups, scores, "macs=0.5")
        small = cpd.cut(model, plan)
        assert cpd.verify(model, small, plan, x)
        assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    after = snapshot(model)
    assert torch.equal(before[2], after[2])
    assert before[1] == after[1]
    for name, (identity, value, wants, grad) in before[0].items():
        now = after[0][name]
        assert (identity, wants, grad) == (now[0], now[2], now[3])
        assert torch.equal(value, now[1])
    handle.remove()


def test_ignore() -> None:
    model = nn.Sequential(Stage(3, 6), Stage(6, 8), conv(8, 4)).double()
    x = tokens(2, 3, 6, 6)
    everything = {group.name for group in cpd.comb(model, x)}
    for ignore in ("0.conv1", ["0.conv1"], [model[0].conv1], model[0].conv1, "*.conv1.*"):
        groups = cpd.comb(model, x, ignore=ignore)
        assert "0.conv1" not in {group.name for group in groups}
        assert {"ignored by the user"} <= {item.reason for item in groups.frozen}
    assert "0.conv1" in everything
    groups = cpd.comb(model, x, ignore=["1"])
    assert {group.name for group in groups} == {"0.conv1", "0.conv2"}
    with pytest.raises(
        UnknownName, match=r"module or tensor to ignore '0\.conv7'; did you mean '0\.conv"
    ):
        cpd.comb(model, x, ignore=["0.conv7"])
    with pytest.raises(InputError, match="ignore has a Linear that is no part of the model"):
        cpd.comb(model, x, ignore=[nn.Linear(1, 1)])


def test_an_operator_without_a_rule() -> None:
    model = Net(
        lambda m, x: m.b(torch.linalg.matrix_exp(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)
    )
    x = torch.randn(2, 4, 4)
    groups = cpd.comb(model, x)
    assert not len(groups)
    kept = {(item.reason, item.op, item.path) for item in groups.frozen}
    assert ("operator without a rule", "linalg_matrix_exp", "") in kept
    with pytest.raises(
        TraceError, match=r"no rule for operator aten\.linalg_matrix_exp.*unknown=\"freeze\""
    ):
        cpd.comb(model, x, unknown="error")
    with pytest.raises(UnknownName, match="handling of unknown operators 'fail'"):
        cpd.comb(model, x, unknown="fail")


def test_wrong_inputs_are_told_from_a_network_that_does_not_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(
        InputError, match=r"Sequential does not run on these example inputs \[\(2, 5\)\]"
    ):
        cpd.comb(model, torch.randn(2, 5))
    with pytest.raises(InputError, match="example_inputs is a int"):
        cpd.comb(model, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model is a function"):
        cpd.comb(lambda x: x, torch.randn(2, 4))  # type: ignore[arg-type]
    jumpy = Net(lambda m, x: m.a(x) if x.sum().item() > 0 else m.a(-x), a=nn.Linear(4, 2))
    with pytest.raises(
        TraceError, match=r"Net runs on \[\(2, 4\)\] but torch\.export cannot trace it"
    ):
        cpd.comb(jumpy, torch.randn(2, 4))


def test_groups_are_found_by_name() -> None:
    groups = cpd.comb(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4))
    assert groups["0"].size == groups["0"].width == 6
    assert {(m.tensor, m.role) for m in groups["0"].members} == {
        ("0.weight", "out"),
        ("0.bias", "out"),
        ("2.weight", "in"),
    }
    with pytest.raises(InputError, match="no coupling group 'x'; there are: 0"):
        groups["x"]


# --- printed groups -----------------------------------------------------------------------------------------

PRINTED = (
    "residual", "depthwise", "grouped", "squeeze and excite", "cat of cats, norm, split", "uneven split",
    "chunk and gate", "attention", "nn.MultiheadAttention", "attention, layer norm on q and k",
    "grouped queries, expand", "pixel shuffle", "tied embedding", "nest", "shuffle", "gru",
)  # fmt: skip


def place(text: str) -> str:
    """Without numbers of lines, which differ between versions of PyTorch and of this file."""
    return re.sub(r"(\.py):\d+", r"\1", text)


@pytest.mark.parametrize("name", PRINTED)
def test_printed_groups(name: str) -> None:
    trap = TRAPS[name]
    lines = []
    for exact in (False, True):
        groups = cpd.comb(randomised(trap.make()), example(trap), exact=exact)
        lines += [f"exact={exact}", str(groups), *(str(group) for group in groups)]
    text = place("\n".join(lines)) + "\n"
    path = GOLDEN / f"{name.replace(',', '').replace(' ', '_')}.txt"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        pytest.fail(f"{path} was not there; it is now: read it before you keep it")
    assert text == path.read_text(encoding="utf-8")


# --- widths that kernels take ---------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts in one tensor, whose kernel takes rows of multiples of 16 bytes."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.start = nn.ModuleList(nn.Linear(6, width) for width in widths)
        self.up = nn.Parameter(torch.randn(2, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(2, 32, 8) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([3, 8], dtype=torch.int32)
        x = torch.cat([start(x) for start in self.start], 1)
        inner = torch._grouped_mm(x, self.up, offs=ends).relu()
        return torch._grouped_mm(inner, self.down, offs=ends)


def test_grouped_products_keep_multiples() -> None:
    model, x = (
        Experts(16).bfloat16(),
        torch.randn(8, 6).bfloat16(),
    )  # its fake kernel takes no other
    groups = cpd.comb(model, x)
    assert {group.name: group.families[0].multiple for group in groups} == {"start.0": 8, "up": 8}
    scores = {group.name: torch.rand(group.size) for group in groups}
    plan = cpd.choose(groups, scores, "params=0.4", unreachable="closest")
    assert [(w.before, w.after) for w in plan.widths] == [(32, 16), (16, 8)]
    assert cpd.cut(model, plan, verify=False)(x).shape == (8, 8)  # the real kernel


def test_widths_that_no_multiple_divides_stay() -> None:
    groups = cpd.comb(Experts(10, 6).bfloat16(), torch.randn(8, 6).bfloat16())
    assert [group.name for group in groups] == ["up"]
    assert "grouped products take multiples of 8" in str(groups)


def test_operators_that_draw_are_tried_without_a_draw(monkeypatch):
    """The random state stays, whatever the rule of an operator had to try for the first time."""
    monkeypatch.setattr(pointwise, "_PROBED", {})

    def forward(m, x):
        x = F.rrelu(m.first(x), training=m.training)
        if not m.training:
            return m.last(x)
        x = x * x.new_empty(x.shape[0], 1).bernoulli_(0.5)
        return m.last(x), m.aux(x)

    model = Net(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 2), aux=nn.Linear(4, 2)).eval()
    before = torch.get_rng_state()
    groups = cpd.comb(model, torch.zeros(2, 4))
    assert [group.name for group in groups] == ["first"]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_collector_is_left_as_it_was() -> None:
    """Full collections wait while a network is combed, and no longer, whatever comes of it."""
    before = gc.get_threshold()
    cpd.comb(nn.Linear(3, 4), torch.randn(2, 3))
    assert gc.get_threshold() == before
    with uncollected():
        assert gc.get_threshold()[2] > before[2]
    with pytest.raises(InputError), uncollected():
        cpd.comb(nn.Linear(3, 4), torch.randn(2, 5))
    assert gc.get_threshold() == before


def _written_into_part(m: Any, y: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros(2, 5, dtype=y.dtype)
    sums[:, 0] = y.mean(-1)
    return m.last(y) * sums[:, :1]


def _kept_in_a_buffer(m: Any, y: torch.Tensor) -> torch.Tensor:
    m.mean.copy_(y.mean().reshape(1))
    return m.last(y)


def _asserted(m: Any, y: torch.Tensor) -> torch.Tensor:
    torch._assert_async(y.mean() < 1e9)
    return m.last(y)


def _a_number(m: Any, y: torch.Tensor) -> torch.Tensor:
    return m.last(y) * (y.mean() > 0).long().item()


def _unread(m: Any, y: torch.Tensor) -> torch.Tensor:
    y.mean()
    return m.last(y)


@pytest.mark.parametrize(
    ("forward", "kept"),
    [
        (_written_into_part, True),
        (_kept_in_a_buffer, True),
        (_asserted, True),
        (_a_number, True),
        (_unread, False),
    ],
)
def test_exact_keeps_for_what_something_comes_of(forward: Any, kept: bool) -> None:
    """An output is not all that counts: what is written, checked or measured does as well."""
    model = Net(lambda m, x: forward(m, m.first(x)), first=nn.Linear(4, 6), last=nn.Linear(6, 2))
    model.register_buffer("mean", torch.zeros(1))
    groups = cpd.comb(randomised(model), tokens(2, 4), exact=True)
    assert ("exact: mean over channels" in str(groups)) == kept
    assert [group.name for group in groups] == ([] if kept else ["first"])
