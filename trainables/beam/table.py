"""The CSV of a data set in the DeepSense 6G layout: which files make up each window.

Legend: N windows, K instants of a column group (5 for a sensor, 2 for positions, 1 for station and power).
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainables.beam.config import Modality
from trainables.beam.files import BEAMS
from trainables.contract import UserError

Ints = NDArray[np.int64]
Row = dict[str, str]

# Folder and CSV of each labelled set. The second was recorded at another rate, and is absent from most copies.
DEVELOPMENT = ("Multi_Modal", "ml_challenge_dev_multi_modal.csv")
ADAPTATION = ("Adaptation_dataset_multi_modal", "ml_challenge_data_adaptation_multi_modal.csv")

# Column groups by what they hold; a trailing underscore stands for one column per instant.
GROUPS: dict[Modality, tuple[str, ...]] = {
    "image": ("unit1_rgb_",),
    "lidar": ("unit1_lidar_",),
    "radar": ("unit1_radar_",),
    "gps": ("unit1_loc", "unit2_loc_"),
}
POWER, BEAM, PASS = "unit1_pwr_60ghz", "unit1_beam", "seq_index"


@dataclass(frozen=True)
class Files:
    """The distinct files of one column group, and where each window's are among them (oldest first)."""

    paths: tuple[Path, ...]
    row: tuple[int, ...]  # the first window that names each file
    at_NK: Ints


@dataclass(frozen=True)
class Table:
    """All labelled windows of a data set, in the order of its CSV files."""

    csvs: tuple[Path, ...]
    digest: str  # of the CSV files' content
    lines: tuple[str, ...]  # "row 3 of a.csv" for every window, for messages
    scenarios: tuple[str, ...]  # "scenario31", ... in the order of their numbers
    scenario_N: Ints
    beam_N: Ints  # 0-based, as the CSV says
    groups: dict[str, Files]
    frame_NK: Ints  # numbers of the frames that a window sees, its label's included
    passes_N: tuple[str, ...] | None  # which pass of the car; None where the CSV does not say
    adaptation_N: NDArray[np.bool_]


def read_table(root: Path, modalities: Sequence[Modality]) -> Table:
    """Read the CSV files below `root`; raises `UserError` for what is missing in them."""
    if not root.is_dir():
        raise UserError(f"data.root = {root}: no such folder; give the one that holds {DEVELOPMENT[0]}/, or null")
    sets = [DEVELOPMENT] + ([ADAPTATION] if root.joinpath(*ADAPTATION).exists() else [])
    csvs = tuple(root.joinpath(*names) for names in sets)
    wanted = [POWER, *(name for modality in modalities for name in GROUPS[modality])]
    rows: list[Row] = []
    lines: list[str] = []
    adaptation: list[bool] = []
    digest = hashlib.sha256()
    for path, names in zip(csvs, sets, strict=True):
        found = _read_csv(path, modalities)
        digest.update(path.read_bytes())
        for number, row in enumerate(found, start=1):
            rows.append({name: f"{names[0]}/{value}" if _is_file(name) else value for name, value in row.items()})
            lines.append(f"row {number} of {path}")
        adaptation += [names is ADAPTATION] * len(found)
    labels = [_label(row, line) for row, line in zip(rows, lines, strict=True)]
    scenario_of = [_scenario(row[POWER], line) for row, line in zip(rows, lines, strict=True)]
    scenarios = sorted(set(scenario_of), key=lambda name: int(name.removeprefix("scenario")))
    groups = {name: _files(root, rows, _columns(rows[0], name)) for name in wanted}
    return Table(
        csvs=csvs,
        digest=digest.hexdigest(),
        lines=tuple(lines),
        scenarios=tuple(scenarios),
        scenario_N=np.array([scenarios.index(name) for name in scenario_of]),
        beam_N=np.array(labels),
        groups=groups,
        frame_NK=_frames(groups),
        passes_N=tuple(row[PASS] for row in rows) if all(PASS in row for row in rows) else None,
        adaptation_N=np.array(adaptation),
    )


def _is_file(column: str) -> bool:
    return column.startswith(("unit1_", "unit2_")) and column != BEAM


def _read_csv(path: Path, modalities: Sequence[Modality]) -> list[Row]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; data.root must hold the development set's CSV") from None
    for name in (POWER, BEAM):
        if name not in header:
            raise UserError(f"{path} has no column {name}; every window needs its power and its label")
    for modality in modalities:
        for name in GROUPS[modality]:
            if not _columns(dict.fromkeys(header, ""), name):
                column = f"{name}1" if name.endswith("_") else name
                raise UserError(f"{path} has no column {column}; take {modality} out of data.modalities")
    if not rows:
        raise UserError(f"{path} has no rows; give a data set with at least one window")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # DictReader's mark of too many or too few fields
            raise UserError(f"{path}: row {number} does not have the header's {len(header)} fields; mend the row")
    return rows


def _columns(row: Row, group: str) -> list[str]:
    """The columns of a group, oldest instant first."""
    if not group.endswith("_"):
        return [group] if group in row else []
    numbered = [name for name in row if re.fullmatch(re.escape(group) + r"\d+", name)]
    return sorted(numbered, key=lambda name: int(name.removeprefix(group)))


def _label(row: Row, line: str) -> int:
    try:
        beam = int(row[BEAM])
    except ValueError:
        beam = 0
    if not 1 <= beam <= BEAMS:
        raise UserError(f"{line}: {BEAM} = {row[BEAM]!r} is not one number in 1..{BEAMS}; mend the row")
    return beam - 1


def _scenario(path: str, line: str) -> str:
    found = re.search(r"scenario\d+", path)
    if found is None:
        raise UserError(f"{line}: {path} lies in no scenarioNN folder; keep the layout of the public data")
    return found.group()


def _files(root: Path, rows: list[Row], columns: list[str]) -> Files:
    place: dict[str, int] = {}
    first: list[int] = []
    at = np.empty((len(rows), len(columns)), dtype=np.int64)
    for i, row in enumerate(rows):
        for k, column in enumerate(columns):
            name = row[column]
            if name not in place:
                place[name] = len(place)
                first.append(i)
            at[i, k] = place[name]
    return Files(tuple(root / name for name in place), tuple(first), at)


def _frames(groups: dict[str, Files]) -> Ints:
    """Frame numbers stand after the last underscore of a file's name; the station's only file has none."""
    columns = []
    for files in groups.values():
        found = [re.search(r"_(\d+)$", path.stem) for path in files.paths]
        if all(found):
            columns.append(np.array([int(match.group(1)) for match in found if match])[files.at_NK])
    if not columns:
        return np.arange(len(next(iter(groups.values())).at_NK))[:, None]
    return np.concatenate(columns, axis=1)
