"""Aliases: which calls of a traced graph show one storage, and through which parts it is written.

The graph keeps operators that work in place as the network's code has them. A write through a view
changes what every other view shows from then on, so who reads what when has to be known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

_PARTS = ("slice", "select")
# They return what they are given where nothing is dropped; the trace's tensors do not show that.
_HAND_ON = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")


def op_name(node: fx.Node) -> str:
    """Return the name of a node's operator, without namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else str(node.target)


def is_view(node: fx.Node) -> bool:
    """Say whether an operator returns a view of what it is given, by its schema."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def writes(node: fx.Node) -> list[fx.Node]:
    """Return what a call writes into, by the schema of its operator."""
    found = []
    schema = getattr(node.target, "_schema", None)
    for number, argument in enumerate(schema.arguments if schema else ()):
        value = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, fx.Node):
            found.append(value)
    return found


def base(node: fx.Node) -> fx.Node:
    """Return the call that a view, or a view of a view, shows the storage of."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if not (is_view(node) or _is_item(node)):
            break
        node = node.args[0]
    return node


def views(node: fx.Node) -> list[fx.Node]:
    """Return the views of a node, and those of them."""
    found = []
    for user in node.users:
        if is_view(user) or _is_item(user):
            found += [user, *views(user)]
    return found


def sole_chain(base: fx.Node, value: fx.Node) -> bool:
    """Say whether nothing but `value` sees the storage of `base`."""
    while value is not base:
        value = value.args[0]  # type: ignore[assignment]
        if len(value.users) > 1:
            return False
    return True


def needed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that something comes of: an output, a write in place, or what is no tensor
    (a check, a number that a size is made of).
    """
    left = [n for n in graph.nodes if n.op == "output" or writes(n) or not _has_tensor(n)]
    found = set(left)
    while left:
        new = [x for x in left.pop().all_input_nodes if x not in found]
        found.update(new)
        left += new
    return found


def _has_tensor(node: fx.Node) -> bool:
    """Say whether a node's value is a tensor, or has one in it."""
    value = node.meta.get("val")
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, torch.Tensor) for item in items)


class Storages:
    """What shows which storage, in a whole graph.

    The tensors that the trace ran on tell, beside the schemas: a cast may copy in another type.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._time = {node: time for time, node in enumerate(graph.nodes)}
        self._keys: dict[fx.Node, set[int]] = {}
        self._shown: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            keys = {value.untyped_storage()._cdata for value in _tensors(node.meta.get("val"))}
            if is_view(node) or _is_item(node) or _whole(node) or op_name(node) in _HAND_ON:
                for given in node.all_input_nodes[:1]:
                    keys |= self._keys[given]
            self._keys[node] = keys
            for key in keys:
                self._shown.setdefault(key, []).append(node)

    def chain(self, value: fx.Node) -> list[fx.Node]:
        """Return a value, what it is a slice of, and so on to a tensor that a call made afresh;
        nothing where it is another view, or of what the network is given.
        """
        found = [value]
        while op_name(found[-1]) in _PARTS or _whole(found[-1]):
            found.append(found[-1].args[0])  # type: ignore[arg-type]
        made = found[-1]
        given = set().union(*(self._keys[node] for node in made.all_input_nodes))
        fresh = made.op == "call_function" and self._keys[made].isdisjoint(given)
        return found if fresh else []

    def seen_otherwise(self, writer: fx.Node, chain: list[fx.Node]) -> bool:
        """Say whether what shows the storage of a chain, and was made before it is written to, is
        read afterwards.
        """
        now = self._time[writer]
        shown = {node for key in self._keys[chain[0]] for node in self._shown[key]}
        before = (node for node in shown.difference(chain) if self._time[node] < now)
        return any(self._time[user] > now for node in before for user in node.users)


def _whole(node: fx.Node) -> bool:
    """Say whether an operator works in place, and so returns all of its first argument."""
    name = op_name(node)
    return name.endswith("_") and not name.endswith("__") and node.args[:1] == (*writes(node)[:1],)


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    leaves = value if isinstance(value, list | tuple) else [value]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
