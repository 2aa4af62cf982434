"""The artefact: a folder of tensors, plan and manifest that rebuilds a cut network. No pickle.

    model.safetensors   every parameter and buffer, shared ones once; aliases in the metadata
    plan.json           ``plan.to_json()``, exactly
    manifest.json       format, version, sha256 and size of the two files, what the caller adds

A folder read back is untrusted: sizes are limited and hashes, names and shapes are checked before a
single tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from cpd.cut import cut
from cpd.errors import ArtefactError, CPDError, ExportError, InputError, OutputError
from cpd.exporters._tensors import MANIFEST, PLAN, TENSORS, Stored, assign, collect, read, write
from cpd.files import publish, refusal, staging
from cpd.plan import Plan
from cpd.reading import LONGEST, bounded, contents, opened

__all__ = ["load", "plan_of", "rebuilt", "save"]

FORMAT = 1
_LIMITS = {MANIFEST: 1 << 20, PLAN: LONGEST}  # bytes
_AGAIN = "Copy the whole folder again, or write it again with cpd.save."


def save(
    model: nn.Module,
    plan: Plan,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a cut network and its plan to ``folder``, to be read by :func:`load`.

    Every parameter and buffer is written, those outside the state dict too, so that the network
    read back gives the same outputs bit for bit. A new folder appears in one step. In an existing
    one (``overwrite``) the three files are replaced, the manifest last, and all others stay: a
    crash in between is found by its hashes.

    Args:
        model: the network that ``cut`` gave, on any device.
        plan: the plan it was cut by.
        folder: where to write; must be new or empty unless ``overwrite``.
        overwrite: replace an artefact that is there.
        extra: anything JSON can hold, kept under "extra" in the manifest.

    Returns:
        The folder.

    Raises:
        InputError: ``model`` was not cut by ``plan``, or ``extra`` does not fit into JSON or 1 MiB.
        ExportError: the model holds what tensors alone cannot (extra state or meta tensors), or the
            plan is too large to be read back.
        OutputError: the folder is not empty, or cannot be written.
    """
    folder = Path(folder)
    _check_target(folder, overwrite)
    stored = collect(model)
    _check_cut(plan, stored)
    inside = folder.is_dir() and any(folder.iterdir())
    with staging(folder if inside else folder.parent) as temporary:
        draft = temporary / "artefact"
        draft.mkdir()
        write(stored, draft / TENSORS)
        (draft / PLAN).write_text(_plan(plan), encoding="utf-8")
        (draft / MANIFEST).write_text(_manifest(draft, extra), encoding="utf-8")
        if inside:
            for name in (TENSORS, PLAN, MANIFEST):
                publish(draft / name, folder / name)
        else:
            publish(draft, folder)
    return folder


def plan_of(folder: str | os.PathLike[str]) -> Plan:
    """The plan in ``folder``, once manifest, sizes and hashes are checked; needs no network.

    Raises:
        ArtefactError: as :func:`load` does.
    """
    folder = Path(folder)
    _check_files(folder, _read_manifest(folder))
    return _read_plan(folder)


def rebuilt(folder: str | os.PathLike[str], plan: Plan, model: nn.Module) -> nn.Module:
    """What :func:`load` gives, by the plan that :func:`plan_of` read."""
    folder = Path(folder)
    plan.check(model)
    _check_attributes(folder / PLAN, plan, model)
    small = _cut(folder / PLAN, plan, model)
    assign(small, read(folder / TENSORS, small))
    return small


