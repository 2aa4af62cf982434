"""Filter pruning via geometric median."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from ..groups import CouplingGroup, Groups, Member
from ._aggregate import aggregated, check_aggregate
from ._members import Tensors, check_members, held_tensors, parameters_of
from .base import Accumulated, Importance, Scores


def fpgm(*, aggregate: str = "mean", members: str = "out") -> Importance:
    """Sum over the other channels j of ‖F_c − F_j‖₂, with F_c the weights of channel c in a tensor.

    A channel near the geometric median of its layer is what the others can stand for: it goes
    first. Source: He et al., "Filter Pruning via Geometric Median" (CVPR 2019). Channels whose
    weights are all zero, such as masked ones, are no neighbours. Filters of different groups of a
    convolution read different channels: each counts as zero on what it does not read, and kernels
    of depthwise convolutions are compared as they are. Unit: that of the weights.
    """
    check_aggregate(aggregate)
    check_members(members)

    def one(group: CouplingGroup, tensors: Tensors, parts: dict[str, int]) -> torch.Tensor:
        found = [
            (m, _distances(tensors[m.tensor].detach(), m, group.size, parts.get(m.tensor, 1)))
            for m in parameters_of(group, tensors, members)
        ]
        return aggregated(found, group.size, aggregate)

    def scores(model: nn.Module, groups: Groups) -> Scores:
        tensors, parts = held_tensors(model), dict(_grouped(groups))
        return {group.name: one(group, tensors, parts) for group in groups}

    return Accumulated(scores, needs_gradient=False)


def _grouped(groups: Groups) -> Iterator[tuple[str, int]]:
    """Return the weights of grouped convolutions, with the number of groups."""
    named = groups.trace.tensors
    for node in groups.trace.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        if "groups" not in names or "weight" not in names:
            continue
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight, count = given["weight"], given.get("groups", 1)
        if isinstance(weight, fx.Node) and isinstance(count, int) and weight.name in named:
            yield named[weight.name], count


def _distances(tensor: torch.Tensor, member: Member, size: int, parts: int) -> torch.Tensor:
    rows, channels = _rows(tensor.double(), member)
    alive = rows.any(1)
    apart = torch.cdist(rows, rows)
    if parts > 1 and rows.shape[1] > tensor[0, 0].numel():  # each reads or makes several
        part, length = _parts(member, size, parts).to(channels.device)[channels], rows.norm(dim=1)
        same = part[:, None] == part[None]
        apart = torch.where(same, apart, torch.hypot(length[:, None], length[None]))
    total = apart.fill_diagonal_(0)[:, alive].sum(1)
    return torch.zeros(size, dtype=torch.float64, device=tensor.device).index_add_(
        0, channels, total
    )


def _parts(member: Member, size: int, parts: int) -> torch.Tensor:
    """Return in which group of a convolution each channel is: its first axis holds them in turn."""
    channel = torch.from_numpy(member.channel).flatten(1)
    rows = torch.arange(len(channel)) * parts // len(channel)
    found = torch.zeros(size, dtype=torch.int64)
    mine = channel >= 0
    found[channel[mine]] = rows[:, None].expand_as(channel)[mine]
    return found


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
