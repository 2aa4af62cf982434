"""What breaks a run from outside, in words: no memory, a data worker that died."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import sleep
from traceback import walk_tb

import torch

from cpd.errors import CPDError, DataError, OutOfMemory

__all__ = ["explained", "explaining"]

NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
)
NO_WORKER = ("DataLoader worker", "worker exited unexpectedly")


@contextmanager
def explaining(where: Callable[[], str]) -> Iterator[None]:
    """Turn what torch and the system raise into errors of the tree, where it is known what it is.

    Raises:
        OutOfMemory, DataError: no memory is left; a process that loads data died.
    """
    with _explaining(where), _explaining(where):  # the signal may come while the first one explains
        yield


@contextmanager
def _explaining(where: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except CPDError:
        raise
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        known = explained(error, where())
        if known is None:
            raise
        if isinstance(known, DataError):
            _let_signals_come()
        raise known from error


def _let_signals_come() -> None:
    """PyTorch also tells of a dead worker from a signal, once, wherever the code is when it comes:
    that may be after the death was known from elsewhere.
    """
    with suppress(RuntimeError):
        sleep(0.2)


def explained(error: Exception, where: str) -> CPDError | None:
    """The error of the tree that an error of torch or the system means, or None."""
    text = str(error)
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or any(word in text for word in NO_MEMORY):
        return OutOfMemory(
            f"out of memory {where}: {_first(text)}. The last checkpoint is intact. Make "
            "accumulate larger, which splits each batch and changes no gradient, or workers fewer, "
            "and resume; a smaller batch_size is another run."
        )
    told = isinstance(error, RuntimeError) and any(word in text for word in NO_WORKER)
    if told or _in_the_middle(error):
        return DataError(
            f"a process that loads data died {where}: {_first(text)}. The last checkpoint is "
            "intact. Where the system killed it, it had no memory left (shared memory in /dev/shm "
            "too): use fewer workers; workers=0 loads in the training process and shows its error."
        )
    return None


def _in_the_middle(error: Exception) -> bool:
    """Whether a tensor was being taken over from another process, which is there no more."""
    if not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return False
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(x.f_globals.get("__name__", "").startswith("torch.multiprocessing") for x in frames)


def _first(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].rstrip(".") if lines else "no further word"
