"""Files that are written whole or not at all, and paths given by users."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from trainables.contract import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_there(path: Path) -> bool:
    """Return whether a path given by a user exists; raises UserError if it cannot be accessed."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def is_full(error: BaseException) -> bool:
    """Return whether the error was raised because a disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def says_full(text: str) -> bool:
    """Return whether the text of an error says that a disk, or a quota on it, is full."""
    return any(os.strerror(code) in text for code in _FULL)


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    replace_bytes(path, text.encode("utf-8", "backslashreplace"), durable)  # lone surrogates are written escaped


def replace_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file whole or not at all: to a temporary file beside it, which is then renamed.

    durable: also if the machine loses its power; takes longer.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        if durable:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
