"""The protocol of an importance, and the sums that all of them are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..errors import InputError
from ..groups import Groups

Scores = dict[str, torch.Tensor]
Normaliser = Callable[[torch.Tensor], torch.Tensor]


@runtime_checkable
class Importance(Protocol):
    """What the pruning loop needs of an importance.

    `start` may attach hooks; `observe` is called after every backward pass, before the gradients
    go; `scores` returns what has come together since `start` or `reset`, one float64 vector for
    each group; `close` removes the hooks. `state`/`load_state` carry the sums through a checkpoint.
    One that has `before_backward(loss)` is also shown every loss before its backward pass; one that
    has a true `needs_forward` reads forward passes alone.
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


class Sums:
    """What every importance of the shelf is: named sums, and how scores come of them.

    A subclass adds to its sums in `observe` and makes scores of their totals over all processes in
    `finished`. `shared` names the sums that are the same on all processes (those made of gradients,
    which data parallel averages): they are averaged, all others are added up.
    """

    needs_gradient = False
    whole = True  # set by the loop: whether gradients are those of a batch with all its parts
    scale = 1.0  # set by the loop: what gradients of activations are multiplied by
    normalise: Normaliser | None = None

    def __init__(self) -> None:
        self._sums: Scores = {}
        self._model: nn.Module | None = None
        self._groups: Groups | None = None

    def start(self, model: nn.Module, groups: Groups) -> None:
        """Begin to watch a model."""
        self.close()
        self._model, self._groups = model, groups
        self.reset()

    @property
    def watched(self) -> tuple[nn.Module, Groups]:
        """The model and its groups."""
        assert self._model is not None, "start() comes first"
        assert self._groups is not None
        return self._model, self._groups

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add to a sum, in float64, where the value is."""
        value = value.detach().double()
        known = self._sums.get(name)
        self._sums[name] = value if known is None else known.to(value.device) + value

    def shared(self, name: str) -> bool:  # noqa: ARG002 - a subclass may tell sums apart
        """Say whether a sum is the same on all processes."""
        return False

    def finished(self, sums: Scores) -> Scores:
        """Return the scores of sums over all processes."""
        return sums

    def scores(self) -> Scores:
        """Return the scores of everything since `start` or `reset`, over all processes."""
        if not self._sums:
            return {}
        totals = {
            name: reduced(self._sums[name].cpu(), mean=self.shared(name))
            for name in sorted(self._sums)
        }
        found = {name: vector.cpu() for name, vector in self.finished(totals).items()}
        if self.normalise is None:
            return found
        return {name: self.normalise(vector) for name, vector in found.items()}

    def state(self) -> Scores:
        """Return the sums over all processes, for a checkpoint; every process has to call it."""
        held = {name: self._sums[name].to("cpu", copy=True) for name in sorted(self._sums)}
        return {name: reduced(v, mean=self.shared(name)) for name, v in held.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from the sums of a checkpoint. What is added up over processes the first has."""
        sums = {name: value.double().clone() for name, value in state.items()}
        mine = {n: v if self.shared(n) or main() else torch.zeros_like(v) for n, v in sums.items()}
        self._sums = mine

    def reset(self) -> None:
        """Forget the sums."""
        self._sums = {}

    def close(self) -> None:
        """Stop watching; what came together so far can still be read."""


class Accumulated(Sums):
    """An importance made of a function: (model, groups) -> scores of one backward pass, added up.

    Gradients are those of the whole batch and, as under data parallel, the same on all processes:
    the sums are averaged over processes, which leaves them as they are but for rounding.
    """

    def __init__(
        self, function: Callable[[nn.Module, Groups], Mapping[str, Any]], *, needs_gradient: bool
    ) -> None:
        super().__init__()
        self.function, self.needs_gradient = function, needs_gradient

    def observe(self) -> None:
        """Add the scores of what the model holds now, once a batch is whole."""
        model, groups = self.watched
        if not self.whole:
            return
        with torch.no_grad():
            found = self.function(model, groups)
        for group in groups:
            if group.name not in found:
                raise InputError(f"the importance returned no scores for group {group.name!r}")
            vector = torch.as_tensor(found[group.name])
            if vector.shape != (group.size,):
                raise InputError(
                    f"the importance returned shape {tuple(vector.shape)} for group {group.name!r} "
                    f"of {group.size} channels"
                )
            self.add(group.name, vector)

    def shared(self, name: str) -> bool:  # noqa: ARG002
        """Scores of averaged gradients, or of weights, are."""
        return True


def reduced(value: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """Sum (or average) a tensor over all processes; as it is where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    result = value.clone()
    if torch.distributed.get_backend() == "nccl":
        result = result.cuda()
    torch.distributed.all_reduce(result)
    return (result / torch.distributed.get_world_size() if mean else result).cpu()


def main() -> bool:
    """Say whether this is the first process."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not parallel or torch.distributed.get_rank() == 0


def processes() -> int:
    """Return how many processes share the work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model, also where a wrapper for data parallel holds it."""
    held = getattr(model, "module", None)
    return held if isinstance(held, nn.Module) else model
