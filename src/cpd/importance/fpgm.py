"""Filter pruning via geometric median."""

from __future__ import annotations

import torch
from torch import nn

from ..groups import CouplingGroup, Groups, Member
from ._aggregate import aggregated, check_aggregate
from ._members import Tensors, check_members, held_tensors, parameters_of
from .base import Accumulated, Importance, Scores


def fpgm(*, aggregate: str = "mean", members: str = "out") -> Importance:
    """Sum over the other channels j of ‖F_c − F_j‖₂, with F_c the weights of channel c in a tensor.

    A channel near the geometric median of its layer is what the others can stand for: it goes
    first. Source: He et al., "Filter Pruning via Geometric Median" (CVPR 2019). Channels whose
    weights are all zero, such as masked ones, are no neighbours. Unit: that of the weights.
    """
    check_aggregate(aggregate)
    check_members(members)

    def one(group: CouplingGroup, tensors: Tensors) -> torch.Tensor:
        found = [
            (m, _distances(tensors[m.tensor].detach(), m, group.size))
            for m in parameters_of(group, tensors, members)
        ]
        return aggregated(found, group.size, aggregate)

    def scores(model: nn.Module, groups: Groups) -> Scores:
        tensors = held_tensors(model)
        return {group.name: one(group, tensors) for group in groups}

    return Accumulated(scores, needs_gradient=False)


def _distances(tensor: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    rows, channels = _rows(tensor.double(), member)
    alive = rows.any(1)
    apart = torch.cdist(rows, rows).fill_diagonal_(0)
    total = apart[:, alive].sum(1)
    return torch.zeros(size, dtype=torch.float64, device=tensor.device).index_add_(
        0, channels, total
    )


def _rows(tensor: torch.Tensor, member: Member) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one row of weights for each channel of a tensor, and the channels' numbers.

    Where channels have different numbers of entries, the shorter rows end in zeros.
    """
    axes = [k for k, length in enumerate(member.channel.shape) if length > 1]
    rest = [k for k in range(tensor.ndim) if k not in axes]
    index = torch.from_numpy(member.channel).to(tensor.device).reshape(-1)
    slices = tensor.permute(*axes, *rest).reshape(len(index), -1)
    mine = (index >= 0).nonzero()[:, 0]
    mine = mine[index[mine].argsort(stable=True)]
    channels, counts = index[mine].unique_consecutive(return_counts=True)
    most, width = int(counts.max()), slices.shape[1]
    starts = counts.cumsum(0) - counts
    number = torch.arange(len(mine), device=mine.device)
    row = torch.repeat_interleave(torch.arange(len(counts), device=mine.device), counts)
    rows = slices.new_zeros(len(counts), most, width)
    rows[row, number - starts[row]] = slices[mine]
    return rows.reshape(len(counts), most * width), channels
