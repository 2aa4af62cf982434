"""Replace: which modules run a forward as data, and which of its literals carry channels.

A module whose code computes a size that no attribute holds (`C // num_heads`) cannot follow a cut
by itself. Its forward is captured (`capture`); the calls are matched with those of the traced
network, which know for every literal whose axis it is; a plan then only writes the new numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, partial
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn

from .calls import Returned, Uncapturable, leaves_of, returned
from .capture import capture
from .channels import Ids
from .forward import Data, Forward, changed
from .graph import Step
from .labels import Labels, Mask, axis_size
from .literals import Disagreement, Literal, Place, goes_apart, matched, scales_of
from .recorded import Recorded
from .rules import Size
from .trace import Trace, location, named_tensors

_SPARSE = 8  # numbers to one that is there
_ENOUGH = 3  # modules of one class that fail for one reason: others are not tried


@dataclass(frozen=True)
class Template:
    """A captured forward, with the sizes behind its literals and the scales to be written into
    it; `rigid` sizes it computes from its inputs, so they must stay. `others`: the same for calls
    of other forms.
    """

    forward: Forward
    places: dict[Place, Literal]
    rigid: list[Size]
    scales: dict[Place, tuple[Labels, int]]
    ids: Ids
    others: tuple[Template, ...] = ()

    def at(self, alive: Mask) -> Forward | None:
        """Return the forward for live ids; None where nothing that passes through it changes."""
        return None if alive[self.ids].all() else self._changed(alive)

    def _changed(self, alive: Mask) -> Forward:
        values: dict[Place, Any] = {}
        for size in self.rigid:
            if axis_size(size.labels, size.axis, alive) != size.old:
                raise Disagreement(f"a size of {size.old} is computed from the inputs")
        for place, literal in self.places.items():
            values[place] = literal.at(alive)
        for place, (labels, axis) in self.scales.items():
            values[place] = labels.shape[axis] ** -0.5
        others = tuple(other._changed(alive) for other in self.others)
        return replace(changed(self.forward, values), others=others)


class Replacements:
    """The forwards of one network that may be replaced, captured when they are first asked for."""

    def __init__(self, model: nn.Module, trace: Trace, steps: list[Step], *, strict: bool) -> None:
        self.model, self.trace, self.strict = model, trace, strict
        self.steps: dict[str, list[Step]] = {}
        for step in steps:
            self.steps.setdefault(location(step.node)[0], []).append(step)
        self.active: dict[str, Template] = {}
        self.why_not: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self._made: dict[str, Template | None] = {}
        self._recorded = Recorded(model, trace, list(self.steps))
        self._captured: dict[Any, Forward | str] = {}
        self._failed: dict[type, list[str]] = {}

    def enable(self, paths: Iterable[str], why: str) -> list[str]:
        """Let plans replace the forwards at `paths`; return those that were not so before."""
        added = []
        for path in dict.fromkeys(paths):
            template = None if path in self.active else self.template(path)
            if template is not None:
                self.active[path] = template
                self.why[path] = why
                added.append(path)
        return added

    def disable(self, paths: Iterable[str]) -> None:
        """Let the forwards at `paths` stay as they are."""
        for path in paths:
            self.active.pop(path)
            self.why.pop(path)

    def at(self, alive: Mask) -> dict[str, Forward]:
        """Return path -> forward for live ids, where one must be replaced."""
        found = {}
        for path, template in self.active.items():
            try:
                found[path] = template.at(alive)
            except Disagreement as error:
                raise Disagreement(str(error), path) from error
        return {path: forward for path, forward in found.items() if forward is not None}

    def template(self, path: str) -> Template | None:
        """Return the captured forward of a module; None where it cannot be had (see `why_not`)."""
        if path not in self._made:
            try:
                self._made[path] = self._template(path)
            except Uncapturable as reason:
                self.why_not[path] = str(reason)
                self._made[path] = None
        return self._made[path]

    def _template(self, path: str) -> Template:
        module = self.model.get_submodule(path)
        if self.strict:
            raise Uncapturable("the class is to be kept")
        if type(module).__module__.startswith("torch."):
            raise Uncapturable("it is a layer of PyTorch")
        failed = self._failed.get(type(module), [])
        if failed[_ENOUGH - 1 :] and len(set(failed)) == 1:
            raise Uncapturable(failed[0])  # the same code, which takes its time
        calls = self._recorded.of(path)
        if not calls:
            why = self._recorded.why_not.get(path, "it is called by another way than its forward")
            raise Uncapturable(why)
        try:
            made = self._recorded.children.get(path, [])
            children = returned(made, self._recorded.batches.get(path, []))
            forward = self._capture(module, calls, children)
            if goes_apart(forward, self.steps.get(path, [])):
                return self._of_both_ways(path, module, calls)
            return self._matched(path, forward)
        except Uncapturable as reason:
            self._failed.setdefault(type(module), []).append(str(reason))
            raise

    def _matched(self, path: str, forward: Forward) -> Template:
        steps = self.steps.get(path, [])
        places, rigid = matched(forward, steps)
        return Template(forward, places, rigid, scales_of(forward, steps), self.passing(path))

    def _of_both_ways(self, path: str, module: nn.Module, calls: list[Data]) -> Template:
        """Return the forward of a module that takes another way while it is traced: where it is
        then called in another form, it can be called in both.
        """
        if self._recorded.on_values and self._recorded.one_length:
            raise Uncapturable("it runs with inputs of one length alone")
        made = self._matched(path, self._capture(module, calls, []))
        traced = [call() for call in self._recorded.traced.get(path, [])]
        if not traced or str(leaves_of(traced[0])[1]) == str(leaves_of(calls[0])[1]):
            return made
        other = self._matched(path, self._capture(module, traced, []))
        return replace(made, others=(other,))

    def passing(self, path: str) -> Ids:
        """Return the ids of all that a module and its children compute with."""
        inside = [k for k in self.steps if not path or f"{k}.".startswith(f"{path}.")]
        return _distinct([self._own[k] for k in inside])

    @cached_property
    def _own(self) -> dict[str, Ids]:
        """The ids of all that each module's own code computes with."""
        found = {}
        for path, steps in self.steps.items():
            ids = {}
            for value in pytree.tree_leaves([[x.out, list(x.args.values())] for x in steps]):
                if isinstance(value, Labels):
                    ids.update({id(layer.ids): layer.ids for layer in value.layers})
            found[path] = _distinct(list(ids.values()))
        return found

    def _capture(self, module: nn.Module, calls: list[Data], children: list[Returned]) -> Forward:
        """Capture a forward once for all modules that have the same code and numbers."""
        key = (_key(module, calls), bool(children))
        if key not in self._captured:
            try:
                self._captured[key] = capture(module, calls, children)
            except Uncapturable as reason:
                self._captured[key] = str(reason)
        found = self._captured[key]
        if isinstance(found, str):
            raise Uncapturable(found)
        return found


