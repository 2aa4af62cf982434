"""Memory: the peak of what is held at once while a traced graph runs, counted from the graph.

Held are all weights (parameters, buffers, constants) and the inputs from the first call to the
last, and what each call makes until the last call that reads it or a view of it. Calls run in the
order of the graph; what a kernel takes for itself while it runs is not in the graph, nor counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from .graph import Step
from .labels import Labels, Mask
from .rules import Factor
from .terms import Cost, Item, Values, factors_of
from .trace import Trace, location, named_tensors


@dataclass
class _Held:
    """One storage: how many bytes, and from which call to which (both included)."""

    item: Item
    first: int
    last: int


class Peak(Cost):
    """The largest sum, over all calls, of the bytes that are held during the call."""

    def __init__(self, held: Iterable[_Held], places: list[str]) -> None:
        held = list(held)
        super().__init__(one.item for one in held)
        self.places = places
        self._first = np.array([one.first for one in held], np.int64)
        self._after = np.array([one.last + 1 for one in held], np.int64)

    def _sums(self, values: Values) -> Values:
        change = np.zeros(len(self.places) + 1, np.int64)
        np.add.at(change, self._first, values)
        np.subtract.at(change, self._after, values)
        sums: Values = np.cumsum(change)[:-1]
        return sums

    def total(self, values: Values) -> int:
        """Return the peak."""
        return int(self._sums(values).max(initial=0))

    def place(self, alive_ids: Mask) -> str:
        """Return the call at which the peak arises: "conv2d in layer1.0.conv1"."""
        sums = self._sums(self.values(self.sizes(alive_ids)))
        return self.places[int(sums.argmax())] if self.places else ""


def peak(
    model: nn.Module,
    trace: Trace,
    steps: Iterable[Step],
    labels: Mapping[str, Labels],
    gates: Mapping[Any, tuple[Factor, ...]] | None = None,
) -> Peak:
    """Return the memory of a traced network in bytes, at the batch that it was traced with.

    `steps`: all calls with the labels of what they put out; `labels`: those of each tensor;
    `gates`: factors of what calls put out, and of tensors, that are 0 once a branch has gone.
    """
    gates = gates or {}
    nodes = list(trace.graph.nodes)
    calls = [node for node in nodes if node.op not in ("placeholder", "get_attr")]
    given = [node for node in nodes if node.op == "placeholder"]
    last = max(len(calls) - 1, 0)
    held = [_Held(item, 0, last) for item in _weights(model, trace, labels, gates)]
    storages: dict[int, _Held] = {}
    for node in given:
        inside = node.name in trace.tensors or node.name in trace.constants  # counted above
        for value in _tensors(node.meta.get("val")):
            storages[_storage(value)] = _Held((0 if inside else _bytes(value), ()), 0, last)
    made = {step.node: step.out for step in steps}
    gated: dict[int, tuple[Factor, ...]] = {}
    for time, node in enumerate(calls):
        for storage in (x for source in node.all_input_nodes for x in _storages(source)):
            if storage in storages:
                storages[storage].last = max(storages[storage].last, time)
        out = made.get(node)
        for number, value in enumerate(_tensors(node.meta.get("val"))):
            one = out[number] if isinstance(out, list) else out
            key, behind = _storage(value), gates.get(node, ())
            if behind and key not in storages:
                gated[key] = behind
            elif key in gated and behind != gated[key]:
                # what a branch made is written to outside of it: without the branch it begins here
                storages[key].last = time - 1
                held.append(storages.pop(key))
                gated.pop(key)
            storages.setdefault(key, _Held(_gated(_item(value, one), behind), time, time))
    places = [_place(node) for node in calls] or [""]
    return Peak([*held, *(one for one in storages.values() if one.item[0])], places)


def _weights(
    model: nn.Module,
    trace: Trace,
    labels: Mapping[str, Labels],
    gates: Mapping[Any, tuple[Factor, ...]],
) -> Iterable[Item]:
    """The bytes of every parameter, buffer and constant, tied ones once."""
    for name, tensor in named_tensors(model):
        if trace.aliases[name] == name:
            yield _gated(_item(tensor, labels.get(name)), gates.get(name, ()))
    yield sum(_bytes(tensor) for tensor in trace.constants.values()), ()


def _item(value: torch.Tensor, labels: Any) -> Item:
    if not isinstance(labels, Labels) or len(labels.shape) != value.ndim:
        return _bytes(value), ()
    times, factors = factors_of(labels, value.shape)
    return times * value.element_size(), factors


def _gated(item: Item, behind: tuple[Factor, ...]) -> Item:
    return item[0], (*item[1], *behind)


def _bytes(value: torch.Tensor) -> int:
    return prod(int(size) for size in value.shape) * value.element_size()


def _storage(value: torch.Tensor) -> int:
    """What tells views of one another from copies; the trace holds them all, so none is reused."""
    return value.untyped_storage()._cdata


def _storages(node: fx.Node) -> list[int]:
    return [_storage(value) for value in _tensors(node.meta.get("val"))]


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = value if isinstance(value, list | tuple) else [value]
    return [x for x in leaves if isinstance(x, torch.Tensor)]


def _place(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else str(node.target)
    path = location(node)[0]
    return f"{name} in {path}" if path else name
