"""Tensors made on the spot: as wide as another tensor, or of a fixed size."""

from __future__ import annotations

from dataclasses import replace

from ..labels import Labels
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
    """The same (or equally distributed) everywhere. `x_like` has the width of what it is like; a
    literal size is fixed.
    """
    like = call.args.get("self")
    if call.op.endswith("_like") and isinstance(like, Labels):
        zero = call.op == "zeros_like"
        return Labels(call.shape, tuple(replace(layer, zero=zero) for layer in like.layers))
    return Labels(call.shape)


@rule(
    "arange", "linspace", "eye", "tril_indices", "triu_indices", "randint", "randperm", "bernoulli"
)
def sequence(call: Call) -> Labels:
    """Numbers that differ from place to place: the size is fixed."""
    return Labels(call.shape)
