"""Tensors made on the spot: as wide as another tensor, or of a fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..labels import Labels, Layer
from .base import Call, rule


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "scalar_tensor",
)
def uniform(call: Call) -> Labels:
    """The same (or equally distributed) everywhere, so it fits any width: `x_like` has that of what
    it is like, and a literal size follows what it meets.
    """
    like = call.args.get("self")
    zero = "zeros" in call.op
    if call.op.endswith("_like") and isinstance(like, Labels):
        return Labels(call.shape, tuple(replace(layer, zero=zero) for layer in like.layers))
    literals = call.args.get("size")
    if not isinstance(literals, Sequence) or len(literals) != len(call.shape):
        return Labels(call.shape, uniform=True)
    layers = tuple(
        Layer((axis,), call.channels.new(size), zero)
        for axis, size in enumerate(call.shape)
        if size > 1
    )
    out = Labels(call.shape, layers, uniform=True)
    for index, old in enumerate(literals):
        call.size("size", index, int(old), out, index)
    return out


@rule(
    "arange", "linspace", "eye", "tril_indices", "triu_indices", "randint", "randperm", "bernoulli"
)
def sequence(call: Call) -> Labels:
    """Numbers that differ from place to place: the size is fixed."""
    return Labels(call.shape)
