"""The hub of Hugging Face: artefacts pushed and pulled as folders. No pickle, no code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cpd.errors import ArtefactError, ExportError, OutputError
from cpd.exporters._call import brief
from cpd.exporters._tensors import MANIFEST, PLAN, TENSORS

__all__ = ["pull", "push"]

FILES = (TENSORS, PLAN, MANIFEST)
AGAIN = "Check the network, the name OWNER/NAME and your login (hf auth login); then try again."


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
    except Exception as error:  # its errors, and those of the network below, change with versions
        raise OutputError(f"{repository} cannot be written to: {brief(error)} {AGAIN}") from error
    return str(getattr(done, "commit_url", done))


def pull(repository: str, *, revision: str | None = None, **options: Any) -> Path:
    """Download an artefact; return its folder, for ``cpd.load``, which reads it as untrusted.

    Only the three files of an artefact are downloaded. A branch may change: name a commit as
    ``revision`` for what must not.

    Args:
        repository: "owner/name".
        revision: a branch, a tag or a commit.
        **options: of ``huggingface_hub.snapshot_download``, such as ``token`` or ``local_dir``.

    Raises:
        ArtefactError: it cannot be reached. ExportError: huggingface_hub is missing.
    """
    library = _library()
    try:
        found = library.snapshot_download(
            repository, revision=revision, allow_patterns=list(FILES), **options
        )
    except Exception as error:  # as above
        raise ArtefactError(f"{repository} cannot be read: {brief(error)} {AGAIN}") from error
    return Path(found)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ExportError("the hub needs the package huggingface_hub: install it") from error
    return huggingface_hub
