"""Ctrl-C and SIGTERM in a long run: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

from cpd.distill.callbacks import Callback, State
from cpd.errors import Interrupted

__all__ = ["Stopper", "Stops"]

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stops:
    """Takes signals while a run is on; between steps they leave at once, as they always did.

    A second signal leaves at once too. Only the main thread can take signals; elsewhere, and with
    `active=False`, everything stays as it is.
    """

    def __init__(self, *, active: bool) -> None:
        """`active`: whether there is anywhere to write a checkpoint to."""
        self.active = active and threading.current_thread() is threading.main_thread()
        self.stepping = False
        self.pending = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        """Take signals."""
        if self.active:
            self._before = {number: signal.signal(number, self._take) for number in NAMES}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.pending or not self.stepping:
            leave(number, "")
        self.pending = number

    def asked(self) -> int:
        """The signal that came on any process, or 0."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self.pending
        on = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        newest = torch.tensor([self.pending], device=on)
        torch.distributed.all_reduce(newest, torch.distributed.ReduceOp.MAX)
        return int(newest)


class Stopper(Callback):
    """The last callback of a stage: where a signal came, it saves and leaves after the step."""

    def __init__(self, stops: Stops, save: Callable[[], None]) -> None:
        """`save` writes the checkpoint."""
        self.stops, self.save = stops, save

    def on_start(self, state: State) -> None:  # noqa: ARG002
        """From here on a step is finished first."""
        self.stops.stepping = True

    def after_step(self, state: State) -> None:
        """Leave, but not after the last step: what follows it writes a checkpoint anyway."""
        if not self.stops.active or state.step >= state.total:
            return
        number = self.stops.asked()
        if number:
            self.stops.stepping = False
            self.save()
            leave(number, f" after step {state.step} of {state.total} of stage {state.stage!r}")

    def on_end(self, state: State) -> None:
        """From here on a signal leaves at once; one that came on any process, on all of them."""
        if not self.stops.active:
            return
        number = self.stops.asked()
        self.stops.stepping = False
        number = number or self.stops.pending  # it came while they asked
        if number:
            leave(number, f" at the end of stage {state.stage!r}")


def leave(number: int, where: str) -> None:
    """Raise what a signal means.

    Raises:
        KeyboardInterrupt: for Ctrl-C. Interrupted: for SIGTERM.
    """
    text = f"stopped by {NAMES[signal.Signals(number)]}{where}; resume goes on from the checkpoint"
    raise KeyboardInterrupt(text) if number == signal.SIGINT else Interrupted(text)
