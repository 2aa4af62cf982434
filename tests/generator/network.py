"""The network that a spec stands for, its inputs, and the strategy that draws specs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import nn

from .base import BODY, IDIOMS, Shape, adapted, axis_of, built, mapped, needed, sequence

Spec = dict[str, Any]

# name -> channels and space of the input; "ids" are looked up in an embedding first
INPUTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "plane": (3, (4, 4)),
    "odd plane": (3, (5, 4)),
    "all six": (6, (6, 6)),
    "line": (3, (7,)),
    "volume": (2, (3, 4, 2)),
    "tokens": (5, (5,)),
    "ids": (0, (4,)),
}
HEADS = ("flat", "mean", "places", "first", "embedding", "pooled max")
EXTRA = ("nothing", "input added", "input joined", "vector")
OUTPUTS = ("tensor", "tuple", "dict", "named", "nested")
STEM = 6
CLASSES = 3
WORDS = 11


class Out(NamedTuple):
    main: torch.Tensor
    nothing: None
    more: list[torch.Tensor]


class Head(nn.Module):
    """What makes an output of a value."""

    def __init__(self, shape: Shape, how: str, embedding: nn.Embedding | None) -> None:
        super().__init__()
        if how == "embedding" and embedding is None:
            how = "places"
        self.how, self.axis = how, axis_of(shape)
        if how == "flat":
            self.layer = nn.Linear(shape.channels * shape.places, CLASSES)
        elif how == "places":
            self.layer = mapped(shape, CLASSES)
        elif how == "embedding":
            to, shape = needed(shape, "tokens")
            self.fit = nn.Sequential(to, adapted(shape, shape.wide(STEM)))
            self.embedding = embedding
        else:
            self.layer = nn.Linear(shape.channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "flat":
            return self.layer(x.flatten(1))
        if self.how == "places":
            return self.layer(x)
        if self.how == "embedding":
            return F.linear(self.fit(x), self.embedding.weight)
        rows = x.flatten(2) if self.axis == 1 else x.transpose(1, 2)
        if self.how == "first":
            return self.layer(rows[..., 0])
        return self.layer(rows.amax(-1) if self.how == "pooled max" else rows.mean(-1))


class Network(nn.Module):
    """Blocks in a row, heads at the end and in between, a second input where the spec has one."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind, self.extra, self.outputs = spec["input"], spec["extra"], spec["outputs"]
        shape, self.stem = stem(spec["input"])
        self.embedding = self.stem if spec["input"] == "ids" else None
        self.blocks, self.aux, self.at = nn.ModuleList(), nn.ModuleList(), set(spec["aux"])
        for number, block in enumerate(spec["blocks"]):
            made, shape = built(shape, block)
            self.blocks.append(made)
            if number in self.at:
                self.aux.append(Head(shape, "mean", None))
            if number == 0 and self.extra != "nothing":
                self.second = second_input(shape, spec["input"], self.extra)
                shape = shape.wide(2 * shape.channels) if self.joins(shape) else shape
        self.head = Head(shape, spec["head"], self.embedding)

    def joins(self, shape: Shape) -> bool:
        self.axis = axis_of(shape)
        self.cat = self.extra == "input joined" and shape.channels <= 12
        return self.cat

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> Any:
        x = self.stem(x)
        more = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.at:
                more.append(self.aux[len(more)](x))
            if number == 0 and other is not None:
                y = self.second(other)
                if self.extra == "vector":
                    y = y.view(len(y), *(-1 if k == self.axis else 1 for k in range(1, x.ndim)))
                x = torch.cat([x, y], self.axis) if self.cat else x + y
        return self.packed(self.head(x), more)

    def packed(self, main: torch.Tensor, more: list[torch.Tensor]) -> Any:
        if self.outputs == "tensor" and not more:
            return main
        made = {
            "dict": {"main": main, **{f"aux{k}": y for k, y in enumerate(more)}},
            "named": Out(main, None, more),
            "nested": [main, {"more": tuple(more)}],
        }
        return made.get(self.outputs, (main, *more))


def stem(kind: str) -> tuple[Shape, nn.Module]:
    channels, space = INPUTS[kind]
    if kind == "ids":
        return Shape("tokens", STEM, space), nn.Embedding(WORDS, STEM)
    shape = Shape("tokens" if kind == "tokens" else "image", channels, space)
    return shape.wide(STEM), mapped(shape, STEM)


