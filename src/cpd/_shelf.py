"""What every shelf does with a name from outside: find the entry, check its options.

A spec is a name (``"kd"``) or a mapping of names to options (``{"kd": {"temperature": 4.0}}``),
as it stands in a YAML file. Objects and callables are the shelves' own business.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from cpd.errors import InputError, UnknownName

__all__ = ["build", "check_options", "keywords", "one", "parse"]

T = TypeVar("T")


def parse(kind: str, spec: object) -> dict[str, dict[str, Any]]:
    """Return name → options of a spec that is a name or a mapping; options are copied.

    Raises InputError where it is neither, or where the options of a name are not a mapping.
    """
    if isinstance(spec, str):
        return {spec: {}}
    if not isinstance(spec, Mapping):
        raise InputError(
            f"a {kind} is given by a name, a mapping of names to options, or an object of its own; "
            f"got {type(spec).__name__}: {spec!r}."
        )
    for name, options in spec.items():
        if options is not None and not isinstance(options, Mapping):
            raise InputError(
                f"options of {kind} {name!r} must be a mapping such as {{'option': value}}; "
                f"got {type(options).__name__}: {options!r}."
            )
    return {name: dict(options or {}) for name, options in spec.items()}


def one(kind: str, spec: object) -> tuple[str, dict[str, Any]]:
    """Like ``parse`` where exactly one entry is wanted; InputError for none or several."""
    entries = parse(kind, spec)
    if len(entries) != 1:
        raise InputError(f"exactly one {kind} is wanted, got {len(entries)}: {list(entries)}.")
    return next(iter(entries.items()))


def build(
    kind: str, shelf: Mapping[str, Callable[..., T]], name: str, options: Mapping[str, Any]
) -> T:
    """Return ``shelf[name](**options)``.

    Raises UnknownName where the shelf has no such name or option, InputError where one is missing.
    """
    if name not in shelf:
        raise UnknownName(kind, name, shelf)
    check_options(kind, name, options, keywords(shelf[name]))
    for parameter in inspect.signature(shelf[name]).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise InputError(f"{kind} {name!r} needs the option {parameter.name!r}.")
    return shelf[name](**options)


def check_options(kind: str, name: str, options: Mapping[str, Any], valid: Iterable[str]) -> None:
    """UnknownName for the first option that is not in ``valid``."""
    valid = tuple(valid)
    for option in options:
        if option not in valid:
            raise UnknownName(f"option of {kind} {name!r}", option, valid)


def keywords(function: Callable[..., object]) -> tuple[str, ...]:
    """Names of the parameters that can be given by keyword."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds)
