"""What an entry of the zoo is, and the weights that all of them get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpd.trace import split_inputs

Built = tuple[nn.Module, Any]
Build = Callable[[], Built]


@dataclass(frozen=True)
class Network:
    """One network.

    `name`: "library:name". `build`: returns the network and example inputs (a tensor, a tuple or a
    dict) with two samples. `part`: what this is a part of, and why not the whole, for what does
    not export whole. `note`: what differs from the library's defaults. `memory`: GiB of address
    space that its process may take; beyond, it ends with an error instead of filling the machine.
    """

    name: str
    build: Build
    part: str = ""
    note: str = ""
    memory: int = 14

    @property
    def library(self) -> str:
        """The library, as in the name."""
        return self.name.partition(":")[0]

    def make(self, seed: int = 0) -> Built:
        """Return the network in evaluation mode with random weights, the same for one seed."""
        torch.manual_seed(seed)
        model, inputs = self.build()
        randomise(model, seed)
        calibrate(model.eval(), inputs)
        return model, inputs


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every floating parameter and statistic of a norm random values that keep signals alive.

    What libraries start at zero (last norms of residual branches, heads, layer scales) would hide
    everything behind it from a proof; what they start at one would make all channels alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, tensor in model.named_parameters():
        if tensor.ndim == 0 or not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            wide = max(tensor[0].numel(), 1) ** -0.5
            tensor.copy_(1.2 * max(min(wide, 0.5), 0.02) * normal(tensor))
        elif "bias" in name.rpartition(".")[2]:
            tensor.copy_(0.1 * normal(tensor))
        else:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * normal(tensor))
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Any) -> None:
    """Give batch norms the statistics of the inputs: signals neither fade nor grow with depth."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    args, kwargs = split_inputs(inputs)
    model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
