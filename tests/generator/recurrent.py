"""Recurrent layers over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Made, Shape, Then, idiom

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


@idiom(
    "tokens",
    kind=tuple(KINDS),
    width=(3, 4, 6),
    layers=(1, 2),
    both=(False, True),
    first=(True, False),
    bias=(True, False),
    state=(False, True),
)
def recurrent(shape: Shape, o: Any) -> Made:
    """`nn.LSTM`, `nn.GRU`, `nn.RNN`: both directions, with a learned first state or none."""
    ways = 2 if o.both else 1
    options = {
        "batch_first": o.first,
        "bias": o.bias,
        "bidirectional": o.both,
        "num_layers": o.layers,
    }
    parts: dict[str, Any] = {"layer": KINDS[o.kind](shape.channels, o.width, **options)}
    if o.state:
        parts["state"] = nn.Parameter(torch.ones(ways * o.layers, 1, o.width))

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x if o.first else x.transpose(0, 1)
        if not o.state:
            y = m.layer(x)[0]
        else:
            batch = x.shape[0 if o.first else 1]
            h = m.state.repeat(1, batch, 1)
            y = m.layer(x, (h, torch.tanh(h)) if o.kind == "lstm" else h)[0]
        return y if o.first else y.transpose(0, 1)

    return Then(run, **parts), shape.wide(ways * o.width)


@idiom("tokens", kind=tuple(KINDS), width=(3, 4, 6))
def recurrent_cell(shape: Shape, o: Any) -> Made:
    """One step after the other, in Python."""
    cell = CELLS[o.kind](shape.channels, o.width)

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        state, outputs = None, []
        for k in range(x.shape[1]):
            state = m.cell(x[:, k], state)
            outputs.append(state[0] if o.kind == "lstm" else state)
        return torch.stack(outputs, 1)

    return Then(run, cell=cell), shape.wide(o.width)
