"""Reading: files of unknown origin may be no larger than what this library writes."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import ArtefactError

__all__ = ["LONGEST", "bounded", "contents", "opened"]

LONGEST = 1 << 25  # bytes of a file; a large plan (of 200 layers, 20 M weights) has a million
NESTED = 1 << 19  # lists and mappings in it: each takes many times its letters


def opened(path: Path) -> BinaryIO:
    """A file to read bytes of; OSError also where it is a pipe or a device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.open("rb")


def contents(path: Path, most: int, hint: str) -> bytes:
    """What is in a file of at most so many bytes.

    Raises:
        ArtefactError: it is missing, no regular file, or larger; the text ends in ``hint``.
    """
    try:
        with opened(path) as stream:
            data = stream.read(most + 1)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}. {hint}") from error
    if len(data) > most:
        raise ArtefactError(f"{path} is larger than {most} bytes. {hint}")
    return data


def bounded(text: str) -> str:
    """JSON; ValueError where reading it could take more memory than any file of ours needs."""
    nested = text.count("[") + text.count("{")
    if len(text) > LONGEST or nested > NESTED:
        raise ValueError(
            f"{len(text)} letters with {nested} lists and mappings; at most {LONGEST} and {NESTED} "
            "are read"
        )
    return text
