"""Scores over batches, without a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..groups import Groups
from ..trace import Inputs, quiet_state, split_inputs
from .base import Importance, Scores

Loss = Callable[[nn.Module, Any], torch.Tensor]


def collected(
    importance: Importance, model: nn.Module, groups: Groups, batches: Iterable[Any], loss: Loss
) -> Scores:
    """Return the scores of an importance over batches; see `cpd.importance.collect`."""
    seen = False
    with _unchanged(model):
        importance.start(model, groups)
        try:
            for batch in batches:
                seen = True
                model.zero_grad(set_to_none=True)
                _pass(importance, loss, model, batch)
                importance.observe()
            if not seen:
                raise InputError("no batch to collect scores from; is the loader empty or used up?")
            return importance.scores()
        finally:
            importance.close()


def _pass(importance: Importance, loss: Loss, model: nn.Module, batch: Any) -> None:
    """One forward pass, and the backward pass where the importance needs it."""
    with torch.set_grad_enabled(importance.needs_gradient):
        value = loss(model, batch)
        if not importance.needs_gradient:
            return
        shown = getattr(importance, "before_backward", None)
        if shown is not None:
            shown(value)
        value.backward()


def run_on(model: nn.Module, inputs: Inputs) -> None:
    """Run a model once in evaluation mode, without gradients; nothing on it changes."""
    args, kwargs = split_inputs(inputs)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), quiet_state():
            model(*args, **kwargs)
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give back gradients, buffers and the random state."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    for parameter, _ in gradients:
        parameter.grad = None
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide the layers inside
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
