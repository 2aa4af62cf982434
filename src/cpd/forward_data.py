"""Calls of a traced forward as data."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .calls import Uncapturable
from .forward import Data, encode, op_name

Alike = Callable[[str, Any], bool]


class Apart(Uncapturable):
    """Two runs of one forward are of different operators or numbers."""


def child(path: str, *args: Any, **kwargs: Any) -> Any:
    """Stand for a call of a child in a graph under capture."""
    raise AssertionError(path, args, kwargs)


def data_of(single: fx.Graph, double: fx.Graph, *, flags_of_second: bool = False) -> list[Data]:
    """Return the calls as data; `double` is the same forward on float64, at one size.

    With `flags_of_second` true and false are as in `double` (it trains). Raises `Apart` where
    they differ in more.
    """
    twins = _twins(single, double)
    same = _Same(single, double, twins)
    inputs = [n for n in single.nodes if n.op == "placeholder" and "tensor" not in n.meta]
    first = next((n for n in inputs if _floating(n)), None)
    made: list[Data] = []
    follows = {kind: f"{first.name}_{kind}" for kind in ("dtype", "device") if first is not None}
    for node in single.nodes:
        if node.op == "placeholder" and "tensor" in node.meta:
            if node.users:
                made.append(_call(node.name, "tensor", [node.meta["tensor"]]))
        elif node.op == "placeholder":
            made.append(_call(node.name, "input", []))
            if node is inputs[-1]:
                made += [_call(name, kind, [first]) for kind, name in follows.items()]
        else:
            made.append(_node(node, twins.get(node, node), follows, flags_of_second, same))
    return _without_unused(made)


def _twins(single: fx.Graph, double: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return each call that is no arithmetic with sizes with its twin."""
    pairs = [[n for n in graph.nodes if not _counts(n)] for graph in (single, double)]
    same = all(
        a.target == b.target or a.op != "call_function" for a, b in zip(*pairs, strict=False)
    )
    if len(pairs[0]) != len(pairs[1]) or not same:
        raise Apart("its operators depend on the type of its inputs")
    return dict(zip(*pairs, strict=True))


def _counts(node: fx.Node) -> bool:
    """Say whether a call only computes sizes, or does nothing at the sizes at hand."""
    if node.op != "call_function" or node.target is child or node.target is operator.getitem:
        return False
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or "::sym_" in target._schema.name:
        return True
    if target not in (torch.ops.aten.slice.Tensor, torch.ops.aten.alias.default):
        return False
    given: Any = node.args[0]
    return _hints(given) == _hints(node)


def _hints(node: fx.Node) -> list[int]:
    shape = node.meta["val"].shape
    return [x.node.hint if isinstance(x, torch.SymInt) else x for x in shape]


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _call(name: str, op: str, args: list[Any], kwargs: Data | None = None) -> Data:
    return {"name": name, "op": op, "args": encode(args), "kwargs": encode(kwargs or {})}


class _Same:
    """Says whether what two runs give to a call is the same: calls that are twins, or one size."""

    def __init__(self, single: fx.Graph, double: fx.Graph, twins: dict[fx.Node, fx.Node]) -> None:
        self.single, self.double = ({n.name: n for n in graph.nodes} for graph in (single, double))
        self.twins = twins

    def __call__(self, name: str, other: Any) -> bool:
        mine = _whole(self.single[name])
        theirs = _whole(self.double[other["node"]]) if isinstance(other, dict) else other
        if mine in self.twins:
            return self.twins[mine] is theirs
        return _hint(mine) == _hint(theirs)


def _whole(node: fx.Node) -> fx.Node:
    """Return what a slice of all, or an alias, shows."""
    while _counts(node) and _tensor_of(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _tensor_of(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _hint(value: Any) -> Any:
    """Return the number at hand of a size, given as a number or as the call that computes it."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value


def _node(
    a: fx.Node, b: fx.Node, follows: dict[str, str], flags_of_second: bool, same: _Same
) -> Data:
    # A call that only computes sizes has no twin: these are looked at where they are used.
    alike: Alike = same if a is not b else lambda *_: True
    try:
        args, kwargs = (
            _merged(encode(x), encode(y), follows, flags_of_second, alike)
            for x, y in ((list(a.args), list(b.args)), (dict(a.kwargs), dict(b.kwargs)))
        )
    except TypeError as error:
        raise Uncapturable(str(error)) from error
    op: str | None
    if a.op == "output":
        op = "output"
    elif a.op == "call_function":
        op = "child" if a.target is child else op_name(a.target)
    else:
        op = None
    if op is None:
        raise Uncapturable(f"its code uses {a.target}, which a forward as data cannot hold")
    return {"name": a.name, "op": op, "args": args, "kwargs": kwargs}


def _merged(
    single: Any, double: Any, follows: dict[str, str], flags_of_second: bool, same: Alike
) -> Any:
    """Let a type that changed with the inputs', and every device, be the inputs'."""
    if isinstance(single, dict) and isinstance(single.get("node"), str):
        if not same(single["node"], double):
            raise Apart("what it computes with depends on the type of its inputs")
        return single  # a size that is a number in the other run, or the same call
    for kind in ("dtype", "device") if isinstance(single, dict) else ():
        if isinstance(single.get(kind), str) and (kind == "device" or single != double):
            if kind not in follows:
                raise Uncapturable(f"a {kind} follows no input")
            return {"node": follows[kind]}
    if isinstance(single, bool) and isinstance(double, bool):
        return double if flags_of_second else single
    if type(single) is not type(double):
        raise Apart("a value depends on the type of its inputs")
    if isinstance(single, dict | list):
        return _merged_parts(single, double, follows, flags_of_second, same)
    if single != double:
        raise Apart("a number depends on the type of its inputs")
    return single


def _merged_parts(
    single: Any, double: Any, follows: dict[str, str], flags_of_second: bool, same: Alike
) -> Any:
    keys, others = (x.keys() if isinstance(x, dict) else range(len(x)) for x in (single, double))
    if keys != others:
        raise Apart("its arguments depend on the type of its inputs")
    parts = [_merged(single[k], double[k], follows, flags_of_second, same) for k in keys]
    return dict(zip(keys, parts, strict=True)) if isinstance(single, dict) else parts


def _without_unused(made: list[Data]) -> list[Data]:
    used: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("node"), str):
                used.add(value["node"])
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    kept = []
    for node in reversed(made):
        if node["op"] in ("dtype", "device", "tensor") and node["name"] not in used:
            continue
        walk(node["args"])
        walk(node["kwargs"])
        kept.append(node)
    return kept[::-1]