def second_input(shape: Shape, kind: str, how: str) -> nn.Module:
    """A vector for each sample, or another value like the first input."""
    if how == "vector" or kind == "ids":
        return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, shape.channels))
    first, made = stem(kind)
    return nn.Sequential(made, nn.GELU(), adapted(first, shape))


def inputs(spec: Spec, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return random inputs of a network, in float64."""
    generator = torch.Generator().manual_seed(seed)
    channels, space = INPUTS[spec["input"]]

    def made(*size: int) -> torch.Tensor:
        return torch.randn(batch, *size, generator=generator, dtype=torch.float64)

    if spec["input"] == "ids":
        first = torch.randint(0, WORDS, (batch, *space), generator=generator)
    else:
        first = made(*space, channels) if spec["input"] == "tokens" else made(channels, *space)
    if spec["extra"] == "nothing":
        return (first,)
    if spec["extra"] == "vector" or spec["input"] == "ids":
        return first, made(4)
    return first, made(*first.shape[1:])


def build(spec: Spec) -> nn.Module:
    """Return the network of a spec: float64, in eval mode, with random weights."""
    if spec["input"] == "ids" and spec["extra"] != "nothing":
        spec = {**spec, "extra": "vector"}
    model = Network(spec).double().eval()
    generator = torch.Generator().manual_seed(spec["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, generator)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            elif name.endswith(("_u", "_v")):  # of a spectral norm
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(F.normalize(noise, dim=0))
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not spec["frozen"] or number % spec["frozen"] != 0)
    return model


def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Weights keep a signal alive; what scales is away from zero, of either sign."""
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if name.endswith("bias") or tensor.ndim == 0:
        tensor.copy_(0.4 * noise)
    elif tensor.ndim == 1:
        tensor.copy_((noise.abs() * 0.4 + 0.6) * torch.where(noise > -1, 1.0, -1.0))
    else:
        tensor.copy_(1.2 * noise / math.sqrt(max(tensor[0].numel(), 2)))


def names(blocks: list[Spec]) -> Iterator[str]:
    """Return the idioms in blocks, those inside others too."""
    for block in blocks:
        yield block["is"]
        for option, values in IDIOMS[block["is"]].options.items():
            if values is BODY:
                yield from names(block.get(option) or [])


def random(spec: Spec) -> bool:
    """Say whether a network in training mode depends on random numbers."""
    return "regularised" in set(names(spec["blocks"]))


# the strategy ------------------------------------------------------------------------------------


def blocks(depth: int = 2, least: int = 1) -> st.SearchStrategy[list[Spec]]:
    """Lists of blocks, at least so many; `depth`: how deep blocks are inside others."""
    found = [found for found in IDIOMS.values() if depth or BODY not in found.options.values()]
    one = st.sampled_from(sorted(found, key=lambda f: f.name)).flatmap(lambda f: _block(f, depth))
    return st.lists(one, min_size=least, max_size=3 if depth == 2 and least else 2)


def _block(found: Any, depth: int) -> st.SearchStrategy[Spec]:
    options = {
        name: blocks(depth - 1) if values is BODY else st.sampled_from(values)
        for name, values in found.options.items()
    }
    return st.fixed_dictionaries({"is": st.just(found.name), **options})


def around(name: str) -> st.SearchStrategy[list[Spec]]:
    """Lists of blocks with a block of one idiom in the middle."""
    parts = st.tuples(blocks(2, 0), _block(IDIOMS[name], 2), blocks(2, 0))
    return parts.map(lambda found: [*found[0], found[1], *found[2]])


def specs(of: str | None = None) -> st.SearchStrategy[Spec]:
    """Networks, as data; those that have the idiom `of`, or any."""
    return st.fixed_dictionaries(
        {
            "input": st.sampled_from(tuple(INPUTS)),
            "blocks": blocks() if of is None else around(of),
            "head": st.sampled_from(HEADS),
            "aux": st.lists(st.integers(0, 2), max_size=1),
            "extra": st.sampled_from((*EXTRA[:1] * 3, *EXTRA[1:])),
            "outputs": st.sampled_from(OUTPUTS),
            "frozen": st.sampled_from((0, 0, 0, 2, 3)),
            "seed": st.integers(0, 999),
        }
    )


__all__ = ["Network", "Spec", "build", "inputs", "names", "random", "sequence", "specs"]
