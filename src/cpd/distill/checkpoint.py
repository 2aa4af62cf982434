"""Checkpoints without pickle: a safetensors file, tensors as its body, all else JSON in its head.

The file is replaced in one step, so a run that dies while it writes keeps the checkpoint before. A
checksum of everything tells a damaged file, and the generation before it can be kept beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cpd.errors import ArtefactError, InputError, OutputError
from cpd.files import publish, save_file, staging

__all__ = ["exists", "newest", "pack", "previous", "read", "unpack", "write"]

FORMAT = "cpd.checkpoint.2"
OLDER = "cpd.checkpoint.1"  # without a checksum
PLAIN = (str, int, float, bool, type(None))
_SOUND: dict[Path, tuple[int, ...]] = {}
"""Files that this process has written or found to be whole, each with what `_stamp` says."""


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """JSON for a nest of mappings, sequences, tensors, plain values; tensors go to ``tensors``.

    Raises:
        InputError: a value that is none of these.
    """
    if isinstance(value, torch.Tensor):
        name = path or "value"
        while name in tensors:  # keys may hold a "/", and 1 and "1" are two
            name += "'"
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


def write(path: str | os.PathLike[str], value: Any, *, generations: bool = False) -> None:
    """Write a nest of mappings, sequences, tensors and plain values, atomically.

    ``generations``: the file that was there stays, as ``previous(path)``. A damaged one does not
    take the place of the one before it.

    Raises:
        OutputError: the file cannot be written. InputError: a value that a checkpoint cannot hold.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(value, tensors))
    head = {"format": FORMAT, "value": text, "sha256": _checksum(text, tensors)}
    with staging(path.parent) as temporary:
        draft = temporary / path.name
        try:
            save_file(tensors, draft, metadata=head)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"cannot write the checkpoint {path}: {error}. The one before is intact; make "
                "room, or choose another folder"
            ) from error
        if generations and path.exists() and (_sound(path) or not previous(path).exists()):
            path.replace(previous(path))
        publish(draft, path)
        if generations:
            _SOUND[path.absolute()] = _stamp(path)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes where a file is written anew."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sound(path: Path) -> bool:
    """Whether a file can be read; one that is known to be whole is not read again."""
    if _SOUND.get(path.absolute()) == _stamp(path):
        return True
    try:
        read(path)
    except ArtefactError:
        return False
    return True


def previous(path: Path) -> Path:
    """Where the generation before lies."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def exists(path: Path) -> bool:
    """Whether there is a checkpoint of any generation."""
    return path.exists() or previous(path).exists()


def newest(path: Path) -> Any:
    """The checkpoint, or where it is damaged or missing the one before it, with a warning.

    Raises:
        ArtefactError: neither can be read.
    """
    try:
        found = read(path)
        _SOUND[path.absolute()] = _stamp(path)
    except ArtefactError as error:
        _SOUND.pop(path.absolute(), None)
        if not previous(path).exists():
            raise
        found = read(previous(path))
        if path.exists():  # else the run ended between two renames, and nothing is damaged
            warnings.warn(f"{error}. Going on from {previous(path)}, the one before", stacklevel=2)
    return found


def read(path: str | os.PathLike[str]) -> Any:
    """What ``write`` wrote.

    Raises:
        ArtefactError: no such file, a truncated or damaged one, or one that is no checkpoint of
            this library.
    """
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"cannot read the checkpoint {path}: {error}") from error
    if head.get("format") not in (FORMAT, OLDER):
        found = head.get("format", "none")
        raise ArtefactError(f"{path} is not a checkpoint of this library ({FORMAT}); found {found}")
    text = head.get("value", "")
    if head["format"] == FORMAT and head.get("sha256") != _checksum(text, tensors):
        raise ArtefactError(f"cannot read the checkpoint {path}: its checksum is another")
    try:
        return unpack(json.loads(text), tensors)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ArtefactError(f"cannot read the checkpoint {path}: {error}") from error


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The hash of all that a checkpoint holds."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
