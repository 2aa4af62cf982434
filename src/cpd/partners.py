"""Partners: the calls of a captured forward beside those of its trace, where the two take other
ways.

Code may choose by what it is given how it computes the same (a kernel for grouped queries where
there is no mask, copies of the keys where there is one), and a trace may be given what a run is
not. Then calls of either have no partner in the other. What a plan must change is known from the
trace alone, so of the code no number that may be a size is left without a partner: with a stale
one a cut forward could run and be wrong. Everything else is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .calls import Uncapturable
from .forward import Data, encode
from .graph import Step

Pair = tuple[int, Step]
_WHOLE = sys.maxsize  # where a slice ends that takes all that is left
_NO_SIZES = {"input", "tensor", "output", "dtype", "device"}


def name_of(step: Step) -> str | None:
    """Return the name that a step's operator has in a forward; None for what is no operator."""
    target: Any = step.node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return f"{target.namespace}.{target._schema.name.split('::')[-1]}.{target._overloadname}"


def agree(held: Any, given: Any) -> bool:
    """Say whether the numbers of two calls are the same, where both are numbers: a slice that
    takes all stands in the code, but not always in a trace.
    """
    if isinstance(held, list) and isinstance(given, list):
        return all(agree(a, b) for a, b in zip(held, given, strict=False))
    if isinstance(held, dict) and isinstance(given, dict):
        return held.keys() != given.keys() or all(agree(held[k], given[k]) for k in held)
    if isinstance(held, str) or not isinstance(held, type(given)) or -1 in (held, given):
        return True
    return held == given


def apart(graph: list[Data], steps: list[Step]) -> list[Pair]:
    """Pair as many calls of a forward and of its trace as can be paired in their order.

    Raises `Uncapturable` where a pair reads from calls that are no pair, or where a number of the
    forward may be a size and has no partner.
    """
    _called_once(steps)
    numbers = [k for k, call in enumerate(graph) if "." in call["op"]]
    known = [step for step in steps if name_of(step) is not None]
    pairs = [(numbers[a], known[b]) for a, b in _longest(graph, numbers, known)]
    _read_alike(graph, pairs)
    none_left(graph, {number for number, _ in pairs})
    return pairs


def _called_once(steps: list[Step]) -> None:
    """A second call would leave steps without a partner that the code does make."""
    stacks = (step.node.meta.get("nn_module_stack") or {} for step in steps)
    if len({[*stack][-1] for stack in stacks if stack}) > 1:
        raise Uncapturable("it is called more than once, and its trace is another way of its code")


def _longest(graph: list[Data], numbers: list[int], steps: list[Step]) -> list[tuple[int, int]]:
    """Return the longest common subsequence of the calls, as pairs of places."""
    given = [(name_of(step), encode(list(step.node.args))) for step in steps]
    same = [[_same(graph[number], *call) for call in given] for number in numbers]
    best = np.zeros((len(numbers) + 1, len(steps) + 1), np.int64)
    for a in reversed(range(len(numbers))):
        for b in reversed(range(len(steps))):
            skipped = max(best[a + 1, b], best[a, b + 1])
            best[a, b] = 1 + best[a + 1, b + 1] if same[a][b] else skipped
    found, a, b = [], 0, 0
    while a < len(numbers) and b < len(steps):
        if same[a][b]:
            found.append((a, b))
            a, b = a + 1, b + 1
        elif best[a + 1, b] >= best[a, b + 1]:
            a += 1
        else:
            b += 1
    return found


def _same(call: Data, name: str | None, given: Any) -> bool:
    same = call["op"] == name and agree(call["args"], given)
    return same and _as_many(call["args"], given)


def _as_many(held: Any, given: Any) -> bool:
    """Say whether two calls have as many arguments, and the code no number where the trace has
    none.
    """
    if isinstance(held, dict) and isinstance(given, dict):
        return all(_as_many(held[k], given[k]) for k in held.keys() & given.keys())
    if isinstance(held, list) and isinstance(given, list):
        return len(held) == len(given) and all(map(_as_many, held, given))
    return given != -1 or held == -1 or isinstance(held, dict)


