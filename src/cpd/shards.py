"""Shards: a checkpoint too large to load, cut by a plan file by file.

A folder of safetensors files goes in, a folder of the same files goes out, each tensor narrowed to
what the plan keeps. One tensor at a time is in memory, so the peak does not depend on the size of
the checkpoint. The network itself may be on the meta device: `comb` and `choose` need no weights
for scores that need none.

    model.safetensors.index.json   tensor -> file, as Hugging Face writes it; sizes follow
    model-00001-of-00003.safetensors, ...
    plan.json                      ``plan.to_json()``
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .cut import cut_tensor
from .errors import ArtefactError, OutputError, PlanMismatch, UnknownName
from .files import publish, refusal, staging
from .plan import Plan

__all__ = ["cut_shards"]

INDEX, PLAN = ".safetensors.index.json", "plan.json"
_INDEX_LIMIT = 1 << 28  # bytes
_SHOWN = 5  # names listed in an error
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}  # of the format; what packs several numbers into a byte cannot be narrowed index by index


@dataclass(frozen=True)
class _Entry:
    """One tensor of the checkpoint: the name that the plan knows it by, file, type and shape."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]


def cut_shards(
    source: str | os.PathLike[str],
    plan: Plan,
    target: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    names: Callable[[str], str] | None = None,
    extra: str = "error",
) -> Path:
    """Cut the checkpoint in `source` by a plan and write it to `target`, file by file.

    Tensors keep their names, types and files. What a tied tensor is called in the checkpoint does
    not matter, and it may be there once or under each of its names. Everything is checked before
    the first tensor is written, and the folder appears in one step.

    Args:
        source: folder of safetensors files, with an index (`*.safetensors.index.json`) or without.
        plan: made for the network that the checkpoint belongs to.
        target: folder to write; must be new or empty.
        model: the unpruned network, on any device: tells which of its buffers a checkpoint does
            not hold. Needed for plans read from JSON where there are such buffers.
        names: the network's name of a tensor from its name in the checkpoint; the same by default.
        extra: "error" refuses tensors that the network does not have, "drop" leaves them out.

    Returns:
        The folder.

    Raises:
        ArtefactError: the checkpoint is incomplete, damaged, or not safetensors.
        PlanMismatch: its tensors are not those of the network that the plan was made for.
        OutputError: `target` is not empty, or cannot be written.
    """
    if extra not in ("error", "drop"):
        raise UnknownName("handling of extra tensors", extra, ("error", "drop"))
    source, target = Path(source), Path(target)
    _check_target(target)
    index, files = _contents(source)
    entries = {
        stored: entry
        for stored, entry in _entries(source, files, names or str)
        if extra == "error" or entry.name in plan.shapes
    }
    _check_fit(source, plan, entries, _expected(plan, model))
    entries = {stored: entry for stored, entry in entries.items() if entry.name not in plan.gone}
    with staging(target.parent) as temporary:
        draft = temporary / "shards"
        draft.mkdir()
        for file in sorted({entry.file for entry in entries.values()}):
            _cut_file(source, file, draft, plan, entries)
        if index is not None:
            text = json.dumps(_new_index(source / index, plan, entries), indent=2)
            (draft / index).write_text(text + "\n", encoding="utf-8")
        (draft / PLAN).write_text(plan.to_json(), encoding="utf-8")
        publish(draft, target)
    return target


def _check_target(target: Path) -> None:
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise refusal(target, error) from error
    if taken:
        raise OutputError(f"{target} is there already: give a folder that is new or empty.")


# Reading


def _contents(source: Path) -> tuple[str | None, dict[str, str]]:
    """Return the name of the index, if there is one, and tensor -> file."""
    if not source.is_dir():
        raise ArtefactError(f"{source} is not a folder: give one with *.safetensors files.")
    indices = sorted(path.name for path in source.glob(f"*{INDEX}"))
    if len(indices) > 1:
        found = ", ".join(indices)
        raise ArtefactError(f"{source} has more than one index: {found}. Leave one checkpoint.")
    if indices:
        return indices[0], _weight_map(source / indices[0])
    files: dict[str, str] = {}
    for path in sorted(source.glob("*.safetensors")):
        for stored in _stored(path):
            if stored in files:
                raise ArtefactError(
                    f"{stored!r} is in {files[stored]} and in {path.name}: {source} holds more "
                    "than one checkpoint. Leave one, or add its index."
                )
            files[stored] = path.name
    if not files:
        raise ArtefactError(f"{source} has no *.safetensors file with tensors.")
    return None, files


def _weight_map(path: Path) -> dict[str, str]:
    content = _index(path).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ArtefactError(f"{path} has no weight_map: it is no index of safetensors files.")
    for stored, file in content.items():
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain:
            raise ArtefactError(f"{path}: {stored!r} is in {file!r}, which is no file beside it.")
    return content