def load(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The cut network in ``folder``, rebuilt from the unpruned architecture.

    Args:
        folder: what :func:`save` wrote; treated as untrusted.
        model: the unpruned network with any weights; it stays as it is.

    Returns:
        A new network of the class of ``model``, on its device, with the widths, tensors and dtypes
        of the saved one; tensors that were shared are shared again.

    Raises:
        ArtefactError: a file is missing, truncated, damaged, foreign or too large, or its tensors
            do not fit. Nothing is loaded then.
        PlanMismatch: the plan was made for another model than ``model``.
    """
    return rebuilt(folder, plan_of(folder), model)


# Writing


def _check_target(folder: Path, overwrite: bool) -> None:
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file: choose a folder.")
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise OutputError(
                f"{folder} exists and is not empty: choose another folder, or pass overwrite=True, "
                f"which replaces {TENSORS}, {PLAN} and {MANIFEST} in it and nothing else."
            )
    except OSError as error:
        raise refusal(folder, error) from error


def _check_cut(plan: Plan, stored: Stored) -> None:
    """Refuse a network that ``plan`` did not make: it could be written, but never read back."""
    for name, kept in plan.masks().items():
        tensor = stored.tensors.get(stored.aliases.get(name, name))
        count = int(kept.sum())
        found = 0 if tensor is None else tensor.numel()
        if found != count:
            raise InputError(
                f"the model was not cut by this plan: {name!r} has {found} values, the plan keeps "
                f"{count} of {kept.numel()}. Save what cpd.cut(model, plan) returned."
            )


def _plan(plan: Plan) -> str:
    try:
        return bounded(plan.to_json())
    except ValueError as error:
        raise ExportError(
            f"the plan is larger than load reads, as files are not trusted: {error}. Keep "
            "plan.to_json() and the tensors yourself; Plan.from_json(text, limited=False) reads it."
        ) from error


def _manifest(draft: Path, extra: Mapping[str, Any] | None) -> str:
    try:
        version = metadata.version("cpd")
    except metadata.PackageNotFoundError:
        version = "unknown"  # run from a source tree that was never installed
    files = {name: _fingerprint(draft / name) for name in (TENSORS, PLAN)}
    content = {"format": FORMAT, "cpd": version, "files": files, "extra": dict(extra or {})}
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"extra: only what JSON can hold can be saved: {error}") from error
    if len(text.encode()) > _LIMITS[MANIFEST]:
        raise InputError(
            f"extra: the manifest may have {_LIMITS[MANIFEST]} bytes; save less in it."
        )
    return text


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with opened(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# Reading


def _bytes(path: Path) -> bytes:
    return contents(path, _LIMITS[path.name], "Give the folder that cpd.save wrote.")


def _read_limited(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; refuses what is missing, too large or not a JSON object."""
    data = _bytes(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ArtefactError(f"{path} is not valid JSON: {error}. {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no JSON object: it was not written by cpd.save.")
    return content


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is not a folder: give the folder that cpd.save wrote.")
    path = folder / MANIFEST
    content: dict[str, Any] = _read_limited(path)
    if content.get("format") != FORMAT:
        raise ArtefactError(
            f"{path}: format {content.get('format')!r}, but this version reads {FORMAT}. Use the "
            f"version of cpd that wrote it ({content.get('cpd', 'not noted')!r})."
        )
    return content


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare size and hash of both files with the manifest."""
    noted = manifest.get("files")
    for name in (TENSORS, PLAN):
        path = folder / name
        want = noted.get(name) if isinstance(noted, dict) else None
        if not isinstance(want, dict):
            raise ArtefactError(f"{folder / MANIFEST} has no entry for {name}. {_AGAIN}")
        try:
            size = path.stat().st_size
            if size != want.get("bytes"):
                raise ArtefactError(
                    f"{path} has {size} bytes, the manifest says {want.get('bytes')}: it is "
                    f"truncated or was changed. {_AGAIN}"
                )
            have = _fingerprint(path)
        except OSError as error:
            raise ArtefactError(f"{path} cannot be read: {error.strerror}. {_AGAIN}") from error
        if have["sha256"] != want.get("sha256"):
            raise ArtefactError(
                f"{path} has another sha256 than the manifest says: it is damaged, was changed, or "
                f"belongs to another artefact. {_AGAIN}"
            )


def _read_plan(folder: Path) -> Plan:
    path = folder / PLAN
    try:
        return Plan.from_json(_bytes(path).decode())
    except CPDError as error:
        raise ArtefactError(f"{path} holds no usable plan: {error}") from error
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ArtefactError(
            f"{path} holds no usable plan: {type(error).__name__}: {error}. {_AGAIN}"
        ) from error


def _cut(path: Path, plan: Plan, model: nn.Module) -> nn.Module:
    """The network cut by an untrusted plan."""
    try:
        return cut(model, plan, verify=False)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{path} cannot be applied: {type(error).__name__}: {error}. {_AGAIN}"
        ) from error


def _check_attributes(path: Path, plan: Plan, model: nn.Module) -> None:
    """A plan may set numbers where the model has numbers; nothing else untrusted goes in."""
    try:
        entries = [
            (o, name, new) for o, news in plan.attributes.items() for name, new in news.items()
        ]
        olds = [getattr(model.get_submodule(owner), name) for owner, name, _ in entries]
    except AttributeError as error:
        raise ArtefactError(
            f"{path} sets what the model does not have: {error}. {_AGAIN}"
        ) from error
    for (owner, name, new), old in zip(entries, olds, strict=True):
        if not (_is_numeric(old) and _is_numeric(new)):
            raise ArtefactError(
                f"{path} sets {owner}.{name}, which is no number: cpd.save did not write it."
            )


def _is_numeric(value: object) -> bool:
    entries = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(entry, (int, float)) for entry in entries)
