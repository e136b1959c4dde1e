"""Reads the CSV of a data set in the DeepSense 6G layout, which lists the files of each window.

Legend: N windows, K instants of a column group (5 for a sensor, 2 for positions, 1 for the station), P instants whose
beams are predicted (1 as published).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trainables.beam.config import Data, Modality
from trainables.beam.files import BEAMS
from trainables.cache import Stamp, stamp_of
from trainables.contract import UserError

Ints = NDArray[np.int64]
Array = TypeVar("Array", bound=NDArray[np.generic])
Row = dict[str, str]

# Folder of the development set; folder and CSV of the adaptation set, which was recorded at another rate and is missing
# from most copies.
DEVELOPMENT = "Multi_Modal"
ADAPTATION = ("Adaptation_dataset_multi_modal", "ml_challenge_data_adaptation_multi_modal.csv")

# Column groups by modality; a trailing underscore stands for one column per instant.
GROUPS: dict[Modality, tuple[str, ...]] = {
    "image": ("unit1_rgb_",),
    "lidar": ("unit1_lidar_",),
    "radar": ("unit1_radar_",),
    "gps": ("unit1_loc", "unit2_loc_"),
}
SENSOR_COLUMNS = ("unit1_rgb_", "unit1_lidar_", "unit1_radar_")
POWER, BEAM, PASS = "unit1_pwr_60ghz", "unit1_beam", "seq_index"


@dataclass(frozen=True)
class Files:
    """The distinct files of one column group, and each window's files among them."""

    paths: tuple[Path, ...]
    row: tuple[int, ...]  # the first window that names each file
    at_NK: Ints  # indices into `paths`, oldest instant first


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: tables are keys of caches
class Table:
    """All windows of a data set, in the order of its CSV files. Its arrays are read-only."""

    root: Path
    csvs: tuple[Path, ...]
    digest: str  # of the CSV files' content
    lines: tuple[str, ...]  # "row 3 of a.csv" for every window, for messages
    scenarios: tuple[str, ...]  # "scenario31", ... in the order of their numbers
    scenario_N: Ints
    beam_NP: Ints  # the CSV's labels, counted from 0; without labels P is 0, and there is no group of powers
    groups: dict[str, Files]
    frame_NK: Ints  # file numbers of a window's frames, its labels' included
    passes_N: tuple[str, ...] | None  # the car's pass; None if the development set's CSV does not name passes
    adaptation_N: NDArray[np.bool_]  # whether a window is of the adaptation set
    left_out: str  # which CSV is not read, and why; empty if none
    label_frame_N: Ints | None = None  # file number of the first predicted instant; None: file names have no numbers
    like: Table | None = None  # for unlabelled windows: the model's training table, if its inputs depend on that

    def reaches(self, data: Data) -> bool:
        """Return whether the windows have as many instants, and as many beams, as `data` needs."""
        return self.beam_NP.shape[1] >= data.steps and self.spans(data.reach)

    def spans(self, instants: int) -> bool:
        """Return whether the windows have at least this many instants of every sensor."""
        found = [self.groups[name].at_NK.shape[1] for name in SENSOR_COLUMNS if name in self.groups]
        return all(count >= instants for count in found)


def read_table(root: Path, data: Data, built: Path | None = None) -> Table:
    """Read the CSV files below `root`; `built`, if given, replaces the development set's CSV.

    The adaptation set is left out if its windows are too short for `data`. Raises `UserError` for anything missing.
    Repeated calls in a process return the same table, unless a file has been written since.
    """
    if not root.is_dir():
        raise UserError(f"data.root = {root}: no such folder; give the one that holds {DEVELOPMENT}/, or null")
    asked = Data(root=str(root), csv=data.csv, modalities=data.modalities, history=data.reach, steps=data.steps)
    development, adaptation = built or root / DEVELOPMENT / data.csv, root.joinpath(*ADAPTATION)
    return _read(root, asked, development, (stamp_of(development), stamp_of(adaptation)))


