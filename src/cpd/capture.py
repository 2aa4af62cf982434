"""Capture: a module's own forward as data, with its children as leaves.

The forward runs on fake tensors, in evaluation and in training mode. A size that changes with the
batch or the resolution is a row of values (`symbols`), the one at hand and what it would be for
other inputs, and the calls read it from their inputs; every other size is a number. What depends
on the type of the inputs is found by running once more in float64.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental import proxy_tensor
from torch.nn.utils import stateless
from torch.utils._thunk import Thunk

from .calls import Returned, Uncapturable, filled, form, forward_with, leaves_of, tensors_in
from .forward import Data, Forward
from .forward_data import Apart, child, data_of
from .surgery import share
from .symbols import Sizes
from .trace import named_tensors, quiet_state

Shapes = list[tuple[int, ...]]


def capture(module: nn.Module, calls: list[Data], children: list[Returned]) -> Forward:
    """Return the forward of a module that is called with the arguments in `calls`.

    Each of `calls` is what `bound` gives, from runs with inputs of several sizes: where their
    shapes differ the forward takes any size. `children`: what they return in these calls; where it
    is not known they are run. Raises `Uncapturable`.
    """
    tree, varying = form(calls)
    call = calls[0]

    def graph(kind: torch.dtype, *, training: bool, sizes: bool) -> fx.Graph:
        axes = varying if sizes else [(False,) * len(axes) for axes in varying]
        known = children if sizes and not training else []
        return _graph(module, call, axes, kind, known, training=training)

    def merged(single: fx.Graph, training: bool) -> list[Data]:
        try:
            return data_of(single, graph(torch.float64, training=training, sizes=False))
        except Apart:  # what is constant with one size need not be with any
            return data_of(single, graph(torch.float64, training=training, sizes=True))

    with quiet_state():
        single = graph(torch.float32, training=False, sizes=True)
        double = graph(torch.float64, training=True, sizes=False)
        try:  # most modules leave it to their children to train
            graphs = {
                "eval": data_of(single, double),
                "train": data_of(single, double, flags_of_second=True),
            }
        except Apart:
            other = graph(torch.float32, training=True, sizes=True)
            graphs = {"eval": merged(single, False), "train": merged(other, True)}
    return Forward(tree, graphs)


def _graph(
    module: nn.Module,
    call: Data,
    varying: list[tuple[bool, ...]],
    dtype: torch.dtype,
    children: list[Returned],
    *,
    training: bool,
) -> fx.Graph:
    """Return the calls of one forward; its `output` holds the structure of what it returns."""
    copied = share(module)
    copied.train(training)
    env = Sizes()
    fake = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    if any(any(axes) for axes in varying):
        fake.cache_enabled = False  # for sizes that vary it takes longer than it saves
    tensors = {name: _fake(fake, t, (), dtype) for name, t in named_tensors(copied)}
    plain = {
        name: _fake(fake, value, (), dtype)
        for name, value in vars(copied).items()
        if isinstance(value, torch.Tensor)
    }
    inputs = _fake_inputs(fake, env, call, varying, dtype)
    known = _Known(fake, env, children, {_held(module, call): dtype})
    returned: dict[str, Any] = {}

    def run(tensors: Data, plain: Data, inputs: list[Any]) -> list[Any]:
        given = filled(call, iter(inputs))
        vars(copied).update(plain)
        with stateless._reparametrize_module(copied, tensors), _leaf_calls(copied, known):
            out = forward_with(copied, given)
        flat, returned["spec"] = pytree.tree_flatten(out)
        returned["constants"] = [
            None if isinstance(x, torch.Tensor | torch.SymInt) else (x,) for x in flat
        ]
        return flat

    drawn = random.getstate()
    with fake, torch.no_grad():
        traced = _made(run, tensors, plain, inputs)
    if random.getstate() != drawn:
        random.setstate(drawn)
        raise Uncapturable("it draws random numbers of Python")
    _name_inputs(traced, [*tensors, *plain])
    _constants(traced)
    if env.refused:
        raise Uncapturable(env.refused)
    _structure(traced.graph, returned)
    return traced.graph


def _made(run: Any, *args: Any) -> fx.GraphModule:
    make = proxy_tensor.make_fx(
        run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True
    )
    try:  # layouts of symbolic sizes take their time, and nothing here reads them
        with patch.object(proxy_tensor, "_extract_tensor_metadata", lambda _: None):
            return make(*args)
    except Uncapturable:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise Uncapturable(f"{type(error).__name__}: {text}") from error


def _fake_inputs(
    mode: FakeTensorMode,
    env: Sizes,
    call: Data,
    varying: list[tuple[bool, ...]],
    dtype: torch.dtype,
) -> list[Any]:
    """Return inputs without values; an integer that varies is a symbol."""
    made: list[Any] = []
    for value, axes in zip(leaves_of(call)[0], varying, strict=True):
        if isinstance(value, torch.Tensor):
            made.append(_fake(mode, value, axes, dtype))
        else:
            made.append(env.size(value) if axes[0] else value)
    return made


def _fake(
    mode: FakeTensorMode,
    value: torch.Tensor,
    varying: tuple[bool, ...],
    dtype: torch.dtype,
    known: Mapping[int, torch.SymInt] | None = None,
) -> torch.Tensor:
    kind = dtype if value.is_floating_point() else value.dtype
    env: Any = mode.shape_env
    sizes = enumerate(zip(value.shape, varying, strict=False))
    known = known or {}
    shape = [(known[k] if k in known else env.size(n)) if v else n for k, (n, v) in sizes]
    with mode:
        return torch.empty(shape or value.shape, dtype=kind, device="cpu")


def _held(module: nn.Module, call: Data) -> torch.dtype:
    """Return the floating type that a module computes with."""
    tensors = [*(tensor for _, tensor in named_tensors(module)), *tensors_in(call)]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


class _Known:
    """What children return, made without running them: sizes that vary are symbols of their own."""

    def __init__(
        self,
        mode: FakeTensorMode,
        env: Sizes,
        children: list[Returned],
        dtypes: dict[torch.dtype, torch.dtype],
    ) -> None:
        self.mode, self.env, self.dtypes = mode, env, dtypes
        self.left = iter(children)
        self.relied: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # of one size in an axis

    def __call__(self, path: str, args: Any, kwargs: Any) -> Any:
        """Return the outputs of the next call of a child, or None where they are not known."""
        found = next(self.left, None)
        if found is None or found.first.path != path or not path:
            self.left = iter(())
            return None
        given = tensors_in((args, kwargs))
        leaves: list[Any] = []
        self.relied = []
        axes_of = zip(found.first.leaves, found.varying, found.batch, strict=True)
        for leaf, axes, batch in axes_of:
            if isinstance(leaf, torch.Tensor):
                known = self._batch(leaf, batch, given)
                leaves.append(self._tensor(leaf, axes, known))
                if leaves[-1] is None:
                    self.relied = []
                    return None
                self.relied += [(leaves[-1], given[0], axis) for axis in known]
            elif isinstance(leaf, tuple):
                leaves.append(given[leaf[0]])
            else:
                leaves.append(self.env.size(leaf[0]) if axes[0] else leaf[0])
        return pytree.tree_unflatten(leaves, found.first.spec)

    def _batch(
        self, leaf: torch.Tensor, batch: tuple[bool, ...], given: list[torch.Tensor]
    ) -> dict[int, torch.SymInt]:
        """Return the axes that are the batch of what a child was given, as far as it was seen."""
        found: dict[int, torch.SymInt] = {}
        like = given[0].shape if len(given) == 1 else ()
        for axis, (is_batch, mine, theirs) in enumerate(zip(batch, leaf.shape, like, strict=False)):
            same = self.env.again(theirs) if is_batch and mine == theirs else None
            if same is not None:
                found[axis] = same
        return found

    def _tensor(
        self, like: torch.Tensor, varying: tuple[bool, ...], known: dict[int, torch.SymInt]
    ) -> torch.Tensor | None:
        """Return a tensor of the same form; None where it has none of its own (views, sizes of
        one).
        """
        order = sorted(range(like.ndim), key=lambda k: (-like.stride()[k], k))
        moved = like.permute(order)
        special = any(v and size < 2 for v, size in zip(varying, like.shape, strict=True))
        if special or not moved.is_contiguous():
            return None
        kind = self.dtypes.get(like.dtype, like.dtype)
        with unset_fake_temporarily():
            axes = tuple(varying[k] for k in order)
            there = {at: known[k] for at, k in enumerate(order) if k in known}
            made = _fake(self.mode, moved, axes, kind, there)
        return made.permute([order.index(k) for k in range(like.ndim)])


@contextmanager
def _leaf_calls(module: nn.Module, known: _Known) -> Iterator[None]:
    """Record calls of children as they are; what they compute is known or run, but not recorded."""
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
                out = known(paths[id(self)], args, kwargs)
                out = original(self, *args, **kwargs) if out is None else out
        finally:
            inside = False
        given, named = pytree.tree_map(lambda x: _proxy(mode.tracer, x), (args, kwargs))
        proxy = mode.tracer.create_proxy("call_function", child, (paths[id(self)], *given), named)
        out = proxy_tensor.track_tensor_tree(out, proxy, constant=None, tracer=mode.tracer)
        for made, like, axis in known.relied:
            _check_same(mode.tracer, made, like, axis)
        known.relied = []
        return out

    with patch.object(nn.Module, "__call__", call):
        yield


def _check_same(tracer: Any, a: torch.Tensor, b: torch.Tensor, axis: int) -> None:
    """Let the forward check that two tensors have one size, which was not asked for."""
    read = torch.ops.aten.sym_size.int
    sizes = [
        tracer.create_proxy("call_function", read, (_proxy(tracer, x), axis), {}) for x in (a, b)
    ]
    same = tracer.create_proxy("call_function", operator.eq, tuple(sizes), {})
    tracer.create_proxy("call_function", torch._check, (same,), {})


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


def _constants(traced: fx.GraphModule) -> None:
    """Make the numbers that code writes into tensors where it stands; they are no tensors held."""
    for node in list(traced.graph.find_nodes(op="get_attr")):
        value = getattr(traced, str(node.target))
        if not isinstance(value, torch.Tensor) or value.ndim or value.is_meta:
            continue
        with traced.graph.inserting_before(node):
            made = traced.graph.call_function(
                torch.ops.aten.full.default, ([], value.item()), {"dtype": value.dtype}
            )
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        traced.graph.erase_node(node)


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
