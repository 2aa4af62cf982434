"""Vanishing: which values of a part of a graph are zero where all tensors of that part are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import fx

from .aliases import op_name
from .trace import Trace, location

# f(0) = 0, elementwise or as a move, a mean or a pool; the first argument decides.
_KEEP = frozenset(
    [
        "relu",
        "relu6",
        "gelu",
        "silu",
        "tanh",
        "hardswish",
        "leaky_relu",
        "elu",
        "celu",
        "selu",
        "mish",
        "prelu",
        "softshrink",
        "hardshrink",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "neg",
        "abs",
        "sign",
        "square",
        "sqrt",
        "div",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "view",
        "reshape",
        "_unsafe_view",
        "view_as",
        "permute",
        "transpose",
        "t",
        "movedim",
        "expand",
        "expand_as",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "narrow",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "getitem",
        "index",
        "flip",
        "roll",
        "repeat",
        "repeat_interleave",
        "tile",
        "to",
        "_to_copy",
        "type_as",
        "lift_fresh_copy",
        "mean",
        "sum",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
    ]
)
_PRODUCTS = frozenset(("mul", "matmul", "bmm", "mm", "einsum"))
_JOINS = frozenset(("cat", "stack"))
_SUMS = frozenset(("add", "sub", *_JOINS))


class Vanishing:
    """Says of values whether they are zero, whatever finite values come in from outside."""

    def __init__(self, nodes: Collection[fx.Node], trace: Trace) -> None:
        self.nodes, self.trace = nodes, trace
        self.known: dict[fx.Node, bool] = {}
        self.why = ""

    def __call__(self, value: Any) -> bool:
        """Return whether an argument is zero; of several, whether all are."""
        if isinstance(value, list | tuple):
            return bool(value) and all(map(self, value))
        if not isinstance(value, fx.Node):
            return value is None or (isinstance(value, int | float) and value == 0)
        if value not in self.nodes:
            return False
        if value not in self.known:
            self.known[value] = self._zero(value)
            if not self.known[value] and not self.why:
                self.why = f"{op_name(value)} in {location(value)[0]}"
        return self.known[value]

    def _zero(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node.name in self.trace.tensors
        name = op_name(node)
        name = name[:-1] if name.endswith("_") else name
        if name in _KEEP:
            return self(node.args[0])
        if name in _PRODUCTS:
            return any(self(x) for x in _flat(node.args))
        if name in _SUMS:
            return all(self(x) for x in _flat(node.args[: 1 if name in _JOINS else 2]))
        for start, rule in _RULES.items():
            if name.startswith(start) or name.endswith(start):
                return rule(self, node)
        return False


def _layer(zero: Vanishing, node: fx.Node) -> bool:
    source = zero(given(node, "weight")) or zero(given(node, "input"))
    return source and zero(given(node, "bias"))


def _norm(zero: Vanishing, node: fx.Node) -> bool:
    weight = given(node, "weight")
    return weight is not None and zero(weight) and zero(given(node, "bias"))


def _attention(zero: Vanishing, node: fx.Node) -> bool:
    return zero(given(node, "value"))


def _clamp(zero: Vanishing, node: fx.Node) -> bool:
    low, high = given(node, "min_val"), given(node, "max_val")
    low, high = (-1 if low is None else low), (1 if high is None else high)
    return zero(node.args[0]) and low <= 0 <= high


def _pad(zero: Vanishing, node: fx.Node) -> bool:
    return zero(node.args[0]) and not given(node, "value")


_RULES: dict[str, Callable[[Vanishing, fx.Node], bool]] = {
    "linear": _layer,
    "conv": _layer,
    "_norm": _norm,
    "scaled_dot_product_attention": _attention,
    "hardtanh": _clamp,
    "pad": _pad,
}


def given(node: fx.Node, name: str) -> Any:
    """Return what a call was given for an argument of its operator; None where nothing."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    if name in names and names.index(name) < len(node.args):
        return node.args[names.index(name)]
    return node.kwargs.get(name)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
