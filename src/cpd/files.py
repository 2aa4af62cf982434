"""Writing files so that a crash leaves the old one or the new one, never half of one.

Everything is first written into a temporary folder on the same file system and then renamed over
its target, which the operating system does in one step.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from cpd.errors import OutputError

__all__ = [
    "TEMPORARY",
    "publish",
    "refusal",
    "save_file",
    "staging",
    "swept",
    "unwritten",
    "write_text",
]

TEMPORARY = ".cpd-"
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_NAMED = re.compile(rf"{re.escape(TEMPORARY)}([0-9a-f]{{8}})-(\d{{1,9}})-\w+")
_DAY = 24 * 60 * 60  # seconds
_PROBE = 1 << 16  # bytes
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES}


def refusal(path: Path, error: OSError) -> OutputError:
    """Why ``path`` cannot be written, as an ``OutputError`` made from the system's ``error``."""
    reason = error.strerror or str(error)
    at = f" (at {error.filename})" if error.filename and str(error.filename) != str(path) else ""
    return OutputError(
        f"cannot write {path}: {reason}{at}. Choose a path inside a folder that exists or can be "
        "made, that you may write to, and that has space left."
    )


def unwritten(draft: Path, target: Path, error: BaseException) -> None:
    """Tell whether the disk is at fault that ``draft`` is not whole, or what was written.

    Libraries in C++ do not say so in a way of their own, so more is written where they stopped.

    Raises:
        OutputError: it is the disk.
    """
    held: BaseException | None = error
    while held is not None:
        if isinstance(held, OSError) and held.errno in _OF_DISKS:
            raise refusal(target, held) from error
        held = held.__cause__ or held.__context__
    try:
        with draft.open("ab") as stream:
            stream.write(bytes(_PROBE))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as refused:
        raise refusal(target, refused) from error


def save_file(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, where a disk at fault is an ``OSError`` as with any other file.

    Raises:
        OSError: the disk is full or refuses it. SafetensorError, ValueError, RuntimeError: the
            tensors cannot be written so.
    """
    try:
        safetensors.save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A temporary folder inside ``parent`` (made where missing), gone afterwards whatever happens.

    Raises:
        OutputError: ``parent`` cannot be made or written to, or writing failed inside the block.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{TEMPORARY}{_HOST}-{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise refusal(parent, error) from error
    try:
        yield temporary
    except OSError as error:
        raise refusal(parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """Return the rights that new files lack; it can only be read by setting it."""
    held = os.umask(0o022)
    os.umask(held)
    return held


def publish(source: Path, target: Path) -> None:
    """Move ``source`` (a file or folder made in ``staging``) to ``target`` in one step.

    The content is flushed to the disk first, so that the name never points at missing data.

    Raises:
        OutputError: ``target`` cannot be replaced, for instance because it is a folder.
    """
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    try:
        for path in files:
            path.chmod(0o666 & ~_umask())  # some writers leave files that only their owner reads
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        source.replace(target)
        _flush_folder(target.parent)
    except OSError as error:
        raise refusal(target, error) from error


def _flush_folder(folder: Path) -> None:
    """Let the new name reach the disk, where the system knows how to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def swept(folder: Path, *, shared: bool = False) -> None:
    """Take away what a run that was killed left in the middle of writing.

    ``shared``: others may write into the folder too. What a process that lives is at stays, and so
    does what was made by another machine within a day.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        if not shared or _left(path):
            shutil.rmtree(path, ignore_errors=True)


def _left(temporary: Path) -> bool:
    """Whether nobody will finish a temporary folder: its process is gone, or it is a day old."""
    named = _NAMED.fullmatch(temporary.name)
    if named is None:
        return False
    try:
        if time.time() - temporary.stat().st_mtime > _DAY:
            return True
        if named[1] == _HOST and os.name == "posix":  # elsewhere the signal 0 is none
            os.kill(int(named[2]), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8 to ``path``, all or nothing; an existing file is replaced.

    Raises:
        OutputError: the file or its folder cannot be written.
    """
    path = Path(path)
    with staging(path.parent) as temporary:
        draft = temporary / path.name
        draft.write_text(text, encoding="utf-8")
        publish(draft, path)
    return path