@functools.lru_cache(maxsize=4)  # a trial with built windows uses two, 35 MB each at the published size
def _read(root: Path, data: Data, development: Path, stamps: tuple[Stamp, Stamp]) -> Table:
    """Read both sets; the two files' `stamps` invalidate the cache when one changes."""
    sets, left_out = [(DEVELOPMENT, development)], ""
    if stamps[1] is not None:
        short = _short(root.joinpath(*ADAPTATION), data)
        left_out = f"{'/'.join(ADAPTATION)} is left out: {short}" if short else ""
        sets += [] if short else [(ADAPTATION[0], root.joinpath(*ADAPTATION))]
    read = [(folder, path, _read_csv(path, data.modalities, labelled=True)) for folder, path in sets]
    return _table(root, read, data.modalities, left_out)


def read_unlabelled(path: Path, data: Data, like: Table | None) -> tuple[Table, tuple[str, ...]]:
    """Return the windows of an unlabelled CSV, like the challenge's test set, and their names from its column `index`.

    Without that column, windows are numbered from 1. Files are named relative to the CSV's folder. Labels, if any, are
    ignored. Raises `UserError` for anything missing.
    """
    path = path.absolute()  # not resolved: a linked CSV names files beside the link
    rows = _read_csv(path, data.modalities, labelled=False)
    table = _table(path.parent.parent, [(path.parent.name, path, rows)], data.modalities, labelled=False)
    if not table.spans(data.history):
        raise UserError(f"{path}: its windows have fewer instants than the {data.history} that the model sees")
    names = tuple(row.get("index", str(number)) for number, row in enumerate(rows, start=1))
    return replace(table, label_frame_N=_newest_frames(rows), like=like), names


def has_labels(path: Path) -> bool:
    """Return whether a CSV has labels, in its column `unit1_beam`; raises `UserError` if it cannot be read."""
    return any(row.get(BEAM) for row in _read_csv(path.absolute(), (), labelled=False))


def read_labelled(path: Path, steps: int) -> Table:
    """Return the windows of a labelled CSV with their powers and labels alone, at least `steps` of each.

    Files are named relative to the CSV's folder. Raises `UserError` for anything missing.
    """
    path = path.absolute()
    table = _table(path.parent.parent, [(path.parent.name, path, _read_csv(path, ()))], ())
    if (told := table.beam_NP.shape[1]) < steps:
        raise UserError(f"{path}: its windows have {told} labels, and the model predicts {steps}; give as many")
    return table


def _newest_frames(rows: Sequence[Row]) -> Ints | None:
    """Return the file numbers of the windows' newest frames, from the first sensor whose files all have one."""
    columns = [names[-1] for group in SENSOR_COLUMNS if (names := _columns(rows[0], group))]
    for column in columns:
        found = [number_of(Path(row[column])) for row in rows]
        if (told := [number for number in found if number is not None]) and len(told) == len(found):
            return fixed(np.array(told))
    return None


