"""Tensors made on the spot. A constant value fits any width; a sequence of numbers does not."""

from __future__ import annotations

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
    """The same (or equally distributed) everywhere. Its literal size follows what it meets: see
    `Size`.
    """
    like = call.args.get("self")
    if call.op.endswith("_like") and isinstance(like, Labels):
        return Labels(call.shape, uniform=True)
    return Labels(call.shape)


@rule(
    "arange", "linspace", "eye", "tril_indices", "triu_indices", "randint", "randperm", "bernoulli"
)
def sequence(call: Call) -> Labels:
    """Numbers that differ from place to place: the size is fixed."""
    return Labels(call.shape)
