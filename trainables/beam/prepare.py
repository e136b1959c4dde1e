"""Decodes the raw files once into arrays on disk, which all processes of a machine then share through the page cache.

One array per modality. Its name holds what determines it, so that a changed setting makes a new array and never reads
an old one; a raw file that is replaced while the CSV stays the same goes unnoticed, and the cache must be removed.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainables.beam import simulator
from trainables.beam.cache import cache_folder, make_once
from trainables.beam.config import Data
from trainables.beam.files import (
    BEAMS,
    fov_of,
    lidar_counts,
    radar_maps,
    read_cube,
    read_image,
    read_points,
    read_position,
    read_power,
)
from trainables.beam.table import GROUPS, POWER, Files, Table, read_table
from trainables.contract import UserError

VERSION = 1  # raise it whenever decoding changes


@dataclass(frozen=True)
class Decoder:
    """How the files of one column group become one array: `read` gives one row of `shape`."""

    read: Callable[[Path], NDArray[np.generic]]
    shape: tuple[int, ...]
    dtype: DTypeLike
    settings: str  # what else determines the result


def data_root(data: Data) -> Path:
    """The data set's folder; simulated data are written at the first call."""
    if data.root is not None:
        return Path(data.root).expanduser()
    settings = data.simulated
    key = "-".join(str(part) for part in (simulator.VERSION, *astuple(settings)))
    root = cache_folder(data.prepared) / f"simulated-{key}"
    if make_once(root, lambda unfinished: simulator.simulate(unfinished, settings)):
        print(f"beam data: {settings.passes} simulated passes of {settings.frames} frames in {root}", flush=True)
    return root


def prepare_data(data: Data) -> Table:
    """Check and decode what `data` asks for, unless it has been done.

    Raises `UserError` with file, row and remedy for what cannot be read. Several processes may call it at once.
    """
    root = data_root(data)
    table = read_table(root, data.modalities)
    wanted = {name: array_path(data, table, name) for name in table.groups}
    missing = {name: path for name, path in wanted.items() if not path.exists()}
    if not missing:
        return table
    for name in missing:
        _check_files(table, table.groups[name])
    kind = "simulated" if data.root is None else "real"
    size = sum(_size(data, table, name) for name in missing) / 2**20
    names = ", ".join(name.strip("_") for name in missing)
    print(f"beam data: preparing {kind} data of {root}: {names}, {size:.0f} MiB", flush=True)
    for name, path in missing.items():
        make_once(path, _decode(data, table, name))
    if POWER in missing:
        broken = np.isnan(np.load(wanted[POWER])).any(axis=1)[table.groups[POWER].at_NK[:, 0]]
        if broken.any():
            print(f"beam data: {broken.sum()} windows relabelled, because a power is NaN", flush=True)
    return table


def labels(table: Table, power: NDArray[np.float64]) -> NDArray[np.int64]:
    """The best beam of every window, (N,), given the decoded power files.

    Where a power is NaN the official label points at it; the strongest of the others is taken instead.
    """
    power_NB = power[table.groups[POWER].at_NK[:, 0]]
    return np.where(np.isnan(power_NB).any(axis=1), np.nanargmax(power_NB, axis=1), table.beam_N)


def array_path(data: Data, table: Table, group: str) -> Path:
    key = (VERSION, [str(path.resolve()) for path in table.csvs], table.digest, group, _decoder(data, group).settings)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_folder(data.prepared) / "decoded" / f"{group.strip('_')}-{digest}.npy"


def _decoder(data: Data, group: str) -> Decoder:
    size = data.image_size

    def lidar(path: Path) -> NDArray[np.uint8]:
        scenario = next(part for part in reversed(path.parts) if part.startswith("scenario"))
        return lidar_counts(read_points(path), size, fov_of(scenario, data.scenario_fov))

    def radar(path: Path) -> NDArray[np.float16]:
        return radar_maps(read_cube(path), size)

    if group in GROUPS["image"]:
        return Decoder(lambda path: read_image(path, size), (3, size, size), np.uint8, f"{size}")
    if group in GROUPS["lidar"]:
        return Decoder(lidar, (1, size, size), np.uint8, f"{size} {data.scenario_fov}")
    if group in GROUPS["radar"]:
        return Decoder(radar, (2, size, size), np.float16, f"{size}")
    if group == POWER:
        return Decoder(read_power, (BEAMS,), np.float64, "")
    return Decoder(read_position, (2,), np.float64, "")


def _size(data: Data, table: Table, group: str) -> int:
    """Of a prepared array, bytes."""
    decoder = _decoder(data, group)
    return len(table.groups[group].paths) * math.prod(decoder.shape) * np.dtype(decoder.dtype).itemsize


def _check_files(table: Table, files: Files) -> None:
    """Every file must be there before the long work begins."""
    for path, row in zip(files.paths, files.row, strict=True):
        if not path.is_file():
            raise UserError(f"{path} is not there; {table.lines[row]} names it: restore the file or remove the row")


def _decode(data: Data, table: Table, group: str) -> Callable[[Path], None]:
    files, decoder = table.groups[group], _decoder(data, group)

    def make(unfinished: Path) -> None:
        shape = (len(files.paths), *decoder.shape)
        array = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.dtype(decoder.dtype), shape=shape)

        def one(i: int) -> None:
            try:
                array[i] = decoder.read(files.paths[i])
            except UserError as error:
                where = table.lines[files.row[i]]
                raise UserError(f"{error}; {where} names it: restore the file or remove the row") from None

        # Threads: picture decoding and FFTs, which take the time, run outside Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for _ in pool.map(one, range(len(files.paths))):
                    pass
            except BaseException:  # a mistake in a file, or Ctrl-C: do not go on to the last file
                pool.shutdown(cancel_futures=True)
                raise
        array.flush()

    return make
