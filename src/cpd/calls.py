"""Calls: what a module is called with, as a tree of inputs and constants, and what its children
return to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import nn

from .forward import Data, bound, parameters

Bound = Callable[[], Data]


class Uncapturable(Exception):
    """Why a module's forward cannot be had as data."""


def form(calls: list[Data]) -> tuple[Data, list[tuple[bool, ...]]]:
    """Return the tree of the arguments, and which axes of its leaves vary between the calls."""
    flat = [leaves_of(call) for call in calls]
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


def is_input(value: Any) -> bool:
    """Say whether a value is an input of the calls: a tensor or an integer."""
    return isinstance(value, torch.Tensor) or (
        isinstance(value, int) and not isinstance(value, bool)
    )


def leaves_of(call: Data) -> tuple[list[Any], Any]:
    """Return the inputs among the arguments, and the form of the rest."""
    leaves: list[Any] = []

    def walk(value: Any) -> Any:
        if is_input(value):
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
    if is_input(value):
        return {"input": next(counter), "tensor": isinstance(value, torch.Tensor)}
    if isinstance(value, list | tuple):
        return {"list": [_tree(item, counter) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _tree(item, counter) for key, item in value.items()}}
    return {"is": value}


def filled(call: Data, leaves: Iterator[Any]) -> Data:
    """Return the arguments of a call with other inputs in them."""

    def walk(value: Any) -> Any:
        if is_input(value):
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


def forward_with(module: nn.Module, given: Data) -> Any:
    """Run a module's own forward, without its hooks, on arguments by name."""
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


@dataclass(frozen=True)
class Made:
    """What a call of a child gave its caller: the child's path there, and what it returned.

    Leaves are tensors without values, an `int` k in a tuple for the k-th tensor that the child was
    given itself, or constants in a list.
    """

    path: str
    spec: Any
    leaves: list[Any]


def record(
    model: nn.Module, paths: list[str], run: Any
) -> tuple[dict[str, list[Bound]], dict[str, list[list[Made]]]]:
    """Run a model; return what the modules at `paths` are called with (bound when it is asked for:
    most are not), and what the children gave them that they call, in order.
    """
    calls: dict[str, list[Bound]] = {path: [] for path in paths}
    made: dict[str, list[list[Made]]] = {path: [] for path in paths}
    handles = []
    for path in paths:

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            calls[path].append(partial(bound, module, args, kwargs))

        handles.append(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    try:
        with _children(model, made):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls, made


@contextmanager
def _children(model: nn.Module, made: dict[str, list[list[Made]]]) -> Iterator[None]:
    """Note what every call of a module gives the module whose code made it."""
    names = {id(module): path for path, module in model.named_modules()}
    callers: list[tuple[str, list[Made]]] = []
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = names.get(id(self))
        if path is None:
            return original(self, *args, **kwargs)
        mine: list[Made] = []
        made.get(path, []).append(mine)
        callers.append((path, mine))
        try:
            out = original(self, *args, **kwargs)
        finally:
            callers.pop()
        if callers:
            caller, theirs = callers[-1]
            inside = path.removeprefix(f"{caller}.") if caller else path
            theirs.append(_made("" if inside == path and caller else inside, args, kwargs, out))
        return out

    with patch.object(nn.Module, "__call__", call):
        yield


def _made(path: str, args: Any, kwargs: Any, out: Any) -> Made:
    given = [id(x) for x in tensors_in((args, kwargs))]
    flat, spec = pytree.tree_flatten(out)

    def leaf(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return [x]
        if id(x) in given:
            return (given.index(id(x)),)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    return Made(path, spec, [leaf(x) for x in flat])


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors in nested values."""
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


@dataclass(frozen=True)
class Returned:
    """What a child returns where its caller may be called with several sizes: as `Made`, which
    axes of its tensors vary, and which are as long as the batch each time.
    """

    first: Made
    varying: list[tuple[bool, ...]]
    batch: list[tuple[bool, ...]]


def returned(made: list[list[Made]], batches: list[int]) -> list[Returned]:
    """Return what the children of a module return, from its calls at several sizes (`batches`: the
    network's batch at each); nothing where that cannot be told from them.
    """
    forms = {
        tuple((x.path, str(x.spec), *map(_form, x.leaves)) for x in children) for children in made
    }
    if len(forms) != 1:
        return []
    result = []
    for same in zip(*made, strict=True):
        varying, batch = [], []
        for leaves in zip(*(x.leaves for x in same), strict=True):
            sizes = [
                tuple(x.shape) if isinstance(x, torch.Tensor) else (_plain(x),) for x in leaves
            ]
            varying.append(tuple(len(set(axis)) > 1 for axis in zip(*sizes, strict=True)))
            batch.append(tuple([*axis] == batches for axis in zip(*sizes, strict=True)))
        result.append(Returned(same[0], varying, batch))
    return result


def _form(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype} {leaf.ndim}"
    return "integer" if isinstance(leaf, list) and is_input(leaf[0]) else repr(leaf)


def _plain(leaf: Any) -> int:
    """Return what a child returned that is an integer; of other leaves all are alike."""
    return leaf[0] if isinstance(leaf, list) and is_input(leaf[0]) else 0
