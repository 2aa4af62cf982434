"""Operators that mix or order what they run over: channels do not pass."""

from __future__ import annotations

from ..labels import Labels
from .base import Call, rule


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "diff")
@rule("sort", "argsort", "topk", "kthvalue", "mode", "msort")
@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft")
def barrier(call: Call) -> Labels | list[Labels]:
    """Runs along one axis, which is fixed; the other axes pass."""
    x = call.args["self"]
    axis = call.args.get("dim", 0 if call.op == "msort" else -1)
    axes = {(-1 if axis is None else axis) % max(len(x.shape), 1)}
    return _along(call, x, axes, f"{call.op} along channels")


@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn")
def transform(call: Call) -> Labels | list[Labels]:
    """A Fourier transform mixes the axes that it runs over; the other axes pass."""
    x = call.args["self"]
    dims = call.args.get("dim")
    plain = range(-2, 0) if call.op.endswith("2") else range(len(x.shape))
    given = plain if dims is None else [dims] if isinstance(dims, int) else dims
    axes = {axis % len(x.shape) for axis in given}
    return _along(call, x, axes, f"{call.op} over channels")


def _along(call: Call, x: Labels, axes: set[int], why: str) -> Labels | list[Labels]:
    for layer in x.layers:
        if axes & set(layer.axes):
            call.freeze(layer.ids, why)
    kept = tuple(layer for layer in x.layers if not axes & set(layer.axes))
    same = [len(shape) == len(x.shape) for shape in call.out]
    results = [Labels(shape, kept if k else ()) for shape, k in zip(call.out, same, strict=True)]
    if not all(same):
        call.freeze_all(x, why)
    return results if len(results) > 1 else results[0]


@rule("histc", "one_hot", "searchsorted", "bucketize", "item")
def wall(call: Call) -> Labels | list[Labels]:
    """Counts or places entries of the whole tensor, or makes a number of it: nothing of what goes
    in may shrink.
    """
    for tensor in _tensors(list(call.args.values())):
        call.freeze_all(tensor, f"{call.op} depends on every entry")
    results = [Labels(shape) for shape in call.out]
    return results if len(results) != 1 else results[0]


def _tensors(values: list[object]) -> list[Labels]:
    found = []
    for value in values:
        if isinstance(value, Labels):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(list(value))
    return found
