"""All tensors of a network to one safetensors file and back: ties, strides and dtypes included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cpd.errors import ArtefactError, ExportError
from cpd.files import save_file
from cpd.reading import opened

__all__ = ["MANIFEST", "PLAN", "TENSORS", "Stored", "assign", "collect", "read", "write"]

TENSORS, PLAN, MANIFEST = "model.safetensors", "plan.json", "manifest.json"
"""The files of an artefact."""

_HEADER_LIMIT = 1 << 25  # bytes: names and shapes of some 200 000 tensors


@dataclass(frozen=True)
class Stored:
    """Tensors by name, each memory once.

    ``aliases`` maps further names of a tensor to the one it is stored under. ``orders`` has, for
    each tensor that does not lie row by row in memory, its axes from the slowest to the fastest:
    results can depend on it in the last bit.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    orders: dict[str, list[int]]


def collect(model: nn.Module) -> Stored:
    """Every parameter and buffer of ``model``, those outside its state dict too.

    Raises:
        ExportError: the model holds what plain tensors cannot: extra state, meta or sparse tensors.
    """
    states = [name for name in model.state_dict(keep_vars=True) if name.endswith("_extra_state")]
    if states:
        raise ExportError(
            f"{states[0]!r} is extra state of a module (get_extra_state), which is no tensor and "
            "would need pickle. Keep it in a registered buffer instead."
        )
    stored = Stored({}, {}, {})
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in _slots(model):
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            kind = "meta" if tensor.is_meta else "quantized or sparse"
            raise ExportError(f"{name!r} is a {kind} tensor: only plain dense ones can be saved.")
        owner = first.setdefault(_memory(tensor), name)
        if owner != name:
            stored.aliases[name] = owner
            continue
        stored.tensors[name] = tensor.detach()
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
            axes = range(tensor.ndim)
            stored.orders[name] = sorted(axes, key=[-step for step in tensor.stride()].__getitem__)
    return stored


def write(stored: Stored, path: Path) -> None:
    """Write ``stored`` to ``path`` as safetensors, aliases and orders as JSON in its metadata.

    Raises:
        OSError: the disk is full or refuses it. ExportError: the tensors cannot be written so.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in stored.tensors.items():
        tensor = value.cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in seen else tensor  # two views of one memory
        seen.add(memory)
    notes = {
        "format": "pt",
        "aliases": json.dumps(stored.aliases, sort_keys=True),
        "orders": json.dumps(stored.orders, sort_keys=True),
    }
    try:
        save_file(plain, path, metadata=notes)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ExportError(f"the tensors cannot be written to {path.name}: {error}") from error


def read(path: Path, small: nn.Module) -> Stored:
    """The tensors in ``path``; their values are read only if all names and shapes are ``small``'s.

    Raises:
        ArtefactError: the file is damaged, foreign, or holds tensors of another network.
    """
    try:
        with opened(path) as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > min(_HEADER_LIMIT, path.stat().st_size):
            raise ArtefactError(
                f"{path} announces a header of {header} bytes: damaged, or no safetensors file."
            )
        with safe_open(path, framework="pt", device="cpu") as reader:
            aliases, orders = _notes(path, reader.metadata())
            shapes = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118 - it is no mapping
            _check_fit(path, small, shapes, aliases)
            stored = Stored({name: reader.get_tensor(name) for name in shapes}, aliases, orders)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise ArtefactError(
            f"{path} cannot be read: {error}. Copy it again, or write it again with cpd.save."
        ) from error
    _check_values(path, small, stored)
    return stored


def assign(small: nn.Module, stored: Stored) -> None:
    """Put the tensors into ``small`` with their dtypes; what was shared is shared again."""
    placed: dict[str, Tensor] = {}
    for name, slot in list(_slots(small)):
        owner = stored.aliases.get(name, name)
        if owner not in placed:
            tensor = stored.tensors[owner]
            slot.data = _ordered(tensor, stored.orders.get(owner)).to(slot.device)
            placed[owner] = slot
        elif isinstance(slot, nn.Parameter) != isinstance(placed[owner], nn.Parameter):
            slot.data = placed[owner].data  # a buffer on the memory of a parameter
        elif slot is not placed[owner]:
            path, _, leaf = name.rpartition(".")
            module = small.get_submodule(path)
            table: dict[str, Any] = (
                module._parameters if isinstance(slot, nn.Parameter) else module._buffers
            )
            table[leaf] = placed[owner]


def _slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer, shared ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """A key that is the same for two tensors if they are one and the same memory."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _ordered(tensor: Tensor, order: list[int] | None) -> Tensor:
    """A copy of ``tensor`` with its axes lying in memory in ``order``, slowest first.

    A copy in any case: tensors of a mapped file start at any byte, where the kernels of a processor
    add up in another order and differ in the last bit.
    """
    if order is None:
        return tensor.clone()
    memory = torch.empty([tensor.shape[axis] for axis in order], dtype=tensor.dtype)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return memory.permute(inverse).copy_(tensor)


def _notes(
    path: Path, metadata: dict[str, str] | None
) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Aliases and orders from the metadata of an untrusted file."""
    try:
        aliases, orders = (json.loads((metadata or {})[key]) for key in ("aliases", "orders"))
        good = all(isinstance(owner, str) for owner in aliases.values())
        good &= all(sorted(order) == list(range(len(order))) for order in orders.values())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ArtefactError(f"{path} has no table of shared tensors: cpd.save did not write it.")
    return aliases, orders


def _check_fit(
    path: Path, small: nn.Module, shapes: dict[str, tuple[int, ...]], aliases: dict[str, str]
) -> None:
    """Names and shapes in the file must be those of the cut network, all of them, both ways."""
    slots = dict(_slots(small))
    owners = dict.fromkeys(shapes, "") | aliases
    faults = [f"{name!r} is missing" for name in slots if name not in owners]
    faults += [f"{name!r} is not in the model" for name in owners if name not in slots]
    for name, owner in owners.items():
        found = shapes.get(owner or name)
        if found is None:
            faults.append(f"{name!r} refers to {owner!r}, which is missing")
        elif name in slots and tuple(slots[name].shape) != found:
            faults.append(f"{name!r} has shape {found}, the cut model {tuple(slots[name].shape)}")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if faults[5:] else "")
        raise ArtefactError(
            f"{path} does not fit the model cut by the plan: {shown}. Build the model exactly as "
            "it was when the plan was made, in code and options."
        )


def _check_values(path: Path, small: nn.Module, stored: Stored) -> None:
    """Kinds of number must be the model's, and what it shares must have one value in the file."""
    for name, order in stored.orders.items():
        if name not in stored.tensors or len(order) != stored.tensors[name].ndim:
            raise ArtefactError(f"{path}: the order of axes noted for {name!r} is not one of it.")
    first: dict[int, str] = {}
    for name, slot in _slots(small):
        other = first.setdefault(id(slot), name)
        one, two = (stored.tensors[stored.aliases.get(key, key)] for key in (other, name))
        if slot.is_floating_point() != two.is_floating_point():
            raise ArtefactError(f"{path}: {name!r} is {two.dtype}, the model has {slot.dtype}.")
        if one is not two and not (one.dtype == two.dtype and torch.equal(one, two)):
            raise ArtefactError(
                f"{path}: the model shares {other!r} and {name!r}, the saved one had two different "
                "values there. Build the model without that tie."
            )
