"""Aggregation: one number for a channel from those of all the tensors it runs through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import UnknownName
from ..groups import Member
from ._members import covered

Found = Sequence[tuple[Member, torch.Tensor]]


def by_sum(values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The sum over members."""
    return torch.where(held, values, 0).sum(0)


def by_mean(values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The mean over the members that hold the channel."""
    return by_sum(values, held) / held.sum(0).clamp_min(1)


def by_max(values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The largest over members; 0 where none holds the channel."""
    largest = torch.where(held, values, -torch.inf).amax(0)
    return torch.where(held.any(0), largest, 0)


def first(values: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """That of the first member that holds the channel, in the order of the model's tensors."""
    at = held.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(held.any(0), values.gather(0, at)[0], 0)


AGGREGATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": by_mean,
    "sum": by_sum,
    "max": by_max,
    "first": first,
}


def check_aggregate(how: str) -> str:
    """Return the name of an aggregation. Raises `UnknownName` where there is none of that name."""
    if how not in tuple(AGGREGATES):
        raise UnknownName("aggregate", how, AGGREGATES)
    return how


def aggregated(found: Found, size: int, how: str) -> torch.Tensor:
    """Return one vector (size,) of the members' vectors (size,) each; 0 where there is none."""
    if not found:
        return torch.zeros(size, dtype=torch.float64)
    device = found[0][1].device
    values = torch.stack([vector.to(device) for _, vector in found])
    held = torch.stack([covered(member, size) for member, _ in found]).to(device)
    return AGGREGATES[how](values, held)
