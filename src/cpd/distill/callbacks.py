"""What may be called while a network trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Callback", "Callbacks", "State"]


@dataclass
class State:
    """Where a stage is. Callbacks read it; only ``stop`` is theirs to set.

    Attributes:
        stage: name of the stage ("base", "prune", "recover", …).
        total: optimizer steps of the stage.
        student: the network that trains, never wrapped.
        step: optimizer steps taken. epoch: epochs finished. batch: batches taken of this epoch.
        losses: newest value of each term, unweighted by the parts of a batch, and "total".
        rate: learning rate of the newest step.
        synced: whether gradients are those of the whole batch: its last accumulated part is done.
        main: whether this is the process that writes files.
        stop: set it to end the stage after this step.
        history: one entry for each evaluation so far.
    """

    stage: str
    total: int
    student: nn.Module
    step: int = 0
    epoch: int = 0
    batch: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0
    synced: bool = True
    main: bool = True
    stop: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Callback:
    """Override what you need. Every method is called on every process."""

    def on_start(self, state: State) -> None:
        """Before the first step of a stage, and before the first one after a resume."""

    def before_backward(self, state: State, terms: dict[str, torch.Tensor]) -> None:
        """Before every backward pass; ``terms`` add up to what it goes through, "task" is one."""

    def after_backward(self, state: State) -> None:
        """After every backward pass; gradients are there, the optimizer has not stepped."""

    def after_step(self, state: State) -> None:
        """After every step of the optimizer."""

    def after_evaluate(self, state: State, metrics: dict[str, float]) -> None:
        """After every evaluation on the validation data."""

    def on_end(self, state: State) -> None:
        """After the last step of a stage."""

    def on_bad_batch(self, state: State, details: dict[str, Any]) -> None:
        """When a loss is not finite; ``details``: "batch", "terms", and where it was "saved"."""

    def on_event(self, name: str, details: dict[str, Any]) -> None:
        """When something else happened: a part of the way began, units were pruned."""


@dataclass(frozen=True)
class Callbacks:
    """Several callbacks as one, in their order; an object may have only some of the methods."""

    members: tuple[Any, ...] = ()

    def __call__(self, method: str, *args: Any) -> None:
        """Call a method on every member that has it."""
        for member in self.members:
            call = getattr(member, method, None)
            if call is not None:
                call(*args)
