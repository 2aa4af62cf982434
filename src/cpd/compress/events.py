"""The interval loop: importance adds up over steps, then a few units go, until the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cpd.choose import choose
from cpd.compress.config import CompressConfig
from cpd.distill import Callback, State
from cpd.groups import Groups
from cpd.importance.base import Sums
from cpd.mask import mask
from cpd.plan import Plan

__all__ = ["Events"]


class Events(Callback):
    """Prunes a network while it trains: one event every ``interval`` steps, ``count`` in all.

    Event k of K aims at 1 − (1 − target) · k / K of each cost, from the plan before it. Scores are
    those accumulated since the event before (J. Schmitt et al., CPD, ITSC 2024).
    """

    def __init__(
        self,
        student: nn.Module,
        groups: Groups,
        importance: Any,
        config: CompressConfig,
        saved: Callable[[Plan, int], None],
    ) -> None:
        """``saved`` is called after every event with the plan and the step it was made at."""
        self.student, self.groups, self.config, self.saved = student, groups, config, saved
        self.importance = importance
        self.plan: Plan | None = None
        self.masker: Any = None
        self.done = 0

    @property
    def steps(self) -> int:
        """Optimizer steps until the target."""
        return self.config.interval * self.config.count

    def resume(self, plan: Plan, done: int) -> None:
        """Go on after so many events, which led to ``plan``."""
        self.plan, self.done = plan, done

    def on_start(self, state: State) -> None:  # noqa: ARG002
        """Begin to watch, and mask what is gone already."""
        self.importance.start(self.student, self.groups)
        if self.plan is not None:
            self.masker = mask(self.student, self.plan)

    def after_backward(self, state: State) -> None:
        """Add this batch to the scores: its parts one by one, or, from the gradient, as a whole."""
        if isinstance(self.importance, Sums):
            self.importance.whole = state.synced
        self.importance.observe()

    def after_step(self, state: State) -> None:
        """Keep what is gone at zero; every ``interval`` steps, let more go."""
        if self.masker is not None:
            self.masker.apply()
        if state.step % self.config.interval == 0:
            self._prune(state)

    def on_end(self, state: State) -> None:  # noqa: ARG002
        """Watch no longer."""
        self.importance.close()

    def _prune(self, state: State) -> None:
        config = self.config
        self.done += 1
        plan = choose(
            self.groups,
            self.importance.scores(),
            config.target_at(self.done),
            **config.choice,
            start=self.plan,
        )
        self.plan = _shared(plan, next(self.student.parameters()).device)
        if self.masker is None:
            self.masker = mask(self.student, self.plan)
        else:
            self.masker.update(self.plan)
        self.masker.apply()
        self.importance.reset()
        self.saved(self.plan, state.step)


def _shared(plan: Plan, device: torch.device) -> Plan:
    """The plan of the main process, on every process: rounding must not part them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return plan
    text = torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(text)], device=device)
    torch.distributed.broadcast(length, 0)
    sent = text if torch.distributed.get_rank() == 0 else text.new_zeros(int(length))
    torch.distributed.broadcast(sent, 0)
    return Plan.from_json(bytes(sent.tolist()).decode())
