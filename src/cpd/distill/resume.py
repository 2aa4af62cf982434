"""Going on from a checkpoint: which run it is of, and whether that is this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpd.distill.checkpoint import newest, previous
from cpd.distill.loop import Loop
from cpd.distill.options import TrainOptions, plain
from cpd.errors import ArtefactError, InputError

__all__ = ["go_on", "identity"]

# What changes how a step is computed, but not what it is: may differ on resume.
FREE = ("accumulate", "teacher_cache", "workers")
SHOWN = 3  # tensors that differ, in an error


def identity(options: TrainOptions, **more: Any) -> dict[str, Any]:
    """All that decides the weights, as JSON can hold it: what a checkpoint must agree with.

    ``more``: the arguments of ``distill`` beside its options; objects count by their class.
    """
    held = {**plain(options), **{name: plain(value) for name, value in more.items()}}
    return {name: value for name, value in held.items() if name not in FREE}


def go_on(loop: Loop, path: Path, mine: Mapping[str, Any]) -> None:
    """Take a loop to where the newest checkpoint of its run left it; ``mine``: its identity.

    Raises:
        InputError: the checkpoint is of another run or network. Older ones do not say of which run.
        ArtefactError: it is none of ``distill``, or damaged.
    """
    saved: Any = newest(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("student"), dict):
        raise ArtefactError(f"{path} is not a checkpoint of cpd.distill. {_remedy(path)}")
    was = saved.get("run", {})
    changed = [f"{k} was {was[k]!r}, is {v!r}" for k, v in mine.items() if was.get(k, v) != v]
    if changed:
        raise InputError(f"{path} is of another run: {'; '.join(changed)}. {_remedy(path)}")
    other = _differing(saved["student"], loop.state.student)
    if other:
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        raise InputError(
            f"{path} is of a run on another network: {'; '.join(other[:SHOWN])}{more}. "
            f"{_remedy(path)}"
        )
    try:
        loop.load_state_dict(saved)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this run: {error}. {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    return (
        "Give what that run was given, another file, or begin anew: delete it, and "
        f"{previous(path).name} with it"
    )


def _differing(saved: Mapping[str, torch.Tensor], student: nn.Module) -> list[str]:
    """Tensors whose shape is another, or that only one of both has."""
    held = student.state_dict()
    lazy = {name for name, tensor in held.items() if nn.parameter.is_lazy(tensor)}
    made = [name for name in {**saved, **held} if name not in lazy]
    shapes = {name: (_shape(saved.get(name)), _shape(held.get(name))) for name in made}
    return [f"{name} was {was}, is {now}" for name, (was, now) in shapes.items() if was != now]


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
