"""Decodes the raw files once into arrays on disk, which all processes of a machine then share through the page cache.

One array per column group. Its name contains a digest of what determines it, so that a changed setting makes a new
array. A raw file that is replaced while the CSV stays the same goes unnoticed: remove the cache then.
"""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainables.beam import multistep, simulator
from trainables.beam.augment import changed_points
from trainables.beam.background import FRAMES, background, without
from trainables.beam.config import Data
from trainables.beam.decode import Decoder, Progress, decode, naming
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
from trainables.beam.table import BEAM, GROUPS, POWER, Table, read_table, scenario_of
from trainables.cache import cache_folder, make_once, unfinished_of
from trainables.contract import UserError

VERSION = 2  # increment it whenever decoding changes


CHANGED_LIDAR = "unit1_lidar_changed"  # name of the array of both kinds of changed copies of every lidar file


def data_root(data: Data) -> Path:
    """Return the data set's folder; simulated data are generated on the first call."""
    if data.root is not None:
        return Path(data.root).expanduser()
    settings = data.simulated
    key = "-".join(str(part) for part in (simulator.VERSION, *astuple(settings)))
    root = cache_folder(data.prepared) / f"simulated-{key}"
    if make_once(root, lambda unfinished: simulator.simulate(unfinished, settings)):
        print(f"beam data: {settings.passes} simulated passes of {settings.frames} frames in {root}", flush=True)
    return root


def find_table(data: Data) -> Table:
    """Return the table of all windows; if the window file's are too short, they are built from the raw files.

    Built windows are kept, and built anew once the folders hold other files, as after an incomplete download.
    """
    root = data_root(data)
    table = read_table(root, data)
    if table.reaches(data):
        return table
    shape = f"{data.reach}to{data.steps}"
    key = (multistep.VERSION, str(root.resolve()), table.digest, sorted(table.groups), multistep.listing(table))
    path = cache_folder(data.prepared) / "windows" / f"{shape}-{_digest(key)}.csv"
    make_once(path, lambda unfinished: multistep.write_windows(unfinished, table, data.reach, data.steps))
    return read_table(root, data, built=path)


def _digest(key: object) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


def prepare_data(data: Data) -> Table:
    """Check and decode all that `data` needs, unless already done; return the table of windows.

    Raises `UserError` with file, row and remedy for data that cannot be read. Several processes may call it at once.
    """
    table = find_table(data)
    prepare_arrays(data, table, wanted_arrays(data, table))
    return table


def prepare_arrays(data: Data, table: Table, names: Sequence[str]) -> None:
    """Check and decode the named arrays of a table, unless already done; raises `UserError` as `prepare_data`."""
    wanted = {name: array_path(data, table, name) for name in names}
    missing = {name: path for name, path in wanted.items() if not path.exists()}
    if not missing:
        return
    for name in missing:
        _check_files(data, table, _group(name))
    kind = "simulated" if data.root is None else "real"
    size = sum(_size(data, table, name) for name in missing)
    told = ", ".join(name.strip("_") for name in missing)
    print(f"beam data: preparing {kind} data of {table.root}: {told}, {size / 2**20:.0f} MiB", flush=True)
    check_room(cache_folder(data.prepared), size, [unfinished_of(path) for path in missing.values()])
    for name, path in missing.items():
        if data.lidar == "filtered" and _group(name) in GROUPS["lidar"]:
            _make_backgrounds(data, table)
        make_once(path, _maker(data, table, name), resumes=True)
    if POWER in missing:
        broken = np.isnan(np.load(wanted[POWER])).any(axis=1)[table.groups[POWER].at_NK].any(axis=1)
        if broken.any():
            print(f"beam data: {broken.sum()} windows relabelled, because a power is NaN", flush=True)
        labels(table, np.load(wanted[POWER]))


def wanted_arrays(data: Data, table: Table) -> list[str]:
    """Return the names of the arrays that `data` needs: one for each column group, and one of changed lidar copies."""
    return [*table.groups, *([CHANGED_LIDAR] if data.augment and "lidar" in data.modalities else [])]


def _group(array: str) -> str:
    """Return the column group whose files an array holds."""
    return GROUPS["lidar"][0] if array == CHANGED_LIDAR else array


