"""What every rule works with: the call, the registry, and the alignment of named axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..channels import Channels, Ids
from ..labels import Labels, Layer, equal_rows, place

Rule = Callable[["Call"], "Labels | list[Labels]"]
Zero = Callable[[dict[int, bool]], bool]
_RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Size:
    """A literal in a call's arguments that is the size of an axis, and must follow it."""

    arg: str
    index: int | None
    old: int
    labels: Labels
    axis: int


@dataclass(frozen=True)
class Factor:
    """The number of live indices of one axis of a layer."""

    layer: Layer
    position: int


@dataclass(frozen=True)
class Pin:
    """An attention whose default scale depends on the size of `axis` of its query."""

    labels: Labels
    axis: int


@dataclass
class Call:
    """One call of one operator. `args` are named as in its schema; tensors are `Labels`."""

    op: str
    args: dict[str, Any]
    out: list[tuple[int, ...]]
    channels: Channels
    target: Any = None
    exact: bool = False
    where: str = ""
    sizes: list[Size] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    macs: list[tuple[int, tuple[Factor, ...]]] = field(default_factory=list)
    lossy: bool = False
    consumed: list[Ids] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.out[0]

    def freeze(self, ids: Ids, why: str) -> None:
        """Keep these channels; `Channels.place` says which call demands it."""
        self.channels.freeze(ids, why)

    def freeze_axis(self, labels: Labels, axis: int, why: str) -> None:
        """Keep the size of one axis (whole rows of an outer axis may still go)."""
        layer = labels.at(axis, self.channels)
        if layer is not None:
            self.channels.freeze_inner(layer.ids, why)

    def freeze_indices(self, labels: Labels, axis: int, why: str) -> None:
        """Keep every index of one axis."""
        layer = labels.at(axis, self.channels)
        if layer is not None:
            self.freeze(layer.ids, why)

    def freeze_all(self, labels: Labels, why: str) -> None:
        """Keep every channel of a tensor."""
        for layer in labels.layers:
            self.freeze(layer.ids, why)

    def keep_two(self, labels: Labels, axis: int) -> None:
        """At least two indices of one axis must stay, where the op means something else on one."""
        layer = labels.at(axis, self.channels)
        if layer is not None:
            half = layer.ids.shape[-1] // 2
            self.channels.keep_one(layer.ids[..., :half])
            self.channels.keep_one(layer.ids[..., half:])

    def statistic(self, labels: Labels, axis: int, why: str) -> None:
        """A value is computed across the channels of `axis`: cutting is then not the same as
        zeroing.
        """
        if not labels.carries(axis):
            return
        if labels.owned(axis) is None:
            self.freeze_indices(labels, axis, f"rows depend on each other: {why}")
        elif self.exact:
            self.freeze_axis(labels, axis, f"exact: {why}")
        self.lossy = True

    def size(self, arg: str, index: int | None, old: int, labels: Labels, axis: int) -> None:
        """Record a literal size that must follow `axis` of `labels`."""
        if old > 1 and labels.carries(axis):
            self.sizes.append(Size(arg, index, old, labels, axis))

    def cost(self, times: int, axes: Sequence[tuple[Labels, int]]) -> None:
        """Record MACs: `times` x the product of these axes' sizes."""
        factors = []
        for labels, axis in axes:
            layer = labels.governing(axis)
            if layer is None:
                times *= labels.shape[axis]
            else:
                factors.append(Factor(layer, layer.axes.index(axis)))
        self.macs.append((times, tuple(factors)))


