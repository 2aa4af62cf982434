"""Convolutions of every form, and what changes the space of an image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from .base import WIDTHS, Made, Shape, Then, common, conv, divisor, idiom

ACTS = {
    "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "elu": nn.ELU,
    "softplus": nn.Softplus, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "none": nn.Identity,
    "leaky": nn.LeakyReLU, "relu6": nn.ReLU6, "mish": nn.Mish,
}  # fmt: skip


def _strided(shape: Shape, stride: int) -> tuple[int, ...]:
    return tuple((n - 1) // stride + 1 for n in shape.space)


@idiom(
    "image",
    width=WIDTHS,
    kernel=(1, 3),
    groups=(1, 2, 3, 4),
    stride=(1, 2),
    bias=(True, False),
    act=tuple(ACTS),
    padding=("zeros", "reflect", "circular"),
)
def convolution(shape: Shape, o: Any) -> Made:
    groups = common(shape.channels, o.width, o.groups)
    padding = o.padding if min(shape.space) > 1 and len(shape.space) < 3 else "zeros"
    layer = conv(
        shape, o.width, o.kernel, groups=groups, stride=o.stride, bias=o.bias, padding_mode=padding
    )
    out = Shape("image", o.width, _strided(shape, o.stride))
    return nn.Sequential(layer, ACTS[o.act]()), out


@idiom("image", times=(1, 2, 3), kernel=(3, 1), bias=(True, False))
def depthwise(shape: Shape, o: Any) -> Made:
    out = shape.channels * o.times if shape.channels * o.times <= 24 else shape.channels
    return conv(shape, out, o.kernel, groups=shape.channels, bias=o.bias), shape.wide(out)


@idiom("image", width=WIDTHS, kernel=(3, 1), grow=(2, 1))
def inverted_bottleneck(shape: Shape, o: Any) -> Made:
    inner = shape.wide(o.width * o.grow)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norm = norms[len(shape.space) - 1]
    return nn.Sequential(
        conv(shape, inner.channels, bias=False),
        norm(inner.channels),
        nn.ReLU6(),
        conv(inner, inner.channels, o.kernel, groups=inner.channels, bias=False),
        norm(inner.channels),
        nn.ReLU6(),
        conv(inner, o.width, bias=False),
        norm(o.width),
    ), shape.wide(o.width)


@idiom("image", width=WIDTHS, groups=(1, 2, 3), stride=(1, 2), bias=(True, False))
def transposed(shape: Shape, o: Any) -> Made:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(shape.space) - 1]
    groups = common(shape.channels, o.width, o.groups)
    stride = o.stride if shape.places <= 16 else 1
    layer = kind(shape.channels, o.width, stride, stride, groups=groups, bias=o.bias)
    return layer, Shape("image", o.width, tuple(n * stride for n in shape.space))


@idiom("plane", width=WIDTHS, how=("module", "function", "by hand"))
def pixel_shuffle(shape: Shape, o: Any) -> Made:
    if shape.places > 16:
        return conv(shape, o.width, 3), shape.wide(o.width)
    make = conv(shape, 4 * o.width)
    to = replace(shape.wide(o.width), space=tuple(2 * n for n in shape.space))
    if o.how == "module":
        return nn.Sequential(make, nn.PixelShuffle(2)), to
    if o.how == "function":
        return Then(lambda m, x: F.pixel_shuffle(m.make(x), m.times), make=make, times=2), to

    def by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        x = m.make(x).view(n, -1, 2, 2, h, w)
        return x.permute(0, 1, 4, 2, 5, 3).reshape(n, -1, 2 * h, 2 * w)

    return Then(by_hand, make=make), to


@idiom("plane", how=("module", "slices", "by hand"), width=WIDTHS)
def pixel_unshuffle(shape: Shape, o: Any) -> Made:
    if any(n % 2 for n in shape.space) or shape.channels > 9:
        return conv(shape, o.width), shape.wide(o.width)
    inner = Shape("image", 4 * shape.channels, tuple(n // 2 for n in shape.space))
    after = conv(inner, o.width)
    out = inner.wide(o.width)
    if o.how == "module":
        return nn.Sequential(nn.PixelUnshuffle(2), after), out

    def slices(m: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [x[..., a::2, b::2] for b in (0, 1) for a in (0, 1)]
        return m.after(torch.cat(parts, 1))

    def by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return m.after(x.reshape(n, c * 4, h // 2, w // 2))

    return Then(slices if o.how == "slices" else by_hand, after=after), out


@idiom("image", how=("max", "avg", "adaptive", "nearest", "linear", "pad"))
def resample(shape: Shape, o: Any) -> Made:
    rank = len(shape.space)
    modes = {"nearest": "nearest", "linear": ("linear", "bilinear", "trilinear")[rank - 1]}
    if o.how in modes and shape.places <= 16:
        to = tuple(2 * n for n in shape.space)
        mode = modes[o.how]
        return Then(lambda m, x: F.interpolate(x, scale_factor=2, mode=mode)), replace(
            shape, space=to
        )
    if o.how == "pad" and shape.places <= 36:
        to = (*shape.space[:-1], shape.space[-1] + 2)
        return Then(lambda m, x: F.pad(x, (1, 1))), replace(shape, space=to)
    if o.how == "adaptive":
        kind = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1]
        return kind(2), replace(shape, space=(2,) * rank)
    kernel = tuple(min(2, n) for n in shape.space)
    kinds = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
    if o.how != "max":
        kinds = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    to = tuple(n // k for n, k in zip(shape.space, kernel, strict=True))
    return kinds[rank - 1](kernel if rank > 1 else kernel[0]), replace(shape, space=to)


@idiom("plane", width=WIDTHS, how=("linear", "weights"))
def unfold(shape: Shape, o: Any) -> Made:
    if o.how == "linear":
        make = nn.Linear(9 * shape.channels, o.width)

        def linear(m: Any, x: torch.Tensor) -> torch.Tensor:
            y = m.make(F.unfold(x, 3, padding=1).transpose(1, 2)).transpose(1, 2)
            return y.unflatten(2, x.shape[2:])

        return Then(linear, make=make), shape.wide(o.width)
    weights = nn.Parameter(torch.ones(9, 1))

    def weighted(m: Any, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        y = F.unfold(x, 3, padding=1).view(n, c, 9, h * w)
        return (y * m.weights).sum(2).view(n, c, h, w)

    return Then(weighted, weights=weights), shape


class Standardised(nn.Conv2d):
    """Weight standardisation: a convolution whose weight is normalised row by row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
        w = (w - mean) / (std + 0.1)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByNorm(nn.Conv2d):
    """Weight standardisation by `batch_norm` over rows, as networks without norms have it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(
            rows, None, None, self.gain.view(-1), training=True, momentum=0.0, eps=1e-3
        )
        w = w.reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@idiom("plane", width=WIDTHS, groups=(1, 2), how=("mean and std", "batch norm"))
def weight_standardisation(shape: Shape, o: Any) -> Made:
    kind = Standardised if o.how == "mean and std" else StandardisedByNorm
    groups = common(shape.channels, o.width, o.groups)
    return kind(shape.channels, o.width, 3, padding=1, groups=groups), shape.wide(o.width)


@idiom("image", width=WIDTHS, kernel=(1, 3), how=("weight norm", "spectral norm"), dim=(0, 1))
def reparametrised(shape: Shape, o: Any) -> Made:
    layer = conv(shape, o.width, o.kernel)
    if o.how == "spectral norm":
        return parametrizations.spectral_norm(layer), shape.wide(o.width)
    return parametrizations.weight_norm(layer, dim=o.dim), shape.wide(o.width)


@idiom("plane", width=WIDTHS, kernel=(1, 3), groups=(1, 2), what=("weight", "product"))
def functional_weight(shape: Shape, o: Any) -> Made:
    groups = common(shape.channels, o.width, o.groups)
    size = (o.width, shape.channels // groups, o.kernel, o.kernel)
    pad = o.kernel // 2
    if o.what == "weight":
        run = lambda m, x: F.conv2d(x, m.w, m.b, padding=pad, groups=groups)  # noqa: E731
        parts = {"w": nn.Parameter(torch.ones(size)), "b": nn.Parameter(torch.zeros(o.width))}
        return Then(run, **parts), shape.wide(o.width)
    rank = divisor(o.width, 4)
    parts = {
        "u": nn.Parameter(torch.ones(o.width, rank)),
        "v": nn.Parameter(torch.ones(rank, *size[1:])),
    }

    def product(m: Any, x: torch.Tensor) -> torch.Tensor:
        w = (m.u @ m.v.flatten(1)).view(*size)
        return F.conv2d(x, w, padding=pad, groups=groups)

    return Then(product, **parts), shape.wide(o.width)
