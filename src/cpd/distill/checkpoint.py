"""Checkpoints without pickle: a safetensors file, tensors as its body, all else JSON in its head.

The file is replaced in one step, so a run that dies while it writes keeps the checkpoint before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cpd.errors import ArtefactError, InputError, OutputError
from cpd.files import publish, staging

__all__ = ["pack", "read", "unpack", "write"]

FORMAT = "cpd.checkpoint.1"
PLAIN = (str, int, float, bool, type(None))


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """JSON for a nest of mappings, sequences, tensors, plain values; tensors go to ``tensors``.

    Raises:
        InputError: a value that is none of these.
    """
    if isinstance(value, torch.Tensor):
        name = path or "value"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        items = value.items()
        return {"map": [[_key(k, path), pack(v, tensors, f"{path}/{k}")] for k, v in items]}
    if isinstance(value, list | tuple):
        packed = [pack(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": packed}
    found = type(value).__name__
    raise InputError(f"a checkpoint cannot hold {path}: {found} is neither tensor nor JSON")


def _key(key: Any, path: str) -> str | int:
    if isinstance(key, str | int):
        return key
    raise InputError(f"a checkpoint cannot hold {path}: key {key!r} is neither text nor a number")


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of ``pack``."""
    if not isinstance(packed, Mapping):
        return packed
    ((kind, inner),) = packed.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "map":
        return {key: unpack(value, tensors) for key, value in inner}
    items = [unpack(item, tensors) for item in inner]
    return tuple(items) if kind == "tuple" else items


def write(path: str | os.PathLike[str], value: Any) -> None:
    """Write a nest of mappings, sequences, tensors and plain values, atomically.

    Raises:
        OutputError: the file cannot be written. InputError: a value that a checkpoint cannot hold.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    head = {"format": FORMAT, "value": json.dumps(pack(value, tensors))}
    with staging(path.parent) as temporary:
        draft = temporary / path.name
        try:
            save_file(tensors, draft, metadata=head)
        except SafetensorError as error:
            raise OutputError(f"cannot write the checkpoint {path}: {error}") from error
        publish(draft, path)


def read(path: str | os.PathLike[str]) -> Any:
    """What ``write`` wrote.

    Raises:
        ArtefactError: no such file, a truncated one, or one that is no checkpoint of this library.
    """
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"cannot read the checkpoint {path}: {error}") from error
    if head.get("format") != FORMAT:
        found = head.get("format", "none")
        raise ArtefactError(f"{path} is not a checkpoint of this library ({FORMAT}); found {found}")
    return unpack(json.loads(head["value"]), tensors)
