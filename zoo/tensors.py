"""Nested inputs and outputs: another batch, another type, their differences."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from cpd.trace import split_inputs


def tensors_of(values: Any) -> list[torch.Tensor]:
    """Return all tensors in nested values."""
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def batch_of(inputs: Any) -> int:
    """Return the number of samples."""
    return next(int(x.shape[0]) for x in tensors_of(inputs) if x.ndim)


def resized(inputs: Any, size: int) -> Any:
    """Return inputs with another number of samples: the same ones again and again."""
    batch = batch_of(inputs)

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.ndim == 0 or x.shape[0] != batch:
            return x
        return x[torch.arange(size) % batch]

    return pytree.tree_map(one, inputs)


def call(model: nn.Module, inputs: Any, seed: int = 0) -> list[torch.Tensor]:
    """Run a network as it is (training or not) and return the tensors it puts out."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - some networks draw from it in training
    random.seed(seed)
    args, kwargs = split_inputs(inputs)
    return tensors_of(model(*args, **kwargs))


def difference(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value wanted of each output."""
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if b.numel():
            a, b = a.detach().double(), b.detach().double()
            scale = b.abs().max().clamp_min(1e-30)
            worst = max(worst, float(((a - b).abs().max() / scale).nan_to_num(float("inf"))))
    return worst