def _read_alike(graph: list[Data], pairs: list[Pair]) -> None:
    """Refuse a pair that reads, at one place, from two calls that have other partners."""
    partner = {graph[number]["name"]: step.node for number, step in pairs}
    back = {node: name for name, node in partner.items()}
    for number, step in pairs:
        given = encode(list(step.node.args))
        nodes = {node.name: node for node in step.node.all_input_nodes}
        for mine, theirs in _read(graph[number]["args"], given):
            node = nodes.get(theirs)
            if mine in partner and node in back and partner[mine] is not node:
                raise Uncapturable(f"its trace and its code disagree about {graph[number]['op']}")


def _read(held: Any, given: Any) -> Iterator[tuple[str, str]]:
    """Return the names of the calls that two calls read from, place by place."""
    if isinstance(held, dict) and isinstance(given, dict) and held.keys() == given.keys():
        for kind in held:
            if kind == "node":
                yield held[kind], given[kind]
            else:
                yield from _read(held[kind], given[kind])
    elif isinstance(held, list) and isinstance(given, list):
        for a, b in zip(held, given, strict=False):
            yield from _read(a, b)


def none_left(graph: list[Data], paired: set[int]) -> None:
    """Refuse a call without a partner that holds a number which may be a size."""
    products = _products(graph)
    for number, call in enumerate(graph):
        if number in paired or call["op"] in _NO_SIZES:
            continue
        if any(_may_be_size(x, products) for x in _numbers(call)):
            raise Uncapturable(
                f"its trace does not say what the numbers of {call['op']} in its code stand for"
            )


def _numbers(call: Data) -> Iterator[Any]:
    """Return the arguments of a call that may be sizes: numbers, lists of them, and the results of
    other calls in their place.
    """
    if call["op"] == "child":
        yield from (x for x in call["args"]["list"][1:] if not isinstance(x, str | dict))
    if "." not in call["op"]:
        return  # what is computed from sizes is looked at where it is used
    name, overload = call["op"].split(".")[1:]
    target: Any = getattr(getattr(torch.ops.aten, name), overload)
    given, named = call["args"]["list"], call["kwargs"]["dict"]
    for position, argument in enumerate(target._schema.arguments):
        kind = str(argument.real_type).lower()
        counts = "int" in kind or ("number" in kind and torch.Tag.pointwise not in target.tags)
        if not counts or argument.name.startswith("dim") or argument.name.endswith("_dim"):
            continue
        yield given[position] if position < len(given) else named.get(argument.name)


def _products(graph: list[Data]) -> set[str]:
    """Return the calls that compute a size from a product with a number, which may be one of
    channels or heads. Sums and parts of what is read from tensors are lengths.
    """
    found: set[str] = set()
    for call in graph:
        if "." in call["op"] or call["op"] in (*_NO_SIZES, "child", "getitem"):
            continue
        parts = call["args"]["list"]
        inside = {x["node"] for x in parts if isinstance(x, dict) and "node" in x}
        numbers = [x for x in parts if isinstance(x, int) and not isinstance(x, bool)]
        if inside & found or (numbers and call["op"] in ("mul", "pow")):
            found.add(call["name"])
    return found


def _may_be_size(value: Any, products: set[str]) -> bool:
    """Say whether a number may have to change with the channels: not where it is left to PyTorch
    (-1), takes all, is the first place, or is a length that is read from a tensor.
    """
    if isinstance(value, dict) and "node" in value:
        return value["node"] in products
    if isinstance(value, dict):
        return any(
            x not in (-1, 1) and _may_be_size(x, products) for x in next(iter(value.values()))
        )
    return isinstance(value, int) and not isinstance(value, bool) and value not in (0, _WHOLE)
