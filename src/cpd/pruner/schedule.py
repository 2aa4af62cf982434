"""Value: when units go, and how many. Every loop that prunes while it trains reads it from here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..budgets import parse_target, partly
from ..errors import InputError

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Event k of K aims at 1 − (1 − target) · k / K of each cost, `interval` steps after the last;
    at K / k times a `latency_ms`, of which the whole is not known.

    Attributes:
        target: the costs to reach, as shares of the unpruned network.
        interval: optimizer steps over which importance adds up before each event.
        events: how many events; None: as many as `step` asks for, or 10.
        step: largest share of a cost to take at one event, in place of `events`.
    """

    target: str | Mapping[str, float]
    interval: int = 50
    events: int | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is trained."""
        shares = parse_target(self.target)
        for name in ("interval", "events"):
            value: Any = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.step is not None and not 0 < self.step <= 1:
            raise InputError(f"step must be above 0 and at most 1, got {self.step!r}")
        if self.step is not None and self.events is not None:
            raise InputError("give events (how many) or step (how much at once), not both")
        if self.step is not None and set(shares) == {"latency_ms"}:
            raise InputError("step is a share, but latency_ms is none: give events, or latency=")

    @property
    def count(self) -> int:
        """Pruning events until the target."""
        if self.step is None:
            return self.events or 10
        shares = parse_target(self.target)
        most = max(1 - share for cost, share in shares.items() if cost != "latency_ms")
        return max(1, math.ceil(most / self.step - 1e-9))

    @property
    def identity(self) -> dict[str, Any]:
        """What tells schedules apart, however they were written."""
        shares = dict(parse_target(self.target))
        return {"target": shares, "interval": self.interval, "events": self.count}

    @property
    def steps(self) -> int:
        """Optimizer steps until the target."""
        return self.interval * self.count

    def due(self, step: int) -> bool:
        """Say whether an event follows this step (counted from 1)."""
        return step % self.interval == 0 and step <= self.steps

    def target_at(self, event: int) -> dict[str, float]:
        """The target of an event (from 1): on a straight line from 1 to the final one."""
        return partly(parse_target(self.target), event / self.count)
