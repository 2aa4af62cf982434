"""Recurrent layers: the gates of one hidden unit are one channel, and it feeds back into itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..channels import Ids
from ..labels import Labels, Layer
from .base import Call, align, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass
class _Direction:
    """One layer in one direction: its hidden units, and what it puts out."""

    hidden: Ids
    out: Ids


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> list[Labels]:
    """h[t] = f(w_ih x[t] + w_hh h[t-1] + b), gate by gate: the gates' rows of one hidden unit, its
    column in w_hh and its reader in the next layer go together. All layers and directions keep the
    same number.
    """
    x = call.args["input" if "input" in call.args else "data"]
    states = call.args["hx"] if isinstance(call.args["hx"], list) else [call.args["hx"]]
    params, gates = list(call.args["params"]), _GATES[call.op]
    for layer in x.layers:
        if layer.axes != (len(x.shape) - 1,):
            call.freeze(layer.ids, "time and batch of a recurrent layer")
    feature = Layer((0,), _last(call, x), _zero(x))
    numbers = (int(call.args["num_layers"]), 1 + int(call.args["bidirectional"]))
    each = len(params) // (numbers[0] * numbers[1])
    steps = int(np.prod(x.shape[:-1]))
    found: list[_Direction] = []
    for _ in range(numbers[0]):
        made = []
        for _ in range(numbers[1]):
            part, params = params[:each], params[each:]
            made.append(_direction(call, part, gates, feature, steps))
        feature = Layer((0,), np.concatenate([d.out for d in made]), zero=False)
        found += made
    hidden, out = np.stack([d.hidden for d in found]), np.stack([d.out for d in found])
    zero = _states(call, states, [out, hidden])
    last = len(call.shape) - 1
    y = Labels(call.shape, (Layer((last,), feature.ids, zero),))
    ends = [
        Labels(shape, (_stacked(ids, len(shape) - 1, zero),))
        for shape, ids in zip(call.out[1:], [out, hidden], strict=False)
    ]
    return [y, *ends]


def _direction(
    call: Call, params: list[Labels], gates: int, feature: Layer, steps: int
) -> _Direction:
    """Unite the parameters of one layer in one direction: w_ih, w_hh, biases, and a projection."""
    ih, hh, *rest = params
    size = ih.shape[0] // gates
    hidden = _gate(call, ih, gates)
    for bias in (p for p in (hh, *rest) if p.shape[:1] == ih.shape[:1]):
        call.channels.unite(_gate(call, bias, gates), hidden)
    _reads(call, ih, feature)
    out, projection = hidden, rest[-1] if rest and len(rest[-1].shape) == 2 else None
    if projection is not None:
        out = _axis(call, projection, 0)
        for run in np.array_split(hidden, len(out) + 1):
            call.channels.keep_one(run)  # a projection is known by being narrower
        _reads(call, projection, Layer((0,), hidden))
    _reads(call, hh, Layer((0,), out))
    call.cost(steps, [(ih, 0), (ih, 1)])
    call.cost(steps, [(hh, 0), (hh, 1)])
    if projection is not None:
        call.cost(steps, [(projection, 0), (projection, 1)])
    assert hidden.shape == (size,)
    return _Direction(hidden, out)


def _gate(call: Call, weight: Labels, gates: int) -> Ids:
    """Make the rows of all gates one channel each, and return their ids."""
    ids = _axis(call, weight, 0).reshape(gates, -1)
    call.channels.unite(ids, ids[:1])
    return ids[0]


def _axis(call: Call, labels: Labels, axis: int) -> Ids:
    """Return ids along one axis; frozen ones where it has none of its own."""
    layer = labels.owned(axis)
    if layer is not None and len(layer.axes) == 1:
        call.channels.use(layer.ids)
        return layer.ids
    call.freeze_all(labels, "a recurrent weight that is coupled in another way")
    ids = call.channels.new(labels.shape[axis])
    call.freeze(ids, "meets an axis of fixed size")
    return ids


def _last(call: Call, x: Labels) -> Ids:
    return _axis(call, x, len(x.shape) - 1)


def _zero(x: Labels) -> bool:
    layer = x.owned(len(x.shape) - 1)
    return layer is not None and layer.zero


def _reads(call: Call, weight: Labels, feature: Layer) -> None:
    """Unite a weight's columns with what it reads."""
    columns = weight.owned(1)
    if columns is not None:
        call.consumed.append(columns.ids)
    call.channels.unite(_axis(call, weight, 1), feature.ids)


def _stacked(ids: Ids, axis: int, zero: bool) -> Layer:
    """The layer of a state (layers x directions, batch, hidden)."""
    return Layer((axis,), ids[0], zero) if len(ids) == 1 else Layer((0, axis), ids, zero)


def _states(call: Call, states: list[Labels], ids: list[Ids]) -> bool:
    """Unite the states given with the hidden units, and say whether they stay zero."""
    if len(ids[0]) > 1:
        for made in ids:
            call.channels.nest(made)
            call.channels.freeze(call.channels.rows(made), "every layer and direction stays")
    zero = True
    for state, made in zip(states, ids, strict=False):
        last = len(state.shape) - 1
        names = ["l", "n", "h"][2 - last :]
        layer = state.owned(last)
        zero = zero and layer is not None and layer.zero
        if state.uniform and layer is not None and len(made) > 1:
            call.channels.unite(made[0], layer.ids)  # as many as in any layer, no matter which
            state = Labels(state.shape, tuple(e for e in state.layers if e is not layer), True)
            names = [*names[:-1], "any"]
        own = Labels(state.shape, (_stacked(made, last, zero=True),))
        align(call, [(own, ["l", "n", "h"][2 - last :]), (state, names)], [], ())
    return zero


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(call: Call) -> Labels | list[Labels]:
    """One step of a recurrent layer: as the layer."""
    x, gates = call.args["input"], _GATES[call.op.removesuffix("_cell")]
    states = call.args["hx"] if isinstance(call.args["hx"], list) else [call.args["hx"]]
    weights = [call.args.get(k) for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    params = [w for w in weights if w is not None]
    lead = [f"n{k}" for k in range(len(x.shape) - 1)]
    feature = Layer((0,), _last(call, x), _zero(x))
    made = _direction(call, params, gates, feature, 1 if not lead else x.shape[0])
    last = len(call.shape) - 1
    own = Labels(call.shape, (Layer((last,), made.hidden),))
    operands = [(own, [*lead, "h"]), *((state, [*lead, "h"]) for state in states)]
    y = align(call, operands, [*lead, "h"], call.shape, zero=lambda flags: all(flags.values()))
    for layer in (e for e in x.layers if e.axes != (last,)):
        call.freeze(layer.ids, "batch of a recurrent cell")
    return [y, y] if len(call.out) > 1 else y
