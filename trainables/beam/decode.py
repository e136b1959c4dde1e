"""Files decoded one by one into the rows of an array on disk, by several threads, resumed where it was interrupted."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tqdm import tqdm

from trainables.cache import reserved_array
from trainables.contract import UserError

CHUNK = 256  # files; what an interruption loses at most
QUIET_S = 30.0  # between two lines of progress where there is no terminal
Array = np.memmap[Any, np.dtype[Any]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Decoder:
    """How the files of one column group become one array: `read` gives one row of `shape`."""

    read: Callable[[Path], NDArray[np.generic]]
    shape: tuple[int, ...]
    dtype: DTypeLike
    settings: str  # what else determines the result

    def array_shape(self, files: int) -> tuple[int, ...]:
        return (files, *self.shape)


def decode(unfinished: Path, decoder: Decoder, paths: tuple[Path, ...], name: str, where: Callable[[int], str]) -> None:
    """Write the rows of all `paths` to the .npy file `unfinished`, as `fill` does.

    where: says of the i-th file who names it. Raises `UserError` for a file that cannot be read whole as well.
    """

    def one(array: Array, i: int) -> int:
        with naming(paths[i], where(i)):
            array[i] = decoder.read(paths[i])
        return 1

    # Threads: pictures, numbers in text and FFTs, which take the time, are decoded outside Python's lock. (While one
    # thread decoded, another waited for the lock 6 % of the time, and 20 % beside point clouds.)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def some(array: Array, chunk: range) -> Iterator[int]:
            try:
                yield from pool.map(functools.partial(one, array), chunk)
            except BaseException:  # a mistake in a file, or Ctrl-C: do not go on to the last file
                pool.shutdown(cancel_futures=True)
                raise

        fill(unfinished, decoder.array_shape(len(paths)), decoder.dtype, name, some)


@contextmanager
def naming(path: Path, row: str) -> Iterator[None]:
    """While the file is read: whatever it does to its reader is a mistake that names it and the row that names it."""
    remedy = f"{row} names it: restore the file or remove the row"
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    except Exception as error:  # a broken file can make a library fail in any way
        raise UserError(f"{path}: {type(error).__name__}: {error}; {remedy}") from error


def fill(
    unfinished: Path,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    name: str,
    write: Callable[[Array, range], Iterable[int]],
) -> None:
    """Write the rows of an array to the .npy file `unfinished`, or those that an earlier call did not come to.

    name: what the progress is called. write: writes a range of the array's rows, and says how many more are done as it
    goes. Rows count as written once they are on the disk, so that even a power cut leaves no zeros behind that would
    pass for data. Raises `UserError` for a full disk.
    """
    written = unfinished.with_name(f"{unfinished.name}.rows")
    if unfinished.exists() and written.exists():
        done = int(written.read_text())
        array = np.load(unfinished, mmap_mode="r+")
    else:
        done = 0
        written.unlink(missing_ok=True)  # of another array, which somebody removed
        array = reserved_array(unfinished, shape, np.dtype(dtype))
    with Progress(name, shape[0], done) as progress:
        for first in range(done, shape[0], CHUNK):
            chunk = range(first, min(first + CHUNK, shape[0]))
            for count in write(array, chunk):
                progress.step(count)
            array.flush()
            _replace_text(written, str(chunk.stop))
    written.unlink(missing_ok=True)


def _replace_text(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


class Progress:
    """Of so many files: a bar on a terminal; elsewhere a line every so often, and none where all is done before."""

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self.done = name, total, done
        self.told_s = time.monotonic()
        self.bar = tqdm(
            desc=name, total=total, initial=done, unit=" files", leave=False, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def over(self, files: Iterable[Item]) -> Iterator[Item]:
        """The same, each of which counts as done once the next is asked for."""
        for file in files:
            yield file
            self.step()

    def step(self, files: int = 1) -> None:
        self.done += files
        self.bar.update(files)
        if self.bar.disable and time.monotonic() - self.told_s > QUIET_S:
            print(f"beam data: {self.name}: {self.done} of {self.total} files", flush=True)
            self.told_s = time.monotonic()
