"""The Trainer of transformers: a callback that prunes, and a Trainer that distills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from cpd import losses as loss_shelf
from cpd import tasks as task_shelf
from cpd.distill import read, write
from cpd.errors import InputError
from cpd.pruner import Pruner

__all__ = ["DistillTrainer", "PruneCallback"]

STATE = "pruner.safetensors"
Handled = Any  # arguments, state and control of a Trainer, which a callback is handed


class PruneCallback(TrainerCallback):
    """Prunes while a Trainer trains; checkpoints of the Trainer hold where it is.

    pruner = cpd.Pruner(model, example_inputs, target="macs=0.5")
    Trainer(model=model, ..., callbacks=[PruneCallback(pruner)]).train()
    small = pruner.finish()
    """

    def __init__(self, pruner: Pruner) -> None:
        """`pruner`: of the very network that the Trainer gets."""
        self.pruner = pruner
        self.attached: Any = None

    def on_train_begin(self, args: Handled, state: Handled, control: Handled, **more: Any) -> None:  # noqa: ARG002
        """Watch the optimizer."""
        self.attached = self.pruner.attach(more["optimizer"])

    def on_substep_end(self, args: Handled, state: Handled, control: Handled, **more: Any) -> None:  # noqa: ARG002
        """Look at a part of an accumulated batch."""
        self.pruner.observe(whole=False, scaler=self.attached.scaler)

    def on_save(self, args: Handled, state: Handled, control: Handled, **more: Any) -> None:  # noqa: ARG002
        """Lay the pruner's state beside the Trainer's."""
        held = self.pruner.state_dict()  # added up over all processes
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write(folder / STATE, held)

    def on_train_end(self, args: Handled, state: Handled, control: Handled, **more: Any) -> None:  # noqa: ARG002
        """Watch no longer."""
        self.attached.remove()

    def resume(self, checkpoint: str | Path) -> None:
        """Go on from a checkpoint folder; call it before `train(resume_from_checkpoint=folder)`.

        Raises:
            ArtefactError: the folder has no state of a pruner, or a damaged one.
        """
        self.pruner.load_state_dict(read(Path(checkpoint) / STATE))


class DistillTrainer(Trainer):
    """A Trainer whose loss is the network's own plus distillation losses from a teacher.

    L = task_weight · L_task + Σ_i w_i · L_i(s(x), t(x)), as in `cpd.distill`; the shelf of losses
    is that of `cpd.losses`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        losses: Any = "kd",
        task: Any = "classification",
        task_weight: float = 1.0,
        **more: Any,
    ) -> None:
        """`teacher`: frozen and in evaluation mode from here on. Else as a Trainer.

        Raises:
            UnknownName: no loss or task of that name.
            InputError: a loss that learns along; `cpd.distill` trains those.
        """
        super().__init__(*args, **more)
        # The Trainer then divides the loss by the parts of an accumulated batch, all terms alike.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.task, self.task_weight = task_shelf.resolve(task), task_weight
        found = loss_shelf.resolve(losses)
        if any(term.stateful for term in found.terms):
            names = ", ".join(term.name for term in found.terms if term.stateful)
            raise InputError(f"losses that learn or remember ({names}) need cpd.distill")
        student: Any = self.model
        self.losses = loss_shelf.attach(
            found, student, self.teacher, inputs=self._example, logits=self.task.logits
        )

    def _example(self) -> Any:
        """The inputs of a first batch, for losses that look inside the networks."""
        batch = dict(next(iter(self.get_train_dataloader())))
        batch.pop("labels", None)
        return {name: value.to(self.args.device) for name, value in batch.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The network's loss, and in training the weighted terms of the teacher."""
        targets = inputs.get("labels")  # the Trainer takes them out where it smooths labels
        with self.losses.watching() as (own, other):
            more = {"return_outputs": True, "num_items_in_batch": num_items_in_batch}
            loss, outputs = super().compute_loss(model, inputs, **more)
            if model.training:
                with torch.no_grad():
                    taught = self.teacher(**inputs)
                step, total = self.state.global_step, max(self.state.max_steps, 1)
                seen = loss_shelf.Seen(targets, own, other, step, total)
                own_logits, others = (self.task.logits(x) for x in (outputs, taught))
                terms = self.losses(own_logits, others, seen)
                loss = self.task_weight * loss + sum(terms.values())
        return (loss, outputs) if return_outputs else loss
