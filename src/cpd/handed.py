"""Handed on: which attributes of the modules reach which calls, as they are.

A literal of a call may be a number that the module around it holds and passes on; another attribute
may have the same value and mean something else (an axis, a depth, heads beside head dims). The
network runs once with marked numbers in place of those attributes, and every call tells which it
was given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode

from .on_meta import OnMeta
from .surgery import rebuild, share
from .trace import Trace, named_tensors, quiet_state

Holder = tuple[str, str, int | None]  # path of a module, its attribute, an entry of a tuple or list
Seen = tuple[Holder, str, str, int]  # path of the module that calls, name of what it calls, place


_ALIKE = {
    "reshape": "view",
    "_unsafe_view": "view",
    "split_with_sizes": "split",
    "unsafe_split": "split",
    "slice": "__getitem__",
}


class _Marked(int):
    """A number that knows which attribute it was read from."""

    holder: Holder


class HandedOn:
    """Says whether what an attribute holds reaches a call of a module."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self._trace = model, trace
        self._asked: set[Holder] = set()
        self._seen: set[Seen] | None = set()
        self._first = {id(module): path for path, module in model.named_modules()}

    def ask(self, holders: Collection[Holder]) -> None:
        """Find out about these, in one run; nothing is run for those that are known."""
        new = set(holders) - self._asked
        if new and self._seen is not None:
            self._asked |= new
            self._seen = self._runs(self._asked)

    def __call__(self, holder: Holder, path: str, op: str = "", index: int | None = None) -> bool:
        """Whether a call that the module at ``path`` makes is given what ``holder`` holds; of
        ``op``, as its ``index``-th number, where these are given.

        True where the network does not run with marked numbers.
        """
        if self._seen is None:
            return True
        name = self._first[id(self._model.get_submodule(path))]
        if index is not None and op == "unflatten":
            index += 1  # behind the axis
        return any(
            (held, at) == (holder, name)
            and (not op or _ALIKE.get(called, called) == _ALIKE.get(op, op))
            and (index is None or place == index)
            for held, at, called, place in self._seen
        )

    def _runs(self, holders: Collection[Holder]) -> set[Seen] | None:
        devices = [torch.device("meta")]
        if not any(tensor.is_meta for _, tensor in named_tensors(self._model)):
            devices.append(torch.device("cpu"))  # code that asks for values has them
        for device in devices:
            try:
                return self._run(holders, device)
            except Exception:  # noqa: BLE001, S112 - whatever the code raises, it tells nothing
                continue
        return None

    def _run(self, holders: Collection[Holder], device: torch.device) -> set[Seen]:
        mode: AbstractContextManager[Any]
        if device.type == "meta":
            held = {name: t.detach().to(device) for name, t in named_tensors(self._model)}
            marked, mode = rebuild(self._model, held, {}), OnMeta()
        else:
            marked, mode = share(self._model), nullcontext()
        for holder in holders:
            _mark(marked, holder)
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(device), (self._trace.args, self._trace.kwargs)
        )
        watch = _Watch(marked.eval())
        with quiet_state(), torch.no_grad(), watch.inside(), watch, mode:
            marked(*args, **kwargs)
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
        self.seen: set[Seen] = set()
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
        name = getattr(func, "__name__", "")
        for place, value in enumerate(_numbers((args, kwargs or {}))):
            if isinstance(value, _Marked):
                self.seen.add((value.holder, self._at[-1], name, place))
        return func(*args, **(kwargs or {}))


def _numbers(values: Any) -> Iterator[int]:
    """Every number among arguments, in order."""
    if isinstance(values, int):
        yield values
    elif isinstance(values, slice):
        yield from _numbers((values.start, values.stop, values.step))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, dict):
        yield from _numbers(list(values.values()))
