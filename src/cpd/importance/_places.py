"""Hooks: what flows in and out of the layers that read or make a group's channels.

A *place* is the input of a layer that reads channels, or the output of one that makes or scales
them, along its channel axis. Layers are those whose tensors are members; a tensor that is used
outside any layer has no place, and what it says must come from its values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..groups import Groups, Member
from ._members import tiers
from .base import Sums, inner_model

_CONV = nn.modules.conv._ConvNd
_NORM = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_PROJECTED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Place:
    """The input ("in") or output ("out") of the layer at `path`; `leaf`: which of its weights."""

    path: str
    role: str
    leaf: str

    @property
    def name(self) -> str:
        """What its sums are called."""
        return f"{self.path}|{self.leaf}|{self.role}"


@dataclass(frozen=True, eq=False)
class Reading:
    """What a group's member shows at its place: the channel at each index there, or -1.

    `main`: the layer's weight, which speaks for its other tensors.
    """

    member: Member
    place: Place | None
    main: bool
    channel: torch.Tensor

    def onto(self, values: torch.Tensor, size: int) -> torch.Tensor:
        """Sum values (..., indices of the place) onto channels (..., size)."""
        index = self.channel.to(values.device)
        mine = index >= 0
        result = values.new_zeros(*values.shape[:-1], size)
        return result.index_add_(-1, index[mine], values[..., mine])

    def covers(self, size: int) -> torch.Tensor:
        """Return which channels it shows: bool (size,)."""
        held = torch.zeros(size, dtype=torch.bool)
        held[self.channel[self.channel >= 0]] = True
        return held


Taken = Callable[[Place, torch.Tensor, int], torch.Tensor | None]


class Watching(Sums):
    """An importance that hooks layers. A subclass says what it takes of an input or output.

    `take(place, value, axis)` gets each value as it flows, its channels along `axis`, and returns
    what flows on in its stead, or None. `fresh` is called before every forward pass of the model.
    `recurrent`: whether it looks at what recurrent layers read and put out, too.
    """

    recurrent = False

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []
        self.readings: dict[str, list[list[Reading]]] = {}
        self.rows = 1

    def start(self, model: nn.Module, groups: Groups) -> None:
        """Hook the layers that read, scale and make the channels."""
        super().start(model, groups)
        inner = inner_model(model)
        self.readings = {
            group.name: [
                [_reading(inner, member, self.recurrent) for member in tier]
                for tier in tiers(groups, group)
            ]
            for group in groups
        }
        for place in sorted(self.places(), key=lambda place: place.name):
            self._hook(inner.get_submodule(place.path), place)
        self._handles.append(inner.register_forward_pre_hook(self._before, with_kwargs=True))

    def places(self) -> set[Place]:
        """Return the inputs and outputs to watch: those of every layer that is a member."""
        return {
            reading.place
            for levels in self.readings.values()
            for level in levels
            for reading in level
            if reading.place is not None and reading.main
        }

    def take(self, place: Place, value: torch.Tensor, axis: int) -> torch.Tensor | None:
        """Take in one value; subclasses say how."""
        raise AssertionError((self, place, value, axis))

    def fresh(self) -> None:
        """Forget a forward pass that was not followed by `observe`."""

    def close(self) -> None:
        """Remove the hooks."""
        super().close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        sizes = [x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.ndim]
        self.rows = sizes[0] if sizes else 1
        self.fresh()

    def _hook(self, module: nn.Module, place: Place) -> None:
        if isinstance(module, nn.MultiheadAttention):
            hook = _projecting(place, self.take)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            return

        def before(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            value = _flowing(layer, args)
            if value is None:
                return None
            instead = self.take(place, value, _axis(layer, value))
            return None if instead is None else (instead, *args[1:])

        def after(layer: nn.Module, _: tuple[Any, ...], result: Any) -> Any:
            value = _flowing(layer, result)
            return None if value is None else self.take(place, value, _axis(layer, value))

        if place.role == "in":
            self._handles.append(module.register_forward_pre_hook(before))
        else:
            self._handles.append(module.register_forward_hook(after))


def _projecting(place: Place, take: Taken) -> Callable[..., None]:
    """Watch an attention layer's own projections: made again from its inputs, to look at."""

    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        with torch.no_grad():
            parts = []
            for number, letter in enumerate("qkv"):
                x, bias = named[("query", "key", "value")[number]], layer.in_proj_bias
                bias = None if bias is None else bias.chunk(3)[number]
                if place.leaf == f"{letter}_proj_weight":
                    parts = [F.linear(x, getattr(layer, place.leaf), bias)]
                    break
                if place.leaf == "in_proj_weight":
                    parts.append(F.linear(x, layer.in_proj_weight.chunk(3)[number], bias))
            for part in _joined(parts):
                take(place, part, part.ndim - 1)

    return before


