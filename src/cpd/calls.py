"""Calls: what a module is called with, as a tree of inputs and constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .forward import Data, bound, parameters


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


def fix(
    tree: Data, varying: list[tuple[bool, ...]], few: list[tuple[bool, ...]], call: Data
) -> None:
    """Write the sizes of axes that vary, but may not, into the leaves of a tree of arguments."""
    leaves, _ = leaves_of(call)
    for leaf in _inputs(tree):
        value, k = leaves[leaf["input"]], leaf["input"]
        axes = [a for a, (v, f) in enumerate(zip(varying[k], few[k], strict=True)) if v and not f]
        if axes and not isinstance(value, torch.Tensor):
            raise Uncapturable("its arithmetic with sizes takes too long")
        if axes:
            leaf["fixed"] = {str(axis): value.shape[axis] for axis in axes}


def _inputs(tree: Any) -> Iterator[Data]:
    if isinstance(tree, dict) and "input" in tree:
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _inputs(part)


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
