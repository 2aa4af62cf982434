"""Accelerate: attach to the prepared optimizer, and give the pruner the network inside.

accelerate launch -m examples.with_accelerate
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

import cpd
from examples.common import EXAMPLE, PRUNING, accuracy, loader, network, optimizer_of


def main() -> tuple[nn.Module, cpd.Plan]:
    """Prune while training; return the small network and the plan."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = network().train()
    prepared, optimizer, batches = accelerator.prepare(model, optimizer_of(model), loader())
    inputs = {name: value.to(accelerator.device) for name, value in EXAMPLE.items()}
    pruner = cpd.Pruner(accelerator.unwrap_model(prepared), inputs, **PRUNING)
    attached = pruner.attach(optimizer)
    for batch in batches:
        optimizer.zero_grad()
        accelerator.backward(prepared(**batch)["loss"])
        optimizer.step()
    attached.remove()
    small = pruner.finish()
    assert pruner.plan is not None
    return small, pruner.plan


if __name__ == "__main__":
    found, plan = main()
    print(plan)
    print(f"accuracy {accuracy(found.cpu()):.1%}")