def _joined(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor where queries and keys are equally many, as in attention to oneself."""
    if len({part.shape[:-1] for part in parts}) == 1:
        return [torch.cat(parts, -1)]
    return []


def _axis(module: nn.Module, value: torch.Tensor) -> int:
    """Return the axis of a layer's input or output that channels lie along."""
    if isinstance(module, _CONV):
        return value.ndim - 1 - len(module.kernel_size)
    return 1 if isinstance(module, _NORM) else value.ndim - 1


def _flowing(module: nn.Module, value: Any) -> torch.Tensor | None:
    """Return the tensor that a layer reads first, or puts out; of a recurrent layer without its
    states, and of sequences of unequal length without padding.
    """
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        value = value[0] if value else None
    if isinstance(value, PackedSequence) and isinstance(module, _RECURRENT):
        return value.data
    return value if isinstance(value, torch.Tensor) else None


def _reading(model: nn.Module, member: Member, recurrent: bool) -> Reading:
    path, _, leaf = member.tensor.rpartition(".")
    module = model.get_submodule(path)
    if recurrent and isinstance(module, _RECURRENT):
        return _recurrent(module, member)
    place, main = None, True
    if isinstance(module, nn.MultiheadAttention):
        weight = leaf.replace("in_proj_bias", "in_proj_weight")
        if weight in _PROJECTED and member.role == "out":
            place, main = Place(path, "out", weight), leaf == weight
    elif isinstance(module, (_CONV, *_LAST, *_NORM)):
        place, main = Place(path, member.role, "weight"), leaf == "weight"
    groups = module.groups if isinstance(module, _CONV) else 1
    return Reading(member, place, main, torch.from_numpy(_along(member, groups)))


def _recurrent(module: Any, member: Member) -> Reading:
    """What a recurrent layer shows: its first layer what it reads, its last one what it puts out,
    each direction in its half. Of layers in between nothing is seen.
    """
    path, _, leaf = member.tensor.rpartition(".")
    backward, cell = leaf.endswith("_reverse"), isinstance(module, nn.RNNCellBase)
    name, hidden = leaf.removesuffix("_reverse"), member.channel.reshape(-1)
    if member.role == "in" and name == ("weight_ih" if cell else "weight_ih_l0"):
        return Reading(member, Place(path, "in", "input"), True, torch.from_numpy(hidden.copy()))
    size = module.hidden_size if cell else module.proj_size or module.hidden_size
    made = "weight_hr" if not cell and module.proj_size else "weight_ih"
    if member.role != "out" or name != (made if cell else f"{made}_l{module.num_layers - 1}"):
        return Reading(member, None, True, torch.from_numpy(hidden.copy()))
    sides = 1 if cell else 1 + module.bidirectional
    shown = np.full(sides * size, -1)
    shown[int(backward) * size :][:size] = hidden[:size]  # the first gate's rows
    return Reading(member, Place(path, "out", "output"), True, torch.from_numpy(shown))


def _along(member: Member, groups: int) -> Any:
    """Return the group's channel of each input (or output) channel of a layer, -1 for others'."""
    channel = member.channel
    if channel.ndim > 1 and channel.shape[0] > 1 and channel.shape[1] > 1:  # a grouped convolution
        rows = channel.reshape(groups, -1, channel.shape[1])
        return np.ascontiguousarray(rows[:, 0]).reshape(-1)
    return np.ascontiguousarray(channel).reshape(-1)


def expect(seen: bool, groups: Groups) -> None:
    """Raise `InputError` where no forward pass came before `observe`."""
    if not seen:
        raise InputError(
            f"no activation has passed the layers of group {next(iter(groups)).name!r} since "
            "start() or the last observe(). Run the model forward between them; "
            "cpd.importance.collect does so over batches."
        )
