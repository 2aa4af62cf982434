"""Layers and idioms, one small network each: combed, cut to half, proved in both modes.

A line says which axes must become narrower, so that nothing freezes unseen: `"conv.weight 0"` is the
first axis of that tensor; names after `|` are narrower only where statistics over kept channels are
allowed (`exact=False`).
"""

# ruff: noqa: E501 - one idiom, a few lines

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpd
from laws import difference, flat, randomised, run, wide, zeroed


class Net(nn.Module):
    """Modules, parameters and numbers by name, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


@dataclass
class Idiom:
    """How to make it, what goes in, and which axes get narrower (always; without `exact` too)."""

    make: Callable[[], nn.Module]
    inputs: Any
    narrower: str


IDIOMS: dict[str, Idiom] = {}


def idiom(name: str, inputs: Any, narrower: str) -> Callable[[Callable[[], nn.Module]], None]:
    def register(make: Callable[[], nn.Module]) -> None:
        assert name not in IDIOMS
        IDIOMS[name] = Idiom(make, inputs, narrower)

    return register


def P(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def image(channels: int = 3, size: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


def tokens(width: int = 6, length: int = 5, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, width)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# convolutions ------------------------------------------------------------------------------------


@idiom("conv1d", torch.randn(2, 3, 9), "0.weight 0, 1.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 3, dilation=2))


@idiom("conv3d", torch.randn(2, 3, 4, 4, 4), "0.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 4, 3))


@idiom("transposed", torch.randn(2, 3, 5), "0.weight 1, 1.weight 0")
def _() -> nn.Module:
    return chain(nn.ConvTranspose1d(3, 8, 3, stride=2), nn.ConvTranspose1d(8, 4, 2))


@idiom("transposed 3d", torch.randn(2, 3, 3, 3, 3), "0.weight 1, 1.weight 0, 1.weight 1")
def _() -> nn.Module:
    return chain(nn.ConvTranspose3d(3, 8, 2), nn.ConvTranspose3d(8, 6, 2), nn.Conv3d(6, 2, 1))


@idiom("grouped", image(), "0.weight 0, 1.weight 0, 1.weight 1, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=3), nn.Conv2d(24, 4, 1))


@idiom("grouped transposed", image(), "0.weight 0, 1.weight 0, 1.weight 1, 2.weight 1")
def _() -> nn.Module:
    return chain(
        nn.Conv2d(3, 12, 1), nn.ConvTranspose2d(12, 24, 2, 2, groups=3), nn.Conv2d(24, 4, 1)
    )


@idiom("depthwise multiplier", image(), "0.weight 0, 1.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 3, groups=8), nn.Conv2d(24, 4, 1))


@idiom("depthwise transposed", image(), "0.weight 0, 1.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), nn.Conv2d(8, 4, 1))


@idiom("inverted residual", image(8), "a.0.weight 0, a.2.weight 0, a.4.weight 1")
def _() -> nn.Module:
    a = chain(
        nn.Conv2d(8, 16, 1),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU6(),
        nn.Conv2d(16, 8, 1),
    )
    return Net(lambda m, x: x + m.a(x), a=a)


@idiom("raw parameters", image(), "w 0, b 0, v 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: F.conv2d(F.relu(F.conv2d(x, m.w, m.b, padding=1)), m.v),
        w=P(8, 3, 3, 3),
        b=P(8),
        v=P(4, 8, 1, 1),
    )


@idiom("stacked weights in bmm", torch.randn(2, 3, 5), "w 2, v 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.bmm(x.transpose(0, 1), m.w)
        return torch.bmm(F.gelu(y), m.v).transpose(0, 1)

    return Net(forward, w=P(3, 5, 8), v=P(3, 8, 4))


@idiom("baddbmm", torch.randn(2, 3, 5), "w 2, b 2, v 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.baddbmm(m.b, x.transpose(0, 1), m.w)
        return torch.bmm(F.relu(y), m.v).transpose(0, 1)

    return Net(forward, w=P(3, 5, 8), b=P(3, 1, 8), v=P(3, 8, 4))


@idiom("weight standardisation", image(), "|0.weight 0, 1.weight 1")
def _() -> nn.Module:
    class Standard(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            std = self.weight.var((1, 2, 3), keepdim=True, unbiased=False).add(1e-5).sqrt()
            return self._conv_forward(x, (self.weight - mean) / std, self.bias)

    return chain(Standard(3, 8, 3, padding=1), Standard(8, 4, 3))


@idiom(
    "weight norm",
    tokens(),
    "|0.parametrizations.weight.original1 0, 1.parametrizations.weight.original1 1",
)
def _() -> nn.Module:
    wrap = torch.nn.utils.parametrizations.weight_norm
    return chain(wrap(nn.Linear(6, 8)), wrap(nn.Linear(8, 4)))


@idiom(
    "weight norm convolution",
    image(),
    "|0.parametrizations.weight.original1 0, 2.parametrizations.weight.original1 1",
)
def _() -> nn.Module:
    wrap = torch.nn.utils.parametrizations.weight_norm
    return chain(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), wrap(nn.Conv2d(8, 4, 3)))


@idiom("weight norm by hook", tokens(), "|0.weight_v 0, 0.weight_g 0, 1.weight_v 1")
def _() -> nn.Module:
    with pytest.warns(FutureWarning):
        return chain(*(torch.nn.utils.weight_norm(x) for x in (nn.Linear(6, 8), nn.Linear(8, 4))))


@idiom(
    "spectral norm",
    image(),
    "0.parametrizations.weight.original 0, 2.parametrizations.weight.original 1",
)
def _() -> nn.Module:
    wrap = torch.nn.utils.parametrizations.spectral_norm
    return chain(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), wrap(nn.Conv2d(8, 4, 3)))


@idiom("spectral norm by hook", tokens(), "0.weight_orig 0, 1.weight_orig 1")
def _() -> nn.Module:
    return chain(*(torch.nn.utils.spectral_norm(x) for x in (nn.Linear(6, 8), nn.Linear(8, 4))))


@idiom(
    "bilinear",
    (tokens(), tokens(4)),
    "a.weight 0, b.weight 0, c.weight 0, c.weight 1, c.weight 2, d.weight 1",
)
def _() -> nn.Module:
    return Net(
        lambda m, x, y: m.d(F.relu(m.c(m.a(x), m.b(y)))),
        a=nn.Linear(6, 8), b=nn.Linear(4, 6), c=nn.Bilinear(8, 6, 5), d=nn.Linear(5, 3),
    )  # fmt: skip


# norms and activations ---------------------------------------------------------------------------


@idiom("group norm of other groups", image(), "0.weight 0, 1.weight 0, 2.weight 0, 4.weight 1")
def _() -> nn.Module:
    return chain(
        nn.Conv2d(3, 24, 1),
        nn.Conv2d(24, 24, 3, groups=2),
        nn.GroupNorm(6, 24),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1),
    )


@idiom("group norm of fewer groups", image(), "0.weight 0, 1.weight 0, 2.weight 0, 4.weight 1")
def _() -> nn.Module:
    return chain(
        nn.Conv2d(3, 24, 1),
        nn.Conv2d(24, 24, 3, groups=6),
        nn.GroupNorm(2, 24),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1),
    )


@idiom(
    "instance norm with statistics", image(), "0.weight 0, 1.weight 0, 1.running_mean 0, 2.weight 1"
)
def _() -> nn.Module:
    return chain(
        nn.Conv2d(3, 8, 1),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.Conv2d(8, 4, 1),
    )


@idiom("instance norm", image(), "0.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8), nn.Conv2d(8, 4, 1))


@idiom("layer norm over everything", image(), "|0.weight 0, 1.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 8, 1), nn.LayerNorm((8, 6, 6)), nn.Conv2d(8, 4, 1))


@idiom("layer norm over channels first", image(), "|a.weight 0, n.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.b(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    return Net(forward, a=nn.Conv2d(3, 8, 1), n=nn.LayerNorm(8), b=nn.Conv2d(8, 4, 1))


@idiom("rms norm", tokens(), "|0.weight 0, 1.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 4))


@idiom("rms norm by hand", tokens(), "|a.weight 0, g 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(m.g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 4), g=P(8))


@idiom("global response norm", image(), "|a.weight 0, g 3, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x.permute(0, 2, 3, 1))
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return m.b(m.g * x * (size / (size.mean(-1, keepdim=True) + 1e-6)) + x)

    return Net(forward, a=nn.Linear(3, 8), b=nn.Linear(8, 4), g=P(1, 1, 1, 8))


@idiom("prelu", image(), "0.weight 0, 1.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 4, 1), nn.PReLU())


@idiom("glu", image(), "0.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 16, 1), nn.GLU(1), nn.Conv2d(8, 4, 1))


@idiom("swiglu", tokens(), "w.weight 0, o.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate, value = m.w(x).chunk(2, -1)
        return m.o(F.silu(gate) * value)

    return Net(forward, w=nn.Linear(6, 16), o=nn.Linear(8, 6))


@idiom("frozen batch norm", image(), "a.weight 0, scale 0, shift 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.b(m.a(x) * m.scale.view(1, -1, 1, 1) + m.shift.view(1, -1, 1, 1))

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 4, 1),
        scale=torch.ones(8),
        shift=torch.ones(8),
    )


# moves -------------------------------------------------------------------------------------------


@idiom("pixel shuffle", image(), "0.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 24, 1), nn.PixelShuffle(2), nn.Conv2d(6, 4, 1))


@idiom("pixel unshuffle", image(), "0.weight 0, 2.weight 1")
def _() -> nn.Module:
    return chain(nn.Conv2d(3, 6, 1), nn.PixelUnshuffle(2), nn.Conv2d(24, 4, 1))


@idiom("unfold", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(F.unfold(m.a(x), 2).transpose(1, 2)),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Linear(24, 4),
    )


@idiom("fold", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(F.fold(m.a(x.flatten(2)), (7, 7), 2)), a=nn.Conv1d(3, 24, 1), b=nn.Conv2d(6, 4, 1)
    )  # fmt: skip


@idiom("patches by view", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return m.b(x.reshape(n, (h // 2) * (w // 2), 4 * c))

    return Net(forward, a=nn.Conv2d(3, 6, 1), b=nn.Linear(24, 4))


@idiom("patch merging", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x).permute(0, 2, 3, 1)
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return m.b(torch.cat(parts, -1))

    return Net(forward, a=nn.Conv2d(3, 6, 1), b=nn.Linear(24, 4))


@idiom("einsum", tokens(), "w 0, v 1, u 0")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bti,oi->bto", x, m.w).relu()
        y = torch.einsum("...i,ji", y, m.v)
        return torch.einsum("...ti,ij->...tj", y.sigmoid(), m.u)

    return Net(forward, w=P(8, 6), v=P(10, 8), u=P(10, 4))


@idiom("einsum of three", tokens(), "w 1, v 0")
def _() -> nn.Module:
    return Net(lambda m, x: torch.einsum("bti,ir,ro->bto", x, m.w, m.v), w=P(6, 8), v=P(8, 4))


@idiom("uneven slices", image(), "a.weight 0, b.weight 1, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(x[:, : m.first]) + m.c(x[:, m.first :])

    return Net(forward, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(4, 5, 1), c=nn.Conv2d(8, 5, 1), first=4)


@idiom("overlapping slices", image(), "a.weight 0, b.weight 1, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(x[:, : m.end]) + m.c(x[:, m.start :])

    return Net(
        forward, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(8, 5, 1), c=nn.Conv2d(9, 5, 1), end=8, start=3
    )


@idiom("every second channel", tokens(), "a.weight 0, b.weight 1, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(x[..., ::2]) * m.c(x[..., 1::2])

    return Net(forward, a=nn.Linear(6, 12), b=nn.Linear(6, 4), c=nn.Linear(6, 4))


@idiom("cat of cats", image(), "a.weight 0, b.weight 0, c.weight 1, d.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x), m.b(x)
        y = torch.cat([a, b], 1)
        z = torch.cat([y, a, F.relu(m.c(y))], 1)
        return m.d(torch.cat([z, y], 1))

    return Net(
        forward,
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(3, 8, 1),
        c=nn.Conv2d(14, 5, 1),
        d=nn.Conv2d(39, 4, 1),
    )


@idiom("dense connections", image(), "a.weight 0, b.weight 0, c.weight 0, d.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        y = torch.cat([y, m.b(y)], 1)
        y = torch.cat([y, m.c(y)], 1)
        return m.d(m.n(y).relu())

    return Net(
        forward,
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(6, 8, 1),
        c=nn.Conv2d(14, 6, 1),
        n=nn.BatchNorm2d(20),
        d=nn.Conv2d(20, 4, 1),
    )


@idiom("chunks in another order", image(), "a.weight 0, b.weight 1, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, two, three = m.a(x).chunk(3, 1)
        return m.b(torch.cat([three, one], 1)) + m.c(two + one)

    return Net(forward, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(8, 5, 1), c=nn.Conv2d(4, 5, 1))


@idiom("split in unequal parts", image(), "a.weight 0, b.weight 1, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, two = m.a(x).split(m.parts, 1)
        return m.b(two) + m.c(one)

    return Net(
        forward, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(8, 5, 1), c=nn.Conv2d(4, 5, 1), parts=[4, 8]
    )


@idiom("flip of channels", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(lambda m, x: m.b(m.a(x).flip(1)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))


@idiom("roll of channels", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(lambda m, x: m.b(m.a(x).roll(2, 1)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))


@idiom("index of channels", image(), "a.0.weight 0, b.weight 0, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.c(F.relu(m.b(m.a(x)[:, m.order])))

    return Net(
        forward,
        a=chain(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)),
        b=nn.Conv2d(8, 8, 1),
        c=nn.Conv2d(8, 4, 1),
        order=torch.tensor([7, 3, 1, 0, 2, 5, 6, 4]),
    )


@idiom("channel shuffle", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        n, c, h, w = x.shape
        x = x.view(n, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.b(x)

    return Net(forward, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(12, 4, 1), groups=3)


@idiom("nn.ChannelShuffle", image(), "0.weight 0, 2.weight 0, 3.weight 1")
def _() -> nn.Module:
    return chain(
        nn.Conv2d(3, 12, 1),
        nn.ChannelShuffle(2),
        nn.Conv2d(12, 12, 1, groups=12),
        nn.Conv2d(12, 4, 1),
    )


@idiom("nn.ChannelShuffle and groups", image(), "2.weight 0, 3.weight 1")
def _() -> nn.Module:
    return chain(
        nn.Conv2d(3, 12, 1),
        nn.ChannelShuffle(2),
        nn.Conv2d(12, 12, 1, groups=2),
        nn.Conv2d(12, 4, 1),
    )


@idiom("repeat of channels", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.a(x).repeat(1, 3, 1, 1)), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(18, 4, 1)
    )


@idiom("each channel repeated", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.a(x).repeat_interleave(2, 1)),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(12, 4, 1),
    )


@idiom("expand of one channel", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(y * x.mean(1, keepdim=True).expand_as(y))

    return Net(forward, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 4, 1))


@idiom("stack and sum", image(), "a.weight 0, b.weight 0, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.c(torch.stack([m.a(x), m.b(x)], 1).sum(1))

    return Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 4, 1))


@idiom("selective kernels", image(), "a.weight 0, b.weight 0, s.weight 0, t.weight 0, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.stack([m.a(x), m.b(x)], 1)
        w = m.t(F.relu(m.s(y.sum(1).mean((2, 3), keepdim=True))))
        w = w.view(w.shape[0], 2, -1, 1, 1).softmax(1)
        return m.c((y * w).sum(1))

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(3, 8, 3, padding=1),
        s=nn.Conv2d(8, 6, 1),
        t=nn.Conv2d(6, 16, 1),
        c=nn.Conv2d(8, 4, 1),
    )


@idiom("padded shortcut", image(), "a.weight 0, d.weight 1, b.weight 0, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.d(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.c(F.relu(m.b(x))))

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 6, 3, 2, 1),
        c=nn.Conv2d(6, 12, 1),
        d=nn.Conv2d(12, 4, 1),
    )


@idiom("buffer with channels", image(), "a.weight 0, mean 1, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.a(x) - m.mean),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 4, 1),
        mean=torch.zeros(1, 8, 1, 1),
    )


@idiom("token mixer", tokens(6, 5), "a.0.weight 0, a.2.weight 1, b.0.weight 0, b.2.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + m.a(x.transpose(1, 2)).transpose(1, 2)
        return x + m.b(x)

    return Net(
        forward,
        a=chain(nn.Linear(5, 10), nn.GELU(), nn.Linear(10, 5)),
        b=chain(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)),
    )


@idiom("spatial gate", tokens(6, 5), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        u, v = m.a(x).chunk(2, -1)
        return m.b(u * m.s(v.transpose(1, 2)).transpose(1, 2))

    return Net(forward, a=nn.Linear(6, 16), s=nn.Linear(5, 5), b=nn.Linear(8, 6))


@idiom("positions in rows", image(), "a.weight 0, pos 2, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.b(
            torch.cat([m.cls.expand(x.shape[0], -1, -1), m.a(x).flatten(2).transpose(1, 2)], 1)
            + m.pos
        )

    return Net(forward, a=nn.Conv2d(3, 8, 2, 2), cls=P(1, 1, 8), pos=P(1, 10, 8), b=nn.Linear(8, 4))


@idiom("positions in columns", image(), "a.weight 0, pos 1, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.a(x) + m.pos),
        a=nn.Conv2d(3, 8, 2, 2),
        pos=P(1, 8, 3, 3),
        b=nn.Conv2d(8, 4, 1),
    )


@idiom("positions by axis", image(), "a.weight 0, rows.weight 1, columns.weight 1, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        n, _, h, w = x.shape
        across = m.columns(torch.arange(w)).unsqueeze(0).repeat(h, 1, 1)
        down = m.rows(torch.arange(h)).unsqueeze(1).repeat(1, w, 1)
        pos = torch.cat([across, down], -1).permute(2, 0, 1).unsqueeze(0).repeat(n, 1, 1, 1)
        return m.b(x + pos)

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 2, 2),
        rows=nn.Embedding(7, 4),
        columns=nn.Embedding(7, 4),
        b=nn.Conv2d(8, 4, 1),
    )


@idiom("positions resampled", image(), "a.weight 0, pos 2, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        pos = m.pos.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        pos = F.interpolate(pos, size=x.shape[-2:], mode="bilinear", antialias=True)
        return m.b((x + pos).flatten(2).transpose(1, 2))

    return Net(forward, a=nn.Conv2d(3, 8, 2, 2), pos=P(1, 16, 8), b=nn.Linear(8, 4))


# gates and attention over channels ---------------------------------------------------------------


@idiom("squeeze and excite", image(), "a.weight 0, r.weight 0, e.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(x * m.e(F.relu(m.r(x.mean((2, 3), keepdim=True)))).sigmoid())

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 1),
        r=nn.Conv2d(8, 4, 1),
        e=nn.Conv2d(4, 8, 1),
        b=nn.Conv2d(8, 4, 1),
    )


@idiom("convolution over channels", image(), "a.0.weight 0, b.weight 0, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        y = m.k(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return m.c(F.relu(m.b(x * y.view(x.shape[0], -1, 1, 1))))

    return Net(
        forward,
        a=chain(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)),
        k=nn.Conv1d(1, 1, 3, padding=1),
        b=nn.Conv2d(8, 6, 1),
        c=nn.Conv2d(6, 4, 1),
    )


@idiom("gate of one channel", image(), "a.weight 0, b.weight 1, g.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        return m.b(x * m.g(x).sigmoid())

    return Net(forward, a=nn.Conv2d(3, 8, 1), g=nn.Conv2d(8, 1, 1), b=nn.Conv2d(8, 4, 1))


@idiom("spatial attention", image(), "|a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        two = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return m.b(x * m.g(two).sigmoid())

    return Net(forward, a=nn.Conv2d(3, 8, 1), g=nn.Conv2d(2, 1, 3, padding=1), b=nn.Conv2d(8, 4, 1))


@idiom("cross covariance attention", tokens(8), "qkv.weight 0, o.weight 1, t 0")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = m.qkv(x).reshape(n, length, 3, m.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = (q @ k.transpose(-2, -1) * m.t).softmax(-1) @ v
        return m.o(y.permute(0, 3, 1, 2).reshape(n, length, -1))

    return Net(forward, qkv=nn.Linear(8, 36), o=nn.Linear(12, 8), t=P(3, 1, 1), heads=3)


# attention ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with what people add to it: the hook `inner` sees q, k and v as (n, heads, t, d)."""

    def __init__(
        self,
        inner: Callable[..., torch.Tensor],
        heads: int = 3,
        kv: int = 3,
        dim: int = 4,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.heads, self.kv, self.dim, self.copies, self.inner = heads, kv, dim, heads // kv, inner
        self.scale = dim**-0.5
        self.q, self.k, self.v = (
            nn.Linear(8, heads * dim),
            nn.Linear(8, kv * dim),
            nn.Linear(8, kv * dim),
        )
        self.o = nn.Linear(heads * dim, 8)
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(n, length, self.kv, -1).transpose(1, 2)
        v = self.v(x).view(n, length, self.kv, -1).transpose(1, 2)
        return self.o(self.inner(self, q, k, v).transpose(1, 2).reshape(n, length, -1))


def plain(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-2, -1) * m.scale).softmax(-1) @ v


