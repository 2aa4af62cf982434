"""The Trainer of Lightning: a callback.

pip install lightning
python -m examples.with_lightning
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import cpd
from cpd.adapters.lightning import PruneCallback
from examples.common import EXAMPLE, PRUNING, accuracy, loader, network, optimizer_of


class Module(LightningModule):  # type: ignore[misc]
    """The network of the other examples."""

    def __init__(self) -> None:
        """The same weights in every run."""
        super().__init__()
        self.net = network()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> Any:  # noqa: ARG002
        """The loss of a batch."""
        return self.net(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Momentum, at a constant rate."""
        return optimizer_of(self.net)


def main() -> tuple[nn.Module, cpd.Plan]:
    """Prune while training; return the small network and the plan."""
    module = Module()
    pruner = cpd.Pruner(module.net, EXAMPLE, **PRUNING)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[PruneCallback(pruner)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(module, loader())
    small = pruner.finish()
    assert pruner.plan is not None
    return small, pruner.plan


if __name__ == "__main__":
    found, plan = main()
    print(plan)
    print(f"accuracy {accuracy(found):.1%}")
