"""timm's training recipe: its optimizer, its schedule, its loss scaler, its moving average.

    python -m examples.with_timm

`cpd.Pruner` is attached to the optimizer; the average is masked along. `timm_recipe=False` takes
the settings of the other examples, so that the plans can be compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import cpd
from cpd import _torchvision
from examples.common import EXAMPLE, PRUNING, STEPS, accuracy, loader, network, optimizer_of


class Unscaled:
    """What timm's NativeScaler does, where gradients need no scale (it wants a GPU)."""

    def __call__(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward and step in one call."""
        loss.backward()
        optimizer.step()


def main(*, timm_recipe: bool = True) -> tuple[nn.Module, cpd.Plan]:
    """Prune while training; return the small network and the plan."""
    _torchvision.ensure()
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, NativeScaler

    model = network().train()
    loss_of: Any = LabelSmoothingCrossEntropy(0.1) if timm_recipe else nn.CrossEntropyLoss()
    optimizer = optimizer_of(model)
    if timm_recipe:
        optimizer = create_optimizer_v2(model, "lamb", lr=0.02, weight_decay=0.02)
    schedule: Any = None  # it changes the rate as soon as it is made
    if timm_recipe:
        schedule = CosineLRScheduler(optimizer, STEPS, warmup_t=5, t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.9)
    scaler: Any = NativeScaler("cuda") if torch.cuda.is_available() else Unscaled()
    pruner = cpd.Pruner(model, EXAMPLE, copies=[average], **PRUNING)
    attached = pruner.attach(optimizer)
    for step, batch in enumerate(loader()):
        if schedule is not None:
            schedule.step_update(step)
        optimizer.zero_grad()
        loss = loss_of(model(batch["pixel_values"]), batch["labels"])
        scaler(loss, optimizer)
        average.update(model, step=step)
    attached.remove()
    assert pruner.plan is not None
    small = pruner.finish()
    if timm_recipe:
        small = cpd.cut(average.module, pruner.plan)
    return small, pruner.plan


if __name__ == "__main__":
    found, plan = main()
    print(plan)
    print(f"accuracy of the average {accuracy(found):.1%}")
