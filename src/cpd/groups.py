"""Coupling groups: what combing finds. A value that prints itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from .branches import Branch, KeptBranch
from .channels import Ids, Place, Reason
from .errors import InputError
from .graph import Pinned, Step
from .labels import Labels, Mask, spread
from .liveness import Peak, peak
from .replace import Replacements
from .rules import Factor
from .sizes import Site
from .stays import Frozen, Kept, first_of, joined, kept_lines
from .terms import Cost, Terms
from .trace import Trace
from .units import Family, Units


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

    @property
    def kinds(self) -> str:
        """Its units in words: "4 head dims, 3 heads"."""
        return joined_kinds((family.width, family.kind) for family in self.families)

    @property
    def share(self) -> dict[str, float]:
        """Cost -> share of the network's that hangs on this group (see `Groups.shares`)."""
        return self._groups.shares[self.name]

    @property
    def held(self) -> tuple[Reason, ...]:
        """Why some of its channels go only with others: a row or its width stays."""
        return self._groups.held[self.name]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.kinds}"]
        lines += [f"  held back: {reason}" for reason in self.held]
        for member in self.members:
            axes = [k for k, size in enumerate(member.channel.shape) if size > 1]
            lines.append(f"  {member.role:<3} {member.tensor} axis {', '.join(map(str, axes))}")
        return "\n".join(lines)


@dataclass(eq=False)
class Groups:
    """All coupling groups of a network, what stays and why, and what everything costs.

    `branches`: the residual branches that may go whole, `kept_branches`: those that cannot; both
    are empty without `depth`. `gates`: call, or tensor's name -> factors that are 0 once its branch
    has gone.
    """

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
    branches: tuple[Branch, ...] = ()
    kept_branches: tuple[KeptBranch, ...] = ()
    gates: dict[Any, tuple[Factor, ...]] = field(default_factory=dict)

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
        """Return a cost ("macs" per sample, "params", "memory" in bytes) with these classes
        alive.
        """
        return self.counted(name).count(alive[self.units.label])

    def counted(self, name: str) -> Cost:
        """Return a cost by its name; memory is worked out where it is first asked for."""
        return self.memory if name == "memory" else self.costs[name]

    @cached_property
    def memory(self) -> Peak:
        """What is held at once while the network runs, at the traced batch."""
        mine = self.trace.graph
        steps = [step for step in self.steps if step.node.graph is mine]
        return peak(self.model, self.trace, steps, self.labels, self.gates)

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """`frozen`, joined by reason and line of code, without the axes of kernels."""
        return joined(self.frozen)

    @property
    def causes(self) -> Ids:
        """Return for each class the number of the reason why it cannot go by itself, or -1."""
        return np.where(self.units.frozen >= 0, self.units.frozen, self.units.held)

    @cached_property
    def held(self) -> dict[str, tuple[Reason, ...]]:
        """Group name -> why some of its channels go only with others.

        Rows over them stay as rows, or their columns as columns: heads whose dims may go, or heads
        that may go whole.
        """
        owner, causes = self.owners()[0], self.causes
        found: list[set[int]] = [set(causes[group.classes].tolist()) for group in self.groups]
        for block, below in self.units.below.items():
            mine = np.unique(owner[below]) if owner[block] < 0 else below[:0]
            for number in mine[mine >= 0].tolist():
                found[number].add(int(causes[block]))
        reasons = self.units.reasons
        return {
            group.name: tuple(dict.fromkeys(reasons[k] for k in sorted(held) if k >= 0))
            for group, held in zip(self.groups, found, strict=True)
        }

    def held_lines(self) -> list[str]:
        """What goes only with others and why, in words; a line for each line of code."""
        found: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
        for name, reason in ((name, reason) for name, mine in self.held.items() for reason in mine):
            at = (reason.text, reason.place.op, reason.place.source)
            found.setdefault(at, []).append((name, reason.place.path))
        lines = []
        for (text, op, source), mine in list(found.items())[:_HELD]:
            names, paths = (
                list(dict.fromkeys(filter(None, words))) for words in zip(*mine, strict=True)
            )
            lines.append(
                f"    {first_of(names)}: {Reason(text, Place(op, first_of(paths), source))}"
            )
        if len(found) > _HELD:
            lines.append(f"    and {len(found) - _HELD} more reasons")
        return ["  held back, to go only with others:", *lines] if lines else []

    def owners(self) -> tuple[Ids, Ids]:
        """Return for each class the number of its group, or -1, and its place in that."""
        owner = np.full(self.units.count, -1, np.int64)
        place = np.zeros(self.units.count, np.int64)
        for number, group in enumerate(self.groups):
            owner[group.classes] = number
            place[group.classes] = np.arange(group.size)
        return owner, place

    @cached_property
    def members(self) -> dict[str, tuple[Member, ...]]:
        """Group name -> members, in the order of the model's tensors."""
        owner, place = self.owners()
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

    @cached_property
    def shares(self) -> dict[str, dict[str, float]]:
        """Group name -> cost -> share of the network's cost that hangs on the group.

        It is what would be saved if all that can go of the group went and nothing else did:
        1 - cost(without it) / cost(whole). A weight between two groups hangs on both of them, so
        shares overlap: they add up to more than the `coverage`.
        """
        alone = {group.name: dict[str, float]() for group in self.groups}
        owner = self.owners()[0][self.units.label]
        for name, terms in self.costs.items():
            whole = self.cost(name, self.everything())
            for group, left in zip(self.groups, terms.without_each(owner, len(self)), strict=True):
                alone[group.name][name] = _share(left, whole)
        return alone

    @cached_property
    def coverage(self) -> dict[str, float]:
        """Cost -> share of the network's cost that hangs on any group at all.

        It is what would be saved if everything went that can go, down to no channel: no plan saves
        more, and every plan less, since at least one unit of each kind stays.
        """
        alive = self.everything()
        for group in self.groups:
            alive[group.classes] = False
        whole = self.everything()
        return {x: _share(self.cost(x, alive), self.cost(x, whole)) for x in self.costs}

    def __str__(self) -> str:
        everything = self.everything()
        macs, params = self.cost("macs", everything), self.cost("params", everything)
        units = sum(family.width for group in self.groups for family in group.families)
        covered = self.coverage
        lines = [
            f"{len(self)} coupling groups, {units} units, {macs:,} MACs, {params:,} parameters",
            f"can go: {covered['macs']:.1%} of the MACs, {covered['params']:.1%} of the parameters",
        ]
        if self.groups:
            lines += _aligned([_HEAD, *(_row(group) for group in self.groups)])
        lines += kept_lines(self.kept)
        lines += self.held_lines()
        lines += self.branch_lines()
        return "\n".join(lines)

    def branch_lines(self) -> list[str]:
        """Which residual branches may go whole, and which may not and why, in words."""
        lines = []
        if self.branches:
            names = [branch.name for branch in self.branches]
            lines.append(f"  {len(names)} residual branches may go whole: {', '.join(names)}")
        if self.kept_branches:
            lines.append("  residual branches that cannot go whole:")
            lines += [f"    {each}" for each in self.kept_branches]
        return lines


