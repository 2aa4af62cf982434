"""Rounds: importance adds up over steps, then a few units go, until the target. One plan on every
process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..choose import choose
from ..errors import PlanMismatch
from ..groups import Groups
from ..importance.base import Scores, Sums
from ..plan import Plan
from .schedule import Schedule

__all__ = ["Rounds", "digest"]


class Rounds:
    """The scores of a network that trains, and the plans that follow from them.

    Scores are those accumulated since the event before (J. Schmitt et al., CPD, ITSC 2024).
    """

    def __init__(
        self, groups: Groups, importance: Any, schedule: Schedule, choice: Mapping[str, Any]
    ) -> None:
        """`choice`: keywords of `choose` for every event."""
        self.groups, self.importance = groups, importance
        self.schedule, self.choice = schedule, dict(choice)
        self.plan: Plan | None = None
        self.done = 0

    @property
    def finished(self) -> bool:
        """Whether the last event has been."""
        return self.done >= self.schedule.count

    def start(self, model: nn.Module, groups: Groups | None = None) -> None:
        """Watch a model; `groups` where it is a cut one, which has others."""
        self.importance.start(model, self.groups if groups is None else groups)

    def show(self, loss: torch.Tensor) -> None:
        """Show the loss, before its backward pass, to an importance of curvature."""
        shown = getattr(self.importance, "before_backward", None)
        if shown is not None:
            shown(loss)

    def observe(self, *, whole: bool, scale: float = 1.0) -> None:
        """Take in one backward pass; `whole`: gradients are those of a batch with all its parts.

        `scale`: what the loss was multiplied by. Parameters' gradients are unscaled already.
        """
        if isinstance(self.importance, Sums):
            self.importance.whole, self.importance.scale = whole, scale
        self.importance.observe()

    def choose(self, device: torch.device, scores: Scores | None = None) -> Plan:
        """The plan of the next event, the same on every process; then scores begin anew."""
        found = self.importance.scores() if scores is None else scores
        self.done += 1
        self.plan = shared(self.plan_at(self.done, found), device)
        self.importance.reset()
        return self.plan

    def plan_at(self, event: int, scores: Scores) -> Plan:
        """The plan of an event, from the plan there is."""
        target = self.schedule.target_at(event)
        return choose(self.groups, scores, target, **self.choice, start=self.plan)

    def close(self) -> None:
        """Watch no longer."""
        self.importance.close()


def shared(plan: Plan, device: torch.device) -> Plan:
    """The plan of the main process, on every process: rounding must not part them.

    Raises:
        PlanMismatch: a process received another plan than the rest.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return plan
    text = torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(text)], device=device)
    torch.distributed.broadcast(length, 0)
    sent = text if torch.distributed.get_rank() == 0 else text.new_zeros(int(length))
    torch.distributed.broadcast(sent, 0)
    received = bytes(sent.tolist()).decode()
    _agreed(received, device)
    return Plan.from_json(received, limited=False)


def of_main(verdict: bool, device: torch.device) -> bool:
    """The verdict of the main process, on every process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return verdict
    told = torch.tensor([verdict], dtype=torch.uint8, device=device)
    torch.distributed.broadcast(told, 0)
    return bool(told)


def digest(text: str) -> bytes:
    """The hash by which processes compare plans."""
    return hashlib.sha256(text.encode()).digest()


def _agreed(text: str, device: torch.device) -> None:
    """Compare the hash of the plan over all processes."""
    mine = torch.tensor(list(digest(text)), dtype=torch.uint8, device=device)
    every = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, mine)
    other = [rank for rank, found in enumerate(every) if not torch.equal(found, mine)]
    if other:
        raise PlanMismatch(
            f"process {torch.distributed.get_rank()} has another plan than process {other[0]}: "
            "what was sent between them did not arrive whole. Run again; check the network and "
            "that all processes run the same version of cpd and torch."
        )
