"""Files that are written whole or not at all, and paths that somebody named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from trainables.contract import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_there(path: Path) -> bool:
    """Whether a path that somebody named exists; raises UserError where it cannot be looked at."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def is_full(error: BaseException) -> bool:
    """Whether it was raised because a disk is full, or somebody's share of it."""
    return isinstance(error, OSError) and error.errno in _FULL


def says_full(text: str) -> bool:
    """Whether the text of an error says that a disk is full, or somebody's share of it."""
    return any(os.strerror(code) in text for code in _FULL)


def replace_text(path: Path, text: str) -> None:
    replace_bytes(path, text.encode("utf-8", "backslashreplace"))  # what is no character is told all the same


def replace_bytes(path: Path, *chunks: bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
