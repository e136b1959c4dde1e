"""Decodes files into the rows of an array on disk, with several threads, and resumes after an interruption."""

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

from trainables.cache import reserved_array, write_whole
from trainables.contract import UserError

CHUNK = 256  # files; an interruption loses at most this many
QUIET_S = 30.0  # from one progress line to the next without a terminal
Array = np.memmap[Any, np.dtype[Any]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Decoder:
    """How the files of one column group become one array: `read` returns a file's row, of `shape`."""

    read: Callable[[Path], NDArray[np.generic]]
    shape: tuple[int, ...]
    dtype: DTypeLike
    settings: str  # all else that determines the result

    def array_shape(self, files: int) -> tuple[int, ...]:
        return (files, *self.shape)


def decode(unfinished: Path, decoder: Decoder, paths: tuple[Path, ...], name: str, where: Callable[[int], str]) -> None:
    """Decode all `paths` into the rows of the .npy file `unfinished`, as `fill` does.

    where: returns which CSV row names the i-th file. Raises `UserError`, as `fill`, and for a file that cannot be read
    completely.
    """

    def one(array: Array, i: int) -> int:
        with naming(paths[i], where(i)):
            array[i] = decoder.read(paths[i])
        return 1

    # Threads suffice: the slow parts (pictures, numbers in text, FFTs) run without the GIL. (Beside a decoding thread,
    # another waited for the GIL 6 % of the time, and 20 % with point clouds.)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def some(array: Array, chunk: range) -> Iterator[int]:
            try:
                yield from pool.map(functools.partial(one, array), chunk)
            except BaseException:  # a bad file, or Ctrl-C: do not decode the remaining files
                pool.shutdown(cancel_futures=True)
                raise

        fill(unfinished, decoder.array_shape(len(paths)), decoder.dtype, name, some)


@contextmanager
def naming(path: Path, row: str) -> Iterator[None]:
    """Turn any exception while a file is read into a `UserError` that names the file and the CSV row that names it."""
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
    """Write the rows of an array to the .npy file `unfinished`, or the rest if an earlier call was interrupted.

    name: title of the progress. write: writes a range of the array's rows, and yields counts of rows as they are done.
    Rows count as written once they are on disk, so that even a power cut leaves no zeros that would pass for data.
    Raises `UserError` for a full disk.
    """
    written = unfinished.with_name(f"{unfinished.name}.rows")
    if unfinished.exists() and written.exists():
        done = int(written.read_text())
        array = np.load(unfinished, mmap_mode="r+")
    else:
        done = 0
        written.unlink(missing_ok=True)  # belongs to an array that somebody removed
        array = reserved_array(unfinished, shape, np.dtype(dtype))
    with Progress(name, shape[0], done) as progress:
        for first in range(done, shape[0], CHUNK):
            chunk = range(first, min(first + CHUNK, shape[0]))
            for count in write(array, chunk):
                progress.step(count)
            array.flush()
            write_whole(written, functools.partial(Path.write_text, data=str(chunk.stop)))
    written.unlink(missing_ok=True)


class Progress:
    """Progress over `total` files: a bar on a terminal, else a line every 30 s, and none if it is done before that."""

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
        """Yield the files, counting each as done when the next is requested."""
        for file in files:
            yield file
            self.step()

    def step(self, files: int = 1) -> None:
        self.done += files
        self.bar.update(files)
        if self.bar.disable and time.monotonic() - self.told_s > QUIET_S:
            print(f"beam data: {self.name}: {self.done} of {self.total} files", flush=True)
            self.told_s = time.monotonic()
