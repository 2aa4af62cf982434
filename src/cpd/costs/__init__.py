"""Costs: what a network costs, counted from its graph.

MACs are multiply-accumulates of convolutions, linear layers, matrix products and attention (both of
its products), per sample. Memory is the peak of all tensors that are held at once, in bytes, at the
batch of the example. The same formulas predict the cost of a plan, so predicted and counted are
equal.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from ..graph import Reader
from ..liveness import peak
from ..terms import Terms
from ..trace import Inputs, trace

__all__ = ["macs", "memory", "params"]


def params(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example_inputs: Inputs) -> int:
    """Return the multiply-accumulates of one sample (those of the example batch / its size).

    Raises `InputError` or `TraceError` as `comb` does.
    """
    reader = Reader(trace(model, example_inputs))
    reader.read()
    terms = Terms(reader.macs, per=max(reader.trace.batch, 1))
    return terms.count(np.ones(reader.channels.count, bool))


def memory(model: nn.Module, example_inputs: Inputs) -> int:
    """Return the peak of weights and activations in bytes, at the batch of the example inputs.

    Weights and inputs are held all the time, and what a call makes until the last call that reads
    it. What a kernel takes for itself while it runs is not counted.

    Raises `InputError` or `TraceError` as `comb` does.
    """
    reader = Reader(trace(model, example_inputs))
    reader.read()
    found = peak(model, reader.trace, reader.steps, reader.labels)
    return found.count(np.ones(reader.channels.count, bool))
