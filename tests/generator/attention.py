"""Attention as it is written: layouts of qkv, scales, norms, positions, groups, windows."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import WIDTHS, Made, Shape, Then, divisor, idiom
from .norms import rms

LAYOUTS = ("3 h d", "h 3 d", "h d 3", "chunk", "split", "separate", "kv", "conv")
NORMS = ("none", "layer", "plain", "rms", "l2")
POSITIONS = ("none", "half", "interleaved", "table", "index", "alibi", "causal")


class Heads(nn.Module):
    """Projects tokens to q, k and v of shape (batch, heads, length, dim)."""

    def __init__(self, width: int, heads: int, dim: int, layout: str) -> None:
        super().__init__()
        self.heads, self.dim, self.layout = heads, dim, layout
        inner = heads * dim
        if layout == "separate":
            self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        elif layout == "kv":
            self.q, self.kv = nn.Linear(width, inner, bias=False), nn.Linear(width, 2 * inner)
        elif layout == "conv":
            self.qkv = nn.Conv1d(width, 3 * inner, 1)
        else:
            self.qkv = nn.Linear(width, 3 * inner)

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, self.dim).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n, length, _ = x.shape
        if self.layout == "separate":
            return tuple(self.apart(layer(x)) for layer in (self.q, self.k, self.v))
        if self.layout == "kv":
            kv = self.kv(x).reshape(n, length, 2, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            return self.apart(self.q(x)), kv[0], kv[1]
        if self.layout == "conv":
            y = self.qkv(x.transpose(1, 2)).view(n, 3, self.heads, self.dim, length)
            return tuple(t.transpose(-2, -1) for t in y.unbind(1))
        return self.fused(self.qkv(x))

    def fused(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n, length, _ = y.shape
        if self.layout == "3 h d":
            return y.reshape(n, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "h 3 d":
            y = y.view(n, length, self.heads, 3 * self.dim).transpose(1, 2)
            return y.chunk(3, -1)
        if self.layout == "h d 3":
            return y.view(n, length, self.heads, self.dim, 3).permute(4, 0, 2, 1, 3).unbind(0)
        parts = y.chunk(3, -1) if self.layout == "chunk" else y.split(self.heads * self.dim, -1)
        return tuple(self.apart(t) for t in parts)


def half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Positions(nn.Module):
    """What positions do to q and k, or to the scores."""

    def __init__(self, how: str, heads: int, dim: int, length: int) -> None:
        super().__init__()
        self.how, self.heads = (
            how if dim % 2 == 0 or how not in ("half", "interleaved") else "none",
            heads,
        )
        place = torch.arange(length, dtype=torch.float64)
        distance = (place[:, None] - place[None]).long()
        if how in ("half", "interleaved"):
            angle = torch.outer(place, 0.7 ** torch.arange(dim // 2, dtype=torch.float64))
            angle = (
                torch.cat([angle, angle], -1) if how == "half" else angle.repeat_interleave(2, -1)
            )
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
        elif how == "table":
            self.table = nn.Parameter(torch.ones(heads, length, length))
        elif how == "index":
            self.table = nn.Parameter(torch.ones(2 * length - 1, heads))
            self.register_buffer("index", distance + length - 1)
        elif how == "alibi":
            slope = 0.5 ** torch.arange(1, heads + 1, dtype=torch.float64)
            self.register_buffer("slope", slope.view(heads, 1, 1) * -distance.abs())
        elif how == "causal":
            self.register_buffer("ahead", distance < 0)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        if self.how not in ("half", "interleaved"):
            return x
        turn = half if self.how == "half" else interleaved
        return x * self.cos.to(x.dtype) + turn(x) * self.sin.to(x.dtype)

    def bias(self, like: torch.Tensor) -> torch.Tensor | None:
        if self.how == "table":
            return self.table.unsqueeze(0)
        if self.how == "index":
            rows = self.table[self.index.view(-1)].view(*self.index.shape, -1)
            return rows.permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.how == "alibi":
            return self.slope.to(like.dtype)
        if self.how == "causal":
            return torch.zeros_like(self.ahead, dtype=like.dtype).masked_fill(self.ahead, -1e4)
        return None


class Attend(nn.Module):
    """softmax(q k^T scale + bias) v, and the linear layer after it."""

    def __init__(self, shape: Shape, heads: int, o: Any) -> None:
        super().__init__()
        dim, self.o_scale, self.core, self.norm = o.dim, o.scale, o.core, o.norm
        self.heads_of = Heads(shape.channels, heads, dim, o.layout)
        self.positions = Positions(o.position, heads, dim, shape.places)
        self.proj = nn.Linear(heads * dim, shape.channels)
        self.q_norm, self.k_norm = qk_norm(o.norm, dim), qk_norm(o.norm, dim)
        self.scale = dim**-0.5 if o.scale == "attribute" else 0.6
        self.dim = dim
        if o.scale == "parameter":
            self.heat = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads_of(x)
        q, k = self.positions.turned(self.q_norm(q)), self.positions.turned(self.k_norm(k))
        if self.o_scale == "parameter":
            q = q * self.heat
        y = self.attended(q, k, v, self.positions.bias(q))
        return x + self.proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))

    def attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self.core == "sdpa":
            scale = None if self.o_scale in ("default", "computed") else self.scale
            return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
        scale = q.shape[-1] ** -0.5 if self.o_scale in ("default", "computed") else self.scale
        if self.core == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
            scores = scores if bias is None else scores + bias
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        scores = (q * scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1) @ v


def qk_norm(how: str, dim: int) -> nn.Module:
    made = {
        "layer": lambda: nn.LayerNorm(dim),
        "plain": lambda: nn.LayerNorm(dim, elementwise_affine=False),
        "rms": lambda: nn.RMSNorm(dim, eps=1e-5),
        "l2": lambda: Then(lambda m, x: F.normalize(x, dim=-1)),
        "rms by hand": lambda: Then(rms, weight=nn.Parameter(torch.ones(dim))),
    }
    return made.get(how, nn.Identity)()


@idiom(
    "tokens",
    heads=(1, 2, 3),
    dim=(2, 3, 4),
    layout=LAYOUTS,
    core=("sdpa", "matmul", "einsum"),
    scale=("default", "attribute", "fixed", "parameter"),
    norm=NORMS,
    position=POSITIONS,
)
def attention(shape: Shape, o: Any) -> Made:
    return Attend(shape, o.heads, o), shape


@idiom(
    "tokens",
    groups=(1, 2),
    times=(2, 3),
    dim=(2, 3, 4),
    how=("expand", "repeat", "view", "enable_gqa"),
    position=("none", "half", "interleaved"),
)
def grouped_query_attention(shape: Shape, o: Any) -> Made:
    """Several query heads read one key and value head."""
    heads = o.groups * o.times
    parts = {
        "q": nn.Linear(shape.channels, heads * o.dim),
        "k": nn.Linear(shape.channels, o.groups * o.dim),
        "v": nn.Linear(shape.channels, o.groups * o.dim),
        "proj": nn.Linear(heads * o.dim, shape.channels),
        "positions": Positions(o.position, heads, o.dim, shape.places),
    }

    def spread(m: Any, x: torch.Tensor) -> torch.Tensor:
        if o.how == "repeat":
            return x.repeat_interleave(m.times, 1)
        n, groups, length, dim = x.shape
        return x[:, :, None].expand(n, groups, m.times, length, dim).reshape(n, -1, length, dim)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, m.dim)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        q, k = m.positions.turned(q), m.positions.turned(k)
        if o.how == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif o.how == "view":
            q = q.unflatten(1, (-1, m.times))
            scores = q @ k.unsqueeze(2).transpose(-2, -1) * 0.5
            y = (scores.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)
        else:
            y = F.scaled_dot_product_attention(q, spread(m, k), spread(m, v))
        return x + m.proj(y.transpose(1, 2).flatten(2))

    return Then(run, dim=o.dim, times=o.times, **parts), shape


@idiom("tokens", heads=(2, 3, 4), dim=(2, 3), how=("linear", "conv", "both"))
def talking_heads(shape: Shape, o: Any) -> Made:
    """Scores are mixed over heads before and after the softmax."""
    kind = nn.Linear if o.how != "conv" else (lambda a, b: nn.Conv2d(a, b, 1))
    parts = {
        "heads_of": Heads(shape.channels, o.heads, o.dim, "3 h d"),
        "before": kind(o.heads, o.heads),
        "after": kind(o.heads, o.heads) if o.how != "linear" else nn.Identity(),
        "proj": nn.Linear(o.heads * o.dim, shape.channels),
    }

    def mixed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.Linear):
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return layer(x)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.heads_of(x)
        scores = mixed(m.before, q @ k.transpose(-2, -1) * 0.5)
        y = mixed(m.after, scores.softmax(-1)) @ v
        return x + m.proj(y.transpose(1, 2).flatten(2))

    return Then(run, **parts), shape


@idiom("plane", heads=(1, 2), dim=(2, 3), window=(2, 3), shift=(0, 1), bias=(True, False))
def windows(shape: Shape, o: Any) -> Made:
    """Attention inside windows of an image, shifted or not (Swin)."""
    size = math.gcd(*shape.space)
    size = divisor(size, o.window)
    tokens = Shape("tokens", shape.channels, (size * size,))
    options = {
        "layout": "3 h d",
        "core": "matmul",
        "scale": "attribute",
        "norm": "none",
        "dim": o.dim,
    }
    position = "index" if o.bias else "none"
    kind = type("Options", (), {**options, "position": position})
    parts = {"norm": nn.LayerNorm(shape.channels), "attn": Attend(tokens, o.heads, kind)}

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(m.norm(x), (-m.shift, -m.shift), (1, 2)) if m.shift else m.norm(x)
        y = (
            y.view(n, h // size, size, w // size, size, c)
            .transpose(2, 3)
            .reshape(-1, size * size, c)
        )
        y = (
            m.attn(y)
            .view(n, h // size, w // size, size, size, c)
            .transpose(2, 3)
            .reshape(n, h, w, c)
        )
        y = torch.roll(y, (m.shift, m.shift), (1, 2)) if m.shift else y
        return (x + y).permute(0, 3, 1, 2)

    return Then(run, shift=o.shift, **parts), shape


@idiom(
    "tokens",
    heads=(1, 2),
    dim=(2, 3),
    feature=("elu", "relu", "softmax", "square"),
    normal=(True, False),
)
def linear_attention(shape: Shape, o: Any) -> Made:
    """q (k^T v): no scores between places."""
    feature = {
        "elu": lambda t: F.elu(t) + 1,
        "relu": lambda t: F.relu(t) + 0.01,
        "softmax": lambda t: t.softmax(-1),
        "square": torch.square,
    }[o.feature]
    parts = {
        "heads_of": Heads(shape.channels, o.heads, o.dim, "separate"),
        "proj": nn.Linear(o.heads * o.dim, shape.channels),
    }

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.heads_of(x)
        q, k = feature(q), feature(k)
        y = q @ (k.transpose(-2, -1) @ v)
        if o.normal:
            y = y / (q @ k.sum(-2).unsqueeze(-1) + 1)
        return x + m.proj(y.transpose(1, 2).flatten(2))

    return Then(run, **parts), shape


@idiom("tokens", queries=(1, 2, 4), heads=(1, 2), dim=(2, 3), width=WIDTHS)
def pooling_attention(shape: Shape, o: Any) -> Made:
    """Learned queries read the tokens."""
    parts = {
        "queries": nn.Parameter(torch.ones(1, o.queries, o.heads * o.dim)),
        "kv": nn.Linear(shape.channels, 2 * o.heads * o.dim),
        "proj": nn.Linear(o.heads * o.dim, o.width),
    }

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        n = len(x)
        q = m.queries.expand(n, -1, -1).unflatten(-1, (m.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (m.heads, -1)).transpose(1, 2) for t in m.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return m.proj(y.transpose(1, 2).flatten(2))

    return Then(run, heads=o.heads, **parts), Shape("tokens", o.width, (o.queries,))


@idiom(
    "tokens",
    heads=(2, 3),
    plain=(2, 3, 4),
    turned=(2, 4),
    values=(2, 3, 5),
    latent=(3, 4, 6),
    how=("cat", "written", "zeros", "other order", "whole"),
    position=("none", "half", "interleaved"),
)
def latent_attention(shape: Shape, o: Any) -> Made:
    """Keys are made of a latent, for each head, and of one part with positions that all heads share
    (DeepSeek); they are joined, or written into a tensor made for them.
    """
    parts = {
        "q": nn.Linear(shape.channels, o.heads * (o.plain + o.turned)),
        "down": nn.Linear(shape.channels, o.latent + o.turned),
        "up": nn.Linear(o.latent, o.heads * (o.plain + o.values), bias=False),
        "proj": nn.Linear(o.heads * o.values, shape.channels),
        "positions": Positions(o.position, o.heads, o.turned, shape.places),
    }

    def joined(m: Any, k: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        shared = shared.expand(-1, k.shape[1], -1, -1)
        if o.how == "cat":
            return torch.cat([k, shared], -1)
        kind = k.new_zeros if o.how == "zeros" else k.new_empty
        y = kind(*k.shape[:-1], m.plain + m.turned)
        if o.how == "whole":
            y[:] = torch.cat([k, shared], -1)
        if o.how == "other order":
            y[..., m.plain :].copy_(shared)
        y[..., : m.plain] = k
        if o.how in ("zeros", "written"):
            y[..., m.plain :].copy_(shared)
        return y

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        q = m.q(x).unflatten(-1, (-1, m.plain + m.turned)).transpose(1, 2)
        q, q_turned = q.split([m.plain, m.turned], -1)
        latent, shared = m.down(x).split([m.latent, m.turned], -1)
        kv = m.up(latent).unflatten(-1, (-1, m.plain + m.values)).transpose(1, 2)
        k, v = kv.split([m.plain, m.values], -1)
        q = torch.cat([q, m.positions.turned(q_turned)], -1)
        k = joined(m, k, m.positions.turned(shared.unsqueeze(1)))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return x + m.proj(y.transpose(1, 2).flatten(2))

    sizes = {name: getattr(o, name) for name in ("plain", "turned", "values", "latent")}
    return Then(run, **sizes, **parts), shape
