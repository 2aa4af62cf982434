"""Pointwise operators: aligned by broadcasting, united position by position.

PyTorch tags them, so no list is kept: `find` is asked for by the tag `pointwise`. Whether a dead
channel that is zero stays zero (relu does, sigmoid does not) is found by running the operator
itself on zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..labels import Labels
from .base import Call, align, rule

_PROBED: dict[Any, bool | None] = {}  # facts about operators, the same for every network


@rule(
    "pointwise",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "native_dropout",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "type_as",
    "copy",
    "lift_fresh_copy",
    "lift_fresh",
    "fill",
    "hardswish",
    "prelu",
    "where",
    "zero",
    "floor_divide",
    "__and__",
    "__or__",
    "__xor__",
    "real",
    "imag",
    "complex",
    "polar",
)
def pointwise(call: Call) -> Labels:
    """y[i] = f(a[i], b[i], ...)."""
    tensors = [(name, value) for name, value in call.args.items() if isinstance(value, Labels)]
    if call.op.startswith("prelu"):
        return _prelu(call)
    if not tensors:
        return Labels(call.shape)
    operands = [(value, _names(value, len(call.shape))) for _, value in tensors]
    names = [f"d{k}" for k in range(len(call.shape), 0, -1)]
    undefined: list[dict[int, bool]] = []
    keep = _zero_probe(call, [name for name, _ in tensors], undefined)
    labels = align(call, operands, names, call.shape, zero=keep)
    for flags in undefined if call.exact else ():
        for number in (n for n, zero in flags.items() if zero):
            call.freeze_all(tensors[number][1], "not finite where channels are zero")
    return replace(labels, uniform=all(value.uniform for _, value in tensors))


def _names(labels: Labels, rank: int) -> list[str]:
    return [f"d{k}" for k in range(rank, 0, -1)][rank - len(labels.shape) :]


def _prelu(call: Call) -> Labels:
    """prelu: the slope has one entry for each channel (axis 1)."""
    x, w = call.args["self"], call.args["weight"]
    names = [f"d{k}" for k in range(len(x.shape))]
    operands = [(x, names)]
    if w.shape and w.shape[0] > 1:
        operands.append((w, [names[1]]))
    return align(call, operands, names, call.shape, zero=lambda flags: flags.get(0, False))


def _zero_probe(call: Call, tensors: list[str], undefined: list[dict[int, bool]]) -> Any:
    """Return a function of zero flags that runs the op with zeros for the zero operands.

    Flags for which the result is not finite (0 / 0) are noted in `undefined`.
    """

    def zero(flags: dict[int, bool]) -> bool:
        if not any(flags.values()) or call.target is None:
            return call.target is None and all(flags.values())
        zeros = tuple(flags.get(number, False) for number in range(len(tensors)))
        plain = sorted((k, repr(v)) for k, v in call.args.items() if k not in tensors)
        key = (call.target, zeros, tuple(tensors), tuple(plain))
        if key not in _PROBED:
            found = [_is_zero(call, tensors, zeros, value) for value in (0.7310, -1.2345)]
            _PROBED[key] = None if None in found else all(found)
        if _PROBED[key] is None:
            undefined.append(flags)
        return bool(_PROBED[key])

    return zero


def _is_zero(call: Call, tensors: list[str], zeros: tuple[bool, ...], value: float) -> bool | None:
    tags = call.target.tags
    if torch.Tag.nondeterministic_seeded in tags and torch.Tag.pointwise not in tags:
        return False  # what it draws now says nothing
    args = dict(call.args)
    if "device" in args:
        args["device"] = torch.device("cpu")  # the model's may be the one without values
    for name, zero in zip(tensors, zeros, strict=True):
        args[name] = torch.full((1,), 0.0 if zero else value)
    names = [argument.name for argument in call.target._schema.arguments]
    positional = dict(zip(names, call.target._schema.arguments, strict=True))
    plain = [args[n] for n in names if n in args and not positional[n].kwarg_only]
    keyword = {n: args[n] for n in names if n in args and positional[n].kwarg_only}
    try:
        with torch.random.fork_rng(devices=[]):  # it may be one that draws
            result = call.target(*plain, **keyword)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False  # the op cannot be probed on one number: claim nothing
    if not isinstance(result, torch.Tensor):
        return False
    return bool((result == 0).all()) if bool(result.isfinite().all()) else None