def check_room(folder: Path, size: int, unfinished: list[Path]) -> None:
    """Raise `UserError` unless the disk has room for `size` bytes, less what unfinished arrays already occupy.

    folder: need not exist yet.
    """
    needed = size - sum(path.stat().st_blocks * 512 for path in unfinished if path.exists())
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if needed > free:
        raise UserError(
            f"{folder}: the prepared data take {needed / 2**20:.0f} MiB more and {free / 2**20:.0f} MiB are free; "
            "make room, or set data.prepared to a folder elsewhere"
        )


def labels(table: Table, power: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the best beam of every window and step, (N, P), from 0, given the decoded power files.

    If a power is NaN, the official label points at it; the strongest other beam is used instead. Raises `UserError` if
    the labels seem to count from 0, by comparison with the powers: the label 0 is too rare to show it.
    """
    power_NPB = power[table.groups[POWER].at_NK]
    broken_NP = np.asarray(np.isnan(power_NPB).any(axis=2))
    strongest_NP = np.nanargmax(power_NPB, axis=2)
    low_NP = np.asarray(table.beam_NP == strongest_NP - 1) & ~broken_NP
    for path, of_N in ((table.csvs[0], ~table.adaptation_N), (table.csvs[-1], table.adaptation_N)):
        if 2 * (low := int(low_NP[of_N].sum())) > (~broken_NP[of_N]).sum():
            raise UserError(
                f"{path}: {BEAM} names the beam below the strongest in {low} of {broken_NP[of_N].size} labels; "
                f"it must count beams from 1 to {BEAMS}: add 1 to each"
            )
    return np.where(broken_NP, strongest_NP, table.beam_NP)


def array_path(data: Data, table: Table, array: str) -> Path:
    settings = _decoder(data, table, array).settings
    key = (VERSION, _places(table), table.digest, _group(array), settings)
    return cache_folder(data.prepared) / "decoded" / f"{array.strip('_')}-{_digest(key)}.npy"


def _places(table: Table) -> list[str]:
    """Return where the CSVs are. A linked CSV is where the link is, beside the files that it names."""
    return [str(path.parent.resolve() / path.name) for path in table.csvs]


def _decoder(data: Data, table: Table, array: str) -> Decoder:
    size, group = data.image_size, _group(array)

    def points(path: Path) -> NDArray[np.float64]:
        found = read_points(path)
        return without(found, background_of(scenario_of(path))) if data.lidar == "filtered" else found

    def seen(path: Path, points_N3: NDArray[np.float64]) -> NDArray[np.uint8]:
        return lidar_counts(points_N3, size, fov_of(scenario_of(path), data.scenario_fov))

    def changed(path: Path) -> NDArray[np.uint8]:
        found, rng = points(path), np.random.default_rng(zlib.crc32("/".join(path.parts[-4:]).encode()))
        return np.stack([seen(path, changed_points(found, kind, rng)) for kind in (1, 2)])

    @functools.cache
    def background_of(scenario: str) -> NDArray[np.float64]:
        return np.asarray(np.load(_background_path(data, table, scenario)))

    lidar = f"{size} {data.scenario_fov} {data.lidar}"
    lidar += f" {table.like.digest}" if table.like is not None and data.lidar == "filtered" else ""
    if array == CHANGED_LIDAR:
        return Decoder(changed, (2, 1, size, size), np.uint8, f"{lidar} changed")
    if group in GROUPS["image"]:
        others = sorted(str(folder.relative_to(table.root)) for folder in picture_folders(data, table).values())
        return Decoder(lambda path: read_image(path, size), (3, size, size), np.uint8, " ".join([f"{size}", *others]))
    if group in GROUPS["lidar"]:
        return Decoder(lambda path: seen(path, points(path)), (1, size, size), np.uint8, lidar)
    if group in GROUPS["radar"]:
        return Decoder(lambda path: radar_maps(read_cube(path), size), (2, size, size), np.float16, f"{size}")
    if group == POWER:
        return Decoder(read_power, (BEAMS,), np.float64, "")
    return Decoder(read_position, (2,), np.float64, "")


def _sources(data: Data, table: Table, group: str) -> tuple[Path, ...]:
    """Return the files to decode: those that the table names or, for pictures, their namesakes in `data.camera`."""
    paths = table.groups[group].paths
    folders = picture_folders(data, table) if group in GROUPS["image"] else {}
    return tuple(folders.get(path.parent, path.parent) / path.name for path in paths) if folders else paths


def picture_folders(data: Data, table: Table) -> dict[Path, Path]:
    """Return, for each folder of pictures, the `data.camera` folder beside it that replaces it, if there is one.

    Raises `UserError` if there is none at all or, for windows given to a model, if it is missing for a scenario whose
    training pictures came from such a folder.
    """
    if data.camera is None or "image" not in data.modalities:
        return {}
    folders = dict.fromkeys(path.parent for path in table.groups[GROUPS["image"][0]].paths)
    found = {folder: beside for folder in folders if (beside := folder.with_name(data.camera)).is_dir()}
    if table.like is None:
        if not found:
            raise UserError(f"data.camera = {data.camera}: no such folder is beside {', '.join(map(str, folders))}")
        return found
    seen = {scenario_of(folder) for folder in picture_folders(data, table.like)}
    for folder in folders:
        if (scenario := scenario_of(folder)) in seen and folder not in found:
            raise UserError(f"{folder.with_name(data.camera)}: no such folder, and the model saw {scenario} from one")
        if scenario in table.like.scenarios and scenario not in seen:
            found.pop(folder, None)
    return found


def _knows(table: Table, scenario: str) -> Table:
    """Return the table whose frames make a scenario's background: the model's training table if it has the scenario."""
    return table.like if table.like is not None and scenario in table.like.scenarios else table


def _background_path(data: Data, table: Table, scenario: str) -> Path:
    table = _knows(table, scenario)
    key = (VERSION, _places(table), table.digest)
    return cache_folder(data.prepared) / "decoded" / f"background-{scenario}-{_digest(key)}.npy"


def _make_backgrounds(data: Data, table: Table) -> None:
    """Make each scenario's static background. Validation frames are used too: a background contains no labels."""
    for scenario in table.scenarios:
        told = _knows(table, scenario)
        make = functools.partial(_make_background, table=told, scenario=scenario)
        make_once(_background_path(data, table, scenario), make)


def _make_background(unfinished: Path, table: Table, scenario: str) -> None:
    files = table.groups[GROUPS["lidar"][0]]
    here = [i for i, path in enumerate(files.paths) if scenario_of(path) == scenario]
    some = [here[i] for i in np.unique(np.linspace(0, len(here) - 1, FRAMES).astype(int))]

    def read(i: int) -> NDArray[np.float64]:
        with naming(files.paths[i], table.lines[files.row[i]]):
            return read_points(files.paths[i])

    with Progress(f"background of {scenario}", len(some)) as progress, unfinished.open("wb") as file:
        np.save(file, background(progress.over(map(read, some))))


def _size(data: Data, table: Table, array: str) -> int:
    """Return the size of a prepared array in bytes."""
    decoder = _decoder(data, table, array)
    shape = decoder.array_shape(len(table.groups[_group(array)].paths))
    return math.prod(shape) * np.dtype(decoder.dtype).itemsize


def _check_files(data: Data, table: Table, group: str) -> None:
    """Raise `UserError` if a file of the column group is missing, before long work begins."""
    paths, rows = _sources(data, table, group), table.groups[group].row
    lacking = [i for i, path in enumerate(paths) if not path.is_file()]
    if not lacking:
        return
    first, row = paths[lacking[0]], rows[lacking[0]]
    scenario_of_row = table.scenario_N[list(rows)]
    alike = [i for i in range(len(paths)) if scenario_of_row[i] == scenario_of_row[lacking[0]]]
    if len(lacking) > 1 and set(alike) <= set(lacking):  # some copies of the data set lack a scenario's whole folder
        scenario, modality = table.scenarios[scenario_of_row[lacking[0]]], _modality(group)
        out = f", take {modality} out of data.modalities," if modality and POWER in table.groups else ""
        raise UserError(
            f"{first.parent} holds none of the {len(alike)} files that {scenario} needs, {table.lines[row]} the first: "
            f"restore them{out} or remove the rows of {scenario} from {table.lines[row].split(' of ', 1)[1]}"
        )
    others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
    raise UserError(f"{first} is not there{others}; {table.lines[row]} names it: restore the file or remove the row")


def _modality(group: str) -> str:
    return next((name for name, groups in GROUPS.items() if group in groups), "")


def _maker(data: Data, table: Table, array: str) -> Callable[[Path], None]:
    files = table.groups[_group(array)]

    def where(i: int) -> str:
        return table.lines[files.row[i]]

    paths = _sources(data, table, _group(array))
    return lambda unfinished: decode(unfinished, _decoder(data, table, array), paths, array.strip("_"), where)