QKVO = "q.weight 0, k.weight 0, v.weight 0, o.weight 1"


@idiom("attention", tokens(8), QKVO)
def _() -> nn.Module:
    return Attention(plain)


@idiom("attention by one op", tokens(8), QKVO)
def _() -> nn.Module:
    return Attention(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v))


@idiom("attention by one op, causal", tokens(8), QKVO)
def _() -> nn.Module:
    return Attention(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=m.scale)
    )


@idiom("attention by einsum", tokens(8), QKVO)
def _() -> nn.Module:
    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = torch.einsum("...qd,...kd->...qk", q, k) * m.scale
        return torch.einsum("bhqk,bhkd->bhqd", a.softmax(-1), v)

    return Attention(inner)


@idiom("linear attention", tokens(8), QKVO)
def _() -> nn.Module:
    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (q @ k.sum(2, keepdim=True).transpose(-2, -1) + 1e-6)
        return q @ (k.transpose(-2, -1) @ v) * z

    return Attention(inner)


@idiom(
    "norms of queries and keys",
    tokens(8),
    "v.weight 0, o.weight 1, |q.weight 0, a.weight 0, b.weight 0",
)
def _() -> nn.Module:
    return Attention(
        lambda m, q, k, v: plain(m, m.a(q), m.b(k), v), a=nn.LayerNorm(4), b=nn.RMSNorm(4)
    )