def _table(
    root: Path,
    sets: Sequence[tuple[str, Path, Sequence[Row]]],
    modalities: Sequence[Modality],
    left_out: str = "",
    labelled: bool = True,
) -> Table:
    """Make the table of some CSV files below `root`.

    sets: for each CSV, the name of the folder that its paths are relative to, its own path, and its rows.
    """
    found: list[list[Row]] = []
    lines: list[str] = []
    digest = hashlib.sha256()
    for folder, path, rows in sets:
        digest.update(path.read_bytes())
        found.append([{k: f"{folder}/{value}" if _is_file(k) else value for k, value in row.items()} for row in rows])
        lines += [f"row {number} of {path}" for number in range(1, len(rows) + 1)]
    every = [row for rows in found for row in rows]
    groups = {}
    for name in _groups(modalities, labelled):
        groups[name] = _files(root, found, name, lines)
    steps = groups[POWER].at_NK.shape[1] if labelled else 0
    labels = [_labels(row, line)[:steps] if labelled else [] for row, line in zip(every, lines, strict=True)]
    told = next(iter(groups.values()))  # files whose paths name the scenario; with labels, those of the powers
    places = [told.paths[at].relative_to(root) for at in told.at_NK[:, 0]]
    scenario_each = [_scenario(path, line) for path, line in zip(places, lines, strict=True)]
    scenarios = sorted(set(scenario_each), key=lambda name: int(name.removeprefix("scenario")))
    label_frames_NP = frame_numbers(groups[POWER]) if labelled else None
    return Table(
        root=root,
        csvs=tuple(path for _, path, _ in sets),
        digest=digest.hexdigest(),
        lines=tuple(lines),
        scenarios=tuple(scenarios),
        scenario_N=fixed(np.array([scenarios.index(name) for name in scenario_each])),
        beam_NP=fixed(np.array(labels, dtype=np.int64)),
        groups=groups,
        frame_NK=fixed(_frames(groups)),
        passes_N=tuple(row.get(PASS, "") for row in every) if PASS in found[0][0] else None,
        adaptation_N=fixed(np.arange(len(every)) >= len(found[0])),
        left_out=left_out,
        label_frame_N=None if label_frames_NP is None else fixed(label_frames_NP[:, 0]),
    )


def fixed(array: Array) -> Array:
    """Make the array read-only, and return it."""
    array.flags.writeable = False
    return array


def _short(path: Path, data: Data) -> str:
    """Return why the windows of this CSV are too short for `data`; empty if they are not."""
    row = _read_csv(path, data.modalities)[0]
    steps = len(_columns(row, POWER))
    if steps < data.steps:
        return f"its windows have {steps} labels, and data.steps = {data.steps}"
    for name in (name for modality in data.modalities for name in GROUPS[modality] if name in SENSOR_COLUMNS):
        if (count := len(_columns(row, name))) < data.history:
            return f"its windows have {count} instants, not {data.history} (data.history, or data.longest_history)"
    return ""


def _is_file(column: str) -> bool:
    return column.startswith(("unit1_", "unit2_")) and column != BEAM


def _groups(modalities: Sequence[Modality], labelled: bool) -> tuple[str, ...]:
    """Return the column groups to read."""
    return ((POWER,) if labelled else ()) + tuple(name for modality in modalities for name in GROUPS[modality])


def _read_csv(path: Path, modalities: Sequence[Modality], labelled: bool = True) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except OSError as error:
        remedy = "data.root must hold the development set's CSV" if labelled else "name the CSV of the windows"
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV in UTF-8 ({error}); save it as one") from None
    _check_header(path, header, modalities, labelled)
    if not rows:
        raise UserError(f"{path} has no rows; give a data set with at least one window")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # DictReader's mark of too many or too few fields
            raise UserError(f"{path}: row {number} does not have the header's {len(header)} fields; correct the row")
    return rows


def _check_header(path: Path, header: list[str], modalities: Sequence[Modality], labelled: bool) -> None:
    """Raise `UserError` if a needed column is missing; sensors would otherwise be read at different instants."""
    columns = dict.fromkeys(header, "")
    if labelled and BEAM not in columns:
        raise UserError(f"{path} has no column {BEAM}; every window needs its label")
    modality_of = {name: modality for modality in modalities for name in GROUPS[modality]}
    groups = [(name, modality_of.get(name, "")) for name in _groups(modalities, labelled)]
    instants = max([1, *(_newest(columns, name) for name, _ in groups if name in SENSOR_COLUMNS)])
    least_of = {"unit2_loc_": 2, **dict.fromkeys(SENSOR_COLUMNS, instants)}
    for name, modality in groups:
        least = least_of.get(name, 0)
        for column in _expected(columns, name, least):
            if column not in columns:
                remedy = f"take {modality} out of data.modalities" if modality else "every window needs its power"
                remedy = remedy if labelled else "the model needs it"
                raise UserError(f"{path} has no column {column}; {remedy}")


