"""How strong, or how often, a channel is active."""

from __future__ import annotations

import torch

from ..errors import UnknownName
from ..groups import CouplingGroup
from ._flows import Flows
from .base import Importance, Scores

_STATISTICS = {"mean": "absolute", "rms": "second", "active": "active"}


def activation(*, statistic: str = "mean", aggregate: str = "mean") -> Importance:
    """E|a_c| over samples and positions where channel c is read ("mean"), or another statistic.

    "rms" is the root of E[a_c²]; "active" the share of values that are not zero, which is 1 minus
    the average percentage of zeros (Hu et al., "Network Trimming", 2016). `aggregate` joins
    readers; channels that no layer reads are taken where they are made.

    Needs forward passes, no gradients.
    """
    if statistic not in tuple(_STATISTICS):
        raise UnknownName("statistic of activation", statistic, _STATISTICS)
    return Activation(_STATISTICS[statistic], aggregate)


class Activation(Flows):
    """See `activation`."""

    def one(self, group: CouplingGroup, sums: Scores) -> torch.Tensor:
        """Return the scores of one group."""
        found = self.typical(group, sums)
        return found.sqrt() if self.statistic == "second" else found
