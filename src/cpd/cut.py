"""Cut: a plan applied for good. The model given in is not changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import VerifyError
from .plan import Kept, Plan
from .surgery import rebuild


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
    small = rebuild(model, tensors, _attributes(model, plan), plan.forwards)
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
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return [(first, state[first]) for first in dict.fromkeys(plan.aliases.values())]


def cut_tensor(tensor: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """Return what a plan keeps of one tensor, rows that pin an attention's scale rescaled."""
    result = tensor.detach()
    if name in plan.rescale:
        rows, factor = plan.rescale[name]
        result = result.clone()
        result[list(rows)] *= factor
    for part in plan.kept.get(name, ()):
        result = _narrowed(result, part)
    return result.clone() if result is tensor or result._base is not None else result


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
