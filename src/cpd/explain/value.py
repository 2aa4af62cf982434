"""The coupling graph as a value: groups and what stays are its nodes, weights are its edges."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cpd.channels import Ids
from cpd.files import write_text
from cpd.groups import CouplingGroup, Groups
from cpd.stays import Frozen, Kept
from cpd.trace import Trace

__all__ = ["Edge", "Explanation", "Node", "explain"]

GROUP, KEPT = "group", "kept"
_COSTS = ("params", "macs")


@dataclass(frozen=True)
class Node:
    """A coupling group, or what stays for one reason.

    Attributes:
        name: the group's name, or the reason.
        kind: "group" or "kept".
        units: what can go one by one, in words; nothing can of what is kept.
        size: channels of a group; indices that stay.
        share: cost -> share of the network's that hangs on a group (see ``Groups.shares``).
        tensors: "out conv1.weight axis 0" of a group, "conv1.weight axis 1" of what stays.
        notes: why channels of a group go only together; the lines of code that demand what stays.
    """

    name: str
    kind: str
    units: str
    size: int
    share: dict[str, float]
    tensors: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edge:
    """Tensors that read the channels of one node and make those of another."""

    source: str
    target: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What can go of a network, what stays and why, what hangs on what.

    Attributes:
        network: the class of the network.
        costs: cost -> that of the whole network. coverage: cost -> share that hangs on any group.
        nodes: groups and reasons, in the order of a forward pass.
        edges: which weights lead from which node to which.
        frozen: every axis that stays, with its reason and place.
    """

    network: str
    costs: dict[str, int]
    coverage: dict[str, float]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    frozen: tuple[Frozen, ...]

    def __str__(self) -> str:
        from .dot import text

        return text(self)

    def to_json(self) -> str:
        """Everything as JSON text, by the names of the attributes."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def dot(self, path: str | os.PathLike[str] | None = None) -> str:
        """The graph in Graphviz' language; written to ``path`` where one is given.

        Raises:
            OutputError: the file cannot be written.
        """
        from .dot import graphviz

        content = graphviz(self)
        if path is not None:
            write_text(path, content)
        return content

    def html(self, path: str | os.PathLike[str]) -> Path:
        """Write the graph as one self-contained, interactive page; returns ``path``.

        Raises:
            OutputError: the file cannot be written.
        """
        from .html import content

        return write_text(path, content(self))


def explain(groups: Groups) -> Explanation:
    """Put into one value what ``comb`` found."""
    places = _Places(groups)
    nodes = [(places.of_group(number), _group(group)) for number, group in enumerate(groups)]
    nodes += [(places.of_reason(reason), _reason(groups, reason)) for reason in places.reasons]
    nodes.sort(key=lambda pair: pair[0])
    whole = groups.everything()
    return Explanation(
        network=type(groups.model).__name__,
        costs={name: groups.cost(name, whole) for name in _COSTS},
        coverage={name: groups.coverage[name] for name in _COSTS},
        nodes=tuple(node for _, node in nodes),
        edges=tuple(places.edges()),
        frozen=groups.frozen,
    )


def _group(group: CouplingGroup) -> Node:
    tensors = []
    for member in group.members:
        axes = [str(axis) for axis, size in enumerate(member.channel.shape) if size > 1]
        tensors.append(f"{member.role} {member.tensor} axis {', '.join(axes)}")
    notes = tuple(f"held back: {reason}" for reason in group.held)
    share = {name: group.share[name] for name in _COSTS}
    return Node(group.name, GROUP, group.kinds, group.size, share, tuple(tensors), notes)


def _reason(groups: Groups, reason: str) -> Node:
    mine = [kept for kept in groups.kept if kept.reason == reason]
    items = [item for kept in mine for item in kept.items]
    tensors = tuple(f"{item.tensor} axis {item.axis}" for item in items)
    notes = tuple(dict.fromkeys(_note(kept) for kept in mine if kept.place))
    return Node(reason, KEPT, "", sum(item.count for item in items), {}, tensors, notes)


def _note(kept: Kept) -> str:
    return f"{kept.tensors}: {kept.place}"


def _used_at(trace: Trace) -> dict[str, int]:
    """Tensor -> number of the first call that uses it: the order of a forward pass."""
    found: dict[str, int] = {}
    for number, node in enumerate(trace.graph.nodes):
        for value in node.all_input_nodes:
            if value.name in trace.tensors:
                found.setdefault(trace.tensors[value.name], number)
    return found


class _Places:
    """Which node every layer of every tensor belongs to."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.order = _used_at(groups.trace)
        self.names = [group.name for group in groups]
        self.owner = np.full(groups.units.count, -1, np.int64)
        for number, group in enumerate(groups):
            self.owner[group.classes] = number
        self.stays: dict[tuple[str, int], list[str]] = {}
        for kept in groups.kept:
            for item in kept.items:
                self.stays.setdefault((item.tensor, item.axis), []).append(kept.reason)
        self.reasons = tuple(dict.fromkeys(kept.reason for kept in groups.kept))

    def of_group(self, number: int) -> tuple[int, int]:
        """Where a group comes: at the first tensor that makes it, before what stays there."""
        members = self.groups.groups[number].members
        makers = [member for member in members if member.role == "out"] or list(members)
        return min(self._at(member.tensor) for member in makers), 1

    def _at(self, tensor: str) -> int:
        """When a tensor is first used; those that no call uses come last."""
        return self.order.get(tensor, len(self.groups.trace.graph.nodes))

    def of_reason(self, reason: str) -> tuple[int, int]:
        """Where a reason comes: outputs of the network last, others at their first tensor."""
        found = [self._at(tensor) for (tensor, _), why in self.stays.items() if reason in why]
        reads = any(role == "in" for role in self._roles(reason))
        return (min(found), 0) if reads else (max(found), 2)

    def _roles(self, reason: str) -> Iterable[str]:
        for (tensor, axis), why in self.stays.items():
            if reason in why:
                yield self._role(tensor, axis)

    def _role(self, tensor: str, axis: int) -> str:
        return "in" if (tensor, axis) in self.groups.consumed else "out"

    def edges(self) -> Iterable[Edge]:
        """The weights between nodes; biases and norms stand in one node alone."""
        found: dict[tuple[str, str], dict[str, None]] = {}
        for tensor, labels in self.groups.labels.items():
            ends: dict[str, dict[str, None]] = {"in": {}, "out": {}}
            for layer in labels.layers:
                role = self._role(tensor, layer.owner)
                classes: Ids = self.groups.units.label[layer.ids]
                numbers = np.unique(self.owner[classes]).tolist()
                ends[role] |= {self.names[k]: None for k in numbers if k >= 0}
                ends[role] |= dict.fromkeys(self.stays.get((tensor, layer.owner), ()))
            for source, target in ((a, b) for a in ends["in"] for b in ends["out"]):
                if source != target:
                    found.setdefault((source, target), {})[tensor] = None
        for (source, target), tensors in found.items():
            yield Edge(source, target, tuple(tensors))
