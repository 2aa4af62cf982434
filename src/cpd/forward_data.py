"""Calls of a traced forward as data, and the checks that go with them."""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental import recording, sym_node, symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .calls import Uncapturable
from .forward import Data, encode, op_name

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_ASKING = {x.__file__ for x in (torch, symbolic_shapes, sym_node, recording)}
Source = tuple[fx.Node, int | None]


class Apart(Uncapturable):
    """Two runs of one forward are of different operators or numbers."""


class Sizes(ShapeEnv):
    """Answers every question about symbolic sizes by the sizes at hand, and notes what the module's
    own code asked; operators check their sizes themselves.

    PyTorch's own would first try to prove the answer for all sizes, which takes seconds where
    images are padded and cut into windows.
    """

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        self.asked: list[Any] = []

    def _evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        value = orig_expr.xreplace(self.backed_var_to_val)
        if value.free_symbols or orig_expr.is_number:
            return super()._evaluate_expr(orig_expr, *args, **kwargs)
        if value is sympy.true or value is sympy.false:
            guard = orig_expr if value is sympy.true else sympy.Not(orig_expr)
        else:
            guard = sympy.Eq(orig_expr, value)
        if not self._suppress_guards_tls() and _branches():
            self.asked.append(guard)
        return value


def check_guards(graph: fx.Graph, guards: list[Any]) -> None:
    """Let the forward refuse sizes for which the module's code would have gone another way."""
    if not guards:
        return
    sources = _sources(graph)
    order = {node: k for k, node in enumerate(graph.nodes)}
    last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
    tracer = fx.proxy.GraphAppendingTracer(graph)
    for expr in dict.fromkeys(guards):
        if getattr(expr, "rel_op", "") == "==" and expr.rhs.is_number:
            raise Uncapturable("its code fixes a size of its inputs, as len() does")
        if not expr.free_symbols <= sources.keys():
            raise Uncapturable("it branches on more than sizes of its inputs and its children's")
        at = max([*last, *(sources[x][0] for x in expr.free_symbols)], key=order.__getitem__)
        with graph.inserting_before(at.next):
            sizes = {x: _size(tracer, *sources[x]) for x in expr.free_symbols}
            holds = sympy_interp(PythonReferenceAnalysis, sizes, expr)
            if isinstance(holds, fx.Proxy):
                tracer.create_proxy("call_function", torch._check, (holds,), {})


def _sources(graph: fx.Graph) -> dict[Any, Source]:
    """Return symbol -> (the first call that has a size of it, its axis); an integer has no axis."""
    found: dict[Any, Source] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        tensor = isinstance(value, torch.Tensor)
        for axis, size in enumerate(value.shape if tensor else [value]):
            if isinstance(size, torch.SymInt) and size.node._expr.is_symbol:
                found.setdefault(size.node._expr, (node, axis if tensor else None))
    return found


def _size(tracer: Any, node: fx.Node, axis: int | None) -> fx.Proxy:
    made = fx.Proxy(node, tracer)
    if axis is None:
        return made
    return tracer.create_proxy("call_function", torch.ops.aten.sym_size.int, (made, axis), {})


def _branches() -> bool:
    """Say whether it is the module's code that asks, not an operator."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename in _ASKING:
        frame = frame.f_back
    return not frame.f_code.co_filename.startswith((_TORCH, _HERE))


def child(path: str, *args: Any, **kwargs: Any) -> Any:
    """Stand for a call of a child in a graph under capture."""
    raise AssertionError(path, args, kwargs)


def data_of(single: fx.Graph, double: fx.Graph, *, flags_of_second: bool = False) -> list[Data]:
    """Return the calls as data; `double` is the same forward on float64, at one size.

    With `flags_of_second` true and false are as in `double` (it trains). Raises `Apart` where
    they differ in more.
    """
    twins = _twins(single, double)
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
            made.append(_node(node, twins.get(node, node), follows, flags_of_second))
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


def _node(a: fx.Node, b: fx.Node, follows: dict[str, str], flags_of_second: bool) -> Data:
    try:
        args, kwargs = (
            _merged(encode(x), encode(y), follows, flags_of_second)
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


def _merged(single: Any, double: Any, follows: dict[str, str], flags_of_second: bool) -> Any:
    """Let a type that changed with the inputs', and every device, be the inputs'."""
    if isinstance(single, dict) and isinstance(single.get("node"), str):
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
        return _merged_parts(single, double, follows, flags_of_second)
    if single != double:
        raise Apart("a number depends on the type of its inputs")
    return single


def _merged_parts(single: Any, double: Any, follows: dict[str, str], flags_of_second: bool) -> Any:
    keys, others = (x.keys() if isinstance(x, dict) else range(len(x)) for x in (single, double))
    if keys != others:
        raise Apart("its arguments depend on the type of its inputs")
    parts = [_merged(single[k], double[k], follows, flags_of_second) for k in keys]
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