def _index(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _INDEX_LIMIT:
            raise ArtefactError(f"{path} is larger than {_INDEX_LIMIT} bytes: not an index.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no JSON object: it is no index.")
    return content


def _stored(path: Path) -> list[str]:
    with _opened(path) as reader:
        return sorted(reader.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file for reading; its errors name it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise ArtefactError(
            f"{path} cannot be read: {error}. Copy the checkpoint again."
        ) from error


def _entries(
    source: Path, files: Mapping[str, str], names: Callable[[str], str]
) -> Iterator[tuple[str, _Entry]]:
    """Read types and shapes, not values, of all tensors, in the order of the files."""
    for file in sorted(set(files.values())):
        with _opened(source / file) as reader:
            held = set(reader.keys())
            mine = sorted(name for name, at in files.items() if at == file)
            lacks = next((name for name in mine if name not in held), None)
            if lacks is not None:
                raise ArtefactError(
                    f"{source / file} lacks {lacks!r}, which the index says is there. Copy the "
                    "checkpoint again."
                )
            for stored in mine:
                view = reader.get_slice(stored)
                shape = tuple(int(size) for size in view.get_shape())
                kind = _known_type(str(view.get_dtype()), f"{source / file}: {stored!r}")
                yield stored, _Entry(names(stored), file, kind, shape)


def _known_type(kind: str, where: str) -> str:
    if kind not in _BYTES:
        raise ArtefactError(
            f"{where} is of type {kind}, which cannot be cut. Convert it to one of "
            f"{', '.join(_BYTES)}."
        )
    return kind


# Fitting


def _expected(plan: Plan, model: nn.Module | None) -> set[str]:
    """Return the names that a checkpoint holds: all but those of buffers that are not saved."""
    if model is None and plan.groups is not None:
        model = plan.groups.model
    if model is None:
        return set(plan.shapes)
    plan.check(model)
    return set(model.state_dict(keep_vars=True)) & set(plan.shapes)


def _check_fit(source: Path, plan: Plan, entries: Mapping[str, _Entry], expected: set[str]) -> None:
    """Names and shapes must be those of the plan's network; tied tensors need to be there once."""
    faults = []
    seen: dict[str, str] = {}
    for stored, entry in entries.items():
        twin = seen.setdefault(entry.name, stored)
        wanted = plan.shapes.get(entry.name)
        if twin != stored:
            faults.append(f"{stored!r} and {twin!r} are both {entry.name!r}")
        elif wanted is None:
            faults.append(f"{stored!r} is no tensor of {plan.model}")
        elif wanted != entry.shape:
            faults.append(f"{stored!r} has shape {entry.shape}, the plan says {wanted}")
    held = {plan.aliases[name] for name in seen if name in plan.aliases}
    missing = sorted(name for name in expected if plan.aliases[name] not in held)
    faults += [f"{name!r} is missing" for name in missing]
    if not faults:
        return
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    hint = "Give names= where the checkpoint calls them otherwise"
    if missing and len(missing) == len(faults) and len(expected) == len(plan.shapes):
        hint = "Give model= where these are buffers that a checkpoint does not hold"
    raise PlanMismatch(
        f"the checkpoint in {source} is not of the network that this plan was made for: "
        f"{'; '.join(faults[:_SHOWN])}{more}. {hint}."
    )


# Writing


def _cut_file(
    source: Path, file: str, draft: Path, plan: Plan, entries: Mapping[str, _Entry]
) -> None:
    """Write one file: its header first, since all sizes are known, then tensor by tensor."""
    mine = {stored: entry for stored, entry in entries.items() if entry.file == file}
    wide_first = sorted(mine, key=lambda stored: (-_BYTES[mine[stored].dtype], stored))
    mine = {stored: mine[stored] for stored in wide_first}  # so that all lie at even addresses
    with _opened(source / file) as reader:
        notes = reader.metadata() or {"format": "pt"}
    with (draft / file).open("wb") as stream:
        stream.write(_header(plan, mine, notes))
        for stored, entry in mine.items():
            with _opened(source / file) as reader:  # each anew: what was read is unmapped again
                tensor = reader.get_tensor(stored)
            tensor = _cut(tensor, plan, plan.aliases[entry.name])
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _cut(tensor: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    if name in plan.rescale and tensor.element_size() == 1:  # eight bits have no products
        return cut_tensor(tensor.float(), plan, name).to(tensor.dtype)
    return cut_tensor(tensor, plan, name)


def _header(plan: Plan, mine: Mapping[str, _Entry], notes: Mapping[str, str]) -> bytes:
    """Return length and header of a safetensors file, padded to eight bytes.

    Source: the format's description, https://github.com/huggingface/safetensors#format.
    """
    content: dict[str, Any] = {"__metadata__": dict(notes)}
    end = 0
    for stored, entry in mine.items():
        start, end = end, end + _size(plan, entry)
        shape = list(plan.new_shape(entry.name))
        content[stored] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size(plan: Plan, entry: _Entry) -> int:
    """Bytes of a tensor after cutting."""
    return prod(plan.new_shape(entry.name)) * _BYTES[entry.dtype]


def _new_index(path: Path, plan: Plan, entries: Mapping[str, _Entry]) -> dict[str, Any]:
    """Return the index with the sizes of the cut checkpoint."""
    content = _index(path)
    notes = content.get("metadata")
    notes = dict(notes) if isinstance(notes, dict) else {}
    notes["total_size"] = sum(_size(plan, entry) for entry in entries.values())
    before, after = plan.costs["params"]
    if isinstance(notes.get("total_parameters"), int):
        notes["total_parameters"] -= before - after
    return {**content, "metadata": notes, "weight_map": {s: e.file for s, e in entries.items()}}
