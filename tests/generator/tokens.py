"""Tokens: feed-forward layers, mixers, positions, raw parameters, layers of torch.nn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import WIDTHS, Made, Shape, Then, divisor, idiom
from .convs import ACTS


@idiom("tokens", width=WIDTHS, act=tuple(ACTS), bias=(True, False))
def linear(shape: Shape, o: Any) -> Made:
    return nn.Sequential(
        nn.Linear(shape.channels, o.width, bias=o.bias), ACTS[o.act]()
    ), shape.wide(o.width)


@idiom(
    "tokens", inner=WIDTHS, norm=(True, False), how=("plain", "gated", "fused", "conv", "scaled")
)
def feed_forward(shape: Shape, o: Any) -> Made:
    c, wide = shape.channels, o.inner * (2 if o.how == "fused" else 1)
    parts: dict[str, Any] = {"up": nn.Linear(c, wide), "down": nn.Linear(o.inner, c)}
    parts["norm"] = nn.LayerNorm(c) if o.norm else nn.Identity()
    if o.how == "gated":
        parts["gate"] = nn.Linear(c, o.inner, bias=False)
    if o.how == "conv":
        parts["depth"] = nn.Conv1d(o.inner, o.inner, 3, padding=1, groups=o.inner)
    if o.how == "scaled":
        parts["gamma"] = nn.Parameter(torch.ones(c))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(x)
        if o.how == "gated":
            y = F.silu(m.gate(y)) * m.up(y)
        elif o.how == "fused":
            gate, y = m.up(y).chunk(2, -1)
            y = F.gelu(gate) * y
        elif o.how == "conv":
            y = F.gelu(m.depth(m.up(y).transpose(1, 2)).transpose(1, 2))
        else:
            y = F.gelu(m.up(y))
        y = m.down(y)
        return x + (y * m.gamma if o.how == "scaled" else y)

    return Then(run, **parts), shape


@idiom("tokens", inner=WIDTHS, how=("mlp", "linear", "gate", "conv", "fourier-like"))
def token_mixer(shape: Shape, o: Any) -> Made:
    """Places are mixed, channel by channel."""
    length, c = shape.places, shape.channels
    made = {
        "mlp": lambda: nn.Sequential(
            nn.Linear(length, o.inner), nn.GELU(), nn.Linear(o.inner, length)
        ),
        "linear": lambda: nn.Linear(length, length),
        "gate": lambda: nn.Linear(length, length),
        "conv": lambda: nn.Conv1d(c, c, 3, padding=1, groups=c),
        "fourier-like": lambda: nn.Identity(),
    }

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        if o.how == "fourier-like":
            return x + 0.5 * x.flip(1) + x.mean(1, keepdim=True)
        y = m.mix(x.transpose(1, 2)).transpose(1, 2)
        return x * y if o.how == "gate" else x + y

    return Then(run, mix=made[o.how]()), shape


@idiom(
    "tokens",
    how=(
        "1 l c",
        "l c",
        "c l",
        "embedding",
        "buffer",
        "axes",
        "class",
        "registers",
        "sequence first",
    ),
)
def positions(shape: Shape, o: Any) -> Made:
    """Tables of positions in every layout, and tokens put before the others."""
    length, c = shape.places, shape.channels
    size = {"1 l c": (1, length, c), "l c": (length, c), "c l": (c, length), "axes": (1, c)}
    table = {
        "embedding": lambda: nn.Embedding(length + 2, c),
        "buffer": lambda: torch.ones(1, length, c),
        "class": lambda: nn.Parameter(torch.ones(1, 1, c)),
        "registers": lambda: nn.Parameter(torch.ones(2, c)),
        "sequence first": lambda: nn.Parameter(torch.ones(length, 1, c)),
    }
    parts: dict[str, Any] = {
        "table": table.get(o.how, lambda: nn.Parameter(torch.ones(size[o.how])))()
    }
    if o.how == "axes":
        parts["rows"] = nn.Parameter(torch.ones(length, 1))
    added = {
        "c l": lambda m, x: x + m.table.t(),
        "embedding": lambda m, x: x + m.table(torch.arange(x.shape[1])),
        "axes": lambda m, x: x + m.table + m.rows,
        "class": lambda m, x: torch.cat([m.table.expand(len(x), -1, -1), x], 1),
        "registers": lambda m, x: torch.cat([x, m.table.unsqueeze(0).repeat(len(x), 1, 1)], 1),
        "sequence first": lambda m, x: (x.transpose(0, 1) + m.table).transpose(0, 1),
    }
    longer = {"class": 1, "registers": 2}.get(o.how, 0)
    run = added.get(o.how, lambda m, x: x + m.table)
    return Then(run, **parts), replace(shape, space=(length + longer,))


@idiom("image", how=("c h w", "1 c h w", "h w c", "interpolated", "rows and columns"))
def image_positions(shape: Shape, o: Any) -> Made:
    c, space = shape.channels, shape.space
    half = (1,) * len(space)
    sizes = {"1 c h w": (1, c, *space), "h w c": (*space, c), "interpolated": (1, c, *half)}
    parts = {"table": nn.Parameter(torch.ones(sizes.get(o.how, (c, *space))))}
    if o.how == "rows and columns":
        first = (c, *(n if k == 0 else 1 for k, n in enumerate(space)))
        last = (c, *(n if k == len(space) - 1 else 1 for k, n in enumerate(space)))
        parts = {"table": nn.Parameter(torch.ones(first)), "other": nn.Parameter(torch.ones(last))}

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        if o.how == "h w c":
            return x + m.table.movedim(-1, 0)
        if o.how == "interpolated":
            return x + F.interpolate(m.table, size=x.shape[2:], mode="nearest")
        return x + m.table + m.other if o.how == "rows and columns" else x + m.table

    return Then(run, **parts), shape


@idiom(
    "tokens",
    width=WIDTHS,
    heads=(1, 2, 3),
    how=("einsum", "matmul", "bmm", "heads", "heads bmm", "addmm", "transposed weight"),
)
def raw_product(shape: Shape, o: Any) -> Made:
    """Products with raw parameters, stacked over heads or not."""
    c, heads = shape.channels, divisor(shape.channels, o.heads)
    out = divisor(o.width, o.heads) if o.how != "heads" else o.heads
    size = {
        "heads": (c, out, o.width // out),
        "heads bmm": (heads, c // heads, o.width),
        "transposed weight": (o.width, c),
    }
    weight = nn.Parameter(torch.ones(size.get(o.how, (c, o.width))))

    def apart(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(-1, (m.heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
        y = torch.bmm(y, m.w).unflatten(1, x.shape[:2])
        return y.permute(1, 2, 0, 3).flatten(2)

    def flat(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(m.b, x.flatten(0, 1), m.w).unflatten(0, x.shape[:2])

    made = {
        "einsum": lambda m, x: torch.einsum("blc,cd->bld", x, m.w) + m.b,
        "matmul": lambda m, x: x @ m.w + m.b,
        "bmm": lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)) + m.b,
        "heads": lambda m, x: torch.einsum("blc,che->blhe", x, m.w).flatten(2),
        "heads bmm": apart,
        "addmm": flat,
        "transposed weight": lambda m, x: x @ m.w.t() + m.b,
    }
    to = {"heads": out * (o.width // out), "heads bmm": heads * o.width}.get(o.how, o.width)
    parts = {"w": weight, "b": nn.Parameter(torch.zeros(o.width)), "heads": heads}
    return Then(made[o.how], **parts), shape.wide(to)


@idiom("tokens", experts=(2, 3), inner=WIDTHS, how=("einsum", "list", "bmm"))
def experts(shape: Shape, o: Any) -> Made:
    """A soft mixture of small networks."""
    c, e = shape.channels, o.experts
    parts: dict[str, Any] = {"gate": nn.Linear(c, e)}
    if o.how == "list":
        layers = (
            nn.Sequential(nn.Linear(c, o.inner), nn.GELU(), nn.Linear(o.inner, c)) for _ in range(e)
        )
        parts["experts"] = nn.ModuleList(layers)
    else:
        parts["up"] = nn.Parameter(torch.ones(e, c, o.inner))
        parts["down"] = nn.Parameter(torch.ones(e, o.inner, c))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate = m.gate(x).softmax(-1)
        if o.how == "list":
            return sum(layer(x) * gate[..., k : k + 1] for k, layer in enumerate(m.experts))
        if o.how == "einsum":
            y = F.gelu(torch.einsum("blc,ecd->bled", x, m.up))
            y = torch.einsum("bled,edc->blec", y, m.down)
            return (y * gate.unsqueeze(-1)).sum(2)
        rows = x.flatten(0, 1).expand(len(m.up), -1, -1)
        y = torch.bmm(F.gelu(torch.bmm(rows, m.up)), m.down)
        return (y * gate.flatten(0, 1).t().unsqueeze(-1)).sum(0).view_as(x)

    return Then(run, **parts), shape


@idiom(
    "tokens",
    heads=(1, 2, 3),
    dim=(2, 3, 4),
    weights=(False, True),
    first=(True, False),
    extra=("none", "bias_kv", "zero_attn", "kdim", "mask", "padding", "alone"),
)
def multihead_attention(shape: Shape, o: Any) -> Made:
    """`nn.MultiheadAttention`, self or cross."""
    inner = o.heads * o.dim
    options = {"bias_kv": {"add_bias_kv": True}, "zero_attn": {"add_zero_attn": True}}.get(
        o.extra, {}
    )
    if o.extra == "kdim":
        options = {"kdim": shape.channels, "vdim": shape.channels}
    parts: dict[str, Any] = {"embed": nn.Linear(shape.channels, inner)}
    parts["attn"] = nn.MultiheadAttention(inner, o.heads, batch_first=o.first, **options)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y, other = m.embed(x), x
        if not o.first:
            y, other = y.transpose(0, 1), x.transpose(0, 1)
        memory = other if o.extra == "kdim" else y
        mask = None
        if o.extra == "mask":
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        pad = _padding(x) if o.extra == "padding" else None
        masks = {"attn_mask": mask, "key_padding_mask": pad}
        z, weights = m.attn(y, memory, memory, need_weights=o.weights, **masks)
        z = z if o.extra == "alone" else y + z  # alone, its output may stay as wide as it was
        z = z if o.first else z.transpose(0, 1)
        return z if weights is None else z + weights.mean((1, 2)).view(-1, 1, 1)

    return Then(run, **parts), shape.wide(inner)


def _padding(x: torch.Tensor) -> torch.Tensor:
    """Let the last place count as padding, where it is not the only one."""
    length = x.shape[1]
    return (torch.arange(length) >= max(length - 1, 1)).expand(x.shape[0], -1)


@idiom(
    "tokens",
    heads=(1, 2),
    dim=(2, 3),
    inner=WIDTHS,
    how=("encoder", "encoder, norm first", "decoder", "encoder, padded"),
)
def transformer_layer(shape: Shape, o: Any) -> Made:
    """Layers of `torch.nn`."""
    inner = o.heads * o.dim
    kind = nn.TransformerDecoderLayer if o.how == "decoder" else nn.TransformerEncoderLayer
    first = "first" in o.how
    layer = kind(inner, o.heads, o.inner, dropout=0.0, batch_first=True, norm_first=first)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.embed(x)
        if o.how == "encoder, padded":
            return m.layer(y, src_key_padding_mask=_padding(y))
        return m.layer(y, y.flip(1)) if o.how == "decoder" else m.layer(y)

    return Then(run, embed=nn.Linear(shape.channels, inner), layer=layer), shape.wide(inner)


@idiom("tokens", how=("shift", "merge", "embed again", "bilinear", "select", "mean"))
def token_moves(shape: Shape, o: Any) -> Made:
    """Places moved, merged or picked."""
    c, length = shape.channels, shape.places
    half = c // 2

    def shift(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = x.split([m.half, x.shape[-1] - m.half], -1)
        return torch.cat([a.roll(1, 1), b], -1)

    if o.how == "shift":
        return Then(shift, half=half), shape
    if o.how == "bilinear":
        return Then(lambda m, x: m.pair(x, x.flip(1)), pair=nn.Bilinear(c, c, c)), shape
    if o.how == "embed again":
        out = nn.Linear(c, c)
        return Then(lambda m, x: F.linear(torch.tanh(m.out(x)), m.out.weight.t(), m.b), out=out,
                    b=nn.Parameter(torch.zeros(c))), shape  # fmt: skip
    if o.how == "merge" and length % 2 == 0 and c <= 12:
        parts = {"norm": nn.LayerNorm(2 * c), "down": nn.Linear(2 * c, c, bias=False)}
        run = lambda m, x: m.down(m.norm(torch.cat([x[:, ::2], x[:, 1::2]], -1)))  # noqa: E731
        return Then(run, **parts), replace(shape, space=(length // 2,))
    if o.how == "select":
        return Then(lambda m, x: x[:, :1] + x[:, -1:]), replace(shape, space=(1,))
    return Then(lambda m, x: torch.cat([x, x.mean(1, keepdim=True)], 1)), replace(
        shape, space=(length + 1,)
    )
