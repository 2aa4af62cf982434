"""Handed on: which attributes of a module reach the calls that code inside its children makes.

A literal of a child's call may be a number that a module around it holds and passes on; another
attribute out there may have the same value and mean something else (an axis, a depth). The network
runs once with marked numbers in place of those attributes, and every call tells which it was given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode

from .on_meta import OnMeta
from .surgery import share
from .trace import Trace, named_tensors, quiet_state

Holder = tuple[str, str, int | None]  # path of a module, its attribute, an entry of a tuple or list


class _Marked(int):
    """A number that knows which attribute it was read from."""

    holder: Holder


class HandedOn:
    """Says whether what an attribute holds reaches the calls of a module as it is."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self._trace = model, trace
        self._asked: set[Holder] = set()
        self._seen: set[tuple[Holder, str]] | None = set()
        self._first = {id(module): path for path, module in model.named_modules()}

    def ask(self, holders: Collection[Holder]) -> None:
        """Find out about these, in one run; nothing is run for those that are known."""
        new = set(holders) - self._asked
        if new and self._seen is not None:
            self._asked |= new
            self._seen = self._runs(self._asked)

    def __call__(self, holder: Holder, path: str) -> bool:
        """Whether a call that the module at ``path`` makes is given what ``holder`` holds; True
        where the network does not run with marked numbers.
        """
        name = self._first[id(self._model.get_submodule(path))]
        return self._seen is None or (holder, name) in self._seen

    def _runs(self, holders: Collection[Holder]) -> set[tuple[Holder, str]] | None:
        devices = [torch.device("meta")]
        if not any(tensor.is_meta for _, tensor in named_tensors(self._model)):
            devices.append(torch.device("cpu"))  # code that asks for values has them
        for device in devices:
            try:
                return self._run(holders, device)
            except Exception:  # noqa: BLE001, S112 - whatever the code raises, it tells nothing
                continue
        return None

    def _run(self, holders: Collection[Holder], device: torch.device) -> set[tuple[Holder, str]]:
        marked = share(self._model).eval()
        for holder in holders:
            _mark(marked, holder)
        tensors = {name: t.detach().to(device) for name, t in named_tensors(marked)}
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(device), (self._trace.args, self._trace.kwargs)
        )
        watch = _Watch(marked)
        with quiet_state(), torch.no_grad(), watch.inside(), watch:
            if device.type == "meta":
                with OnMeta():
                    torch.func.functional_call(marked, tensors, args, kwargs)
            else:
                torch.func.functional_call(marked, tensors, args, kwargs)
        return watch.seen


def _mark(model: nn.Module, holder: Holder) -> None:
    path, attribute, index = holder
    module = model.get_submodule(path)
    held = vars(module)[attribute]
    number = _Marked(held if index is None else held[index])
    number.holder = holder
    if index is None:
        vars(module)[attribute] = number
        return
    entries = [*held[:index], number, *held[index + 1 :]]
    made = getattr(held, "_make", type(held))  # named tuples
    vars(module)[attribute] = made(entries)


class _Watch(TorchFunctionMode):
    """Notes for each call of PyTorch the marked numbers among its arguments, and who made it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: set[tuple[Holder, str]] = set()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._at = [""]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Know whose forward is running."""
        original = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._at.append(self._paths.get(id(module), self._at[-1]))
            try:
                return original(module, *args, **kwargs)
            finally:
                self._at.pop()

        with patch.object(nn.Module, "__call__", call):
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note what a call is given, and make it."""
        del types
        for value in _numbers((args, kwargs or {})):
            self.seen.add((value.holder, self._at[-1]))
        return func(*args, **(kwargs or {}))


def _numbers(values: Any) -> Iterator[_Marked]:
    if isinstance(values, _Marked):
        yield values
    elif isinstance(values, slice):
        yield from _numbers((values.start, values.stop, values.step))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, dict):
        yield from _numbers(list(values.values()))
