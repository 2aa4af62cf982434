"""Op rules: how channel ids pass through one call of one operator.

A rule is a function of a `Call`. It returns the labels of the outputs and records on the call what
the op demands: unions and frozen channels, literal sizes that must follow, statistics across
channels, MACs. It sees shapes and arguments only: never a model, a module or data. An operator
without a rule is never guessed at.
"""

from __future__ import annotations

from .base import Call, Factor, Pin, Size, find, known

# The shelf. Importing a file registers its rules.
from . import addressed, barrier, contract, create, move, norm, parts, pointwise, recurrent, reduce  # noqa: F401  isort: skip
from ._shelf import NO_CHANNELS, bare, shelf, status

__all__ = [
    "NO_CHANNELS",
    "Call",
    "Factor",
    "Pin",
    "Size",
    "bare",
    "find",
    "known",
    "shelf",
    "status",
]
