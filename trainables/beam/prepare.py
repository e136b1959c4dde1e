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

from trainables.beam import multistep, simulator
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
from trainables.beam.table import BEAM, GROUPS, POWER, Table, read_table
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


def find_table(data: Data) -> Table:
    """All windows. Where the data set's own file is too short, they are built from the raw files at the first call."""
    root = data_root(data)
    table = read_table(root, data)
    if table.reaches(data):
        return table
    shape = f"{data.history}to{data.steps}"
    key = (multistep.VERSION, str(root.resolve()), table.digest, sorted(table.groups))
    path = cache_folder(data.prepared) / "windows" / f"{shape}-{_digest(key)}.csv"
    make_once(path, lambda unfinished: multistep.write_windows(unfinished, table, data.history, data.steps))
    return read_table(root, data, built=path)


def _digest(key: object) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def prepare_data(data: Data) -> Table:
    """Check and decode what `data` asks for, unless it has been done.

    Raises `UserError` with file, row and remedy for what cannot be read. Several processes may call it at once.
    """
    table = find_table(data)
    wanted = {name: array_path(data, table, name) for name in table.groups}
    missing = {name: path for name, path in wanted.items() if not path.exists()}
    if not missing:
        return table
    if table.left_out:
        print(f"beam data: {table.left_out}", flush=True)
    for name in missing:
        _check_files(table, name)
    kind = "simulated" if data.root is None else "real"
    size = sum(_size(data, table, name) for name in missing) / 2**20
    names = ", ".join(name.strip("_") for name in missing)
    print(f"beam data: preparing {kind} data of {table.root}: {names}, {size:.0f} MiB", flush=True)
    for name, path in missing.items():
        make_once(path, _decode(data, table, name))
    if POWER in missing:
        broken = np.isnan(np.load(wanted[POWER])).any(axis=1)[table.groups[POWER].at_NK].any(axis=1)
        if broken.any():
            print(f"beam data: {broken.sum()} windows relabelled, because a power is NaN", flush=True)
    return table


def labels(table: Table, power: NDArray[np.float64]) -> NDArray[np.int64]:
    """The best beam of every window and step, (N, P), given the decoded power files.

    Where a power is NaN the official label points at it; the strongest of the others is taken instead. Raises
    `UserError` where the labels count from 0, which none of them may say: 0 is the rarest.
    """
    power_NPB = power[table.groups[POWER].at_NK]
    broken_NP = np.isnan(power_NPB).any(axis=2)
    strongest_NP = np.nanargmax(power_NPB, axis=2)
    low = int((table.beam_NP == strongest_NP - 1)[~broken_NP].sum())
    if 2 * low > (~broken_NP).sum():
        raise UserError(
            f"{table.csvs[0]}: {BEAM} names the beam below the strongest in {low} of {broken_NP.size} labels; "
            f"it must count beams from 1 to {BEAMS}: add 1 to each"
        )
    return np.where(broken_NP, strongest_NP, table.beam_NP)


def array_path(data: Data, table: Table, group: str) -> Path:
    key = (VERSION, [str(path.resolve()) for path in table.csvs], table.digest, group, _decoder(data, group).settings)
    return cache_folder(data.prepared) / "decoded" / f"{group.strip('_')}-{_digest(key)}.npy"


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


def _check_files(table: Table, group: str) -> None:
    """Every file must be there before the long work begins."""
    files = table.groups[group]
    lacking = [i for i, path in enumerate(files.paths) if not path.is_file()]
    if not lacking:
        return
    first, row = files.paths[lacking[0]], files.row[lacking[0]]
    scenario_of = table.scenario_N[list(files.row)]
    alike = [i for i in range(len(files.paths)) if scenario_of[i] == scenario_of[lacking[0]]]
    if len(lacking) > 1 and set(alike) <= set(lacking):  # as in copies of the data set that lack a part of a scenario
        scenario, modality = table.scenarios[scenario_of[lacking[0]]], _modality(group)
        out = f", take {modality} out of data.modalities," if modality else ""
        raise UserError(
            f"{first.parent} holds none of the {len(alike)} files that {scenario} needs, {table.lines[row]} the first: "
            f"restore them{out} or remove the rows of {scenario} from {table.lines[row].split(' of ', 1)[1]}"
        )
    others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
    raise UserError(f"{first} is not there{others}; {table.lines[row]} names it: restore the file or remove the row")


def _modality(group: str) -> str:
    return next((name for name, groups in GROUPS.items() if group in groups), "")


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
