"""Files and folders made once and kept in a cache that all processes of a machine share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from trainables.contract import UserError

Stamp = tuple[Path, int, int] | None


def cache_folder(chosen: str | None) -> Path:
    """Return the folder chosen in the settings, or this project's folder in the user's cache."""
    if chosen is not None:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hyperparameter-search"


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path`. The kernel releases it however the process ends.

    Yields whether the lock is held: unless it is to `wait`, not if another process has it. Raises `UserError` if the
    file or its folder cannot be made, or if the file system has no locks.
    """
    with contextlib.ExitStack() as held:
        mine = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(path.open("w")), fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError as error:
            raise UserError(
                f"{path} cannot be made and locked: {error.strerror}; set data.prepared to a folder elsewhere"
            ) from None
        yield mine


def stamp_of(path: Path) -> Stamp:
    """Return a value that changes when a file is rewritten or a folder's entries change; None if nothing exists."""
    try:
        status = path.stat()
    except OSError:
        return None
    return path, status.st_size, status.st_mtime_ns


def unfinished_of(target: Path) -> Path:
    """Return the path at which `target` is being made."""
    return target.with_name(f"{target.name}.unfinished")


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file or folder whole or not at all: `write` gets another path, which is then renamed to `target`."""
    unfinished = unfinished_of(target)
    write(unfinished)
    unfinished.replace(target)


def make_once(target: Path, make: Callable[[Path], None], resumes: bool = False) -> bool:
    """Make the file or folder `target` unless it exists; return whether this call made it.

    `make` writes to the path it is given, which is renamed to `target` when complete. One process makes it while others
    wait. What a killed process left unfinished is removed by the next, as the lock shows that nobody is writing it; if
    `resumes`, an unfinished file is left for `make` to continue.
    """
    if target.exists():
        return False
    with locked(target.with_name(f"{target.name}.lock")):
        if target.exists():
            return False
        unfinished = unfinished_of(target)
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        elif not resumes:
            unfinished.unlink(missing_ok=True)
        write_whole(target, make)
    return True


def reserved_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.memmap[Any, np.dtype[Any]]:
    """Create a .npy array with all its disk space allocated: if space ran out later, the kernel would kill the process.

    Raises `UserError` if there is too little space.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise UserError(f"{path}: {error.strerror}; make room, or set data.prepared to a folder elsewhere") from None
    return array