def positive(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis % rank if rank else 0


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by name without namespace and overload. Twice is refused."""

    def register(function: Rule) -> Rule:
        for op in ops:
            assert op not in _RULES, f"two rules for {op}"
            _RULES[op] = function
        return function

    return register


def find(op: str) -> Rule | None:
    """Return the rule of an operator, or None. An in-place operator has the rule of its twin."""
    if op.endswith("_") and not op.endswith("__"):
        return _RULES.get(op, _RULES.get(op[:-1]))
    return _RULES.get(op)


def known() -> tuple[str, ...]:
    """Return the names of all operators that have a rule."""
    return tuple(sorted(_RULES))


@dataclass
class _Entry:
    """The ids of one named axis as one operand has them; `names` from the outside in.

    `copied`: rows of which several may be copies of one. `uniform`: any index may go for any other.
    """

    names: tuple[str, ...]
    layer: Layer
    owned: bool
    copied: bool = False
    uniform: bool = False


Named = tuple[Labels, Sequence[str]]


def align(
    call: Call,
    operands: Sequence[Named],
    out: Sequence[str],
    shape: tuple[int, ...],
    *,
    statistic: str | None = None,
    zero: Zero | None = None,
) -> Labels:
    """Unite the axes of the operands that bear one name, and return the labels of the output.

    This is an einsum over ids. An axis of size 1 broadcasts. An operand with a full axis and no ids
    fixes that axis for all. Names that `out` lacks are contracted: dead channels then must be zero
    in one operand, or the contraction is a statistic; `statistic` says so for reductions that never
    are exact (mean, max). `zero(flags)` tells from the operands' zero flags (operand -> zero)
    whether the output's dead entries are zero.
    """
    entries: dict[str, list[_Entry]] = {}
    flags: dict[str, dict[int, bool]] = {}
    for number, (labels, names) in enumerate(operands):
        for name, entry in _entries(call, labels, names):
            entries.setdefault(name, []).append(entry)
            flags.setdefault(name, {})[number] = entry.layer.zero
    fixed = {n for n in entries if any(_fixes(labels, names, n) for labels, names in operands)}
    for name, found in entries.items():
        if name in fixed:
            for entry in found:
                call.channels.freeze_inner(entry.layer.ids, "meets an axis of fixed size")
        for entry in found:
            _unite(call, _main(found), entry)
    for name, found in entries.items():
        if name not in out and (statistic or not any(flags[name].values())):
            _statistic(call, _main(found), statistic or "product of channels that are not zero")
    zero = zero or (lambda given: any(given.values()))
    zeros = {name: zero(given) for name, given in flags.items()}
    return Labels(shape, _out_layers(call, entries, list(out), zeros, fixed))


def _entries(call: Call, labels: Labels, names: Sequence[str]) -> list[tuple[str, _Entry]]:
    found = []
    for axis, name in enumerate(names):
        layer = labels.at(axis, call.channels)
        if layer is not None and labels.shape[axis] > 1:
            named = tuple(names[x] for x in layer.axes)
            call.channels.use(layer.ids)
            owned = labels.owned(axis) is not None and not labels.uniform
            copied = owned and any(labels.owned(x) is not None for x in layer.axes[:-1])
            found.append((name, _Entry(named, layer, owned, copied, labels.uniform)))
    return found


def _fixes(labels: Labels, names: Sequence[str], name: str) -> bool:
    if name not in names:
        return False
    axis = list(names).index(name)
    return labels.shape[axis] > 1 and not labels.carries(axis)


def _main(found: list[_Entry]) -> _Entry:
    def rank(entry: _Entry) -> tuple[int, bool, bool]:
        return len(entry.names), entry.owned, not (entry.copied or entry.uniform)

    return max(found, key=rank)


def _unite(call: Call, main: _Entry, other: _Entry) -> None:
    if other is main:
        return
    if main.names == other.names and other.copied:
        _unite_copies(call, main.layer.ids, other.layer.ids)
    elif main.names == other.names:
        call.channels.unite(main.layer.ids, other.layer.ids)
    elif len(other.names) == 1 and other.uniform:
        rows = main.layer.ids.reshape(-1, main.layer.ids.shape[-1])
        rows = np.concatenate([rows, other.layer.ids.reshape(1, -1)])
        call.channels.nest(rows)  # as many as in each row, no matter which
        call.channels.freeze(call.channels.rows(rows)[-1:], "the same in every row")
    elif len(other.names) == 1:
        ids = main.layer.ids
        columns = call.channels.columns(ids.reshape(-1, ids.shape[-1]))
        call.channels.unite(columns, other.layer.ids)
    else:
        why = "an axis is coupled to two different ones"
        call.channels.freeze(main.layer.ids, why)
        call.channels.freeze(other.layer.ids, why)


def _unite_copies(call: Call, ids: Ids, copies: Ids) -> None:
    """Unite with rows of which several are copies of one: what reads these keeps its columns."""
    ids, copies = ids.reshape(-1, ids.shape[-1]), copies.reshape(-1, copies.shape[-1])
    found = equal_rows(copies)
    if len(found) == len(copies):
        call.channels.unite(ids, copies)
        return
    for same in found:
        mine = ids[same]
        columns = mine[0] if (mine == mine[0]).all() else call.channels.columns(mine)
        call.channels.unite(columns, copies[same[0]])


def _statistic(call: Call, entry: _Entry, why: str) -> None:
    if call.exact:
        call.channels.freeze_inner(entry.layer.ids, f"exact: {why}")
    call.lossy = True


def _out_layers(
    call: Call,
    entries: dict[str, list[_Entry]],
    out: list[str],
    zeros: dict[str, bool],
    fixed: set[str],
) -> tuple[Layer, ...]:
    chosen: dict[str, _Entry] = {}
    for name in out:
        if name in entries and name not in fixed:
            kept = _keep_names(call, _main(entries[name]), out)
            if kept is not None:
                chosen[name] = kept
    outer = {name for entry in chosen.values() if entry.owned for name in entry.names[:-1]}
    layers = []
    for name, entry in chosen.items():
        if entry.owned or name not in outer:
            axes = tuple(out.index(x) for x in entry.names)
            layers.append(place(Layer(axes, entry.layer.ids, zeros[name]), axes, call.channels))
    return tuple(layers)


def _keep_names(call: Call, entry: _Entry, out: list[str]) -> _Entry | None:
    """Drop the outer axes that the op contracts: the rows are then tied to the same columns."""
    lost = [name for name in entry.names if name not in out]
    if not lost:
        return entry
    ids = entry.layer.ids
    if lost == list(entry.names[:-1]):
        columns = call.channels.columns(ids.reshape(-1, ids.shape[-1]))
        return _Entry(entry.names[-1:], Layer((0,), columns, entry.layer.zero), True)
    call.freeze(ids, "one of three coupled axes is contracted")
    return None
