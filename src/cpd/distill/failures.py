"""What breaks a run from outside, in words: no memory, a data worker that died."""

from __future__ import annotations

import torch

from cpd.distill.callbacks import State
from cpd.errors import CPDError, DataError, OutOfMemory

__all__ = ["explained"]

NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
)
NO_WORKER = ("DataLoader worker", "worker exited unexpectedly")


def explained(error: Exception, state: State) -> CPDError | None:
    """The error of the tree that an error of torch or the system means, or None."""
    text = str(error)
    # the last evaluation comes after the last step
    where = f"at step {min(state.step + 1, state.total)} of {state.total} in stage {state.stage!r}"
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or any(word in text for word in NO_MEMORY):
        return OutOfMemory(
            f"out of memory {where}: {_first(text)}. The last checkpoint is intact. Make "
            "batch_size smaller, or accumulate larger, which splits each batch and changes no "
            "gradient; fewer workers need less memory too."
        )
    if isinstance(error, RuntimeError) and any(word in text for word in NO_WORKER):
        return DataError(
            f"a process that loads data died {where}: {_first(text)}. The last checkpoint is "
            "intact. Where the system killed it, it had no memory left (shared memory in /dev/shm "
            "too): use fewer workers; workers=0 loads in the training process and shows its error."
        )
    return None


def _first(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].rstrip(".") if lines else "no further word"
