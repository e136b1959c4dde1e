"""Things made once and kept in a folder that all processes of a machine share."""

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
    """The folder chosen in the settings, or this project's place in the user's cache folder."""
    if chosen is not None:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hyperparameter-search"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; others wait. The kernel lets go when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamp_of(path: Path) -> Stamp:
    """Another value once the file has been written anew, or a folder's names have changed; None where nothing is."""
    try:
        status = path.stat()
    except OSError:
        return None
    return path, status.st_size, status.st_mtime_ns


def unfinished_of(target: Path) -> Path:
    """Where `target` is being made."""
    return target.with_name(f"{target.name}.unfinished")


def make_once(target: Path, make: Callable[[Path], None], resumes: bool = False) -> bool:
    """Make the file or folder `target` unless it is there; whether this call made it.

    `make` writes to the path it is given, which becomes `target` when complete. One process makes it while others wait.
    What a killed process left half-made is removed by the next, for the lock says that nobody is writing it; a `make`
    that `resumes` finds it in its place.
    """
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock")):
        if target.exists():
            return False
        unfinished = unfinished_of(target)
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        elif not resumes:
            unfinished.unlink(missing_ok=True)
        make(unfinished)
        unfinished.replace(target)
    return True


def reserved_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.memmap[Any, np.dtype[Any]]:
    """A new array on disk with all its room taken at once: where it ran out later, the kernel would end the process.

    Raises `UserError` where there is too little.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise UserError(f"{path}: {error.strerror}; make room, or set data.prepared to a folder elsewhere") from None
    return array
