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

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode

from .on_meta import OnMeta
from .surgery import rebuild
from .trace import Trace, named_tensors, quiet_state

Holder = tuple[str, str, int | None]  # path of a module, its attribute, an entry of a tuple or list

_ALIKE = {
    "reshape": "view",
    "_unsafe_view": "view",
    "split_with_sizes": "split",
    "unsafe_split": "split",
    "slice": "__getitem__",
    "mul_": "mul",
    "multiply": "mul",
    "div_": "div",
    "divide": "div",
    "true_divide": "div",
}


class HandedOn:
    """Says whether what an attribute holds reaches a call of a module."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self._trace = model, trace
        self._asked: set[Holder] = set()
        self._believed: set[Holder] = set()  # what a run cannot tell
        self._lost: set[Holder] = set()  # computed with; it may have reached a call as another
        self._seen: set[tuple[Holder, str, str, int]] = set()
        self._first = {id(module): path for path, module in model.named_modules()}

    def ask(self, holders: Collection[Holder]) -> None:
        """Find out about these, in one run; nothing is run for those that are known."""
        asked = {self._canonical(holder) for holder in holders}
        if asked <= self._asked:
            return
        self._asked |= asked
        if not self._ran():
            self._believed |= self._asked

    def __call__(self, holder: Holder, path: str, op: str = "", index: int | None = None) -> bool:
        """Whether a call that the module at ``path`` makes is given what ``holder`` holds; of
        ``op``, as its ``index``-th number, where these are given.
        """
        holder, path = self._canonical(holder), self._name(path)
        if index is not None and op == "unflatten":
            index += 1  # behind the axis
        return holder in self._believed or any(
            (held, at) == (holder, path)
            and (not op or _ALIKE.get(called, called) == _ALIKE.get(op, op))
            and (index is None or place == index)
            for held, at, called, place in self._seen
        )

    def unknown(self, holder: Holder) -> bool:
        """Whether code computes with the number, and no call is given it as it is."""
        holder = self._canonical(holder)
        return holder in self._lost and all(held != holder for held, *_ in self._seen)

    def _name(self, path: str) -> str:
        return self._first[id(self._model.get_submodule(path))]

    def _canonical(self, holder: Holder) -> Holder:
        """One module may go by several names."""
        return (self._name(holder[0]), *holder[1:])

    def _ran(self) -> bool:
        devices: list[torch.device | None] = [torch.device("meta")]
        if not any(tensor.is_meta for _, tensor in named_tensors(self._model)):
            devices.append(None)  # code that asks for values has them
        for device in devices:
            try:
                self._run(device)
            except Exception:  # noqa: BLE001, S112 - whatever the code raises, it tells nothing
                continue
            return True
        return False

    def _run(self, device: torch.device | None) -> None:
        mode: AbstractContextManager[Any] = nullcontext() if device is None else OnMeta()
        held = {name: t.detach() for name, t in named_tensors(self._model)}
        if device is None:
            buffers = {name for name, _ in self._model.named_buffers(remove_duplicate=False)}
            held = {name: t.clone() if name in buffers else t for name, t in held.items()}
        else:
            held = {name: t.to(device) for name, t in held.items()}
        marked, watch = rebuild(self._model, held, {}).eval(), Watch()
        numbers = [self._marked(marked, x) for x in sorted(self._asked, key=str)]
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(device or x.device), (self._trace.args, self._trace.kwargs)
        )
        with quiet_state(), torch.no_grad(), watch.over(marked), mode:
            marked(*args, **kwargs)
        self._lost = {x.holder for x in numbers if x is not None and x.computed}
        self._seen = {
            (number.holder, path, name, place)
            for path, name, given in watch.calls
            for place, number in enumerate(given)
            if isinstance(number, _Marked)
        }

    def _marked(self, model: nn.Module, holder: Holder) -> _Marked | None:
        path, attribute, index = holder
        module = model.get_submodule(path)
        held = vars(module)[attribute]
        number = _Marked(held if index is None else held[index])
        number.holder, number.computed = holder, False
        try:
            if index is not None:
                entries = [*held[:index], number, *held[index + 1 :]]
                held = getattr(held, "_make", type(held))(entries)  # named tuples
            vars(module)[attribute] = number if index is None else held
        except Exception:  # noqa: BLE001 - a container of the user's own
            self._believed.add(holder)
            return None
        return number


class _Marked(int):
    """A number that knows which attribute it was read from, and whether code computes with it."""

    holder: Holder
    computed: bool

    def __hash__(self) -> int:
        return hash(("marked", self.holder))  # what is kept for equal numbers is not for this one


def _noting(name: str) -> Any:
    plain = getattr(int, name)

    def computed(self: _Marked, *others: Any) -> Any:
        self.computed = True
        return plain(self, *others)

    return computed


for _name in ("int", "index", "add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "neg"):
    setattr(_Marked, f"__{_name}__", _noting(f"__{_name}__"))


class Watch(TorchFunctionMode):
    """Notes the calls of PyTorch: the path of the module whose code makes one, its name, the
    numbers among its arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, tuple[int, ...]]] = []
        self._at = [""]

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Note what a model calls that is run inside."""
        handles = []
        for path, module in model.named_modules():

            def enter(*_: Any, path: str = path) -> None:
                self._at.append(path)

            def leave(*_: Any) -> None:
                self._at.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note a call, and make it."""
        del types
        numbers = tuple(_numbers((args, kwargs or {})))
        if numbers:
            self.calls.append((self._at[-1], getattr(func, "__name__", ""), numbers))
        return func(*args, **(kwargs or {}))


def _numbers(values: Any) -> Iterator[int]:
    """Every number among arguments, in order."""
    if isinstance(values, int):
        yield values
    elif isinstance(values, np.integer):
        yield int(values)
    elif isinstance(values, slice):
        yield from _numbers((values.start, values.stop, values.step))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, dict):
        yield from _numbers(list(values.values()))
