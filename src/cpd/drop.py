"""Drop: a forward as data without some of its additions, and without what only they read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .calls import Uncapturable
from .forward import Data, Forward
from .graph import Step
from .literals import aligned, in_training

_SIZES = ("aten.sym_size", "aten.sym_numel", "aten.sym_stride")
CLONE = "aten.clone.default"


@dataclass(frozen=True)
class Addition:
    """One addition of a forward: mode -> number of the call; `stays` is the place among its
    arguments of what is left of it. `written`: the call writes into what is left, so that nothing
    has to be copied.
    """

    numbers: Mapping[str, int]
    stays: int
    written: bool


def addition(forward: Forward, steps: list[Step], step: Step, stays: int) -> Addition:
    """Find the addition of a traced step in the forward of the module that makes it.

    Raises `Uncapturable` where it cannot be told which one it is.
    """
    if forward.others:
        raise Uncapturable("it is called in several ways")
    number = next((k for k, found in aligned(forward.graphs["eval"], steps) if found is step), None)
    trained = None if number is None else in_training(forward).get(number)
    if number is None or trained is None:
        raise Uncapturable("the addition is not in its code")
    call, other = forward.graphs["eval"][number], forward.graphs["train"][trained]
    if call["op"] != other["op"] or call["kwargs"] != {"dict": {}}:
        raise Uncapturable("its forward in training is another one")
    return Addition(
        {"eval": number, "train": trained}, stays, call["op"].endswith("add_.Tensor") and stays == 0
    )


def dropped(forward: Forward, additions: Iterable[Addition]) -> Forward:
    """Return a forward in which each addition is what stays of it."""
    graphs = copy.deepcopy(forward.graphs)
    instead: dict[str, dict[str, Data]] = {mode: {} for mode in graphs}
    for each in additions:
        for mode, number in each.numbers.items():
            call = graphs[mode][number]
            left = call["args"]["list"][each.stays]
            if each.written:
                instead[mode][call["name"]] = left
            else:
                call |= {"op": CLONE, "args": {"list": [left]}, "kwargs": {"dict": {}}}
    return Forward(
        forward.call,
        {mode: _needed(_renamed(graph, instead[mode])) for mode, graph in graphs.items()},
    )


def called(forward: Forward) -> set[str]:
    """Return the children that a forward calls, and the tensors of its module that it reads."""
    return {
        call["args"]["list"][0]
        for graph in forward.graphs.values()
        for call in graph
        if call["op"] in ("child", "tensor")
    }


def _renamed(graph: list[Data], instead: Mapping[str, Data]) -> list[Data]:
    def final(value: Data) -> Data:
        while value.get("node") in instead:
            value = instead[value["node"]]
        return value

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if isinstance(value.get("node"), str):
                return final(value)
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return [
        call | {"args": walk(call["args"]), "kwargs": walk(call["kwargs"])}
        for call in graph
        if call["name"] not in instead
    ]


def _needed(graph: list[Data]) -> list[Data]:
    """Leave out the calls that nothing needs any more: no output, and no check of what is left."""
    needed: set[str] = set()
    for call in reversed(graph):
        writes = _writes(call) and bool(set(_named(call["args"]["list"][:1])) & needed)
        if call["op"] in ("input", "output") or call["name"] in needed or writes:
            needed |= {call["name"], *_named(call["args"]), *_named(call["kwargs"])}
    known = set(needed)  # and sizes of what is left, which checks compute with
    for call in graph:
        inside = set(_named(call["args"])) | set(_named(call["kwargs"]))
        counts = "." not in call["op"] or call["op"].startswith(_SIZES)
        if counts and call["op"] not in ("child", "tensor") and inside and inside <= known:
            known.add(call["name"])
    for call in reversed(graph):
        if call["op"] == "check" and call["name"] in known:
            needed.add(call["name"])
        if call["name"] in needed:
            needed |= {*_named(call["args"]), *_named(call["kwargs"])}
    return [call for call in graph if call["name"] in needed]


def _writes(call: Data) -> bool:
    name = call["op"].partition(".")[2].partition(".")[0]
    return name.endswith("_") and not name.startswith("_")


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("node"), str):
            yield value["node"]
        for item in value.values():
            yield from _named(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named(item)
