"""YAML and flags as one: every key of the one is a flag of the other, however deep."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpd.compress import BenchOptions, CompressConfig, plain
from cpd.distill import LoopOptions, TrainOptions
from cpd.errors import InputError, UnknownName

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["checked", "describe", "parser", "read", "settings"]


STAGES: dict[str, type] = {
    "base": TrainOptions,
    "prune": LoopOptions,
    "recover": TrainOptions,
    "bench": BenchOptions,
}


def settings(words: list[str]) -> dict[str, Any]:
    """Keywords of ``cpd.compress`` from ``CONFIG.yaml --any.key value …``; flags win.

    Raises:
        InputError: a file that cannot be read, a flag without its dashes, or a value of the wrong
            type. UnknownName: a key that does not exist.
    """
    values: dict[str, Any] = {}
    rest = list(words)
    while rest and not rest[0].startswith("--"):
        values = _over(values, read(Path(rest.pop(0))))
    for key, value in _pairs(rest):
        _put(values, key.split("."), value)
    return checked(values)


def read(path: Path) -> dict[str, Any]:
    """A YAML file.

    Raises:
        InputError: it cannot be read, or is no mapping.
    """
    from jsonargparse import get_loader

    try:
        found = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever the library of YAML raises
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path} must be a mapping of keys, found {type(found).__name__}")
    return dict(found)


def _pairs(words: list[str]) -> list[tuple[str, Any]]:
    """Key and value of every flag: ``--key value``, ``--key=value``; ``--key`` alone means true."""
    from jsonargparse import get_loader

    load, found, rest = get_loader("yaml"), [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{word!r} is no flag; write --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            alone = not rest or re.match(r"--[A-Za-z]", rest[0])
            text = "true" if alone else rest.pop(0)
        found.append((key, load(text)))
    return found


def _over(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping laid over another, key by key."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if both else value
    return merged


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value deep inside; what is a bare name on the way becomes a mapping that holds it."""
    for depth, key in enumerate(path[:-1]):
        below = values.get(key)
        if below is None:
            below = _default(path[: depth + 1])
        if isinstance(below, str):
            below = {below: {}} if path[depth + 1] == below else {"name": below}
        if not isinstance(below, Mapping):
            raise InputError(f"--{'.'.join(path)}: {key} is {below!r}, which has no keys")
        values[key] = dict(below)
        values = values[key]
    values[path[-1]] = value


def _default(path: list[str]) -> Any:
    """What a key holds if nobody sets it."""
    kind: Any = CompressConfig
    if len(path) == 1 and path[0] in STAGES:
        return {}
    if len(path) == 2 and path[0] in STAGES:
        kind = STAGES[path[0]]
    elif len(path) > 1:
        return {}
    for item in fields(kind):
        if item.name == path[-1]:
            made = item.default_factory() if item.default_factory is not MISSING else item.default
            return {} if made is MISSING or made is None else plain(made)
    return {}


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values as their types ask for; the first key that does not exist is named."""
    valid = [item.name for item in fields(CompressConfig)]
    for key in values:
        if key not in valid:
            raise UnknownName("key of compress", key, valid)
    for key in ("target", "data", "model"):
        if values.get(key) is None:
            raise InputError(f"{key} is missing: set it in the YAML or as --{key}")
    CompressConfig.of(**values)  # names every wrong key of a stage before types are looked at
    from argparse import ArgumentError

    try:
        found = parser().parse_object(values)
    except ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from error
    typed: dict[str, Any] = found.as_dict()
    return {key: typed[key] for key in values}


def parser() -> ArgumentParser:
    """A parser with every key as a flag, for the help and for types."""
    from jsonargparse import ArgumentParser

    made = ArgumentParser(
        prog="cpd compress",
        usage="cpd compress CONFIG.yaml [--any.key value …]",
        description="Make a network smaller, from a recipe. Every key of the YAML is a flag.",
        exit_on_error=False,
    )
    made.add_class_arguments(CompressConfig)
    describe(made, *(kind.__doc__ or "" for kind in reversed(CompressConfig.__mro__)))
    for key, kind in STAGES.items():
        docs = [parent.__doc__ or "" for parent in reversed(kind.__mro__)]
        describe(made, *docs, prefix=f"{key}.")
    return made


def describe(parser: ArgumentParser, *docs: str, prefix: str = "") -> None:
    """Give every flag of a parser the text that docstrings have on it."""
    texts: dict[str, str] = {}
    for doc in docs:
        body = re.split(r"(?:Attributes|Args):", doc)[-1]
        pieces = re.split(r"(?:^|\.) *(\w+): ", re.sub(r"\s+", " ", body).strip())
        for name, about in zip(pieces[1::2], pieces[2::2], strict=False):
            texts[prefix + name] = about.strip(" .").replace("%", "%%").replace("``", "")
    for group in parser._action_groups:
        if (group.title or "").startswith("<"):
            group.title = "what it takes"
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)
