"""Capture: a module's own forward as data, with its children as leaves.

The forward runs on fake tensors, in evaluation and in training mode. Axes that change with the
batch or the resolution are symbols, so that the calls read them from their inputs; every other size
is a number. What depends on the type of the inputs is found by running once more in float64.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from torch.overrides import TorchFunctionMode
from torch.utils._thunk import Thunk

from .calls import Uncapturable, filled, fix, form, forward_with, leaves_of
from .forward import Data, Forward
from .forward_data import check_guards, child, data_of, sources_of
from .surgery import share
from .trace import named_tensors, quiet_state

Shapes = list[tuple[int, ...]]


class TooSlow(Exception):
    """The arithmetic with symbolic sizes of a forward goes on and on."""


class _Budget(TorchFunctionMode):
    """Give up on a forward after some seconds of processor time."""

    def __init__(self, seconds: float = 3.0) -> None:
        super().__init__()
        self.until = time.process_time() + seconds

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if time.process_time() > self.until:
            raise TooSlow
        return func(*args, **(kwargs or {}))


def capture(
    module: nn.Module, calls: list[Data], batches: int, *, any_size: bool = True
) -> Forward:
    """Return the forward of a module that is called with the arguments in `calls`.

    Each of `calls` is what `bound` gives, from runs at several sizes of the batch (the first
    `batches` of them) and then of the rest: where their shapes differ the forward takes any size.
    With `any_size=False` only the batch may be any. Raises `Uncapturable`; `TooSlow` where the
    code's arithmetic with any resolution takes too long.
    """
    tree, varying = form(calls)
    if not any_size:
        _, few = form(calls[:batches])
        fix(tree, varying, few, calls[0])
        varying = few
    with quiet_state():
        single = _graph(module, calls[0], varying, torch.float32, training=False)
        double = _graph(module, calls[0], varying, torch.float64, training=True)
        if _alike(single, double):  # most modules leave it to their children to train
            graphs = {"eval": data_of(single, double), "train": data_of(double, single)}
        else:
            other = _graph(module, calls[0], varying, torch.float64, training=False)
            training = _graph(module, calls[0], varying, torch.float32, training=True)
            graphs = {"eval": data_of(single, other), "train": data_of(training, double)}
    return Forward(tree, graphs)


def _alike(single: fx.Graph, double: fx.Graph) -> bool:
    pairs = zip(single.nodes, double.nodes, strict=False)
    return len(single.nodes) == len(double.nodes) and all(a.target == b.target for a, b in pairs)


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
    inputs = _fake_inputs(fake, env, call, varying, dtype)
    sources = sources_of(inputs)
    returned: dict[str, Any] = {}

    def run(tensors: Data, plain: Data, inputs: list[Any]) -> list[Any]:
        given = filled(call, iter(inputs))
        vars(copied).update(plain)
        with stateless._reparametrize_module(copied, tensors), _leaf_calls(copied):
            out = forward_with(copied, given)
        flat, returned["spec"] = pytree.tree_flatten(out)
        returned["constants"] = [
            None if isinstance(x, torch.Tensor | torch.SymInt) else (x,) for x in flat
        ]
        return flat

    budget = _Budget() if any(any(axes) for axes in varying) else nullcontext()
    with fake, torch.no_grad(), budget:
        traced = _made(run, tensors, plain, inputs)
    _name_inputs(traced, [*tensors, *plain])
    check_guards(traced.graph, env, sources)
    _structure(traced.graph, returned)
    return traced.graph


def _made(run: Any, *args: Any) -> fx.GraphModule:
    try:
        make = proxy_tensor.make_fx(
            run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True
        )
        return make(*args)
    except (Uncapturable, TooSlow):
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise Uncapturable(f"{type(error).__name__}: {text}") from error


def _fake_inputs(
    mode: FakeTensorMode,
    env: ShapeEnv,
    call: Data,
    varying: list[tuple[bool, ...]],
    dtype: torch.dtype,
) -> list[Any]:
    """Return inputs without values; an integer that varies is a symbol."""
    made: list[Any] = []
    for k, (value, axes) in enumerate(zip(leaves_of(call)[0], varying, strict=True)):
        if isinstance(value, torch.Tensor):
            made.append(_fake(mode, value, axes, dtype))
        else:
            made.append(_symbol(env, value, k) if axes[0] else value)
    return made


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
