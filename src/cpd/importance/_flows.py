"""Statistics of what flows through channels: what the criteria of activations are made of."""

from __future__ import annotations

import torch
from torch import nn

from ..groups import CouplingGroup
from ._aggregate import aggregated, check_aggregate
from ._members import Tensors, first_tier, held_tensors, made_by, per_channel, sum_over
from ._places import Place, Reading, Watching, expect
from .base import Scores


def _second(value: torch.Tensor, axes: list[int]) -> torch.Tensor:
    return sum_over(value.square(), axes)


def _absolute(value: torch.Tensor, axes: list[int]) -> torch.Tensor:
    return sum_over(value.abs(), axes)


def _active(value: torch.Tensor, axes: list[int]) -> torch.Tensor:
    return sum_over(value != 0, axes)


SUMS = {"mean": sum_over, "second": _second, "absolute": _absolute, "active": _active}
NEEDS = {"variance": ("mean", "second")}


class Flows(Watching):
    """Adds up sums of activations at every place; `one` makes scores of them.

    `statistic`: "second" (E[a²]), "variance" (E[a²] − E[a]²), "absolute" (E|a|), "active" (share of
    a ≠ 0), over samples and positions. Only the forward pass that an `observe` follows counts, so
    that evaluations in between do not.
    """

    needs_forward = True
    recurrent = True

    def __init__(self, statistic: str, aggregate: str = "mean") -> None:
        super().__init__()
        check_aggregate(aggregate)
        self.statistic, self.aggregate = statistic, aggregate
        self.kept = NEEDS.get(statistic, (statistic,))
        self._pending: dict[str, torch.Tensor] = {}
        self._weights: Tensors = {}

    def take(self, place: Place, value: torch.Tensor, axis: int) -> None:
        """Add up one value."""
        with torch.no_grad():
            value, width = value.detach(), value.shape[axis]
            rest = [k for k in range(value.ndim) if k != axis]
            count = torch.full((width,), value.numel() / max(width, 1), device=value.device)
            self._note(f"{place.name}|count", count)
            for what in self.kept:
                self._note(f"{place.name}|{what}", SUMS[what](value, rest))

    def _note(self, name: str, value: torch.Tensor) -> None:
        known = self._pending.get(name)
        self._pending[name] = value.double() if known is None else known + value.double()

    def fresh(self) -> None:
        """Forget a forward pass that was not observed."""
        self._pending = {}

    def reset(self) -> None:
        """Forget the sums."""
        super().reset()
        self._pending = {}

    def observe(self) -> None:
        """Count the last forward pass."""
        _, groups = self.watched
        expect(bool(self._pending) or not any(self.places()), groups)
        for name, value in self._pending.items():
            self.add(name, value)
        self.add("observed", torch.ones(()))
        self._pending = {}

    def finished(self, sums: Scores) -> Scores:
        """Return the scores of all groups."""
        model, groups = self.watched
        self._weights = held_tensors(model)
        return {group.name: self.one(group, sums) for group in groups}

    def one(self, group: CouplingGroup, sums: Scores) -> torch.Tensor:
        """Return the scores of one group; subclasses say how."""
        raise AssertionError((self, group, sums))

    def flow(self, reading: Reading, size: int, sums: Scores) -> torch.Tensor | None:
        """Return the statistic of a group's channels at one place, None where nothing went by."""
        place, width = reading.place, len(reading.channel)
        if place is None or not reading.main or f"{place.name}|count" not in sums:
            return None
        found = {what: sums[f"{place.name}|{what}"] for what in ("count", *self.kept)}
        if len(found["count"]) != width:
            return None  # the layer is called on something else than its weight's width
        onto = {what: reading.onto(vector, size) for what, vector in found.items()}
        count = onto.pop("count").clamp_min(1)
        means = {what: vector / count for what, vector in onto.items()}
        if self.statistic == "variance":
            return (means["second"] - means["mean"].square()).clamp_min(0)
        return means[self.statistic]

    def typical(self, group: CouplingGroup, sums: Scores) -> torch.Tensor:
        """Return the statistic of each channel: (size,).

        That of the readers that show it, joined by `aggregate`, or else of what scales or makes the
        channel. Where no layer shows it, that of the output on inputs of mean 0 and variance 1.
        """
        size, found = group.size, []
        for tier in self.readings[group.name]:
            flows = [(reading, self.flow(reading, size, sums)) for reading in tier]
            seen = [(reading, flow) for reading, flow in flows if flow is not None]
            held = torch.zeros(size, dtype=torch.bool)
            for reading, _ in seen:
                held |= reading.covers(size)
            values = [(reading.member, flow) for reading, flow in seen]
            found.append((aggregated(values, size, self.aggregate), held))
        found.append((self._white(group), torch.ones(size, dtype=torch.bool)))
        return first_tier(found)

    def _white(self, group: CouplingGroup) -> torch.Tensor:
        """Return the statistic of the output on white inputs: its variance is the sum of w²."""
        made = [m for m in made_by(group) if isinstance(self._weights[m.tensor], nn.Parameter)]
        squares = [
            (m, per_channel(self._weights[m.tensor].detach().square(), m, group.size).cpu())
            for m in made
        ]
        variance = aggregated(squares, group.size, self.aggregate)
        if self.statistic == "absolute":
            return (variance * (2 / torch.pi)).sqrt()
        return (variance > 0).double() if self.statistic == "active" else variance
