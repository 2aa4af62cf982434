"""Origins: where the network of a command comes from, and what of a folder is trusted."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpd.cli import trusted
from cpd.cli.models import Source, named
from cpd.distill import isolated
from cpd.errors import ArtefactError, InputError
from cpd.exporters._call import brief
from cpd.exporters._tensors import TENSORS
from cpd.exporters.artefact import plan_of, rebuilt

if TYPE_CHECKING:
    from torch import nn

    from cpd.plan import Plan

__all__ = ["made", "noted", "restored", "settled"]

LEAST = 1 << 28  # bytes that the network of any folder may take
TIMES = 256  # its tensors: a tenth of inputs and of outputs, in half precision, is a 200th


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
        if not (folder / name).exists():
            continue
        found: Any = trusted.notes(folder / name)
        if inside is not None:
            found = found.get(inside) if isinstance(found, dict) else None
        if isinstance(found, dict) and found.get("model"):
            args = {} if model_args is None else {"model_args": None}  # typed ones take their place
            spec, args = trusted.network(folder, {**found, **args})
            return Source(spec, args if model_args is None else model_args)
    raise InputError(f"{folder} does not say where its network comes from; give --model")


def restored(
    folder: Path, model: str | None, model_args: dict[str, Any] | None
) -> tuple[nn.Module, Plan]:
    """The network of an artefact, and its plan. Nothing is made before the folder is checked.

    Raises:
        InputError: the folder does not say where its network comes from, or it has to be typed.
        ArtefactError: the folder is damaged, or the network that it names cannot be made or is not
            the plan's.
        PlanMismatch: the network as typed is not the plan's.
    """
    source = noted(folder, model, model_args)
    plan = plan_of(folder)
    network = made(source) if model is not None else _named(folder, source, plan)
    return rebuilt(folder, plan, network), plan


def _named(folder: Path, source: Source, plan: Plan) -> nn.Module:
    """The network that a folder names, which takes memory once its shapes are those of the plan.

    Nobody typed its arguments, and libraries check few of them: any error is the folder's.
    """
    try:
        sketch = _sketched(source)
        if sketch is not None:
            _check_size(folder, sketch)
            plan.check(sketch)
        return made(source)
    except Exception as error:
        if isinstance(error, ArtefactError) or isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise ArtefactError(
            f"{folder} names {source.spec} with {reprlib.repr(dict(source.args))}, which does not "
            f"make its network: {brief(error)} If you trust it, give --model and --model_args"
        ) from error


def _sketched(source: Source) -> nn.Module | None:
    """The network without memory; None where its library needs values while it is made."""
    try:
        with torch.device("meta"):
            return made(source)
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
    return None


def _check_size(folder: Path, sketch: nn.Module) -> None:
    """Refuse a network of far more bytes than the artefact has: a forged plan has any shapes."""
    tensors = [*sketch.parameters(), *sketch.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    most = max(LEAST, TIMES * (folder / TENSORS).stat().st_size)
    if size > most:
        raise ArtefactError(
            f"{folder} names a network of {size:,} bytes; for its tensors {most:,} are allowed. If "
            "you trust it, give --model and --model_args"
        )
