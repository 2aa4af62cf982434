"""Origins: where the network of a command comes from, and what of a folder is trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpd.cli import trusted
from cpd.cli.models import Source, named
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
    """Where the network of an artefact came from: as typed, or as the folder says.

    Raises:
        InputError: the folder does not say, or names what has to be typed.
        ArtefactError: what says it in the folder is damaged or too large.
    """
    if model is not None:
        return Source(model, model_args or {})
    for name, inside in (("manifest.json", "extra"), ("config.yaml", None)):
        if not (folder / name).is_file():
            continue
        found: Any = trusted.notes(folder / name)
        if inside is not None:
            found = found.get(inside) if isinstance(found, dict) else None
        if isinstance(found, dict) and found.get("model"):
            args = {} if model_args is None else {"model_args": None}  # typed ones take their place
            spec, args = trusted.network(folder, {**found, **args})
            return Source(spec, args if model_args is None else model_args)
    raise InputError(f"{folder} does not say where its network comes from; give --model")
