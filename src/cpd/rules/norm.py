"""Normalisations: united with their affine parameters; statistics across channels are lossy."""

from __future__ import annotations

from ..labels import Labels, reshape
from .base import Call, Named, Zero, align, rule


def _affine_zero(first: int, count: int) -> Zero:
    """Dead channels come out as zero only where scale and shift are there and zero."""
    return lambda flags: count > 0 and all(flags.get(first + k, False) for k in range(count))


def _params(call: Call, names: tuple[str, ...], axis: str) -> list[Named]:
    found = [call.args.get(name) for name in names]
    return [(labels, [axis]) for labels in found if labels is not None]


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> Labels:
    """y[n, c, s] = (x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c].

    Where the mean and the variance are those of the input itself, they are statistics across all
    its other axes, which may hold channels too: a weight can be what is normalised.
    """
    x = call.args["input"]
    names = [f"d{k}" for k in range(len(x.shape))]
    if call.args.get("training") or call.args.get("use_input_stats"):
        for axis in range(len(names)):
            if axis > 1 or (axis == 0 and call.op == "batch_norm"):
                call.statistic(x, axis, "normalised across channels")
    affine = _params(call, ("weight", "bias"), names[1])
    running = _params(call, ("running_mean", "running_var"), names[1])
    zero = _affine_zero(1, len(affine))
    return align(call, [(x, names), *affine, *running], names, call.shape, zero=zero)


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Labels:
    """Normalised over the last axes; the statistics are taken across them."""
    x = call.args["input"]
    normalized = call.args["normalized_shape"]
    names = [f"d{k}" for k in range(len(x.shape))]
    first = len(names) - len(normalized)
    for axis in range(first, len(names)):
        call.statistic(x, axis, "normalised across channels")
        call.size("normalized_shape", axis - first, int(normalized[axis - first]), x, axis)
    affine = [call.args.get(name) for name in ("weight", "bias")]
    operands = [(labels, names[first:]) for labels in affine if labels is not None]
    zero = _affine_zero(1, len(operands))
    return align(call, [(x, names), *operands], names, call.shape, zero=zero)


@rule("group_norm")
def group_norm(call: Call) -> Labels:
    """Normalised inside each of `num_groups` equal runs of channels, over all places, which may be
    channels of another axis; whole groups may go.
    """
    x, groups = call.args["input"], call.args["num_groups"]
    n, c, *space = x.shape
    inner = reshape(x, (n, groups, c // groups, *space), call.channels)
    if c > groups:
        call.statistic(inner, 2, "normalised across the channels of a group")
    for axis in range(3, len(inner.shape)):
        call.statistic(inner, axis, "normalised across channels")
    call.size("num_groups", None, groups, inner, 1)
    names = [f"d{k}" for k in range(len(inner.shape))]
    affine = [call.args.get(name) for name in ("weight", "bias")]
    parts = [reshape(p, (groups, c // groups), call.channels) for p in affine if p is not None]
    operands = [(part, names[1:3]) for part in parts]
    y = align(
        call, [(inner, names), *operands], names, inner.shape, zero=_affine_zero(1, len(parts))
    )
    return reshape(y, call.shape, call.channels)


@rule("softmax", "log_softmax", "_softmax", "softmin")
def softmax(call: Call) -> Labels:
    """A softmax over channels is a statistic of them; over any other axis it is pointwise."""
    x = call.args["self"]
    axis = call.args["dim"] % len(x.shape)
    call.statistic(x, axis, "softmax over channels")
    for layer in x.layers:
        if axis in layer.axes[:-1]:  # entries of different rows meet, so all keep the same columns
            call.channels.columns(layer.ids.reshape(-1, layer.ids.shape[-1]))
    names = [f"d{k}" for k in range(len(x.shape))]
    return align(call, [(x, names)], names, call.shape, zero=lambda _: False)


@rule("_weight_norm")
def weight_norm(call: Call) -> Labels:
    """w = g v / |v|, the norm over all axes of v but one: entries that are zero are passed over."""
    v, g = call.args["v"], call.args["g"]
    names = [f"d{k}" for k in range(len(v.shape))]
    kept = [n for n in names if call.args.get("dim", 0) in (names.index(n),)]
    align(call, [(v, names)], kept, tuple(v.shape[names.index(n)] for n in kept))
    if call.exact:
        for axis in (names.index(n) for n in kept):
            call.freeze_indices(v, axis, "not finite where channels are zero")
    own = names if len(g.shape) == len(names) else kept
    return align(call, [(v, names), (g, own[: len(g.shape)])], names, call.shape)