def _expected(columns: Row, group: str, least: int) -> list[str]:
    """Return the columns that a complete group has, for the instants present and at least `least`."""
    instants = max(_newest(columns, group), least)
    return [group] if group in columns or not instants else [f"{group.rstrip('_')}_{k}" for k in range(1, instants + 1)]


def _newest(columns: Row, group: str) -> int:
    """Return the number of a group's newest instant; 0 if none is numbered."""
    names = [name for name in _columns(columns, group) if name != group]
    return int(names[-1].rsplit("_", 1)[1]) if names else 0


def _columns(row: Row, group: str) -> list[str]:
    """Return the columns of a group, oldest instant first."""
    if group in row:
        return [group]
    prefix = group.rstrip("_") + "_"
    numbered = [name for name in row if re.fullmatch(re.escape(prefix) + r"\d+", name)]
    return sorted(numbered, key=lambda name: int(name.removeprefix(prefix)))


def _labels(row: Row, line: str) -> list[int]:
    """Return a row's beams, counted from 0; in the CSV they count from 1, and several are joined by `_`."""
    steps = len(_columns(row, POWER))
    words = row[BEAM].split("_")
    beams = [int(word) if word.isdecimal() else 0 for word in words]
    if len(beams) != steps or not all(1 <= beam <= BEAMS for beam in beams):
        rule = "one number" if steps == 1 else f"{steps} numbers joined by _, each"
        raise UserError(f"{line}: {BEAM} = {row[BEAM]!r} is not {rule} in 1..{BEAMS}; correct the row")
    return [beam - 1 for beam in beams]


def scenario_of(path: Path) -> str:
    """Return the scenario of a file, such as `scenario31`, from its innermost folder of such a name; empty if none."""
    found = [match.group() for folder in path.parts[:-1] if (match := re.search(r"scenario\d+", folder))]
    return found[-1] if found else ""


def _scenario(path: Path, line: str) -> str:
    found = scenario_of(path)
    if not found:
        raise UserError(f"{line}: {path} is not in a scenarioNN folder; keep the layout of the public data")
    return found


def _files(root: Path, sets: list[list[Row]], group: str, lines: list[str]) -> Files:
    """Return the group's files in all sets. A set with more instants than another loses its oldest, or last labels."""
    columns = [_columns(rows[0], group) for rows in sets]
    count = min(map(len, columns))
    kept = [names[-count:] if group in SENSOR_COLUMNS else names[:count] for names in columns]
    named = [[(row[name], name) for name in names] for rows, names in zip(sets, kept, strict=True) for row in rows]
    place: dict[str, int] = {}
    first: list[int] = []
    at = np.empty((len(named), count), dtype=np.int64)
    for i, files in enumerate(named):
        for k, (file, column) in enumerate(files):
            if file.endswith("/"):  # the set's folder without a file name
                raise UserError(f"{lines[i]}: {column} is empty; name a file, remove the row or its modality")
            if file not in place:
                place[file] = len(place)
                first.append(i)
            at[i, k] = place[file]
    return Files(tuple(root / name for name in place), tuple(first), fixed(at))


def _frames(groups: dict[str, Files]) -> Ints:
    columns = [numbers for files in groups.values() if (numbers := frame_numbers(files)) is not None]
    if not columns:
        return np.arange(len(next(iter(groups.values())).at_NK))[:, None]
    return np.concatenate(columns, axis=1)


def frame_numbers(files: Files) -> Ints | None:
    """Return each file's number, (N, K), see `number_of`; None if a file has none, such as the station's only file."""
    found = [number_of(path) for path in files.paths]
    told = [number for number in found if number is not None]
    return np.array(told)[files.at_NK] if len(told) == len(found) else None


def number_of(path: Path) -> int | None:
    """Return the number after the last underscore of a file's name, before its suffix; None if there is none."""
    found = re.search(r"_(\d+)$", path.stem)
    return int(found.group(1)) if found else None
