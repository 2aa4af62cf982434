"""What an optimizer knows of a parameter is cut with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..cut import Slice
from ..errors import InputError

__all__ = ["carry", "cuttable", "forget", "inner_optimizer", "untold"]

# A parameter that is multiplied by f has gradients divided by f. What state of `torch.optim` is
# made of: gradients (-1), their squares (-2), the parameter itself (1) or its steps squared (2).
POWERS = {
    "momentum_buffer": -1,
    "exp_avg": -1,
    "exp_inf": -1,
    "grad_avg": -1,
    "prev": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "square_avg": -2,
    "sum": -2,
    "row_var": -2,
    "col_var": -2,
    "ax": 1,
    "acc_delta": 2,
}


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside wrappers that hold it as `.optimizer`.

    Raises:
        InputError: an optimizer inside another one that writes the weights after it, as Lookahead.
    """
    if isinstance(getattr(optimizer, "_base_optimizer", None), torch.optim.Optimizer):
        raise InputError(
            f"{type(optimizer).__name__} writes the weights after its inner optimizer has stepped, "
            "from a copy that keeps what was pruned: train with the inner optimizer alone"
        )
    while not isinstance(optimizer, torch.optim.Optimizer) or _wraps(optimizer):
        held = getattr(optimizer, "optimizer", None)
        if held is None:
            raise TypeError(f"{type(optimizer).__name__} holds no optimizer of torch")
        optimizer = held
    return optimizer


def _wraps(optimizer: Any) -> bool:
    return isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer)


def cuttable(optimizer: Any) -> None:
    """Refuse an optimizer whose state is one vector of all parameters: it cannot be cut with them.

    Raises:
        InputError: it is LBFGS.
    """
    inner = inner_optimizer(optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        raise InputError(
            f"{type(inner).__name__} keeps directions of all parameters in one vector, which "
            "cannot be cut with the network: use another optimizer, or cut_every=0, which masks "
            "until the end"
        )


def untold(optimizers: Iterable[Any], model: nn.Module) -> None:
    """Warn of parameters that train in none of the optimizers that are cut along."""
    groups = [group for each in optimizers for group in inner_optimizer(each).param_groups]
    told = {id(parameter) for group in groups for parameter in group["params"]}
    trains = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    left = [name for name, parameter in trains if id(parameter) not in told]
    if told and left:
        warnings.warn(
            f"{len(left)} parameters that train, as {left[0]!r}, are in none of the optimizers "
            "that are cut with the network. Where another one steps them, its state would keep the "
            "old shapes: call observe() before, and advance(*optimizers) with all of them after "
            "all have stepped",
            stacklevel=2,
        )


def carry(
    optimizer: Any, model: nn.Module, done: Mapping[str, Slice], shapes: Mapping[str, torch.Size]
) -> None:
    """Cut the state of every parameter as the parameter was.

    `done`: what `cut_in_place` did; `shapes`: of the tensors before it. State of another form than
    the parameter's (or the parameter's with axes of size 1) cannot be cut: that parameter's state
    begins anew, with a warning.
    """
    inner = inner_optimizer(optimizer)
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, slice_ in done.items():
        parameter = held.get(name)
        if parameter is None or parameter not in inner.state:
            continue
        state = inner.state[parameter]
        changed = {k: _cut(k, v, slice_, shapes[name]) for k, v in state.items()}
        lost = [key for key, value in changed.items() if value is None and state[key] is not None]
        if lost:
            warnings.warn(
                f"what {type(inner).__name__} keeps of {name} as {lost[0]!r} cannot be cut with "
                "it; its state of this parameter begins anew",
                stacklevel=2,
            )
            del inner.state[parameter]
        else:
            state.update(changed)


def forget(optimizer: Any, lost: Sequence[torch.Tensor]) -> None:
    """Let an optimizer forget parameters that are no longer there: groups keep their place."""
    inner = inner_optimizer(optimizer)
    gone = {id(tensor) for tensor in lost}
    for group in inner.param_groups if gone else ():
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for tensor in lost:
        inner.state.pop(tensor, None)


def _cut(key: str, value: Any, slice_: Slice, shape: torch.Size) -> Any:
    """One entry of a state after the cut; None where it cannot be cut."""
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, int | float | bool | str) else None
    if value.ndim == 0:
        return value
    if value.shape == shape:
        return slice_.of(value, POWERS.get(key, 0))
    fitting = _fitting(slice_, tuple(value.shape), tuple(shape))
    return None if fitting is None else fitting.of(value, POWERS.get(key, 0))


def _fitting(slice_: Slice, found: tuple[int, ...], shape: tuple[int, ...]) -> Slice | None:
    """The slice of state that has size 1 along some axes (sums over rows, over columns)."""
    if len(found) != len(shape) or any(a not in (1, b) for a, b in zip(found, shape, strict=True)):
        return None
    parts = []
    for part in slice_.parts:
        there = [found[axis] == shape[axis] for axis in part.axes]
        if all(there):
            parts.append(part)
        elif any(there):
            return None
    rows = slice_.rows if shape and found[0] == shape[0] else ()
    return Slice(tuple(parts), rows, slice_.factor)
