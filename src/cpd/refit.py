"""Refitting one layer: which weights give from the inputs that are left what all inputs gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx


@dataclass(frozen=True)
class Reader:
    """A node that multiplies a source with a weight. `kind`: linear (rows are outputs), matmul
    (columns are), conv, or transposed, of which only the bias is mended.
    """

    kind: str
    source: fx.Node
    weight: fx.Node
    bias: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether its weights can be fitted again."""
        return self.kind != "transposed"

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 otherwise."""
        return int(self.options.get("groups", 1)) if self.fits else 1

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as (groups, outputs, inputs)."""
        if self.kind == "matmul":
            return weight.t()[None]
        return weight.reshape(self.groups, -1, weight[0].numel())

    def weight_of(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return (groups, outputs, inputs) as a weight."""
        return matrix[0].t() if self.kind == "matmul" else matrix.reshape(like.shape)

    def outputs(self, value: torch.Tensor) -> torch.Tensor:
        """Return what comes out as (entries, groups, outputs of a group)."""
        axis = value.ndim - 1
        if self.kind in ("conv", "transposed"):
            axis = value.ndim - 1 - self._rank
        return value.movedim(axis, -1).reshape(-1, self.groups, value.shape[axis] // self.groups)

    def inputs(self, value: torch.Tensor) -> torch.Tensor:
        """Return what the weights multiply as (entries, groups, inputs of a group)."""
        if self.kind != "conv":
            return value.reshape(-1, 1, value.shape[-1])
        rank, kernel = self._rank, self.options["kernel"]
        value = value if value.ndim == rank + 2 else value[None]
        value = F.pad(value, self._padding(kernel))
        for axis in range(rank):
            step, apart = self._each("stride")[axis], self._each("dilation")[axis]
            span = apart * (kernel[axis] - 1) + 1
            value = value.unfold(2 + axis, span, step)[..., ::apart]
        value = value.movedim(1, rank + 1)  # samples, places, channels, kernel
        return value.reshape(-1, self.groups, value[0].numel() // self._places(value))

    def _places(self, patches: torch.Tensor) -> int:
        places = 1
        for length in patches.shape[1 : 1 + self._rank]:
            places *= length
        return places * self.groups

    @property
    def _rank(self) -> int:
        return len(self.options["kernel"])

    def _each(self, name: str) -> list[int]:
        value = self.options[name]
        value = list(value) if isinstance(value, list | tuple) else [value]
        return value * self._rank if len(value) == 1 else value

    def _padding(self, kernel: list[int]) -> list[int]:
        """Return padding as `F.pad` takes it: from the last axis to the first."""
        padding = self.options["padding"]
        if not isinstance(padding, str):
            sides = [(p, p) for p in self._each("padding")]
        else:
            spans = [d * (k - 1) for d, k in zip(self._each("dilation"), kernel, strict=True)]
            same = padding == "same"
            sides = [(s // 2, s - s // 2) if same else (0, 0) for s in spans]
        return [length for pair in reversed(sides) for length in pair]


_WEIGHTS = {"linear": ("input", "weight", "bias"), "addmm": ("mat1", "mat2", "self")}
_PRODUCTS = {"matmul": ("self", "other"), "mm": ("self", "mat2")}


def reads(node: fx.Node, op: str) -> Reader | None:
    """Return how a node reads its source with a weight, or None where it is no such node."""
    products = {**_WEIGHTS, **_PRODUCTS}
    conv = op.startswith("conv") and op.endswith("d")
    if op not in products and not conv:
        return None
    args = _bound(node)
    names = products.get(op, ("input", "weight", "bias"))
    source, weight, bias = ([args.get(name) for name in names] + [None])[:3]
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    shape = list(weight.meta["val"].shape)
    if conv:
        kept = {name: args[name] for name in ("stride", "padding", "dilation", "groups")}
        kind = "transposed" if "transpose" in op else "conv"
        return Reader(kind, source, weight, bias, {**kept, "kernel": shape[2:]})
    scaled = args.get("alpha", 1) != 1 or args.get("beta", 1) != 1
    if len(shape) != 2 or scaled:
        return None
    return Reader("linear" if op == "linear" else "matmul", source, weight, bias)


def _bound(node: fx.Node) -> dict[str, Any]:
    """Return a node's arguments by the names of its schema, defaults filled in."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for number, argument in enumerate(schema.arguments):
        if number < len(node.args):
            values[argument.name] = node.args[number]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


class Fit:
    """The sums that a layer is mended from: of what it reads, and of what it has lost.

    `weight` and `alive` have the weight's shape. `centred`: means are taken by a bias or a norm.
    """

    def __init__(
        self, reader: Reader, weight: torch.Tensor, alive: torch.Tensor, *, centred: bool
    ) -> None:
        self.reader, self.like, self.centred = reader, weight, centred
        self.alive = reader.matrix(alive) if reader.fits else None
        self.generator = torch.Generator().manual_seed(0)
        self.lost: torch.Tensor | None = None
        self.read: torch.Tensor | None = None
        self.pilot: torch.Tensor | None = None
        self.count = self.drawn = 0
        self.sums: list[torch.Tensor] = []

    @property
    def regular(self) -> bool:
        """Whether every output that is left reads the same inputs of its group."""
        if self.alive is None:
            return False
        grid = self.alive.any(2, keepdim=True) & self.alive.any(1, keepdim=True)
        return bool((grid == self.alive).all())

    def add(self, source: torch.Tensor, lost: torch.Tensor, share: float) -> None:
        """Add a batch: what the layer reads now, and what it puts out less than it did."""
        missing = self.reader.outputs(lost)
        missing = missing.to(torch.promote_types(missing.dtype, torch.float32))
        total = missing.sum(0, dtype=torch.float64)
        self.lost = total if self.lost is None else self.lost + total
        self.count += len(missing)
        if self.alive is None or not self.regular:
            return
        read = self.reader.inputs(source).to(missing.dtype)
        read = read * self.alive.any(1).to(read.dtype)
        missing = missing * self.alive.any(2).to(missing.dtype)
        mean = read.sum(0, dtype=torch.float64)
        self.read = mean if self.read is None else self.read + mean
        if share < 1:
            drawn = torch.rand(len(read), generator=self.generator) < share
            drawn = drawn.to(read.device)
            read, missing = read[drawn], missing[drawn]
        self._multiply(read, missing)

    def _multiply(self, read: torch.Tensor, missing: torch.Tensor) -> None:
        if self.pilot is None:  # near the mean, so that little is lost to cancellation
            self.pilot = read.mean(0) if self.centred else torch.zeros_like(read[0])
        read = (read - self.pilot).transpose(0, 1)
        missing = missing.transpose(0, 1)
        found = [
            read.transpose(1, 2) @ read,
            missing.transpose(1, 2) @ read,
            read.sum(1),
            missing.sum(1),
        ]
        self.drawn += read.shape[1]
        known = self.sums or [torch.zeros(()).to(found[0])] * len(found)
        self.sums = [a + b.double() for a, b in zip(known, found, strict=True)]

    def solved(self, damping: float) -> torch.Tensor | None:
        """Return what to add to the weight, in its shape; None where it cannot be fitted."""
        if not self.sums or not self.drawn or self.alive is None:
            return None
        gram, cross, read, missing = (value / self.drawn for value in self.sums)
        if self.centred:
            gram = gram - read[:, :, None] * read[:, None, :]
            cross = cross - missing[:, :, None] * read[:, None, :]
        live = self.alive.any(1)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        mean = diagonal.sum(1) / live.sum(1).clamp_min(1)
        ridge = torch.where(mean > 0, damping * mean, 1.0)[:, None].expand_as(diagonal)
        gram = gram + torch.diag_embed(torch.where(live, ridge, 1.0))
        change = torch.linalg.solve(gram, cross.transpose(1, 2)).transpose(1, 2)
        return self.reader.weight_of(change * self.alive, self.like)

    def shift(self, change: torch.Tensor | None) -> torch.Tensor:
        """Return what to add to the bias: the mean that is missing, but for what `change` gives."""
        assert self.lost is not None
        mean = self.lost / self.count
        if change is not None and self.read is not None:
            matrix = self.reader.matrix(change).double()
            mean = mean - (matrix @ (self.read / self.count)[:, :, None])[:, :, 0]
        return mean.reshape(-1)
