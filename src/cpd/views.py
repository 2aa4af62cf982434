"""Views: which part of a parameter a call reads, through slices and turns, and who else does."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .aliases import is_view
from .trace import Trace


@dataclass(frozen=True)
class View:
    """A tensor by name, and the calls that show a part of it."""

    name: str
    calls: tuple[fx.Node, ...] = ()

    def of(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return what is seen of the tensor; writing to it writes to the tensor."""
        value: Any = tensors[self.name]
        for call in self.calls:
            value = _called(call, value)
        return value


class Views:
    """Says of values of a traced network which tensors they show."""

    def __init__(self, trace: Trace, tensors: Mapping[str, torch.Tensor]) -> None:
        self.trace = trace
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._leaves: dict[str, list[tuple[fx.Node, torch.Tensor]]] = {}

    def seen(self, value: Any) -> View | None:
        """Return the part of a tensor that a value is; None where it is computed."""
        calls: list[fx.Node] = []
        while isinstance(value, fx.Node):
            name = self.trace.tensors.get(value.name)
            if name is not None:
                found = View(name, tuple(reversed(calls)))
                return found if self._shares(found) else None
            if not _shows(value):
                return None
            calls.append(value)
            value = value.args[0]
        return None

    def own(self, node: fx.Node, value: Any) -> View | None:
        """Return the part that a value is, if this call alone reads any of it."""
        found = self.seen(value)
        if found is None:
            return None
        leaves = self._leaves_of(found.name)
        if len(leaves) > 1:
            mine = torch.zeros(torch.Size(self.shapes[found.name]).numel(), dtype=torch.bool)
            mine[found.of({found.name: self._numbers(found.name)}).flatten()] = True
            leaves = [leaf for leaf in leaves if mine[leaf[1]].any()]
        return found if [leaf for leaf, _ in leaves] == [node] else None

    def _shares(self, view: View) -> bool:
        """Whether it shows the storage: some views of some layouts are copies."""
        if not view.calls:
            return True
        whole = torch.empty(self.shapes[view.name], device="meta")
        part = view.of({view.name: whole})
        return isinstance(part, torch.Tensor) and part._base is whole

    def _numbers(self, name: str) -> torch.Tensor:
        """Number the entries of a tensor."""
        shape = self.shapes[name]
        return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)

    def _leaves_of(self, name: str) -> list[tuple[fx.Node, torch.Tensor]]:
        """Return the calls that compute with a tensor, each with the numbers of what it reads."""
        if name not in self._leaves:
            starts = [x for x, held in self.trace.tensors.items() if held == name]
            nodes = [x for x in self.trace.graph.nodes if x.name in starts]
            users = [user for node in nodes for user in node.users]
            if len(users) == 1 and not _shows(users[0]):
                self._leaves[name] = [(users[0], torch.empty(0, dtype=torch.int32))]
            else:
                every = self._numbers(name)
                self._leaves[name] = [x for node in nodes for x in _read(node, every)]
        return self._leaves[name]


def _read(node: fx.Node, numbers: Any) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    for user in node.users:
        if _shows(user):
            yield from _read(user, _called(user, numbers))
        else:
            parts = [numbers] if isinstance(numbers, torch.Tensor) else numbers
            yield user, torch.cat([part.flatten() for part in parts])


def _shows(node: fx.Node) -> bool:
    """Whether a call shows its first argument and depends on no other value."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    others = [x for x in node.all_input_nodes if x is not node.args[0]]
    return not others and (is_view(node) or node.target is operator.getitem)


def _called(call: fx.Node, value: Any) -> Any:
    target: Any = call.target
    return target(value, *call.args[1:], **call.kwargs)
