"""The interval loop: importance adds up over steps, then a few units go, until the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cpd.choose import choose
from cpd.comb import comb
from cpd.compress.config import CompressConfig
from cpd.distill import Callback, State
from cpd.distill.batches import to_device
from cpd.groups import Groups
from cpd.importance.base import Sums
from cpd.mask import mask
from cpd.plan import Plan
from cpd.repair import mended
from cpd.trace import named_tensors

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
        batches: Sequence[Any] = (),
    ) -> None:
        """``saved`` is called after every event with the plan and the step it was made at.

        ``batches``: inputs that the network is repaired by at every event.
        """
        self.batches = batches
        self.calibrated: Groups | None = None
        self.gradients: list[torch.Tensor | None] = []
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
        if self.batches:  # traced before anything is hooked
            options = {key: getattr(self.config, key) for key in ("exact", "unknown", "keep_class")}
            first = to_device(self.batches[0], next(self.student.parameters()).device)
            self.calibrated = comb(self.student, first, **options)
        self.importance.start(self.student, self.groups)
        if self.plan is not None:
            self.masker = mask(self.student, self.plan)

    def before_backward(self, state: State, terms: dict[str, torch.Tensor]) -> None:
        """Show the loss to an importance of curvature; score by a part of it, where asked to."""
        scored = self.config.scored
        picked = [t for name, t in terms.items() if scored == "all" or self._picks(name)]
        loss = torch.stack(picked).sum()
        shown = getattr(self.importance, "before_backward", None)
        if shown is not None:
            shown(loss)
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
        self._observe(state)
        for parameter, before in zip(learning, held, strict=True):
            parameter.grad = before
        if state.synced:
            self.gradients = []

    def after_backward(self, state: State) -> None:
        """Add this batch to the scores: its parts one by one, or, from the gradient, as a whole."""
        if self.config.scored == "all" or not self.importance.needs_gradient:
            self._observe(state)

    def _observe(self, state: State) -> None:
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
        if self.batches:
            self._repair(self.plan)
        if self.masker is None:
            self.masker = mask(self.student, self.plan)
        else:
            self.masker.update(self.plan)
        self.masker.apply()
        self.importance.reset()
        self.saved(self.plan, state.step)

    def _repair(self, plan: Plan) -> None:
        """Let what stays make good for what is about to go."""
        device = next(self.student.parameters()).device
        batches = [to_device(batch, device) for batch in self.batches]
        found = mended(self.student, replace(plan, groups=self.calibrated), batches)
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