def _distinct(several: list[Ids]) -> Ids:
    """Return every id in several arrays once, in order."""
    flat = np.concatenate([np.empty(0, np.int64), *(ids.ravel() for ids in several)])
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    if high - low > _SPARSE * flat.size:
        return np.unique(flat)
    there = np.zeros(high - low + 1, bool)  # sorting takes its time
    there[flat - low] = True
    return np.flatnonzero(there) + low if flat.size else flat


_OF_ANY = frozenset(vars(nn.Module()))
_MANY = 64  # entries; of a longer list only which one it is counts
_VALUES = (
    bool, int, float, complex, str, bytes, type(None), Enum, np.generic,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def _key(module: nn.Module, calls: list[Data]) -> Any:
    """Return what the capture of a forward depends on."""
    named = list(named_tensors(module))
    tensors = tuple((name, tuple(t.shape)) for name, t in named)
    own = {id(t): name for name, t in named}
    parts = tuple(
        (name, type(part).__qualname__, _held(part, own)) for name, part in module.named_modules()
    )
    given = tuple(
        tuple(x.shape) if isinstance(x, torch.Tensor) else repr(x)
        for x in pytree.tree_leaves(calls)
    )
    return type(module), tensors, parts, given


def _held(module: nn.Module, own: dict[int, str]) -> Any:
    """Return what a module holds besides tensors and children, in a form that can be compared."""
    mine = vars(module).items()
    return tuple((name, _form(value, module, own)) for name, value in mine if name not in _OF_ANY)


def _form(value: Any, module: nn.Module, own: dict[int, str]) -> Any:
    """Return a plain value as it is, what is made of such by its parts, and all else (a function
    that a forward calls, say) by identity.
    """
    found: Any = id(value)
    if isinstance(value, _VALUES):
        found = repr(value)
    elif isinstance(value, torch.Tensor):
        found = own.get(id(value), id(value))
    elif isinstance(value, weakref.ref):
        found = ""
    elif isinstance(value, list | tuple | dict) and len(value) <= _MANY:
        parts = value.items() if isinstance(value, dict) else value
        found = tuple(_form(part, module, own) for part in parts)
    elif isinstance(value, partial):
        found = _form((value.func, value.args, value.keywords), module, own)
    elif isinstance(value, MethodType) and value.__self__ is module:
        found = id(value.__func__)
    return type(value), found