_KEEPS_STEP = "must keep step with channels that cannot go"
_HEAD = ("group", "units", "tensors", "params", "MACs")
_HELD = 8  # reasons; `Groups.held` has all


def _share(left: int, whole: int) -> float:
    return 1 - left / whole if whole else 0.0


def _row(group: CouplingGroup) -> tuple[str, ...]:
    shares = (f"{group.share[cost]:.1%}" for cost in ("params", "macs"))
    return (group.name, group.kinds, str(len(group.members)), *shares)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns two spaces apart: the first two to the left, the numbers to the right."""
    wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  " + "  ".join(x.ljust(w) if k < 2 else x.rjust(w) for k, (x, w) in enumerate(cells))
        for cells in (list(zip(row, wide, strict=True)) for row in rows)
    ]


def frozen_axes(groups: Groups, closures: Iterable[Ids]) -> Iterator[Frozen]:
    """List every axis with indices that no unit removes, once for each reason.

    Of buffers those with channels of parameters: other axes of theirs are no channels. `closures`:
    the classes that go with the units of each family.
    """
    units = groups.units
    movable = np.zeros(units.count, bool)
    for closure in closures:
        movable[closure] = True
    parameters = {name for name, _ in groups.model.named_parameters()}
    weighed = np.zeros(units.count, bool)
    for layer in (x for name in parameters for x in groups.labels[name].layers):
        weighed[units.label[layer.ids]] = True
    why, reasons = _told(units, groups.causes)
    for tensor, layer in ((t, x) for t in groups.labels for x in groups.labels[t].layers):
        classes = units.label[layer.ids]
        stuck = ~movable[classes] & weighed[classes]
        for number in np.unique(why[classes[stuck]]).tolist():
            mine = (stuck & (why[classes] == number)).reshape(-1, classes.shape[-1]).any(0)
            cause, count = reasons[number], int(mine.sum())
            at = cause.place
            yield Frozen(tensor, layer.owner, cause.text, count, at.op, at.path, at.source)


def _told(units: Units, causes: Ids) -> tuple[Ids, list[Reason]]:
    """Return for each class the number of a reason, and the reasons: what none holds back keeps
    step with others, in the call that uses their axis as two.
    """
    known = len(units.reasons)
    places = [*units.places, Place()]  # -1 is the last
    step = np.where(units.fold_of >= 0, units.fold_of, len(places) - 1)
    why = np.where(causes >= 0, causes, known + step)
    return why, [*units.reasons, *(Reason(_KEEPS_STEP, place) for place in places)]


def joined_kinds(families: Iterable[tuple[int, str]]) -> str:
    """Widths and kinds in words, equal ones joined: "2×4 group channels, 2 conv groups"."""
    counted = Counter(families)
    return ", ".join(
        f"{width} {kind}" if times == 1 else f"{times}×{width} {kind}"
        for (width, kind), times in counted.items()
    )
