"""Trace: the graph of one forward pass, with the names of its parameters and buffers.

`torch.export` (non-strict) records ATen operators in evaluation mode, before decomposition:
`conv2d`, `linear` and attention stay single ops. The model is traced through a copy that shares its
tensors, so nothing on the model changes: no flag, hook, buffer or random state.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn

from .errors import InputError, TraceError
from .surgery import share

_BELOW = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).with_name("on_meta.py")))

_SELDOM = 10**6  # young collections to one of everything

Inputs = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """`tensors[placeholder]` is a parameter's or buffer's name; `aliases[name]` its first name
    where tied.
    """

    graph: fx.Graph
    tensors: dict[str, str]
    constants: dict[str, torch.Tensor]
    aliases: dict[str, str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def batch(self) -> int:
        """Size of the first axis of the first tensor among the inputs; 1 where there is none."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                return int(value.shape[0])
        return 1


def split_inputs(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as (args, kwargs): a tensor, a tuple of arguments, or a dict of
    keywords.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of arguments "
        "or a dict of keyword arguments, as the model's forward takes them"
    )


@contextmanager
def quiet_state(*, fused: bool = False) -> Iterator[None]:
    """Keep the random state, and make attention layers show their operators instead of a fused fast
    path; with `fused` they do as they do for the caller. What fake tensors cannot do is an error
    that is dealt with, and not printed besides.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast and fused)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, log.disabled = log.disabled, True
    try:
        with _no_idle_autocast(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations are not the user's
            yield
    finally:
        log.disabled = quiet
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def uncollected() -> Iterator[None]:
    """Let full collections of cycles wait: each of several would walk every module and every call
    that there is. Younger ones go on.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


@contextmanager
def _no_idle_autocast() -> Iterator[None]:
    """Let `autocast(enabled=False)` do nothing where nothing is cast: the exporter would make a
    graph of its own of what is inside.
    """
    kind = torch.autocast
    enter, leave = kind.__enter__, kind.__exit__

    def idle(context: Any) -> bool:
        return not context._enabled and not torch.is_autocast_enabled(context.device)

    def on_enter(self: Any) -> Any:
        return self if idle(self) else enter(self)

    def on_exit(self: Any, *error: Any) -> Any:
        return None if idle(self) else leave(self, *error)

    with patch.object(kind, "__enter__", on_enter), patch.object(kind, "__exit__", on_exit):
        yield


def trace(model: nn.Module, example_inputs: Inputs, *, training: bool = False) -> Trace:
    """Trace a model on example inputs, in evaluation mode or as it trains.

    Raises `InputError` where the model does not run on the inputs, `TraceError` where it runs but
    cannot be exported.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    args, kwargs = split_inputs(example_inputs)
    copy = share(model)
    copy.train(training)
    with quiet_state():
        try:
            with torch.no_grad():  # code that runs without gradients is then no graph of its own
                exported = torch.export.export(copy, args, kwargs, strict=False)
        except Exception as error:
            raise _explained(copy, args, kwargs, error) from error
    return _trace_of(model, exported, args, kwargs)


def _explained(
    copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> Exception:
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in args]
    shapes += [
        f"{k}={tuple(v.shape) if isinstance(v, torch.Tensor) else v!r}" for k, v in kwargs.items()
    ]
    name = type(copy).__name__
    try:
        with torch.no_grad():
            copy(*args, **kwargs)
    except Exception as failure:  # noqa: BLE001 - any error of the user's forward is reported as such
        return InputError(
            f"{name} does not run on these example inputs {shapes}: {type(failure).__name__}: "
            f"{failure}. Give inputs as its forward takes them: a tensor, a tuple of arguments or "
            "a dict of keywords."
        )
    text = str(error).strip().splitlines() or [""]
    return TraceError(
        f"{name} runs on {shapes} but torch.export cannot trace it: {type(error).__name__}: "
        f"{text[0]} "
        "Make control flow independent of tensor values, or comb a submodule that exports."
    )


def _trace_of(
    model: nn.Module, exported: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_tensors(model):
        aliases[name] = first.setdefault(id(tensor), name)
        shapes[name] = tuple(tensor.shape)
    signature = exported.graph_signature
    tensors = {}
    for table in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        for placeholder, name in table.items():
            tensors[placeholder] = aliases[name]
    constants = {
        placeholder: exported.constants[name]
        for placeholder, name in signature.inputs_to_lifted_tensor_constants.items()
    }
    return Trace(exported.graph, tensors, constants, aliases, args, kwargs, shapes)


def used_tensors(graph: Trace) -> set[str]:
    """Return the names of the parameters and buffers that a traced pass reads."""
    return {graph.tensors[n.name] for n in graph.graph.nodes if n.name in graph.tensors and n.users}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Return all parameters and buffers by all their names, tied ones under each."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def location(node: fx.Node) -> tuple[str, str]:
    """Return the innermost module's path and class of a node; ("", "") at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    path = path.split("@")[0].removeprefix("L['self'].").removeprefix("L['self']")
    path = path.partition("slice(")[0].removesuffix(".")  # a part of a list of modules has no path
    return path, kind.rsplit(".", 1)[-1]


def source_line(node: fx.Node) -> str:
    """Return "file:line" of the Python code that made a node, or "".

    It is the innermost line outside of PyTorch (the one inside where there is none), and the file
    is named as it is imported: no path of the machine goes into a report.
    """
    return innermost(re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or ""))


def innermost(frames: Sequence[tuple[str, object]]) -> str:
    """Return "file:line" of the last of frames (file, line) above PyTorch's own; "" for none.

    Files are named as they are imported; where all are PyTorch's own, the last is taken.
    """
    own = [(file, line) for file, line in frames if not file.startswith(_BELOW)]
    if not frames:
        return ""
    file, line = (own or frames)[-1]
    return f"{_imported_as(file)}:{line}"


@cache
def _imported_as(file: str) -> str:
    roots = [root for root in sys.path if root and Path(file).is_relative_to(root)]
    path = Path(file)
    return path.relative_to(max(roots, key=len)).as_posix() if roots else path.name
