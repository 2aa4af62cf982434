"""What every idiom works with: the shape of a value, the registry, and adapters between shapes.

A network is data: a list of blocks, each `{"is": idiom, option: value, ...}`. Every list of blocks
is a network: options that do not fit (groups that do not divide, a window wider than the image) are
brought to the nearest that does, and between blocks of different needs stands an adapter. So a
failing example can be made smaller by leaving out any part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (4, 6, 8, 9, 12)
BODY = ("body",)  # the option is itself a list of blocks
MOST_PLACES = 64  # places of an image or of a sequence: networks stay small


@dataclass(frozen=True)
class Shape:
    """`kind` "image": (batch, channels, *space). `kind` "tokens": (batch, length, channels)."""

    kind: str
    channels: int
    space: tuple[int, ...]

    @property
    def places(self) -> int:
        return math.prod(self.space)

    def wide(self, channels: int) -> Shape:
        return replace(self, channels=channels)


Made = tuple[nn.Module, Shape]


@dataclass(frozen=True)
class Idiom:
    """`needs`: "image", "plane" (an image of two axes), "tokens", or "any"."""

    name: str
    needs: str
    options: dict[str, tuple[Any, ...]]
    make: Callable[[Shape, SimpleNamespace], Made]


IDIOMS: dict[str, Idiom] = {}


def idiom(
    needs: str, **options: tuple[Any, ...]
) -> Callable[[Callable[[Shape, Any], Made]], Callable[[Shape, Any], Made]]:
    """Register what builds an idiom from the shape of its input and its options."""

    def register(make: Callable[[Shape, Any], Made]) -> Callable[[Shape, Any], Made]:
        name = make.__name__.strip("_").replace("_", " ")
        assert name not in IDIOMS, name
        IDIOMS[name] = Idiom(name, needs, options, make)
        return make

    return register


class Then(nn.Module):
    """A function of a value and of named parts: most idioms are this."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *values: torch.Tensor) -> Any:
        return self.run(self, *values)


def divisor(number: int, wish: int) -> int:
    """Return the largest divisor of `number` that is at most `wish`."""
    return next(k for k in range(min(wish, number), 0, -1) if number % k == 0)


def common(a: int, b: int, wish: int) -> int:
    """Return the largest common divisor of a and b that is at most `wish`."""
    return divisor(math.gcd(a, b), wish)


def conv(shape: Shape, out: int, kernel: int = 1, **options: Any) -> nn.Module:
    """A convolution of the rank of an image that keeps its space."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape.space) - 1]
    return kind(shape.channels, out, kernel, padding=kernel // 2, **options)


def mapped(shape: Shape, out: int, **options: Any) -> nn.Module:
    """The linear map over channels: a 1x1 convolution or a linear layer."""
    if shape.kind == "tokens":
        return nn.Linear(shape.channels, out, **options)
    return conv(shape, out, **options)


def axis_of(shape: Shape) -> int:
    """Return the axis of the channels."""
    return 1 if shape.kind == "image" else 2


def along(shape: Shape) -> tuple[int, ...]:
    """Return what a vector over channels is viewed as to be multiplied with a value."""
    return (-1, *(1,) * len(shape.space)) if shape.kind == "image" else (-1,)


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


# adapters ----------------------------------------------------------------------------------------


def needed(shape: Shape, needs: str) -> Made:
    """Return what brings a value to the kind that an idiom needs."""
    if needs == "tokens" and shape.kind == "image":
        made = Then(lambda m, x: x.flatten(2).transpose(1, 2))
        return made, Shape("tokens", shape.channels, (shape.places,))
    steps: list[nn.Module] = []
    if needs in ("image", "plane") and shape.kind == "tokens":
        steps.append(Then(lambda m, x: x.transpose(1, 2)))
        shape = replace(shape, kind="image")
    if needs == "plane" and len(shape.space) != 2:
        space = plane(shape.places)
        steps.append(Then(lambda m, x: x.flatten(2).unflatten(2, m.space), space=space))
        shape = replace(shape, space=space)
    return nn.Sequential(*steps), shape


def plane(places: int) -> tuple[int, int]:
    height = divisor(places, math.isqrt(places))
    return height, places // height


def adapted(shape: Shape, to: Shape) -> nn.Module:
    """Return what brings a value to a shape: its kind, its space and its width."""
    steps: list[nn.Module] = []
    if (shape.kind, shape.space) != (to.kind, to.space):
        made, shape = needed(shape, "image")
        steps.append(made)
        if shape.places != math.prod(to.space):
            steps.append(
                Then(lambda m, x: F.adaptive_avg_pool1d(x.flatten(2), m.places), places=to.places)
            )
        elif len(shape.space) > 1:
            steps.append(nn.Flatten(2))
        shape = Shape("image", shape.channels, (to.places,))
        if to.kind == "tokens":
            steps.append(Then(lambda m, x: x.transpose(1, 2)))
        elif len(to.space) > 1:
            steps.append(Then(lambda m, x: x.unflatten(2, m.space), space=to.space))
        shape = Shape(to.kind, shape.channels, to.space)
    if shape.channels != to.channels:
        steps.append(mapped(shape, to.channels))
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


def small_enough(shape: Shape) -> Made:
    """Return what keeps a value small: pooled where it has many places."""
    if shape.places <= MOST_PLACES:
        return nn.Identity(), shape
    to = replace(shape, space=tuple(max(1, n // 2) for n in shape.space))
    if shape.kind == "tokens":
        return Then(lambda m, x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)), to
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(shape.space) - 1]
    kernel = tuple(min(2, n) for n in shape.space)
    return Then(lambda m, x: pool(x, kernel)), to


def sequence(shape: Shape, blocks: list[dict[str, Any]]) -> Made:
    """Build blocks one after the other."""
    modules: list[nn.Module] = []
    for block in blocks:
        made, shape = built(shape, block)
        modules.append(made)
    return (modules[0] if len(modules) == 1 else nn.Sequential(*modules)), shape


def built(shape: Shape, block: dict[str, Any]) -> Made:
    """Build one block with what stands before it."""
    found = IDIOMS[block["is"]]
    before, shape = needed(shape, found.needs)
    given = {name: block.get(name, values[0]) for name, values in found.options.items()}
    for name, values in found.options.items():
        if values is BODY and not isinstance(given[name], list):
            given[name] = []
    made, shape = found.make(shape, SimpleNamespace(**given))
    after, shape = small_enough(shape)
    steps = [x for x in (before, made, after) if not (isinstance(x, nn.Sequential) and not len(x))]
    steps = [x for x in steps if not isinstance(x, nn.Identity)]
    return (steps[0] if len(steps) == 1 else nn.Sequential(*steps)), shape
