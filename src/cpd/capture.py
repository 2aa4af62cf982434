"""Capture: a module's own forward as data, with its children as leaves.

The forward runs on fake tensors, in evaluation and in training mode. Axes that change with the
batch or the resolution are symbols, so that the calls read them from their inputs; every other size
is a number. What depends on the type of the inputs is found by running once more in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.utils import stateless
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._thunk import Thunk

from .forward import Data, Forward, bound, encode, op_name, parameters
from .surgery import share
from .trace import named_tensors, quiet_state

Shapes = list[tuple[int, ...]]


_TORCH = str(Path(torch.__file__).parent)


class Uncapturable(Exception):
    """Why a module's forward cannot be had as data."""


def capture(module: nn.Module, calls: list[Data]) -> Forward:
    """Return the forward of a module that is called with the arguments in `calls`.

    Each of `calls` is what `bound` gives, from runs at several batch sizes and resolutions: where
    their shapes differ the forward takes any size. Raises `Uncapturable`.
    """
    tree, varying = _form(calls)
    with quiet_state():
        single = _graph(module, calls[0], varying, torch.float32, training=False)
        double = _graph(module, calls[0], varying, torch.float64, training=True)
        if _alike(single, double):  # most modules leave it to their children to train
            graphs = {"eval": _data(single, double), "train": _data(double, single)}
        else:
            other = _graph(module, calls[0], varying, torch.float64, training=False)
            training = _graph(module, calls[0], varying, torch.float32, training=True)
            graphs = {"eval": _data(single, other), "train": _data(training, double)}
    return Forward(tree, graphs)


def _alike(single: fx.Graph, double: fx.Graph) -> bool:
    pairs = zip(single.nodes, double.nodes, strict=False)
    return len(single.nodes) == len(double.nodes) and all(a.target == b.target for a, b in pairs)


def _form(calls: list[Data]) -> tuple[Data, list[tuple[bool, ...]]]:
    """Return the tree of the arguments, and which axes of its leaves vary between the calls."""
    flat = [_leaves(call) for call in calls]
    if len({str(spec) for _, spec in flat}) > 1:
        raise Uncapturable("it is called in several ways")
    counter = iter(range(len(flat[0][0])))
    tree = {name: _tree(value, counter) for name, value in calls[0].items()}
    varying = []
    for same in zip(*(leaves for leaves, _ in flat), strict=True):
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else (x,) for x in same]
        if len({len(shape) for shape in shapes}) > 1:
            raise Uncapturable("it is called with tensors of several ranks")
        varying.append(tuple(len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)))
    return tree, varying


def _is_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, int) and not isinstance(value, bool)
    )


def _leaves(call: Data) -> tuple[list[Any], Any]:
    """Return the inputs among the arguments, and the form of the rest."""
    leaves: list[Any] = []

    def walk(value: Any) -> Any:
        if _is_input(value):
            leaves.append(value)
            return "tensor" if isinstance(value, torch.Tensor) else "integer"
        if isinstance(value, list | tuple):
            return ["list", *map(walk, value)]
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if value is None or isinstance(value, bool | float | str):
            return ("is", value)
        raise Uncapturable(f"it is called with a {type(value).__name__}")

    return leaves, walk(call)


def _tree(value: Any, counter: Iterator[int]) -> Data:
    if _is_input(value):
        return {"input": next(counter), "tensor": isinstance(value, torch.Tensor)}
    if isinstance(value, list | tuple):
        return {"list": [_tree(item, counter) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _tree(item, counter) for key, item in value.items()}}
    return {"is": value}


def _graph(
    module: nn.Module,
    call: Data,
    varying: list[tuple[bool, ...]],
    dtype: torch.dtype,
    *,
    training: bool,
) -> fx.Graph:
    """Return the calls of one forward; its `output` holds the structure of what it returns."""
    copied = share(module)
    copied.train(training)
    env = ShapeEnv(duck_shape=False)
    fake = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    tensors = {name: _fake(fake, t, (), dtype) for name, t in named_tensors(copied)}
    plain = {
        name: _fake(fake, value, (), dtype)
        for name, value in vars(copied).items()
        if isinstance(value, torch.Tensor)
    }
    leaves, _ = _leaves(call)
    inputs = [
        _fake(fake, value, axes, dtype)
        if isinstance(value, torch.Tensor)
        else _symbol(env, value, k)
        if axes[0]
        else value
        for k, (value, axes) in enumerate(zip(leaves, varying, strict=True))
    ]
    sources = _sources(inputs)
    returned: dict[str, Any] = {}

    def run(tensors: Data, plain: Data, inputs: list[Any]) -> list[Any]:
        given = _filled(call, iter(inputs))
        vars(copied).update(plain)
        with stateless._reparametrize_module(copied, tensors), _leaf_calls(copied):
            out = _forward(copied, given)
        flat, returned["spec"] = pytree.tree_flatten(out)
        returned["constants"] = [
            None if isinstance(x, torch.Tensor | torch.SymInt) else (x,) for x in flat
        ]
        return flat

    try:
        with fake, torch.no_grad():
            traced = proxy_tensor.make_fx(
                run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True
            )(tensors, plain, inputs)
    except Uncapturable:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise Uncapturable(f"{type(error).__name__}: {text}") from error
    names = [*tensors, *plain]
    _name_inputs(traced, names)
    _check_guards(traced.graph, env, sources)
    _structure(traced.graph, returned)
    return traced.graph


