"""The hub of Hugging Face: artefacts pushed and pulled as folders. No pickle, no code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from cpd.errors import ArtefactError, ExportError, OutputError
from cpd.exporters._call import brief
from cpd.exporters.artefact import MANIFEST, PLAN, TENSORS, load

__all__ = ["pull", "push"]

FILES = (TENSORS, PLAN, MANIFEST)


def push(folder: str | os.PathLike[str], repository: str, **options: Any) -> str:
    """Upload an artefact, the three files of ``cpd.save`` and nothing else; return its address.

    Needs the package huggingface_hub, and a login of yours that may write there.

    Args:
        folder: what ``cpd.save`` wrote.
        repository: "owner/name"; it is made where missing.
        **options: of ``huggingface_hub.HfApi.upload_folder``, such as ``revision``, ``token``,
            ``commit_message``; and ``private`` for a repository that is made.

    Raises:
        ArtefactError: the folder is no whole artefact. ExportError: huggingface_hub is missing.
        OutputError: the hub refused, or cannot be reached.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ArtefactError(f"{folder} has no {missing[0]}: give the folder that cpd.save wrote.")
    api = _library().HfApi(token=options.get("token"))
    private = options.pop("private", None)
    try:
        api.create_repo(repository, private=private, exist_ok=True, token=options.get("token"))
        done = api.upload_folder(
            repo_id=repository, folder_path=str(folder), allow_patterns=list(FILES), **options
        )
    except (OSError, ValueError) as error:  # its errors of the network derive from OSError
        raise OutputError(f"{repository} cannot be written to: {brief(error)}") from error
    return str(getattr(done, "commit_url", done))


def pull(
    repository: str, model: nn.Module, *, revision: str | None = None, **options: Any
) -> nn.Module:
    """The cut network of an artefact on the hub, or in a local folder of that name.

    Only the three files of an artefact are downloaded, and they are read as untrusted, as
    ``cpd.load`` does. A branch may change: name a commit as ``revision`` for what must not.

    Args:
        repository: "owner/name", or a folder.
        model: the unpruned network with any weights.
        revision: a branch, a tag or a commit.
        **options: of ``huggingface_hub.snapshot_download``, such as ``token`` or ``cache_dir``.

    Raises:
        ArtefactError: it cannot be reached, or holds no whole artefact. ExportError:
            huggingface_hub is missing. PlanMismatch: it was made for another network.
    """
    folder = Path(repository)
    if not folder.is_dir():
        try:
            found = _library().snapshot_download(
                repository, revision=revision, allow_patterns=list(FILES), **options
            )
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{repository} cannot be read: {brief(error)}") from error
        folder = Path(found)
    return load(folder, model)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ExportError("the hub needs the package huggingface_hub: install it") from error
    return huggingface_hub
