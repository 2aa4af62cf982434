"""Value: what an optimizer step was followed by."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan

__all__ = ["Event"]


@dataclass(frozen=True)
class Event:
    """What an optimizer step was followed by: event `number` of `count`.

    `shares`: what is left of each cost. `cut`: whether the network itself was cut (parameters are
    the same objects, with other shapes), not only masked.
    """

    number: int
    count: int
    step: int
    plan: Plan
    cut: bool

    @property
    def shares(self) -> dict[str, float]:
        """What is left of each cost."""
        return {name: after / before for name, (before, after) in self.plan.costs.items()}

    def __str__(self) -> str:
        left = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        word = "cut" if self.cut else "masked"
        return f"event {self.number} of {self.count} after step {self.step}: {word}, {left} left"
