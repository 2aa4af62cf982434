"""Steps: choosing little by little, where the user sees each step and may veto what goes in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from .budgets import parse_target, partly
from .choose import choose
from .errors import InputError
from .groups import Groups
from .plan import Plan

__all__ = ["Step", "Steps", "steps"]


@dataclass
class Step:
    """What would go in step `number` of `count`: `removed` says how many units of each group.

    `plan` is all that is gone with this step. Nothing said, it is accepted when the next one is
    asked for.
    """

    number: int
    count: int
    plan: Plan
    removed: dict[str, int]
    vetoed: list[str] = field(default_factory=list)

    def veto(self, *names: str) -> None:
        """Let nothing more of these groups (names or patterns) go, now and in all later steps; the
        step is then proposed anew.

        Raises `InputError` where a name is none of those that lose anything in this step.
        """
        for name in names:
            found = [group for group in self.removed if fnmatchcase(group, name)]
            if not found:
                raise InputError(
                    f"veto {name!r}: nothing of that name goes in this step; there are: "
                    f"{', '.join(self.removed) or 'none'}"
                )
            self.vetoed += found

    def __str__(self) -> str:
        costs = [
            f"{k} {after / max(before, 1):.1%}" for k, (before, after) in self.plan.costs.items()
        ]
        lines = [f"step {self.number} of {self.count}: {', '.join(costs)} left"]
        return "\n".join([*lines, *(f"  {name}: {n} fewer" for name, n in self.removed.items())])


class Steps:
    """An iterator over steps; `plan` is what has been accepted so far (None before the first)."""

    def __init__(
        self,
        groups: Groups,
        scores: Mapping[str, torch.Tensor],
        shares: Mapping[str, float],
        count: int,
        options: dict[str, Any],
    ) -> None:
        self.groups, self.scores, self.shares, self.count = groups, scores, shares, count
        self.plan: Plan | None = options.pop("start", None)
        self.keep = dict(options.pop("keep", None) or {})
        self.options = options

    def __iter__(self) -> Iterator[Step]:
        for number in range(1, self.count + 1):
            while True:
                step = self._proposed(number)
                yield step
                self.keep |= dict.fromkeys(step.vetoed, "all")
                if not step.vetoed:
                    self.plan = step.plan
                    break

    def _proposed(self, number: int) -> Step:
        target = partly(self.shares, number / self.count)
        more = {**self.options, "start": self.plan, "keep": self.keep}
        plan = choose(self.groups, self.scores, target, **more)
        before = [w.before for w in plan.widths] if self.plan is None else [
            w.after for w in self.plan.widths
        ]  # fmt: skip
        removed: dict[str, int] = {}
        for width, then in zip(plan.widths, before, strict=True):
            if width.after < then:
                removed[width.group] = removed.get(width.group, 0) + then - width.after
        return Step(number, self.count, plan, removed)


def steps(
    groups: Groups,
    scores: Mapping[str, torch.Tensor],
    target: str | Mapping[str, float],
    *,
    count: int = 10,
    **options: Any,
) -> Steps:
    """Choose in steps that can be vetoed.

        going = cpd.steps(groups, scores, "macs=0.5", count=5)
        for step in going:
            print(step)
            if "head" in step.removed:
                step.veto("head")
        small = cpd.cut(model, going.plan)

    Step k of K aims at 1 - (1 - target) k / K of each cost, from the plan before it; at K / k times
    a `latency_ms`, of which the whole is not known.

    Args:
        groups: from `comb`.
        scores: group name -> importance of its channels.
        target: shares of costs to be left, after the last step.
        count: steps until the target.
        **options: of `choose`.

    Raises what `choose` raises: `UnreachableTarget` where vetoes leave too little.
    """
    shares = parse_target(target)
    if int(count) != count or count < 1:
        raise InputError(f"count is {count!r}; give a whole number of at least 1")
    return Steps(groups, scores, shares, count, dict(options))
