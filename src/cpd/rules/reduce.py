"""Reductions and pooling. Over channels they are statistics; over any other axis channels pass."""

from __future__ import annotations

from collections.abc import Sequence

from ..labels import Labels, Layer
from .base import Call, align, positive, rule

# The reductions whose result over zeros is zero.
_ZERO_OF_ZEROS = ("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "prod")


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "linalg_vector_norm",
    "norm",
    "logsumexp",
    "prod",
    "max",
    "min",
    "any",
    "all",
    "argmax",
    "argmin",
    "median",
)
def reduction(call: Call) -> Labels | list[Labels]:
    """y = reduce(x, dims). A sum or a norm passes over zeros; all else over channels is a
    statistic.
    """
    x = call.args["self"]
    if isinstance(call.args.get("other"), Labels):
        names = [f"d{k}" for k in range(len(call.shape), 0, -1)]
        other = call.args["other"]
        operands = [(t, names[len(names) - len(t.shape) :]) for t in (x, other)]
        return align(call, operands, names, call.shape, zero=lambda _: False)
    rank = len(x.shape)
    dims = call.args.get("dim")
    given = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % rank for d in given} if rank else set()
    names = [f"d{k}" for k in range(rank)]
    keep = bool(call.args.get("keepdim", False)) and dims is not None
    out = [n if k not in gone else f"one{k}" for k, n in enumerate(names) if keep or k not in gone]
    if call.op.startswith(("var", "std")):
        for axis in gone:
            call.keep_two(x, axis)
    why = None if _skips_zeros(call) else f"{call.op} over channels"
    zero = None if call.op in _ZERO_OF_ZEROS and len(call.out) == 1 else (lambda _: False)
    results = [
        align(call, [(x, names)], out, shape, statistic=why, zero=zero) for shape in call.out
    ]
    return results if len(results) > 1 else results[0]


def _skips_zeros(call: Call) -> bool:
    """Say whether channels that are zero make no difference to the result."""
    if call.op not in ("norm", "linalg_vector_norm"):
        return call.op == "sum"
    order = call.args.get("ord", call.args.get("p", 2))
    return not isinstance(order, int | float) or order >= 0


@rule("cosine_similarity", "cdist")
def compared(call: Call) -> Labels:
    """Products or distances of vectors: both must be zero where channels are gone."""
    cosine = call.op == "cosine_similarity"
    x, y = call.args["x1"], call.args["x2"]
    rank = max(len(x.shape), len(y.shape))
    axis = positive(call.args.get("dim", 1), rank) if cosine else rank - 1
    names = [f"d{k}" if k != axis else "k" for k in range(rank)]
    own = [[*names[rank - len(t.shape) :]] for t in (x, y)]
    if not cosine:
        own[0][-2], own[1][-2] = "m", "n"
    for labels, given in zip((x, y), own, strict=True):
        align(call, [(labels, given)], [n for n in given if n != "k"], _without_axis(labels, given))
    out = [n for n in names if n != "k"] if cosine else [*names[:-2], "m", "n"]
    zero = (lambda flags: any(flags.values())) if cosine else (lambda _: False)
    return align(call, list(zip((x, y), own, strict=True)), out, call.shape, zero=zero)


def _without_axis(labels: Labels, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(n for n, name in zip(labels.shape, names, strict=True) if name != "k")


@rule(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
)
def pool(call: Call) -> Labels | list[Labels]:
    """Runs over the last one, two or three axes; channels pass."""
    x = call.args["input"] if "input" in call.args else call.args["self"]
    rank = next(int(c) for c in call.op if c.isdigit())
    first = len(x.shape) - rank
    for axis in range(first, len(x.shape)):
        call.freeze_axis(x, axis, "pooled or resized along this axis")
    results = [Labels(shape, _passing(call, x, range(first, len(x.shape)))) for shape in call.out]
    return results if len(results) > 1 else results[0]


def _passing(call: Call, x: Labels, gone: Sequence[int]) -> tuple[Layer, ...]:
    kept = []
    for layer in x.layers:
        if not set(layer.axes) & set(gone):
            kept.append(layer)
        else:
            call.freeze(layer.ids, "pooled or resized along a coupled axis")
    return tuple(kept)
