"""Weights and activations, by structures."""

from __future__ import annotations

import torch

from ..groups import CouplingGroup
from ._flows import Flows
from ._members import per_channel
from .base import Importance, Scores


def wanda() -> Importance:
    """Sum over readers and their outputs i of |W_ic| * ‖X_c‖, with ‖X_c‖ the root mean square.

    What a channel brings to the layers that read it. Source: Sun et al., "A Simple and Effective
    Pruning Approach for Large Language Models" (ICLR 2024), summed over the weights of a channel;
    the mean in place of the sum over samples is a factor that all channels share. A channel that no
    weight reads has the weight 1.

    Needs forward passes, no gradients.
    """
    return Wanda("second")


class Wanda(Flows):
    """See `wanda`."""

    def one(self, group: CouplingGroup, sums: Scores) -> torch.Tensor:
        """Return the scores of one group."""
        size, size_of = group.size, self.typical(group, sums).sqrt()
        total, read = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.bool)
        for reading in self.readings[group.name][0]:
            flow = self.flow(reading, size, sums)
            norm = size_of if flow is None else flow.sqrt()
            weight = self._weights[reading.member.tensor].detach().abs()
            total += norm * per_channel(weight, reading.member, size).cpu()
            read |= reading.covers(size)
        return torch.where(read, total, size_of)
