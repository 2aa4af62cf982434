"""Hooks on an optimizer: whoever steps it, the pruner sees every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .carry import inner_optimizer
from .event import Event

__all__ = ["Attached"]


class Watched(Protocol):
    """What is called around a step."""

    def observe(self, *, scaler: Any = None) -> None:
        """Before it."""

    def advance(self, *optimizers: Any) -> Event | None:
        """After it."""


class Attached:
    """Hooks on an optimizer: observe before a step, advance after it."""

    def __init__(
        self, pruner: Watched, optimizer: Any, *, observe: bool = True, scaler: Any = None
    ) -> None:
        # accelerate's optimizers hold the scaler that scales the loss
        self.scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        self.observing = observe
        self.pruner = pruner
        self.event: Event | None = None
        inner = inner_optimizer(optimizer)
        self.handles = [
            inner.register_step_pre_hook(self._before),
            inner.register_step_post_hook(self._after),
        ]
        self.left_out = False

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        """A fused step unscales gradients by itself: undo the scale here, and see what it skips."""
        scale, skipped = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        self.left_out = skipped is not None and bool(skipped.item())
        if self.left_out or not self.observing:
            return
        factor = 1.0 if scale is None else float(scale)
        with _scaled(optimizer, 1 / factor):
            self.pruner.observe(scaler=_Scaled(factor) if scale is not None else self.scaler)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if self.left_out:
            return
        self.event = self.pruner.advance(optimizer)

    def remove(self) -> None:
        """Watch the optimizer no longer."""
        for handle in self.handles:
            handle.remove()


class _Scaled:
    """The scale that a fused optimizer was handed, as its scaler would tell it."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def is_enabled(self) -> bool:
        """It scaled."""
        return True

    def get_scale(self) -> float:
        """By so much."""
        return self.scale


@contextmanager
def _scaled(optimizer: Any, factor: float) -> Iterator[None]:
    """Gradients times a factor (a power of two, so that it can be undone exactly)."""
    if factor == 1:
        yield
        return
    found = [p.grad for group in optimizer.param_groups for p in group["params"]]
    held = [gradient for gradient in found if gradient is not None]
    torch._foreach_mul_(held, factor)
    try:
        yield
    finally:
        torch._foreach_mul_(held, 1 / factor)
