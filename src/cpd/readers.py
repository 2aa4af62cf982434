"""Readers: how a call multiplies what it reads with a weight, as one product of matrices.

Whatever the call is, entries of what it reads, (entries, groups, inputs), times the weight,
(groups, outputs, inputs), are what comes out, (entries, groups, outputs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx


@dataclass(frozen=True)
class Reader(ABC):
    """A call that multiplies `source` with `weight`; `bias` is added to what comes out."""

    source: fx.Node
    weight: fx.Node
    bias: Any = None

    @abstractmethod
    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as (groups, outputs, inputs)."""

    @abstractmethod
    def weight_of(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return (groups, outputs, inputs) as a weight."""

    @abstractmethod
    def inputs(self, value: torch.Tensor) -> torch.Tensor:
        """Return what the weights multiply as (entries, groups, inputs)."""

    @abstractmethod
    def outputs(self, value: torch.Tensor) -> torch.Tensor:
        """Return what comes out as (entries, groups, outputs)."""

    def lost(
        self, node: fx.Node, big: Mapping[fx.Node, Any], small: Mapping[fx.Node, Any]
    ) -> torch.Tensor:
        """Return what the products of the whole network are more than those of the smaller one."""
        return big[node] - small[node]


@dataclass(frozen=True)
class Product(Reader):
    """An einsum of two operands: `letters` of the source, the weight and the output."""

    letters: tuple[str, str, str] = ("", "", "")

    def _in_all(self) -> tuple[str, str, str, str, str]:
        """Letters of entries, groups, outputs, inputs, and those that are summed beforehand."""
        source, weight, out = self.letters
        return (
            "".join(x for x in source if x in out and x not in weight),
            "".join(x for x in source if x in out and x in weight),
            "".join(x for x in weight if x in out and x not in source),
            "".join(x for x in source if x in weight and x not in out),
            "".join(x for x in source if x not in weight and x not in out),
        )

    def _order(self, *parts: str) -> list[int]:
        return [self.letters[1].index(x) for x in "".join(parts)]

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        _, groups, outputs, inputs, _ = self._in_all()
        return _grouped(weight.permute(self._order(groups, outputs, inputs)), groups, outputs)

    def weight_of(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        _, groups, outputs, inputs, _ = self._in_all()
        order = self._order(groups, outputs, inputs)
        there = matrix.reshape([like.shape[k] for k in order])
        return there.permute([order.index(k) for k in range(len(order))])

    def inputs(self, value: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        entries, groups, _, inputs, summed = self._in_all()
        source = self.letters[0]
        if summed:
            value = value.sum([source.index(x) for x in summed])
            source = "".join(x for x in source if x not in summed)
        order = [source.index(x) for x in entries + groups + inputs]
        return _grouped(value.permute(order), entries, groups)

    def outputs(self, value: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        entries, groups, outputs, _, _ = self._in_all()
        order = [self.letters[2].index(x) for x in entries + groups + outputs]
        return _grouped(value.permute(order), entries, groups)


def _grouped(value: torch.Tensor, first: str, second: str) -> torch.Tensor:
    """Join the axes of each of three parts."""
    sizes = [1, 1, 1]
    for place, size in enumerate(value.shape):
        sizes[0 if place < len(first) else 1 if place < len(first) + len(second) else 2] *= size
    return value.reshape(sizes)


@dataclass(frozen=True)
class Conv(Reader):
    """A convolution of any rank; `options`: its arguments, and the lengths of its kernel."""

    options: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """How many groups its channels have."""
        return int(self.options["groups"])

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        return weight.reshape(self.groups, -1, weight[0].numel())

    def weight_of(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        return matrix.reshape(like.shape)

    def outputs(self, value: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        axis = value.ndim - 1 - self.rank
        return value.movedim(axis, -1).reshape(-1, self.groups, value.shape[axis] // self.groups)

    def inputs(self, value: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        value = value if value.ndim == self.rank + 2 else value[None]
        kernel, steps = self.options["kernel"], self.each("stride")
        sides = [side for pair in reversed(self._padding(kernel)) for side in pair]
        return self._patches(F.pad(value, sides), steps)

    def _patches(self, value: torch.Tensor, steps: list[int]) -> torch.Tensor:
        for axis, step in enumerate(steps):
            apart = self.each("dilation")[axis]
            span = apart * (self.options["kernel"][axis] - 1) + 1
            value = value.unfold(2 + axis, span, step)[..., ::apart]
        value = value.movedim(1, self.rank + 1)  # samples, places, channels, kernel
        places = torch.Size(value.shape[1 : 1 + self.rank]).numel() * self.groups
        return value.reshape(-1, self.groups, value[0].numel() // places)

    @property
    def rank(self) -> int:
        """How many axes its kernel has."""
        return len(self.options["kernel"])

    def each(self, name: str) -> list[int]:
        """Return an argument for each axis."""
        value = self.options[name]
        value = list(value) if isinstance(value, list | tuple) else [value]
        return value * self.rank if len(value) == 1 else value

    def _padding(self, kernel: list[int]) -> list[tuple[int, int]]:
        """Return what is put before and behind each axis."""
        padding = self.options["padding"]
        if not isinstance(padding, str):
            return [(p, p) for p in self.each("padding")]
        spans = [d * (k - 1) for d, k in zip(self.each("dilation"), kernel, strict=True)]
        same = padding == "same"
        return [(s // 2, s - s // 2) if same else (0, 0) for s in spans]


@dataclass(frozen=True)
class Transposed(Conv):
    """A transposed convolution: a convolution with the kernel turned round, in steps of one, of
    what it reads with zeros between.
    """

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        weight = weight.flip(self._turned).unflatten(0, (self.groups, -1)).transpose(1, 2)
        return weight.reshape(self.groups, weight.shape[1], -1)

    def weight_of(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        outputs, inputs = like.shape[1], like.shape[0] // self.groups
        weight = matrix.reshape(self.groups, outputs, inputs, *like.shape[2:]).transpose(1, 2)
        return weight.reshape(like.shape).flip(self._turned)

    @property
    def _turned(self) -> list[int]:
        return list(range(2, 2 + self.rank))

    def inputs(self, value: torch.Tensor) -> torch.Tensor:
        """See `Reader`."""
        value = value if value.ndim == self.rank + 2 else value[None]
        steps, sides = self.each("stride"), []
        apart = value.new_zeros(
            [*value.shape[:2]]
            + [(n - 1) * step + 1 for n, step in zip(value.shape[2:], steps, strict=True)]
        )
        apart[(slice(None), slice(None), *(slice(None, None, step) for step in steps))] = value
        for axis in reversed(range(self.rank)):
            span = self.each("dilation")[axis] * (self.options["kernel"][axis] - 1)
            before = span - self.each("padding")[axis]
            sides += [before, before + self.each("output_padding")[axis]]
        return self._patches(F.pad(apart, sides), [1] * self.rank)


@dataclass(frozen=True)
class Gates(Product):
    """What a recurrent layer's first cells read from its input; what they put out is behind gates,
    so what is lost is told by the products themselves.
    """

    def lost(
        self, node: fx.Node, big: Mapping[fx.Node, Any], small: Mapping[fx.Node, Any]
    ) -> torch.Tensor:
        """See `Reader`."""
        del node
        whole, left = (F.linear(env[self.source], env[self.weight]) for env in (big, small))
        return whole - left


_GATED = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_PRODUCTS = {"matmul": ("self", "other"), "mm": ("self", "mat2"), "bmm": ("self", "mat2")}


def readers_of(node: fx.Node, op: str) -> list[Reader]:
    """Return the ways in which a call may read one operand with a weight that is another."""
    if not hasattr(node.target, "_schema"):
        return []
    return [x for x in _readers(op, _bound(node)) if _are_nodes(x.source, x.weight)]


def _are_nodes(*values: Any) -> bool:
    return all(isinstance(x, fx.Node) and hasattr(x.meta.get("val"), "shape") for x in values)


def _readers(op: str, args: dict[str, Any]) -> Iterator[Reader]:
    if op.startswith("conv") and op.endswith("d"):
        yield from _convs(op, args)
    elif op == "linear" and _rank(args["weight"]) == 2:
        source = args["input"]
        yield Product(source, args["weight"], args["bias"], _of_linear(source))
    elif op == "addmm" and args["alpha"] == args["beta"] == 1:
        yield Product(args["mat1"], args["mat2"], args["self"], ("aY", "YZ", "aZ"))
    elif op in _PRODUCTS:
        left, right = (args[name] for name in _PRODUCTS[op])
        yield from _of_both(_of_product(_rank(left), _rank(right)), left, right)
    elif op == "einsum" and len(args["tensors"]) == 2:
        left, right = args["tensors"]
        yield from _of_both(_of_equation(args["equation"], _rank(left), _rank(right)), left, right)
    elif op in _GATED:
        yield from _gates(args)
    elif op.removesuffix("_cell") in _GATED:
        yield Gates(args["input"], args["w_ih"], args["b_ih"], _of_linear(args["input"]))


def _rank(value: Any) -> int:
    return len(value.meta["val"].shape) if _are_nodes(value) else 0


def _of_linear(source: Any) -> tuple[str, str, str]:
    """The letters of a product with the rows of a weight."""
    entries = ascii_letters[: _rank(source) - 1]
    return (f"{entries}Y", "ZY", f"{entries}Z")


def _convs(op: str, args: dict[str, Any]) -> Iterator[Reader]:
    if not _are_nodes(args["weight"]):
        return
    kernel = list(args["weight"].meta["val"].shape[2:])
    names = ("stride", "padding", "dilation", "groups")
    options = {**{name: args[name] for name in names}, "kernel": kernel}
    if "transpose" not in op:
        yield Conv(args["input"], args["weight"], args["bias"], options)
    else:
        options["output_padding"] = args["output_padding"]
        yield Transposed(args["input"], args["weight"], args["bias"], options)


def _of_both(equation: tuple[str, str, str] | None, left: Any, right: Any) -> Iterator[Reader]:
    """Either operand may be the weight, if every sum of it is one of products."""
    if equation is None or not _are_nodes(left, right):
        return
    a, b, out = equation
    sizes = [*zip(a, left.meta["val"].shape, strict=True)]
    sizes += zip(b, right.meta["val"].shape, strict=True)
    if len(dict(sizes)) < len(set(sizes)):
        return  # one operand is repeated along an axis of the other
    for one, other, source, weight in ((left, right, a, b), (right, left, b, a)):
        if all(x in source or x in out for x in weight):
            yield Product(one, other, None, (source, weight, out))


def _of_product(left: int, right: int) -> tuple[str, str, str] | None:
    """The letters of a product of matrices that have so many axes."""
    if left < 2 or right < 2 or (left != right and 2 not in (left, right)):
        return None
    rest = ascii_letters[: max(left, right) - 2]
    of_left, of_right = (rest if n > 2 else "" for n in (left, right))
    return (f"{of_left}XY", f"{of_right}YZ", f"{rest}XZ")


def _of_equation(equation: str, left: int, right: int) -> tuple[str, str, str] | None:
    """The letters of an einsum, written out; None where one operand has a letter twice."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    operands = given.split(",")
    free = "".join(x for x in ascii_letters if x not in equation)
    written, most = [], ""
    for letters, rank in zip(operands, (left, right), strict=True):
        more = rank - len(letters.replace("...", "")) if "..." in letters else 0
        rest = free[len(free) - more :]  # axes behind "..." are counted from the last
        most = max(most, rest, key=len)
        written.append(letters.replace("...", rest))
    if not arrow:
        named = given.replace("...", "").replace(",", "")
        out = "..." + "".join(sorted(x for x in set(named) if named.count(x) == 1))
    out = out.replace("...", most)
    if any(len(set(x)) < len(x) for x in (*written, out)):
        return None
    return (written[0], written[1], out)


def _gates(args: dict[str, Any]) -> Iterator[Reader]:
    """What the first layer reads, in each direction; the cells behind read what other cells do."""
    ways = 2 if args["bidirectional"] else 1
    each = len(args["params"]) // (args["num_layers"] * ways)
    for way in range(ways):
        mine = args["params"][way * each : (way + 1) * each]
        bias = mine[2] if args["has_biases"] else None
        yield Gates(args["input"], mine[0], bias, _of_linear(args["input"]))


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
