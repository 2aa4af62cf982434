"""The Trainer of Lightning: a callback that prunes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from cpd.pruner import Pruner
from cpd.pruner.carry import inner_optimizer

__all__ = ["PruneCallback"]


class PruneCallback(Callback):
    """Prunes while a Trainer trains; checkpoints of the Trainer hold where it is.

    `pruner`: of the network inside the LightningModule, or of the module itself. Lightning restores
    weights before callbacks, so a run with `cut_every` cannot go on from its checkpoints: mask
    (`cut_every=0`) where a run may be broken off.
    """

    def __init__(self, pruner: Pruner) -> None:
        """`pruner`: it observes the gradients before they are clipped."""
        self.pruner = pruner
        self.attached: list[Any] = []
        self.whole = True

    def on_train_start(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Watch the optimizers: Lightning computes gradients inside their steps."""
        self.attached = [self.pruner.attach(each, observe=False) for each in trainer.optimizers[:1]]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Know whether a step follows this batch, or gradients add up over more of them."""
        parts = int(trainer.accumulate_grad_batches)
        self.whole = bool((batch_idx + 1) % parts == 0 or trainer.is_last_batch)

    def on_after_backward(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Look at a part of an accumulated batch."""
        if not self.whole:
            self.pruner.observe(whole=False, scaler=_scaler(trainer))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:  # noqa: ARG002
        """Look at the gradients, unless the step will be left out for an overflow.

        Of several optimizers the first counts, as for the steps.
        """
        if inner_optimizer(optimizer) is inner_optimizer(trainer.optimizers[0]):
            self.pruner.observe(scaler=_scaler(trainer))

    def on_train_end(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Watch no longer."""
        for attached in self.attached:
            attached.remove()

    def state_dict(self) -> dict[str, Any]:
        """Where the pruner is."""
        return self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.pruner.load_state_dict(state)


def _scaler(trainer: Any) -> Any:
    """The GradScaler of 16-mixed precision, or None."""
    return getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
