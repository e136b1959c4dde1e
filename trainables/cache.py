"""Things made once and kept in a folder that all processes of a machine share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


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
