"""Statistics of what flows through channels: what the criteria of activations are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..groups import CouplingGroup
from ._aggregate import aggregated
from ._members import Tensors, first_tier, held_tensors, made_by, per_channel
from ._places import Place, Reading, Watching, expect, per_index
from .base import Scores


@dataclass(frozen=True)
class Flow:
    """What went through each channel at one place: sums (size,) over samples and positions.

    `count`: how many values. A channel that is not there has a count of 0.
    """

    count: torch.Tensor
    total: torch.Tensor
    square: torch.Tensor
    absolute: torch.Tensor
    active: torch.Tensor

    @property
    def second(self) -> torch.Tensor:
        """E[a²]."""
        return self.square / self.count.clamp_min(1)

    @property
    def variance(self) -> torch.Tensor:
        """E[a²] − E[a]²."""
        mean = self.total / self.count.clamp_min(1)
        return (self.second - mean.square()).clamp_min(0)


KEPT = ("count", "total", "square", "absolute", "active")


class Flows(Watching):
    """Adds up sums of activations at every place; `one` makes scores of them.

    Only the forward pass that an `observe` follows counts, so that evaluations in between do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: dict[str, torch.Tensor] = {}
        self._weights: Tensors = {}

    def take(self, place: Place, value: torch.Tensor, axis: int) -> None:
        """Add up one value."""
        with torch.no_grad():
            flat = per_index(value.detach(), axis)
            length = torch.full((flat.shape[1],), float(len(flat)), device=flat.device)
            found = {
                "count": length,
                "total": flat.sum(0, dtype=torch.float64),
                "square": flat.square().sum(0, dtype=torch.float64),
                "absolute": flat.abs().sum(0, dtype=torch.float64),
                "active": (flat != 0).sum(0, dtype=torch.float64),
            }
            for what, vector in found.items():
                name = f"{place.name}|{what}"
                known = self._pending.get(name)
                self._pending[name] = vector if known is None else known + vector

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

    def flow(self, reading: Reading, size: int, sums: Scores) -> Flow | None:
        """Return what went through a group's channels at one place, None where nothing did."""
        if reading.place is None or not reading.main:
            return None
        found = [sums.get(f"{reading.place.name}|{what}") for what in KEPT]
        if any(value is None or len(value) != len(reading.channel) for value in found):
            return None
        return Flow(*(reading.onto(value, size) for value in found if value is not None))

    def typical(self, group: CouplingGroup, sums: Scores, what: str) -> torch.Tensor:
        """Return a statistic (a name of `Flow`'s, summed ones per value) of each channel: (size,).

        The mean over the readers that show it, or else over what scales or makes the channel. Where
        no layer shows it, that of the output on inputs of mean 0 and variance 1.
        """
        size, found = group.size, []
        for tier in self.readings[group.name]:
            flows = [(r.member, self.flow(r, size, sums)) for r in tier]
            seen = [(member, flow) for member, flow in flows if flow is not None]
            held = torch.zeros(size, dtype=torch.bool)
            for _, flow in seen:
                held |= flow.count > 0
            values = [(member, _statistic(flow, what)) for member, flow in seen]
            found.append((aggregated(values, size, "mean"), held))
        found.append((self._white(group, what), torch.ones(size, dtype=torch.bool)))
        return first_tier(found)

    def _white(self, group: CouplingGroup, what: str) -> torch.Tensor:
        """Return a statistic of the output on white inputs: its variance is the sum of w²."""
        made = [m for m in made_by(group) if isinstance(self._weights[m.tensor], nn.Parameter)]
        squares = [
            (m, per_channel(self._weights[m.tensor].detach().square(), m, group.size).cpu())
            for m in made
        ]
        variance = aggregated(squares, group.size, "mean")
        if what == "absolute":
            return (variance * (2 / torch.pi)).sqrt()
        return (variance > 0).double() if what == "active" else variance


def _statistic(flow: Flow, what: str) -> torch.Tensor:
    if what in ("second", "variance"):
        return flow.second if what == "second" else flow.variance
    value: torch.Tensor = getattr(flow, what)
    return value / flow.count.clamp_min(1)