def _fake(
    mode: FakeTensorMode, value: torch.Tensor, varying: tuple[bool, ...], dtype: torch.dtype
) -> torch.Tensor:
    shape = tuple(value.shape)
    kind = dtype if value.is_floating_point() else value.dtype
    like = torch.empty(shape, dtype=kind, device="meta")
    with torch.no_grad():
        if not any(varying):
            with mode:
                return torch.empty(shape, dtype=kind, device="cpu")
        sizes = [DimDynamic.DYNAMIC if v else DimDynamic.STATIC for v in varying]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        made = mode.from_tensor(like, symbolic_context=context)
        with mode:
            return torch.empty(made.shape, dtype=kind, device="cpu")


def _symbol(env: ShapeEnv, value: int, number: int) -> Any:
    from torch._dynamo.source import ConstantSource

    source = ConstantSource(f"integer_{number}")
    symbol = env.create_symbol(value, source, DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=value, source=source)


def _filled(call: Data, leaves: Iterator[Any]) -> Data:
    def walk(value: Any) -> Any:
        if _is_input(value):
            return next(leaves)
        if isinstance(value, list | tuple):
            return (
                type(value)(map(walk, value))
                if type(value) in (list, tuple)
                else [*map(walk, value)]
            )
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return value

    return {name: walk(value) for name, value in call.items()}


def _forward(module: nn.Module, given: Data) -> Any:
    args: list[Any] = []
    kwargs: Data = {}
    for name, kind, _ in parameters(type(module)):
        if kind is kind.VAR_POSITIONAL:
            args += given[name]
        elif kind is kind.VAR_KEYWORD:
            kwargs |= given[name]
        elif kind is kind.KEYWORD_ONLY:
            kwargs[name] = given[name]
        else:
            args.append(given[name])
    return module.forward(*args, **kwargs)


def child(path: str, *args: Any, **kwargs: Any) -> Any:
    """Stand for a call of a child in a graph under capture."""
    raise AssertionError(path, args, kwargs)


@contextmanager
def _leaf_calls(module: nn.Module) -> Iterator[None]:
    """Record calls of children as they are; what they compute is run, but not recorded."""
    paths = {id(part): path for path, part in module.named_modules()}
    original = nn.Module.__call__
    inside = False

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        mode = proxy_tensor.get_proxy_mode()
        if inside or mode is None:
            return original(self, *args, **kwargs)
        if not paths.get(id(self)):
            raise Uncapturable(f"it calls a {type(self).__name__} that is no child of it")
        inside = True
        try:
            with proxy_tensor.disable_proxy_modes_tracing():
                out = original(self, *args, **kwargs)
        finally:
            inside = False
        given, named = pytree.tree_map(lambda x: _proxy(mode.tracer, x), (args, kwargs))
        proxy = mode.tracer.create_proxy("call_function", child, (paths[id(self)], *given), named)
        return proxy_tensor.track_tensor_tree(out, proxy, constant=None, tracer=mode.tracer)

    with patch.object(nn.Module, "__call__", call):
        yield


def _proxy(tracer: Any, value: Any) -> Any:
    if not isinstance(value, torch.Tensor | torch.SymInt):
        return value
    found = proxy_tensor.fetch_object_proxy(tracer, value)
    if found is value:
        raise Uncapturable("it passes a constant tensor to a child")
    if isinstance(found, proxy_tensor._ProxyTensor):
        return found.proxy
    return found.force() if isinstance(found, Thunk) else found


def _name_inputs(traced: fx.GraphModule, names: list[str]) -> None:
    """Mark the placeholders of the module's own tensors with their names."""
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for number, node in enumerate(placeholders):
        if number < len(names):
            node.meta["tensor"] = names[number]


Source = tuple[int, int | None]


def _sources(inputs: list[Any]) -> dict[Any, Source]:
    """Return symbol -> (number of the input, its axis); an integer has no axis."""
    found: dict[Any, Source] = {}
    for number, value in enumerate(inputs):
        tensor = isinstance(value, torch.Tensor)
        for axis, size in enumerate(value.shape if tensor else [value]):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (number, axis if tensor else None))
    return found


def _check_guards(graph: fx.Graph, env: ShapeEnv, sources: dict[Any, Source]) -> None:
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
            symbols = {}
            for symbol in expr.free_symbols:
                if symbol not in sources:
                    raise Uncapturable("it branches on more than its inputs' sizes")
                number, axis = sources[symbol]
                made = fx.Proxy(placeholders[number], tracer)
                args = (made, axis)
                symbols[symbol] = (
                    made
                    if axis is None
                    else tracer.create_proxy("call_function", torch.ops.aten.sym_size.int, args, {})
                )
            holds = sympy_interp(PythonReferenceAnalysis, symbols, expr)
            if isinstance(holds, fx.Proxy):
                tracer.create_proxy("call_function", torch._check, (holds,), {})


def _branches(guard: Any) -> bool:
    place = getattr(guard.sloc.framework_loc, "filename", None) or str(guard.sloc.framework_loc)
    return _TORCH not in place


def _structure(graph: fx.Graph, returned: Data) -> None:
    """Put the structure of what the forward returns into its output node."""
    output = next(iter(reversed(graph.nodes)))
    flat = output.args[0]
    flat = list(flat) if isinstance(flat, list | tuple) else [flat]
    leaves = [
        node if constant is None else constant[0]
        for node, constant in zip(flat, returned["constants"], strict=True)
    ]
    output.args = (pytree.tree_unflatten(leaves, returned["spec"]),)


def _data(single: fx.Graph, double: fx.Graph) -> list[Data]:
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


def record(model: nn.Module, paths: list[str], run: Any) -> dict[str, list[Data]]:
    """Run a model, and return what the modules at `paths` are called with."""
    calls: dict[str, list[Data]] = {path: [] for path in paths}
    handles = []
    for path in paths:

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            calls[path].append(bound(module, args, kwargs))

        handles.append(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls
