"""Calls of a traced forward as data, and the checks that go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .calls import Uncapturable
from .forward import Data, encode, op_name

_TORCH = str(Path(torch.__file__).parent)
Source = tuple[int, int | None]


def sources_of(inputs: list[Any]) -> dict[Any, Source]:
    """Return symbol -> (number of the input, its axis); an integer has no axis."""
    found: dict[Any, Source] = {}
    for number, value in enumerate(inputs):
        tensor = isinstance(value, torch.Tensor)
        for axis, size in enumerate(value.shape if tensor else [value]):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (number, axis if tensor else None))
    return found


def check_guards(graph: fx.Graph, env: ShapeEnv, sources: dict[Any, Source]) -> None:
    """Let the forward refuse sizes for which the module's code would have gone another way.

    Only branches in the module's code count; operators check their sizes themselves.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder" and "tensor" not in n.meta]
    guards = [guard.expr for guard in env.guards if _branches(guard)]
    if not guards or not placeholders:
        return
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(placeholders[-1].next):
        for expr in guards:
            if getattr(expr, "rel_op", "") == "==" and expr.rhs.is_number:
                raise Uncapturable("its code fixes a size of its inputs, as len() does")
            if not expr.free_symbols <= sources.keys():
                raise Uncapturable("it branches on more than its inputs' sizes")
            sizes = {x: _size(tracer, placeholders, sources[x]) for x in expr.free_symbols}
            holds = sympy_interp(PythonReferenceAnalysis, sizes, expr)
            if isinstance(holds, fx.Proxy):
                tracer.create_proxy("call_function", torch._check, (holds,), {})


def _size(tracer: Any, placeholders: list[fx.Node], source: Source) -> fx.Proxy:
    number, axis = source
    made = fx.Proxy(placeholders[number], tracer)
    if axis is None:
        return made
    return tracer.create_proxy("call_function", torch.ops.aten.sym_size.int, (made, axis), {})


def _branches(guard: Any) -> bool:
    place = getattr(guard.sloc.framework_loc, "filename", None) or str(guard.sloc.framework_loc)
    return _TORCH not in place


def child(path: str, *args: Any, **kwargs: Any) -> Any:
    """Stand for a call of a child in a graph under capture."""
    raise AssertionError(path, args, kwargs)


def data_of(single: fx.Graph, double: fx.Graph) -> list[Data]:
    """Return the calls as data; `double` is the same forward on float64."""
    pairs = list(zip(single.nodes, double.nodes, strict=False))
    if len(single.nodes) != len(double.nodes) or any(
        a.target != b.target for a, b in pairs if a.op == "call_function"
    ):
        raise Uncapturable("its operators depend on the type of its inputs")
    inputs = [n for n in single.nodes if n.op == "placeholder" and "tensor" not in n.meta]
    first = next((n for n in inputs if _floating(n)), None)
    made: list[Data] = []
    follows = {kind: f"{first.name}_{kind}" for kind in ("dtype", "device") if first is not None}
    for a, b in pairs:
        if a.op == "placeholder" and "tensor" in a.meta:
            if a.users:
                made.append(_call(a.name, "tensor", [a.meta["tensor"]]))
        elif a.op == "placeholder":
            made.append(_call(a.name, "input", []))
            if a is inputs[-1]:
                made += [_call(name, kind, [first]) for kind, name in follows.items()]
        else:
            made.append(_node(a, b, follows))
    return _without_unused(made)


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _call(name: str, op: str, args: list[Any], kwargs: Data | None = None) -> Data:
    return {"name": name, "op": op, "args": encode(args), "kwargs": encode(kwargs or {})}


def _node(a: fx.Node, b: fx.Node, follows: dict[str, str]) -> Data:
    try:
        args, kwargs = (
            _merged(encode(list(a.args)), encode(list(b.args)), follows),
            _merged(encode(dict(a.kwargs)), encode(dict(b.kwargs)), follows),
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


def _merged(single: Any, double: Any, follows: dict[str, str]) -> Any:
    """Let a type that changed with the inputs', and every device, be the inputs'."""
    if isinstance(single, dict) and isinstance(single.get("dtype"), str) and single != double:
        if "dtype" not in follows:
            raise Uncapturable("a type follows no input")
        return {"node": follows["dtype"]}
    if isinstance(single, dict) and isinstance(single.get("device"), str):
        if "device" not in follows:
            raise Uncapturable("a device follows no input")
        return {"node": follows["device"]}
    if isinstance(single, dict):
        return {key: _merged(single[key], double[key], follows) for key in single}
    if isinstance(single, list):
        return [_merged(x, y, follows) for x, y in zip(single, double, strict=True)]
    if isinstance(single, float) and single != double:
        raise Uncapturable("a number depends on the type of its inputs")
    return single


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
