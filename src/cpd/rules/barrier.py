"""Operators that mix or order what they run over: channels do not pass."""

from __future__ import annotations

from ..labels import Labels
from .base import Call, rule


@rule("cumsum", "cumprod", "sort", "argsort", "topk", "logcumsumexp", "diff")
def barrier(call: Call) -> Labels | list[Labels]:
    """Runs along one axis, which is fixed; the other axes pass."""
    x = call.args["self"]
    axis = call.args.get("dim", -1) % max(len(x.shape), 1)
    for layer in x.layers:
        if axis in layer.axes:
            call.freeze(layer.ids, f"{call.op} along channels")
    kept = tuple(layer for layer in x.layers if axis not in layer.axes)
    results = [Labels(shape, kept) for shape in call.out]
    return results if len(results) > 1 else results[0]
