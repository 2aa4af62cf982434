"""Mask: what a plan removes is zero, reversibly, while the network trains at full size."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import nn

from .plan import Plan


class Masks:
    """Holds tensors of a model at zero where masks say so; see `Masker`, which takes plans."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._state = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._masks: dict[str, torch.Tensor] = {}
        self._saved: dict[str, torch.Tensor] = {}

    def set(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Mask by other masks, name -> bool tensor, True = kept; what these keep comes back."""
        masks = {name: mask.to(self._state[name].device) for name, mask in masks.items()}
        with torch.no_grad():
            for name in {**self._masks, **masks}:
                tensor = self._state[name]
                old, new = self._masks.get(name), masks.get(name)
                saved = self._saved.setdefault(name, torch.zeros_like(tensor))
                everything = torch.ones_like(tensor, dtype=torch.bool)
                old = everything if old is None else old
                new = everything if new is None else new
                saved.copy_(torch.where(old & ~new, tensor, saved))
                tensor.copy_(torch.where(new & ~old, saved, tensor))
        self._masks = masks
        self.apply()

    def apply(self) -> None:
        """Set everything removed to zero (again)."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._state[name].mul_(mask) if self._state[name].is_floating_point() else None

    def remove(self) -> None:
        """Put back the values that masking took away."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                tensor = self._state[name]
                tensor.copy_(torch.where(mask, tensor, self._saved[name]))
        self._masks = {}


class Masker(Masks):
    """Holds a model masked: call `apply` after every optimizer step, `update` for a further plan,
    `remove` to undo.

    Only values change: parameters stay the same objects. `remove` gives back the values that were
    there when each entry was first masked; entries that were never masked keep what training made
    of them.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        plan.check(model)
        super().__init__(model)
        self.plan = plan
        self.update(plan)

    def update(self, plan: Plan) -> None:
        """Mask by another plan for the same model; what it keeps of what was masked comes back."""
        plan.check(self.model)
        self.set({n: m for n, m in plan.masks().items() if n == plan.aliases[n]})
        self.plan = plan

    def __enter__(self) -> Masker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def mask(model: nn.Module, plan: Plan) -> Masker:
    """Mask a model in place by a plan; the handle undoes it (also as a context manager).

    Raises `PlanMismatch` where the plan was made for another model.
    """
    return Masker(model, plan)
