"""Origins: where the network of a command comes from, and what of a folder is trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpd.cli.models import LIBRARIES, Source, named
from cpd.distill import isolated
from cpd.errors import InputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["made", "noted", "settled"]


def settled(values: dict[str, Any]) -> tuple[Source, dict[str, Any]]:
    """Where the network comes from, and the other keywords of ``cpd.compress``, names resolved."""
    source = Source(values.pop("model"))
    for key in ("data", "task", "importance", "losses", "teacher"):
        if key in values:
            values[key] = values[key] if values[key] == "self" else named(key, values[key])
    return source, values


def made(source: Source, weights: str | None = None, seed: int = 0) -> nn.Module:
    """The network, the same for the same seed."""
    from cpd.compress import load_weights

    with isolated(seed):
        network = source()
    if weights is not None:
        load_weights(network, weights)
    return network


def noted(folder: Path, model: str | None, model_args: dict[str, Any] | None) -> Source:
    """Where the network of an artefact came from: as typed, or as the folder says."""
    from cpd.cli.flags import read

    if model is not None:
        return Source(model, model_args or {})
    for name, inside in (("config.yaml", None), ("manifest.json", "extra")):
        if not (folder / name).is_file():
            continue
        found: Any = read(folder / name)
        found = found if inside is None else found.get(inside, {})
        if isinstance(found, dict) and found.get("model"):
            return _trusted(folder, found, model_args)
    raise InputError(f"{folder} does not say where its network comes from; give --model")


def _trusted(folder: Path, found: dict[str, Any], model_args: dict[str, Any] | None) -> Source:
    """The network that a folder names: of a known library, made with plain numbers.

    Raises:
        InputError: the folder names code that would be imported, or texts that may name files.
    """
    spec = str(found["model"])
    if spec.partition(":")[0] not in LIBRARIES:
        raise InputError(
            f"{folder} names {spec!r}, which is code of your own: only what you type is imported. "
            f"Give --model {spec} if you trust it"
        )
    plain: Any = model_args if model_args is not None else found.get("model_args") or {}
    if model_args is None:
        for key, value in dict(plain).items():
            entries = value if isinstance(value, list) else [value]
            if not all(isinstance(entry, int | float | None) for entry in entries):
                raise InputError(
                    f"{folder} makes its network with {key}={value!r}, which may name a file: only "
                    f"what you type is read. Give --model {spec} and its --model_args"
                )
    return Source(spec, dict(plain))
