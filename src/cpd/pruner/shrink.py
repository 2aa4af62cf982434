"""Cut while training: the network of the moment, seen from the network before any cut.

Plans are always made for the unpruned network, so that cutting early changes no decision. `frame`
stands for that network: its shapes and modules, without its values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..channels import Ids
from ..comb import comb
from ..cut import Slice, cut_in_place, slices
from ..groups import Groups
from ..importance.base import Scores
from ..kept import Kept
from ..plan import Plan
from ..surgery import rebuild
from ..trace import Inputs, named_tensors
from ..verify import Proof, verify
from .carry import carry, forget

__all__ = ["Shrinking", "framed"]


def framed(model: nn.Module, example_inputs: Inputs, options: Mapping[str, Any]) -> Groups:
    """Comb a copy of a model that keeps its shapes for good, and takes no memory afterwards."""
    names = {id(module): name for name, module in model.named_modules()}
    given = options.get("ignore", ())
    ignored = [given] if isinstance(given, str | nn.Module) else given
    ignore = [names.get(id(x), x) if isinstance(x, nn.Module) else x for x in ignored]
    frame = rebuild(model, {}, {})
    groups = comb(frame, example_inputs, **{**options, "ignore": ignore})
    for _, tensor in named_tensors(frame):
        tensor.data = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return groups


class Shrinking:
    """Cuts a network in place, with its copies and the optimizers' state."""

    def __init__(self, groups: Groups, model: nn.Module, example_inputs: Inputs) -> None:
        """`groups`: of `framed`. `model`: the network that trains, not cut yet."""
        self.groups, self.model, self.example_inputs = groups, model, example_inputs
        self.by: Plan | None = None
        self.now = groups

    def cut(self, plan: Plan, optimizers: Sequence[Any], copies: Sequence[nn.Module]) -> None:
        """Cut to what a plan keeps; the optimizers' state and the copies are cut along."""
        shapes = {name: tensor.shape for name, tensor in named_tensors(self.model)}
        before = dict(named_tensors(self.model))
        done = cut_in_place(self.model, plan, self.by)
        lost = [before[name] for name in sorted(plan.gone & before.keys())]
        for optimizer in optimizers:
            forget(optimizer, lost)
            carry(optimizer, self.model, done, shapes)
        for other in copies:
            cut_in_place(other, plan, self.by)
        self.by = plan
        options: Any = {key: x for key, x in self.groups.options.items() if key != "depth"}
        self.now = comb(self.model, self.example_inputs, **options)

    def masks(self, plan: Plan) -> dict[str, torch.Tensor]:
        """The masks of a plan on the network of the moment."""
        if self.by is None:
            return {n: m for n, m in plan.masks().items() if n == plan.aliases[n]}
        found = {}
        for name, parts in plan.beyond(self.by).items():
            shape = self.by.new_shape(name)
            mask = np.ones(shape, bool)
            for part in parts:
                mask &= _spread(part, len(shape))
            found[name] = torch.from_numpy(mask)
        for name in plan.gone - self.by.gone:
            if name == plan.aliases[name]:
                found[name] = torch.zeros(self.by.new_shape(name), dtype=torch.bool)
        return found

    def scores(self, found: Scores) -> Scores:
        """Scores of the network of the moment as those of the network before any cut.

        What is gone already scores nothing. What no longer can be told apart (a last channel) goes
        last: its score is the largest there is.
        """
        if self.by is None:
            return found
        most = max((float(s.max()) for s in found.values() if s.numel()), default=0.0)
        old = self._old()
        result = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in self.groups}
        seen = dict.fromkeys(result, False)
        for name, left in (each for there in old.values() for each in there):
            result[name][torch.from_numpy(left[left >= 0])] = most
        for name, numbers, values in self._pairs(found, old):
            result[name][torch.from_numpy(numbers)] = values.double()
            seen[name] = True
        self._complain(seen)
        return result

    def _old(self) -> dict[str, list[tuple[str, Ids]]]:
        """Tensor -> groups before any cut and where their channels lie in what is left of it."""
        assert self.by is not None
        old: dict[str, list[tuple[str, Ids]]] = {}
        for group in self.groups:
            for member in (m for m in group.members if m.tensor not in self.by.gone):
                left = _left(member.channel, self.by.kept.get(member.tensor, ()))
                old.setdefault(member.tensor, []).append((group.name, left))
        return old

    def _pairs(
        self, found: Scores, old: Mapping[str, list[tuple[str, Ids]]]
    ) -> Iterator[tuple[str, Ids, torch.Tensor]]:
        """Groups before any cut, channels and scores, joined by where they lie in tensors."""
        for group, member in ((g, m) for g in self.now for m in g.members):
            for name, left in old.get(member.tensor, ()):
                if _varies(member.channel) == _varies(left):
                    here, there = np.broadcast_arrays(member.channel, left)
                    both = (here >= 0) & (there >= 0)
                    yield name, there[both], found[group.name][torch.from_numpy(here[both])]

    def _complain(self, seen: Mapping[str, bool]) -> None:
        """Warn of channels that can go before the cut and cannot be scored after it."""
        assert self.by is not None
        widths = {w.group: w.after for w in self.by.widths}
        for name, known in seen.items():
            if not known and widths.get(name, 0) > 1:
                warnings.warn(
                    f"group {name!r} of {widths[name]} units is no group of the cut network: it "
                    "has no scores any more and goes last. Use cut_every=0 to let it go on.",
                    stacklevel=2,
                )

    def proof(self, plan: Plan) -> Proof:
        """Compare the cut network with the one before any cut, what is gone at zero."""
        return verify(self._grown(plan), self.model, plan)

    def _grown(self, plan: Plan) -> nn.Module:
        """The network before any cut, with the present values, and zeros where it was cut."""
        held, whole = dict(named_tensors(self.model)), slices(plan)
        tensors = {}
        for name, shape in plan.shapes.items():
            if name in plan.gone:
                like = dict(named_tensors(self.groups.model))[name]
                tensors[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
                continue
            value = held[name].detach()
            first = plan.aliases[name]
            tensors[name] = _grown(value, whole[first], shape) if first in whole else value
        return rebuild(self.groups.model, tensors, {})


def _spread(part: Kept, rank: int) -> np.ndarray[Any, Any]:
    shape = [1] * rank
    for axis, size in zip(part.axes, part.mask.shape, strict=True):
        shape[axis] = size
    return part.mask.reshape(shape)


def _left(channel: Ids, parts: Sequence[Kept]) -> Ids:
    """Channels of a tensor where it is cut: shape of what is left, 1 where they do not vary."""
    found = torch.from_numpy(channel)
    for part in parts:
        if not any(found.shape[axis] > 1 for axis in part.axes):
            continue
        sizes = list(found.shape)
        for axis, size in zip(part.axes, part.mask.shape, strict=True):
            sizes[axis] = size
        found = Slice((part,)).of(found.expand(sizes))
    left = found.numpy()
    for axis in set(range(left.ndim)) - set(_varies(left)):
        left = left.take([0], axis)
    return left


def _varies(channel: Ids) -> tuple[int, ...]:
    """Axes along which channels differ."""
    axes = range(channel.ndim)
    return tuple(k for k in axes if (channel != channel.take([0], k)).any())


def _grown(value: torch.Tensor, each: Slice, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor before the cut: `value` where it was kept, zero elsewhere."""
    big = value.new_zeros(shape)
    where = Slice(each.parts).of(torch.arange(big.numel()).reshape(shape))
    big.view(-1)[where.reshape(-1).to(big.device)] = value.reshape(-1)
    if each.rows:
        big[list(each.rows)] /= each.factor
    return big