@idiom("talking heads", tokens(8), f"{QKVO}, a.weight 1, a.weight 0, b.weight 1, b.weight 0")
def _() -> nn.Module:
    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = m.a((q @ k.transpose(-2, -1) * m.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.b(s.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v

    return Attention(inner, heads=4, kv=4, dim=3, a=nn.Linear(4, 4), b=nn.Linear(4, 4))


@idiom("relative bias table", tokens(8), f"{QKVO}, table 1")
def _() -> nn.Module:
    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        bias = m.table[m.index.view(-1)].view(5, 5, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        return (q @ k.transpose(-2, -1) * m.scale + bias).softmax(-1) @ v

    index = torch.arange(5)[:, None] - torch.arange(5) + 4
    return Attention(inner, table=P(9, 3), index=index)


@idiom("relative bias as parameter", tokens(8), f"{QKVO}, bias 1")
def _() -> nn.Module:
    return Attention(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.bias, scale=m.scale),
        bias=P(1, 3, 5, 5),
    )


def rope_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@idiom("rotary, halves", tokens(8), f"{QKVO}, frequency 0")
def _() -> nn.Module:
    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(torch.arange(q.shape[2]).to(m.frequency), m.frequency)
        angle = torch.cat([angle, angle], -1)
        return plain(
            m, rope_half(q, angle.cos(), angle.sin()), rope_half(k, angle.cos(), angle.sin()), v
        )

    return Attention(inner, dim=8, frequency=torch.rand(4))


@idiom(
    "rotary, two places, one norm for all heads", tokens(8), f"{QKVO} | frequency 0, qn.weight 0"
)
def _() -> nn.Module:
    def turned(x: torch.Tensor, angles: list[torch.Tensor]) -> torch.Tensor:
        parts = x.split([2 * (x.shape[-1] // 4)] * 2, -1)
        pairs = zip(parts, angles, strict=True)
        return torch.cat([rope_half(part, a.cos(), a.sin()) for part, a in pairs], -1)

    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        places = torch.arange(q.shape[2]).to(m.frequency)
        angles = [torch.outer(place, m.frequency) for place in (places // 2, places % 2)]
        angles = torch.cat([torch.cat([a, a], -1) for a in angles], -1).chunk(2, -1)
        return plain(m, turned(m.qn(q), angles), turned(m.kn(k), angles), v)

    norms = {"qn": nn.RMSNorm(8), "kn": nn.RMSNorm(8)}
    return Attention(inner, dim=8, frequency=torch.rand(2), **norms)


class Sized(nn.Module):
    """Attention whose code has the dims of a head as a number and leaves the heads open."""

    def __init__(self, kv: int) -> None:
        super().__init__()
        self.dim, self.grouped = 8, kv < 4
        self.q, self.o = nn.Linear(8, 32), nn.Linear(32, 8)
        self.k, self.v = nn.Linear(8, 8 * kv), nn.Linear(8, 8 * kv)
        self.qn, self.kn = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        made = (part(x).view(n, length, -1, self.dim) for part in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in made)
        y = F.scaled_dot_product_attention(self.qn(q), self.kn(k), v, enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).flatten(2))


@idiom("one norm for all heads, dims a number", tokens(8), f"{QKVO} | qn.weight 0, kn.weight 0")
def _() -> nn.Module:
    return Sized(4)


@idiom("one norm for all heads, grouped queries", tokens(8), QKVO)
def _() -> nn.Module:
    return Sized(2)


@idiom("rotary, interleaved", tokens(8), f"{QKVO}, cos 1, sin 1")
def _() -> nn.Module:
    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * cos + other * sin

    return Attention(
        lambda m, q, k, v: plain(m, turned(q, m.cos, m.sin), turned(k, m.cos, m.sin), v),
        dim=8,
        cos=torch.rand(5, 8),
        sin=torch.rand(5, 8),
    )


@idiom("rotary, complex", tokens(8), "q.weight 0, v.weight 0, o.weight 1")
def _() -> nn.Module:
    def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(
            -2
        )

    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turn = torch.polar(torch.ones_like(m.angle), m.angle)
        return plain(m, turned(q, turn), turned(k, turn), v)

    return Attention(inner, dim=8, angle=torch.rand(5, 4))


def grouped(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(m.copies, 1) for x in (k, v))
    return plain(m, q, k, v)


@idiom("grouped queries, repeated", tokens(8), QKVO)
def _() -> nn.Module:
    return Attention(grouped, heads=6, kv=2)


@idiom("grouped queries, expanded", tokens(8), QKVO)
def _() -> nn.Module:
    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n, kv, t, d = k.shape
        k, v = (
            x[:, :, None].expand(n, kv, m.copies, t, d).reshape(n, kv * m.copies, t, d)
            for x in (k, v)
        )
        return F.scaled_dot_product_attention(q, k, v, scale=m.scale)

    return Attention(inner, heads=6, kv=2)


@idiom("grouped queries by one op", tokens(8), QKVO)
def _() -> nn.Module:
    return Attention(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=m.scale, enable_gqa=True),
        heads=6,
        kv=2,
    )


@idiom("grouped queries, rotary", tokens(8), f"{QKVO}, frequency 0")
def _() -> nn.Module:
    def inner(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(torch.arange(q.shape[2]).to(m.frequency), m.frequency)
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        return grouped(m, rope_half(q, cos, sin), rope_half(k, cos, sin), v)

    return Attention(inner, heads=6, kv=2, dim=8, frequency=torch.rand(4))


@idiom("one key for all queries", tokens(8), QKVO)
def _() -> nn.Module:
    return Attention(plain, heads=6, kv=1)


@idiom("one key for all queries, expanded", tokens(8), QKVO)
def _() -> nn.Module:
    return Attention(
        lambda m, q, k, v: plain(
            m, q, k.expand(-1, m.heads, -1, -1), v.expand(-1, m.heads, -1, -1)
        ),
        heads=6,
        kv=1,
    )


@idiom(
    "keys of a latent, written into a tensor made for them",
    tokens(8),
    "q.weight 0, down.weight 0, up.weight 0, up.weight 1, o.weight 1",
)
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q = m.q(x).view(n, t, -1, m.own + m.shared).transpose(1, 2)
        latent, shared = m.down(x).split([m.latent, m.shared], -1)
        kv = m.up(latent).view(n, t, -1, m.own + m.dim).transpose(1, 2)
        own, v = kv.split([m.own, m.dim], -1)
        k = kv.new_empty(*kv.shape[:-1], m.own + m.shared)
        k[..., : m.own].copy_(own)
        k[..., m.own :].copy_(shared.unsqueeze(1).expand(-1, own.shape[1], -1, -1))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return m.o(y.transpose(1, 2).reshape(n, t, -1))

    parts = {"q": nn.Linear(8, 30), "down": nn.Linear(8, 11), "up": nn.Linear(7, 33)}
    return Net(forward, **parts, o=nn.Linear(15, 8), own=6, shared=4, latent=7, dim=5)


@idiom("channels written into zeros", image(), "a.weight 0, b.weight 0, c.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x), m.b(x)
        y = x.new_zeros(x.shape[0], m.first + m.second, *a.shape[2:])
        y[:, : m.first] = a
        y[:, m.first :] += b
        return m.c(F.relu(y))

    parts = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(3, 8, 1), "c": nn.Conv2d(14, 4, 1)}
    return Net(forward, **parts, first=6, second=8)


@idiom("fused projection", tokens(8), "qkv.weight 0, o.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = m.qkv(x).reshape(n, t, 3, m.heads, m.dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.o(y.transpose(1, 2).reshape(n, t, m.heads * m.dim))

    return Net(forward, qkv=nn.Linear(8, 36), o=nn.Linear(12, 8), heads=3, dim=4)


@idiom("windows", image(8, 8), "qkv.weight 0, o.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).roll((-2, -2), (1, 2))
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = m.qkv(x).reshape(x.shape[0], 16, 3, m.heads, -1).permute(2, 0, 3, 1, 4)
        y = m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return y.roll((2, 2), (1, 2)).permute(0, 3, 1, 2)

    return Net(forward, qkv=nn.Linear(8, 36), o=nn.Linear(12, 8), heads=3)


IN = "in_proj_weight 0, out_proj.weight 1"


@idiom("nn.MultiheadAttention", tokens(8), "m.in_proj_weight 0, m.out_proj.weight 1")
def _() -> nn.Module:
    return Net(lambda m, x: m.m(x, x, x)[0], m=nn.MultiheadAttention(8, 4, batch_first=True))


@idiom("nn.MultiheadAttention with weights", tokens(8), "m.in_proj_weight 0, m.out_proj.weight 1")
def _() -> nn.Module:
    return Net(lambda m, x: m.m(x, x, x, average_attn_weights=True), m=nn.MultiheadAttention(8, 4))


@idiom(
    "nn.MultiheadAttention, cross",
    (tokens(8), tokens(8, 7)),
    "m.in_proj_weight 0, m.out_proj.weight 1",
)
def _() -> nn.Module:
    return Net(
        lambda m, x, y: m.m(x, y, y, need_weights=False)[0],
        m=nn.MultiheadAttention(8, 2, batch_first=True),
    )


@idiom(
    "nn.MultiheadAttention, kdim and vdim",
    (tokens(8), tokens(6, 7), tokens(5, 7)),
    "m.q_proj_weight 0, m.k_proj_weight 0, m.v_proj_weight 0, m.out_proj.weight 1",
)
def _() -> nn.Module:
    return Net(
        lambda m, x, y, z: m.m(x, y, z, need_weights=False)[0],
        m=nn.MultiheadAttention(8, 4, kdim=6, vdim=5, batch_first=True),
    )


@idiom("nn.MultiheadAttention, key bias", tokens(8), "m.in_proj_weight 0, m.out_proj.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.m(x, x, x)[0],
        m=nn.MultiheadAttention(
            8, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True, bias=False
        ),
    )


class Masks(nn.Module):
    """A mask for each head of a batch, from one number of heads each time that it is called."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        near = (x.transpose(0, 1) @ y.permute(1, 2, 0)).unsqueeze(1)
        return near.repeat(1, self.heads, 1, 1).flatten(0, 1) < -2.0


@idiom(
    "nn.MultiheadAttention, masks made by one module for two",
    tokens(8, 7),
    "a.in_proj_weight 0, a.out_proj.weight 1, b.in_proj_weight 0, b.out_proj.weight 1",
)
def _() -> nn.Module:
    def forward(m: Any, y: torch.Tensor) -> torch.Tensor:
        x, y = m.queries.unsqueeze(1).repeat(1, len(y), 1), y.transpose(0, 1)
        for layer in (m.a, m.b):  # the weights, means over heads, are of no use
            mask = m.masks(x, y)
            x = x + layer(x, y, y, attn_mask=mask & ~mask.all(-1, keepdim=True))[0]
        m.masks(x, y)
        return x.transpose(0, 1)

    layers = {key: nn.MultiheadAttention(8, 2) for key in "ab"}
    return Net(forward, masks=Masks(2), queries=P(5, 8), **layers)


@idiom(
    "nn.TransformerEncoder",
    tokens(8),
    "e.layers.0.self_attn.in_proj_weight 0, e.layers.1.linear1.weight 0, |a.weight 0, b.weight 1",
)
def _() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return Net(
        lambda m, x: m.b(m.e(m.a(x))),
        a=nn.Linear(8, 8),
        e=nn.TransformerEncoder(layer, 2),
        b=nn.Linear(8, 4),
    )


@idiom(
    "nn.TransformerEncoder, norm first",
    tokens(8),
    "e.layers.0.self_attn.in_proj_weight 0, e.layers.1.linear1.weight 0, |a.weight 0, b.weight 1",
)
def _() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, activation="gelu")
    return Net(
        lambda m, x: m.b(m.e(m.a(x))),
        a=nn.Linear(8, 8),
        e=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        b=nn.Linear(8, 4),
    )


@idiom(
    "nn.TransformerDecoder",
    (tokens(8), tokens(8, 7)),
    "d.layers.0.multihead_attn.in_proj_weight 0, d.layers.1.self_attn.in_proj_weight 0, d.layers.1.linear2.weight 1",
)
def _() -> nn.Module:
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    return Net(lambda m, x, y: m.d(x, y), d=nn.TransformerDecoder(layer, 2))


@idiom(
    "nn.Transformer",
    (tokens(8), tokens(8, 7)),
    "t.encoder.layers.0.linear1.weight 0, t.decoder.layers.0.self_attn.out_proj.weight 1",
)
def _() -> nn.Module:
    return Net(lambda m, x, y: m.t(x, y), t=nn.Transformer(8, 2, 1, 1, 16, batch_first=True))


# recurrent layers --------------------------------------------------------------------------------


def hidden(rnn: nn.Module, width: int) -> nn.Module:
    return Net(
        lambda m, x: m.b(m.rnn(m.a(x))[0]), a=nn.Linear(5, 6), rnn=rnn, b=nn.Linear(width, 3)
    )


@idiom(
    "nn.LSTM",
    tokens(5),
    "a.weight 0, rnn.weight_ih_l0 0, rnn.weight_ih_l0 1, rnn.weight_hh_l0 1, b.weight 1",
)
def _() -> nn.Module:
    return hidden(nn.LSTM(6, 8, batch_first=True), 8)


@idiom(
    "nn.LSTM of two layers, both ways",
    tokens(5),
    "rnn.weight_ih_l0 0, rnn.weight_ih_l1 1, rnn.weight_hh_l1_reverse 1, b.weight 1",
)
def _() -> nn.Module:
    return hidden(nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True), 16)


@idiom(
    "nn.LSTM with dropout between layers",
    tokens(5),
    "rnn.weight_ih_l0 0, rnn.weight_ih_l1 1, rnn.weight_hh_l1 1, b.weight 1",
)
def _() -> nn.Module:
    return hidden(nn.LSTM(6, 8, 2, dropout=0.5, batch_first=True), 8)


@idiom("nn.LSTM with projection", tokens(5), "rnn.weight_ih_l0 0, rnn.weight_hr_l0 1, b.weight 1")
def _() -> nn.Module:
    return hidden(nn.LSTM(6, 12, proj_size=3), 3)


@idiom("nn.LSTM, last state", tokens(5), "rnn.weight_ih_l0 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.rnn(x)[1][0][-1]), rnn=nn.LSTM(5, 8, batch_first=True), b=nn.Linear(8, 3)
    )


@idiom("nn.LSTM with states of its own", tokens(5), "rnn.weight_ih_l0 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(2, x.shape[0], m.hidden, dtype=x.dtype)
        c = x.new_zeros(2, x.shape[0], m.hidden)
        return m.b(m.rnn(x, (h, c))[0])

    return Net(forward, rnn=nn.LSTM(5, 8, 2, batch_first=True), b=nn.Linear(8, 3), hidden=8)


@idiom(
    "nn.GRU with a state from a layer",
    (tokens(5), torch.randn(2, 4)),
    "s.weight 0, rnn.weight_ih_l0 0, b.weight 1",
)
def _() -> nn.Module:
    return Net(
        lambda m, x, z: m.b(m.rnn(x, m.s(z).unsqueeze(0))[0]),
        rnn=nn.GRU(5, 8, batch_first=True),
        s=nn.Linear(4, 8),
        b=nn.Linear(8, 3),
    )


@idiom("nn.GRU both ways", tokens(5), "rnn.weight_ih_l0 0, rnn.weight_hh_l0_reverse 1, b.weight 1")
def _() -> nn.Module:
    return hidden(nn.GRU(6, 8, bidirectional=True, bias=False), 16)


@idiom("nn.RNN", tokens(5), "rnn.weight_ih_l0 0, rnn.weight_ih_l1 0, b.weight 1")
def _() -> nn.Module:
    return hidden(nn.RNN(6, 8, 2, nonlinearity="relu"), 8)


def stepped(cell: nn.Module) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.b(state[0] if isinstance(state, tuple) else state)

    return Net(forward, cell=cell, b=nn.Linear(8, 3))


CELL = "cell.weight_ih 0, cell.weight_hh 0, cell.weight_hh 1, b.weight 1"


@idiom("nn.LSTMCell", tokens(5), CELL)
def _() -> nn.Module:
    return stepped(nn.LSTMCell(5, 8))


@idiom("nn.GRUCell", tokens(5), CELL)
def _() -> nn.Module:
    return stepped(nn.GRUCell(5, 8))


@idiom("nn.RNNCell", tokens(5), CELL)
def _() -> nn.Module:
    return stepped(nn.RNNCell(5, 8))


# whole networks ----------------------------------------------------------------------------------


@idiom("shared module", image(), "a.weight 0, s.weight 0, s.weight 1, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(m.s(F.relu(m.s(F.relu(m.a(x)))))),
        a=nn.Conv2d(3, 8, 1),
        s=nn.Conv2d(8, 8, 3, padding=1),
        b=nn.Conv2d(8, 4, 1),
    )


@idiom("module under two names", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.again = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x)) * self.again(x))

    return Twice()


@idiom("tied table", torch.randint(0, 9, (2, 5)), "e.weight 1, a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: F.linear(m.b(F.gelu(m.a(m.e(x)))), m.e.weight),
        e=nn.Embedding(9, 8),
        a=nn.Linear(8, 16),
        b=nn.Linear(16, 8),
    )


@idiom("bags", (torch.randint(0, 9, (6,)), torch.tensor([0, 2, 3])), "e.weight 1, b.weight 1")
def _() -> nn.Module:
    return Net(lambda m, x, o: m.b(m.e(x, o)), e=nn.EmbeddingBag(9, 8), b=nn.Linear(8, 3))


@idiom("frozen parameters", image(), "0.weight 0, 1.weight 0, 2.weight 1")
def _() -> nn.Module:
    net = chain(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    for parameter in net[:2].parameters():
        parameter.requires_grad_(False)
    return net


@idiom("auxiliary head", image(), "a.weight 0, b.weight 0, h.weight 1, x.0.weight 0, x.0.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = m.a(x).relu()
        return {"out": m.h(m.b(a).relu()), "aux": m.x(a)}

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 8, 3),
        h=nn.Conv2d(8, 4, 1),
        x=chain(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)),
    )


@idiom(
    "several inputs by name", {"x": image(), "y": image(5)}, "|a.weight 0, b.weight 0, c.weight 1"
)
def _() -> nn.Module:
    def forward(
        m: Any, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        z = m.a(x) + m.b(y)
        return m.c(z), [z.mean((1, 2, 3)), m.d(z)]

    return Net(
        forward,
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(5, 8, 1),
        c=nn.Conv2d(8, 4, 1),
        d=nn.Conv2d(8, 2, 1),
    )


@idiom("without gradients", image(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = m.a(x)
        with torch.autocast("cpu", enabled=False):
            return m.b(x)

    return Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))


@idiom("deformable sampling", (image(), torch.rand(2, 6, 6, 2) * 2 - 1), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x, g: m.b(F.grid_sample(m.a(x), g, align_corners=False)),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 4, 1),
    )


@idiom("best tokens gathered", tokens(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        best = m.s(x).squeeze(-1).topk(3, 1)[1]
        return m.b(y.gather(1, best.unsqueeze(-1).expand(-1, -1, y.shape[-1])))

    return Net(forward, a=nn.Linear(6, 8), s=nn.Linear(6, 1), b=nn.Linear(8, 4))


@idiom(
    "scatter of tokens",
    (tokens(), torch.tensor([[0, 2, 1, 1, 0], [2, 2, 0, 1, 1]])),
    "a.weight 0, b.weight 1",
)
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        out = torch.zeros_like(y[:, :3]).scatter_add(1, index.unsqueeze(-1).expand_as(y), y)
        return m.b(out)

    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 4))


@idiom("mixture of experts", tokens(), "u 2, d 1, r.0.weight 0, r.2.weight 1")
def _() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        w = m.r(x).softmax(-1)
        y = torch.einsum("bti,eih->bteh", x, m.u).relu()
        return torch.einsum("bteh,eho,bte->bto", y, m.d, w)

    return Net(
        forward, u=P(3, 6, 8), d=P(3, 8, 6), r=chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    )


@idiom("distances", (tokens(), tokens(6, 7)), "a.weight 0, b.0.weight 0")
def _() -> nn.Module:
    return Net(
        lambda m, x, y: torch.cdist(m.a(x), m.b(y)),
        a=nn.Linear(6, 8, bias=False),
        b=chain(nn.Linear(6, 8, bias=False)),
    )


@idiom("cosine of two towers", (tokens(), tokens()), "a.weight 0, b.weight 0")
def _() -> nn.Module:
    return Net(
        lambda m, x, y: F.cosine_similarity(m.a(x), m.b(y), -1),
        a=nn.Linear(6, 8),
        b=nn.Linear(6, 8),
    )


@idiom("spectrum of tokens", tokens(), "a.weight 0, b.weight 1")
def _() -> nn.Module:
    return Net(
        lambda m, x: m.b(torch.fft.fft(m.a(x), dim=1).real), a=nn.Linear(6, 8), b=nn.Linear(8, 4)
    )


# the proof ---------------------------------------------------------------------------------------


def wanted(line: str, *, exact: bool) -> list[tuple[str, int]]:
    always, _, lossy = line.partition("|")
    parts = [part.split() for part in (always if exact else f"{always},{lossy}").split(",")]
    return [(part[0], int(part[1])) for part in parts if part]


@pytest.mark.parametrize("how", ["exact", "lossy"])
@pytest.mark.parametrize("name", IDIOMS)
def test_idiom_is_cut_and_proved(name: str, how: str) -> None:
    given, exact = IDIOMS[name], how == "exact"
    model, inputs = randomised(given.make()), wide(given.inputs)
    run(
        model, inputs
    )  # weights that hooks compute can be copied only when no gradient is asked for
    groups = cpd.comb(model, inputs, exact=exact)
    scores = cpd.importance.score("random", model, groups)
    plan = cpd.choose(
        groups, scores, target="params=0.01", min_keep=0.5, ranking="uniform", unreachable="closest"
    )
    small = cpd.cut(model, plan, verify=False)
    proof = cpd.verify(model, small, plan, inputs)
    assert proof, f"{proof}\n{groups}\n{plan}"
    assert math.isfinite(proof.max_error)
    if exact:
        worst = difference(run(small, inputs), run(zeroed(model, plan), inputs))
        assert worst <= 1e-9, f"differs from zeroed by {worst:.1e}\n{groups}\n{plan}"
    before, after = plan.costs["params"]
    assert (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in small.parameters()),
    ) == (before, after)
    for tensor, axis in wanted(given.narrower, exact=exact):
        whole, left = plan.shapes[tensor][axis], plan.new_shape(tensor)[axis]
        assert left < whole, f"{tensor} axis {axis} stays {whole}\n{groups}\n{plan}"


@pytest.mark.parametrize("how", ["exact", "lossy"])
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("rotary, two places, one norm for all heads", ["q.weight"]),
        ("one norm for all heads, dims a number", ["q.weight", "k.weight", "v.weight"]),
        ("one norm for all heads, grouped queries", ["q.weight"]),
        (
            "nn.MultiheadAttention, masks made by one module for two",
            ["a.in_proj_weight", "b.in_proj_weight"],
        ),
    ],
)
def test_heads_go_whole(name: str, tensors: list[str], how: str) -> None:
    model, inputs = randomised(IDIOMS[name].make()), wide(IDIOMS[name].inputs)
    groups = cpd.comb(model, inputs, exact=how == "exact")
    units = groups.units
    heads = [f for group in groups for f in group.families if f.kind == "heads" and f.size > 1]
    gone = units.closure([int(cluster[0]) for family in heads for cluster in family.clusters])
    for tensor in tensors:
        layer = groups.labels[tensor].owned(0)
        assert layer is not None
        assert np.isin(units.label[layer.ids], gone).any(), f"{tensor}\n{groups}"


class Folded(nn.Module):
    """Gives every input the same width, which it has as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8

    def forward(self, *xs: torch.Tensor) -> list[torch.Tensor]:
        return [x.reshape(-1, 5, self.width).relu() for x in xs]


@pytest.mark.parametrize("calls", [1, 2])
def test_literals_of_one_call_bind_nothing(calls: int) -> None:
    """Each meets the same channels in every call, so each may have a number of its own."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        ys = [m.a(x), m.b(x), m.c(x)]
        for _ in range(calls):
            ys = m.fold(*ys)
        return m.d(ys[0]) + m.e(ys[1]) + m.f(ys[2])

    layers = {k: nn.Linear(6, 8) for k in "abc"} | {k: nn.Linear(8, 3) for k in "def"}
    groups = cpd.comb(randomised(Net(forward, fold=Folded(), **layers)), tokens())
    assert [(g.name, [f.size for f in g.families]) for g in groups] == [
        ("a", [8]), ("b", [8]), ("c", [8])
    ]  # fmt: skip


def test_literals_of_overlapping_slices_bind_nothing() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(m.fold(y[..., :8])[0] + m.fold(y[..., 4:])[0])

    model = randomised(Net(forward, fold=Folded(), a=nn.Linear(6, 12), b=nn.Linear(8, 3)))
    small, _ = cpd.prune(
        model, tokens(), importance="random", target="params=0.5", unreachable="closest"
    )
    assert small.a.weight.shape[0] < 12


@pytest.mark.parametrize("name", IDIOMS)
def test_cut_idiom_trains(name: str) -> None:
    """One step in training mode: every parameter left gets a gradient that the whole one's gets too."""
    given = IDIOMS[name]
    model, inputs = randomised(given.make()), wide(given.inputs)
    small, _ = cpd.prune(
        model, inputs, importance="random", target="params=0.5", unreachable="closest"
    )

    def gradients(net: nn.Module) -> set[str]:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        out = net.train()(*(inputs if isinstance(inputs, tuple) else args), **kwargs)
        sum(x.square().sum() for x in flat(out) if x.requires_grad).backward()
        return {key for key, value in net.named_parameters() if value.grad is not None}

    assert gradients(small) == gradients(model)
