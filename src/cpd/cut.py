"""Cut: a plan applied for good. The model given in is not changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import VerifyError
from .kept import Kept
from .plan import Plan
from .surgery import change, rebuild


def cut(model: nn.Module, plan: Plan, *, verify: bool = True) -> nn.Module:
    """Return a copy of `model`, of the same class, without what the plan removes.

    Parameters keep their names, types and `requires_grad`; gradients are not carried over. With
    `verify=True` the result is proved against the masked original on inputs like those it was
    traced with.

    Raises:
        PlanMismatch: the plan was made for another model.
        VerifyError: the cut network does not compute what the masked one does.
    """
    plan.check(model)
    tensors: dict[str, torch.Tensor] = {}
    held = dict(_first_named(model, plan))
    for name in {**plan.kept, **plan.rescale}:
        tensors[name] = cut_tensor(held[name], plan, name)
    small = rebuild(model, tensors, _attributes(model, plan), plan.forwards, plan.gone)
    if verify:
        from .verify import verify as prove  # verify reads cut_tensor, so the import waits

        proof = prove(model, small, plan)
        if not proof:
            raise VerifyError(
                f"{proof}\nThe cut network is not what the plan promises: it is not returned. Keep "
                "the named module out with comb(..., ignore=[...]), and report the network."
            )
    return small


def _first_named(model: nn.Module, plan: Plan) -> list[tuple[str, torch.Tensor]]:
    state = _held(model)
    return [(first, state[first]) for first in dict.fromkeys(plan.aliases.values())]


def cut_tensor(tensor: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """Return what a plan keeps of one tensor, rows that pin an attention's scale rescaled."""
    return slice_of(plan, name).of(tensor)


@dataclass(frozen=True)
class Slice:
    """What is done to one tensor: `rows` are multiplied by `factor`, then `parts` are kept."""

    parts: tuple[Kept, ...] = ()
    rows: tuple[int, ...] = ()
    factor: float = 1.0

    def of(self, tensor: torch.Tensor, power: float = 1.0) -> torch.Tensor:
        """Return the slice of a tensor. Rows are multiplied by `factor ** power`."""
        result = tensor.detach()
        if self.rows:
            result = result.clone()
            result[list(self.rows)] *= self.factor**power
        for part in self.parts:
            result = _narrowed(result, part)
        return result.clone() if result is tensor or result._base is not None else result


def slice_of(plan: Plan, name: str) -> Slice:
    """Return what a plan does to a tensor of the model it was made for."""
    rows, factor = plan.rescale.get(name, ((), 1.0))
    return Slice(plan.kept.get(name, ()), tuple(rows), factor)


def slices(plan: Plan, since: Plan | None = None) -> dict[str, Slice]:
    """Return what a plan does to each tensor that changes; `since` is what was cut already."""
    if since is None:
        return {name: slice_of(plan, name) for name in {**plan.kept, **plan.rescale}}
    parts = plan.beyond(since)
    found = {name: Slice(kept) for name, kept in parts.items()}
    for name, (rows, factor) in plan.rescale.items():
        gone = [part for part in since.kept.get(name, ()) if 0 in part.axes]
        alive = np.ones(plan.shapes[name][0], bool)
        for part in gone:
            alive &= part.mask.reshape(len(part.mask), -1).any(1)
        place = np.cumsum(alive) - 1
        left = tuple(int(place[row]) for row in rows if alive[row])
        before = since.rescale.get(name, ((), 1.0))[1]
        found[name] = Slice(parts.get(name, ()), left, factor / before)
    return found


def cut_in_place(model: nn.Module, plan: Plan, since: Plan | None = None) -> dict[str, Slice]:
    """Cut a model itself: parameters and buffers stay the same objects, their values narrow.

    `plan` is made for the network before any cut; `since` is the plan by which this model was cut
    already. Returns what was done to each tensor, for what must follow it (optimizer state).
    """
    done = slices(plan, since)
    held = _held(model)
    tensors = {name: each.of(held[name]) for name, each in done.items()}
    change(model, tensors, _attributes(model, plan), plan.forwards, plan.gone)
    return done


def _held(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _narrowed(tensor: torch.Tensor, part: Kept) -> torch.Tensor:
    if len(part.axes) == 1:
        index = torch.from_numpy(np.flatnonzero(part.mask)).to(tensor.device)
        return tensor.index_select(part.axes[0], index)
    first = list(part.axes)
    rest = [axis for axis in range(tensor.ndim) if axis not in part.axes]
    moved = tensor.permute(*first, *rest)
    alive = [torch.from_numpy(at).to(tensor.device) for at in np.nonzero(part.mask)]
    left = moved[tuple(alive)]  # numbers, not a mask: these need no values to know the shape
    left = left.reshape(*part.sizes, *left.shape[1:])
    back = [0] * tensor.ndim
    for position, axis in enumerate(first + rest):
        back[axis] = position
    return left.permute(*back).contiguous()


def _attributes(model: nn.Module, plan: Plan) -> dict[str, dict[str, Any]]:
    """Give tuples back the type that the model holds (JSON knows lists only)."""
    result: dict[str, dict[str, Any]] = {}
    for path, values in plan.attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            held = getattr(module, name)
            typed = tuple(value) if isinstance(held, tuple) and isinstance(value, list) else value
            result.setdefault(path, {})[name] = typed
    return result
