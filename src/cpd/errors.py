"""Every error raised on purpose, in one tree.

    CPDError
    ├── InputError (also ValueError)   an argument cannot be used as given
    │   └── UnknownName                no such name on the shelf; lists the valid ones
    ├── TraceError                     the model could not be traced into a graph
    ├── UnreachableTarget              the target cannot be met; .closest, .blockers
    ├── PlanMismatch                   the plan was made for another model
    ├── VerifyError                    the cut network does not compute what the masked one does
    ├── MissingGradient                an importance needs gradients and there are none
    ├── NonFiniteLoss                  the loss became NaN or infinite
    ├── OutOfMemory                    the device or the machine has no memory left
    ├── DataError                      a process that loads data died
    ├── Interrupted                    a signal ended the run; its checkpoint is written
    ├── ArtefactError                  a saved folder is truncated, foreign or damaged
    ├── ExportError                    an exporter failed or its check did not hold
    └── OutputError                    an output folder exists already or cannot be written

A text says what went wrong, where, what was found, and what would fix it. Broken invariants of the
library itself are plain ``assert``; they are bugs, not part of this tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ArtefactError",
    "CPDError",
    "DataError",
    "ExportError",
    "InputError",
    "Interrupted",
    "MissingGradient",
    "NonFiniteLoss",
    "OutOfMemory",
    "OutputError",
    "PlanMismatch",
    "TraceError",
    "UnknownName",
    "UnreachableTarget",
    "VerifyError",
]


class CPDError(Exception):
    """The root: ``except cpd.CPDError`` catches everything the library raises on purpose."""


class InputError(CPDError, ValueError):
    """An argument cannot be used as given: wrong type, shape, range or combination."""


class UnknownName(InputError):
    """No entry of that name on a shelf.

    ``kind`` says which shelf ("loss"), ``name`` what was asked for, ``valid`` what there is. The
    text lists the valid names, sorted, and offers the nearest one where one is near.
    """

    def __init__(self, kind: str, name: object, valid: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.valid = tuple(sorted(valid))
        super().__init__(kind, name, self.valid)  # as given, so that it pickles

    def __str__(self) -> str:
        near = get_close_matches(str(self.name), self.valid, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        names = ", ".join(self.valid) if self.valid else "none"
        return f"unknown {self.kind} {self.name!r}{hint} Valid names: {names}."


class TraceError(CPDError):
    """The model could not be traced into a graph, or its graph cannot be read."""


class UnreachableTarget(CPDError):
    """The target cannot be met.

    ``closest`` maps each cost of the target to the nearest value that can be reached, such as
    {"macs": 0.61}, or is None where none was found. ``blockers`` names what keeps the rest.
    """

    def __init__(
        self,
        message: str,
        *,
        closest: dict[str, float] | None = None,
        blockers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.closest = closest
        self.blockers = tuple(blockers)


class PlanMismatch(CPDError):
    """The plan was made for another model: names, shapes or inputs differ."""


class VerifyError(CPDError):
    """The cut network does not compute what the masked network computes."""


class MissingGradient(CPDError):
    """An importance needs gradients and a parameter has none."""


class NonFiniteLoss(CPDError):
    """The loss became NaN or infinite; the text names the term and the step."""


class OutOfMemory(CPDError):
    """No memory was left; the text says at which step, and what needs less."""


class DataError(CPDError):
    """A process that loads data died; the text says at which step."""


class Interrupted(CPDError):
    """A signal (SIGTERM) ended the run after a step; the checkpoint is written."""


class ArtefactError(CPDError):
    """A saved folder is truncated, damaged, or was not written by this library."""


class ExportError(CPDError):
    """An exporter failed, or the exported file does not compute what the model computes."""


class OutputError(CPDError):
    """An output folder exists already or cannot be written."""
