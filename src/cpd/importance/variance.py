"""The variance of a channel behind its activation function."""

from __future__ import annotations

import torch

from ..groups import CouplingGroup
from ._flows import Flows
from ._members import per_channel
from .base import Importance, Scores


def variance(*, weighted: bool = False, aggregate: str = "mean") -> Importance:
    """Var(a_c) over samples and positions, where channel c is read: behind its activation function.

    A channel that is nearly constant can go at little cost, since its mean folds into the next bias
    (`cpd.repair`). Source: "Variance-Based Pruning" (2025), for hidden units in attention networks.
    `weighted`: times the squared norm of the weights that read it, Var(a_c) * ‖W_:c‖²: the power
    that goes missing; source: An et al., "Fluctuation-based Adaptive Structured Pruning" (AAAI
    2024). `aggregate` joins readers (with `weighted` they are summed); channels that no layer reads
    are taken where they are made.

    Needs forward passes, no gradients.
    """
    return Variance(weighted=weighted, aggregate=aggregate)


class Variance(Flows):
    """See `variance`."""

    def __init__(self, *, weighted: bool, aggregate: str) -> None:
        super().__init__("variance", aggregate)
        self.weighted = weighted

    def one(self, group: CouplingGroup, sums: Scores) -> torch.Tensor:
        """Return the scores of one group."""
        spread = self.typical(group, sums)
        if not self.weighted:
            return spread
        size, readers = group.size, self.readings[group.name][0]
        total, read = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.bool)
        for reading in readers:
            flow = self.flow(reading, size, sums)
            mine = spread if flow is None else flow
            weight = self._weights[reading.member.tensor].detach().double().square()
            total += mine * per_channel(weight, reading.member, size).cpu()
            read |= reading.covers(size)
        return torch.where(read, total, spread)
