"""The interval loop: importance adds up over steps, then a few units go, until the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cpd.comb import comb
from cpd.compress.config import CompressConfig
from cpd.distill import Callback, State
from cpd.distill.batches import to_device
from cpd.groups import Groups
from cpd.mask import mask
from cpd.plan import Plan
from cpd.pruner import Rounds
from cpd.pruner.rounds import of_main
from cpd.repair import helps, mended
from cpd.trace import named_tensors

__all__ = ["Events"]

OF_COMB = ("exact", "unknown", "keep_class", "depth")


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
        batches: Sequence[Any] = (),
    ) -> None:
        """``saved`` is called after every event with the plan and the step it was made at.

        ``batches``: inputs that the network is repaired by at every event; with repair="auto" the
        last of them judges whether that helps.
        """
        self.repaired: bool | None = None
        self.batches = batches
        self.calibrated: Groups | None = None
        self.gradients: list[torch.Tensor | None] = []
        self.student, self.config, self.saved = student, config, saved
        self.rounds = Rounds(groups, importance, config.schedule, config.choice)
        self.importance = importance
        self.masker: Any = None
        self._resumed: Any = None

    @property
    def plan(self) -> Plan | None:
        """What is kept so far."""
        return self.rounds.plan

    @property
    def done(self) -> int:
        """Events so far."""
        return self.rounds.done

    @property
    def steps(self) -> int:
        """Optimizer steps until the target."""
        return self.config.schedule.steps

    def resume(self, plan: Plan | None, done: int, scores: Any = None) -> None:
        """Go on after so many events, which led to ``plan``, with the scores since the last."""
        self.rounds.plan, self.rounds.done, self._resumed = plan, done, scores

    def scores(self) -> dict[str, torch.Tensor] | None:
        """What has added up since the last event; None where the importance does not tell."""
        state = getattr(self.importance, "state", None)
        return None if state is None else state()

    def on_start(self, state: State) -> None:  # noqa: ARG002
        """Begin to watch, and mask what is gone already."""
        if self.batches:  # traced before anything is hooked
            options = {key: getattr(self.config, key) for key in OF_COMB}
            first = to_device(self.batches[0], next(self.student.parameters()).device)
            self.calibrated = comb(self.student, first, **options)
        self.rounds.start(self.student)
        if self._resumed:
            self.importance.load_state(self._resumed)
        if self.plan is not None:
            self.masker = mask(self.student, self.plan)

    def before_backward(self, state: State, terms: dict[str, torch.Tensor]) -> None:
        """Show the loss to an importance of curvature; score by a part of it, where asked to."""
        scored = self.config.scored
        picked = [t for name, t in terms.items() if scored == "all" or self._picks(name)]
        loss = torch.stack(picked).sum()
        self.rounds.show(loss)
        if scored != "all" and self.importance.needs_gradient:
            self._score_by(loss, state)

    def _picks(self, name: str) -> bool:
        return (name == "task") == (self.config.scored == "task")

    def _score_by(self, loss: torch.Tensor, state: State) -> None:
        """Observe the gradient of one part of the loss; the backward pass finds all as it was."""
        learning = [p for p in self.student.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
        known = self.gradients or [None] * len(learning)
        self.gradients = [_added(a, b) for a, b in zip(known, found, strict=True)]
        held = [parameter.grad for parameter in learning]
        for parameter, gradient in zip(learning, self.gradients, strict=True):
            parameter.grad = _averaged(gradient) if state.synced else gradient
        self.rounds.observe(whole=state.synced)
        for parameter, before in zip(learning, held, strict=True):
            parameter.grad = before
        if state.synced:
            self.gradients = []

    def after_backward(self, state: State) -> None:
        """Add this batch to the scores: its parts one by one, or, from the gradient, as a whole."""
        if self.config.scored == "all" or not self.importance.needs_gradient:
            self.rounds.observe(whole=state.synced)

    def after_step(self, state: State) -> None:
        """Keep what is gone at zero; every ``interval`` steps, let more go."""
        if self.masker is not None:
            self.masker.apply()
        if self.rounds.schedule.due(state.step):
            self._prune(state)

    def on_end(self, state: State) -> None:  # noqa: ARG002
        """Watch no longer."""
        self.rounds.close()

    def _prune(self, state: State) -> None:
        plan = self.rounds.choose(next(self.student.parameters()).device)
        if self.batches:
            self._repair(plan)
        if self.masker is None:
            self.masker = mask(self.student, plan)
        else:
            self.masker.update(plan)
        self.masker.apply()
        self.saved(plan, state.step)

    def _repair(self, plan: Plan) -> None:
        """Let what stays make good for what is about to go."""
        device = next(self.student.parameters()).device
        batches = [to_device(batch, device) for batch in self.batches]
        plan = replace(plan, groups=self.calibrated)
        judges = batches[-1:] if self.config.repair == "auto" else []
        found = mended(self.student, plan, batches[: len(batches) - len(judges)])
        helped = not judges or helps(self.student, plan, found, judges)
        self.repaired = of_main(helped, device)
        if not self.repaired:
            return
        held = dict(named_tensors(self.student))
        with torch.no_grad():
            for name, value in found.items():
                held[name].copy_(value)


def _added(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a if b is None else b if a is None else a + b


def _averaged(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """The mean over processes, as the gradient of the whole loss is."""
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if gradient is None or alone:
        return gradient
    gradient = gradient.clone()
    torch.distributed.all_reduce(gradient)
    return gradient / torch.distributed.get_world_size()
