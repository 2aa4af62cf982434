"""What is on the shelf, for the page of all rules and the test that no operator is unknown."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .base import find, known

# Operators, or what stands in for one in a graph, through which no channel passes -> why.
NO_CHANNELS = {
    "getitem": "one of several outputs: its labels are those of that output",
    "_assert_tensor_metadata": "a check of types, which puts nothing out",
    "_assert_async": "a check of values, which puts nothing out",
    "wrap_with_set_grad_enabled": "traced without gradients, its calls stand in the graph",
    "wrap_with_autocast": "an idle one is left out; an active one freezes what goes in",
}


class Kind(NamedTuple):
    """A file of the shelf: its title, and what it says of itself."""

    title: str
    text: str


def bare(op: str) -> str:
    """Return the name of an operator without its namespace and overload."""
    parts = op.split(".")
    name = parts[1] if len(parts) > 1 else parts[0]
    twin = name.endswith("_") and not name.endswith("__") and find(name) is find(name[:-1])
    return name[:-1] if twin else name


def status(op: str) -> str:
    """Say how an operator is known: by "rule", as "pointwise" (its tag), as "none", or ""."""
    name = bare(op)
    if find(name) is not None:
        return "rule"
    if name in NO_CHANNELS:
        return "none"
    packets = [getattr(torch.ops.aten, name, None), getattr(torch.ops.aten, name.rstrip("_"), None)]
    overloads = [getattr(p, o) for p in packets if p is not None for o in p.overloads()]
    return "pointwise" if any(torch.Tag.pointwise in o.tags for o in overloads) else ""


def shelf() -> dict[Kind, list[tuple[tuple[str, ...], str]]]:
    """Return file of rules -> (operators, what the rule does to channels), in reading order."""
    by_rule: dict[object, list[str]] = {}
    for op in known():
        by_rule.setdefault(find(op), []).append(op)
    found: dict[Kind, list[tuple[int, tuple[str, ...], str]]] = {}
    for rule, ops in by_rule.items():
        module = sys.modules[rule.__module__]
        head, _, rest = (module.__doc__ or "").strip().partition("\n\n")
        kind = Kind(rule.__module__.rpartition(".")[2].capitalize(), _flat([head, rest]))
        line = rule.__code__.co_firstlineno  # type: ignore[attr-defined]
        found.setdefault(kind, []).append((line, tuple(sorted(ops)), _flat([rule.__doc__ or ""])))
    return {kind: [entry[1:] for entry in sorted(found[kind])] for kind in sorted(found)}


def _flat(texts: Iterable[str]) -> str:
    return " ".join(" ".join(texts).split())
