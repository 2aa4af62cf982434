"""Coupling groups: what combing finds. A value that prints itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import nn

from .channels import Ids
from .errors import InputError
from .graph import Pinned, Step, Terms
from .labels import Labels, Mask, spread
from .replace import Replacements
from .sizes import Site
from .trace import Trace
from .units import Family, Units


@dataclass(frozen=True)
class Frozen:
    """`count` indices of one axis of a tensor that stay, and why.

    `op`, `path` and `source` name the call that demands it: the operator, the module that calls it
    and the "file:line" of the code; "" where no single call does.
    """

    tensor: str
    axis: int
    reason: str
    count: int
    op: str = ""
    path: str = ""
    source: str = ""

    @property
    def place(self) -> str:
        """The call in words: "linear in head, net.py:12"; "" where no single call demands it."""
        where = f"{self.op} in {self.path}" if self.op and self.path else self.op
        return ", ".join(part for part in (where, self.source) if part)

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.tensor} axis {self.axis}, {self.count} of it: {self.reason}{place}"


@dataclass(frozen=True, eq=False)
class Member:
    """Where a group's channels live in one tensor.

    `channel`: for each index of the layer (shape of the tensor with 1 on axes along which channels
    do not vary) the channel of the group, or -1. `role`: "out" where the tensor makes or scales the
    channels, "in" where it reads them. `activation`: elements per sample and channel of what the
    tensor's op puts out.
    """

    tensor: str
    channel: Ids
    role: str
    activation: float


@dataclass(frozen=True, eq=False)
class CouplingGroup:
    """Channels that are bound together. `classes[i]` is channel i in the solved network."""

    name: str
    classes: Ids
    families: tuple[Family, ...]
    kind: tuple[object, ...]
    _groups: Groups = field(repr=False)

    @property
    def size(self) -> int:
        """Number of channels: the length of a score vector."""
        return len(self.classes)

    @property
    def width(self) -> int:
        """Units of the first family: channels, or heads, or conv groups."""
        return self.families[0].width

    @property
    def members(self) -> tuple[Member, ...]:
        """The slices of tensors that these channels run through."""
        return self._groups.members[self.name]

    def __str__(self) -> str:
        units = ", ".join(f"{family.width} {family.kind}" for family in self.families)
        lines = [f"{self.name}: {units}"]
        for member in self.members:
            axes = [k for k, size in enumerate(member.channel.shape) if size > 1]
            lines.append(f"  {member.role:<3} {member.tensor} axis {', '.join(map(str, axes))}")
        return "\n".join(lines)


@dataclass(eq=False)
class Groups:
    """All coupling groups of a network, what stays and why, and what everything costs."""

    trace: Trace
    units: Units
    labels: dict[str, Labels]
    steps: list[Step]
    sites: list[Site]
    pins: list[Pinned]
    replaced: Replacements
    costs: dict[str, Terms]
    groups: tuple[CouplingGroup, ...]
    frozen: tuple[Frozen, ...]
    options: dict[str, object]
    consumed: set[tuple[str, int]]
    activation: dict[str, float]
    model: nn.Module

    def __iter__(self) -> Iterator[CouplingGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> CouplingGroup:
        for group in self.groups:
            if group.name == name:
                return group
        names = ", ".join(group.name for group in self.groups)
        raise InputError(f"no coupling group {name!r}; there are: {names}")

    def everything(self) -> Mask:
        """Return the mask over classes with all alive."""
        return np.ones(self.units.count, dtype=bool)

    def cost(self, name: str, alive: Mask) -> int:
        """Return a cost ("macs" per sample, "params") with these classes alive."""
        return self.costs[name].count(alive[self.units.label])

    @cached_property
    def members(self) -> dict[str, tuple[Member, ...]]:
        """Group name -> members, in the order of the model's tensors."""
        owner = np.full(self.units.count, -1, np.int64)
        place = np.zeros(self.units.count, np.int64)
        for number, group in enumerate(self.groups):
            owner[group.classes] = number
            place[group.classes] = np.arange(group.size)
        found: list[list[Member]] = [[] for _ in self.groups]
        for tensor, layer in ((t, x) for t, labels in self.labels.items() for x in labels.layers):
            classes = self.units.label[layer.ids]
            role = "in" if (tensor, layer.owner) in self.consumed else "out"
            rank = len(self.labels[tensor].shape)
            for number in np.unique(owner[classes][owner[classes] >= 0]).tolist():
                mine = np.where(owner[classes] == number, place[classes], -1)
                activation = self.activation.get(tensor, 1.0)
                found[number].append(Member(tensor, spread(layer, mine, rank), role, activation))
        return {group.name: tuple(found[k]) for k, group in enumerate(self.groups)}

    def __str__(self) -> str:
        everything = self.everything()
        macs, params = self.cost("macs", everything), self.cost("params", everything)
        units = sum(family.width for group in self.groups for family in group.families)
        head = f"{len(self)} coupling groups, {units} units, {macs:,} MACs, {params:,} parameters"
        wide = max([len(group.name) for group in self.groups], default=0)
        lines = [head]
        for group in self.groups:
            kinds = ", ".join(f"{family.width} {family.kind}" for family in group.families)
            lines.append(f"  {group.name:<{wide}}  {kinds}  in {len(group.members)} tensors")
        lines += _frozen_lines(self.frozen)
        return "\n".join(lines)


def _frozen_lines(frozen: tuple[Frozen, ...]) -> list[str]:
    by_reason: dict[tuple[str, str], list[Frozen]] = {}
    for item in frozen:
        if not item.reason.startswith("kernel axis"):
            by_reason.setdefault((item.reason, item.place), []).append(item)
    if not by_reason:
        return []
    lines = ["  kept:"]
    for (reason, place), items in by_reason.items():
        more = f" and {len(items) - 1} more" if len(items) > 1 else ""
        where = f" ({place})" if place else ""
        lines.append(f"    {items[0].tensor} axis {items[0].axis}{more}: {reason}{where}")
    return lines
