"""Numbers from outside: in range, or a clear error that names them."""

from __future__ import annotations

import math
from typing import TypeGuard

from cpd.errors import InputError

__all__ = ["is_number", "nonnegative", "positive", "share", "whole"]


def positive(name: str, value: object) -> None:
    """InputError unless ``value`` is a finite number > 0."""
    if not (is_number(value) and value > 0):
        raise InputError(f"{name} must be a finite number > 0, got {value!r}.")


def nonnegative(name: str, value: object) -> None:
    """InputError unless ``value`` is a finite number ≥ 0."""
    if not (is_number(value) and value >= 0):
        raise InputError(f"{name} must be a finite number >= 0, got {value!r}.")


def share(name: str, value: object) -> None:
    """InputError unless ``value`` is a number in [0, 1)."""
    if not (is_number(value) and 0 <= value < 1):
        raise InputError(f"{name} must be a number in [0, 1), got {value!r}.")


def whole(name: str, value: object, least: int) -> None:
    """InputError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
