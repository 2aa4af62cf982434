"""The protocol of an importance, and what most of them are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..errors import InputError, MissingGradient
from ..groups import CouplingGroup, Groups, Member

Scores = dict[str, torch.Tensor]


@runtime_checkable
class Importance(Protocol):
    """What the pruning loop needs of an importance.

    `start` may attach hooks; `observe` is called after every backward pass, before the gradients
    go; `scores` returns what has come together since `start` or `reset`, one float64 vector for
    each group; `close` removes the hooks. `state`/`load_state` carry the sums through a checkpoint.
    """

    needs_gradient: bool

    def start(self, model: nn.Module, groups: Groups) -> None:
        """Begin to watch a model."""

    def observe(self) -> None:
        """Take in one backward pass."""

    def scores(self) -> Scores:
        """Return the sums so far, over all processes."""

    def reset(self) -> None:
        """Forget the sums."""

    def close(self) -> None:
        """Stop watching."""


def is_importance(value: Any) -> bool:
    """Say whether an object follows the protocol."""
    return not isinstance(value, type) and isinstance(value, Importance)


class Accumulated:
    """An importance made of a function: (model, groups) -> scores of one backward pass, added up.

    `average`: gradients are the same on all processes (as under data parallel), so the sums are
    averaged over processes, which leaves them as they are but for rounding.
    """

    def __init__(
        self, function: Callable[[nn.Module, Groups], Mapping[str, Any]], *, needs_gradient: bool
    ) -> None:
        self.function, self.needs_gradient = function, needs_gradient
        self._sums: Scores = {}
        self._model: nn.Module | None = None
        self._groups: Groups | None = None

    def start(self, model: nn.Module, groups: Groups) -> None:
        """Begin to watch a model."""
        self._model, self._groups = model, groups
        self.reset()

    def observe(self) -> None:
        """Add the scores of what the model holds now."""
        assert self._model is not None, "start() comes first"
        assert self._groups is not None
        with torch.no_grad():
            found = self.function(self._model, self._groups)
        for group in self._groups:
            if group.name not in found:
                raise InputError(f"the importance returned no scores for group {group.name!r}")
            vector = torch.as_tensor(found[group.name]).detach().double().cpu()
            if vector.shape != (group.size,):
                raise InputError(
                    f"the importance returned shape {tuple(vector.shape)} for group {group.name!r} "
                    f"of {group.size} channels"
                )
            self._sums[group.name] = self._sums.get(group.name, 0) + vector

    def scores(self) -> Scores:
        """Return the sums, averaged over processes."""
        return {name: reduced(vector, mean=True) for name, vector in self._sums.items()}

    def state(self) -> Scores:
        """Return the sums for a checkpoint."""
        return {name: vector.clone() for name, vector in self._sums.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the sums of a checkpoint."""
        self._sums = {name: vector.double().clone() for name, vector in state.items()}

    def reset(self) -> None:
        """Forget the sums."""
        self._sums = {}

    def close(self) -> None:
        """Forget the model."""
        self._model = self._groups = None


def reduced(vector: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """Sum (or average) a vector over all processes; as it is where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return vector
    result = vector.clone()
    if torch.distributed.get_backend() == "nccl":
        result = result.cuda()
    torch.distributed.all_reduce(result)
    return (result / torch.distributed.get_world_size() if mean else result).cpu()


def held_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's parameters and buffers by every name, also where a wrapper holds the
    model.
    """
    inner = getattr(model, "module", model) if hasattr(model, "module") else model
    return {
        **dict(inner.named_buffers(remove_duplicate=False)),
        **dict(inner.named_parameters(remove_duplicate=False)),
    }


def per_channel(values: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    """Sum a tensor's entries over each channel of a group: shape (size,), float64.

    `values` has the shape of the member's tensor.
    """
    channel = torch.from_numpy(member.channel).to(values.device)
    gone = [
        axis for axis, length in enumerate(channel.shape) if length == 1 and values.shape[axis] > 1
    ]
    summed = values.double().sum(gone, keepdim=True) if gone else values.double()
    flat, index = summed.reshape(-1), channel.reshape(-1)
    if (index < 0).any():
        flat, index = flat[index >= 0], index[index >= 0]
    return torch.zeros(size, dtype=torch.float64, device=values.device).index_add_(0, index, flat)


def gradient_of(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return a parameter's gradient, or None for what has none by its nature (buffers, frozen
    parameters).
    """
    tensor = tensors[name]
    return tensor.grad if isinstance(tensor, nn.Parameter) else None


def require_gradients(model_tensors: Mapping[str, torch.Tensor], groups: Groups) -> None:
    """Raise `MissingGradient` where a group has no gradient at all."""
    for group in groups:
        if not any(gradient_of(m.tensor, model_tensors) is not None for m in group.members):
            raise MissingGradient(
                f"no gradient on any tensor of group {group.name!r} ({group.members[0].tensor}, "
                "...). Call this after loss.backward() and before zero_grad(), and let these "
                "parameters require gradients."
            )


def made_by(group: CouplingGroup) -> list[Member]:
    """Return the members that make or scale the channels; all members where none does."""
    out = [member for member in group.members if member.role == "out"]
    return out or list(group.members)
