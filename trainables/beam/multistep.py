"""Builds windows with any history and any number of predicted beams from the raw files of a data set.

As published: a window's instants are every other file, t-2(H-1), ..., t-2, t; its positions those of t-12 and t-6; its
labels the beams of P consecutive files, of which the first is t. The published program compared powers as text to find
the strongest beam; here they are compared as numbers.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainables.beam.config import POSITIONS_BACK, STRIDE, built_span
from trainables.beam.files import read_sweep
from trainables.beam.table import BEAM, DEVELOPMENT, PASS, POWER, SENSOR_COLUMNS, Table, number_of
from trainables.cache import Stamp, stamp_of
from trainables.contract import UserError

VERSION = 1  # part of the built file's name: increment it whenever other windows are built

Names = dict[int, str]  # file paths relative to the development set's folder, by file number, of one folder
Row = dict[str, str | int]


def write_windows(path: Path, table: Table, history: int, steps: int) -> None:
    """Write a CSV of all windows of the development set, given the table of its own window file.

    Folders and passes are taken from the table; no window straddles passes. Prints how many windows are left out
    because a sensor lacks a file for an instant that another sensor has, or because all powers of a sweep are NaN.
    Raises `UserError` if no window can be built.
    """
    rows: list[Row] = []
    lacking = 0
    for here, scenario in _scenarios(table):
        built, without = _scenario_rows(table, here, scenario, history, steps)
        rows, lacking = rows + built, lacking + without
    if not rows:
        raise UserError(
            f"windows of {history} instants (data.history, or data.longest_history) and data.steps = {steps}: nowhere "
            f"in {table.root / DEVELOPMENT} are there {built_span(history, steps)} files in a row of one pass"
        )
    if lacking:
        counts = f"{lacking} of {lacking + len(rows)} windows"
        print(f"beam data: {counts} are left out: they lack files, or powers that are not NaN", flush=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", *rows[0]])
        writer.writeheader()
        writer.writerows({"index": i, **row} for i, row in enumerate(rows, start=1))


def listing(table: Table) -> str:
    """Return a digest of the file names in the folders that windows are built from; changes when files are added."""
    known = [_known(table, group, here) for here, _ in _scenarios(table) for group in _listed_groups(table)]
    return hashlib.sha256(repr([_names(x.parent, x.suffix, stamp_of(x.parent)) for x in known]).encode()).hexdigest()


@functools.lru_cache(maxsize=64)  # tens of thousands of names each, needed several times in every trial
def _names(folder: Path, suffix: str, stamp: Stamp) -> str:
    """Return a digest of the names in one folder; its `stamp` invalidates the cache when the folder changes."""
    return hashlib.sha256("/".join(sorted(path.name for path in folder.glob(f"*{suffix}"))).encode()).hexdigest()


def _scenarios(table: Table) -> list[tuple[NDArray[np.bool_], str]]:
    """Return a mask of the windows, and the name, of each scenario in the development set."""
    every = [((table.scenario_N == number) & ~table.adaptation_N, name) for number, name in enumerate(table.scenarios)]
    return [(here, name) for here, name in every if here.any()]


def newest_ids(ids: Sequence[int], history: int, steps: int) -> list[int]:
    """Return the indices into the sorted file numbers at which a window's newest instant may be, as published.

    Excluded are the first 2 H and the last P of a scenario, and places where about every second file is missing.
    """
    last = len(ids) - steps
    return [k for k in range(2 * history, last) if ids[k + steps] - ids[k] < 2 * steps]


def _scenario_rows(
    table: Table, here: NDArray[np.bool_], scenario: str, history: int, steps: int
) -> tuple[list[Row], int]:
    """Return the windows of one scenario, and how many are left out for lack of files or of powers."""
    names = {group: _listed(table, group, here, scenario) for group in _listed_groups(table)}
    recorded, pass_of = {i for listed in names.values() for i in listed}, _passes(table, here)
    ids = sorted(names[POWER])
    beam_of = functools.cache(lambda i: _best_beam(table.root / DEVELOPMENT / names[POWER][i]))  # by file number
    rows: list[Row] = []
    lacking = 0
    for k in newest_ids(ids, history, steps):
        seen = [ids[k] - STRIDE * back for back in reversed(range(history))]
        places = [ids[k] - back for back in POSITIONS_BACK]
        labelled = ids[k : k + steps]
        wanted = {group: seen for group in SENSOR_COLUMNS if group in names}
        if "unit2_loc_" in names:
            wanted["unit2_loc_"] = places
        measured = all(i in recorded for instants in wanted.values() for i in instants)
        if not measured or not _in_one_pass(pass_of, [*seen, *places, *labelled]):
            continue
        beams = [beam_of(i) for i in labelled]
        if None in beams or not all(i in names[group] for group, instants in wanted.items() for i in instants):
            lacking += 1
            continue
        row: Row = {PASS: pass_of[ids[k]]} if pass_of else {}
        for group, instants in wanted.items():
            row |= {f"{group}{at}": names[group][i] for at, i in enumerate(instants, start=1)}
        if "unit1_loc" in table.groups:
            station = table.groups["unit1_loc"]
            row["unit1_loc"] = _relative(table, station.paths[station.at_NK[here][0, 0]])
        row |= {f"{POWER}_{at}": names[POWER][i] for at, i in enumerate(labelled, start=1)}
        row[BEAM] = "_".join(map(str, beams))
        rows.append(row)
    return rows, lacking


def _best_beam(path: Path) -> int | None:
    """Return the strongest beam of a sweep, counted from 1; None if every power is NaN."""
    power = read_sweep(path)
    return None if np.isnan(power).all() else int(np.nanargmax(power)) + 1


def _in_one_pass(pass_of: Mapping[int, str], frames: Sequence[int]) -> bool:
    """Return whether the window file has these frames in one pass; True if it does not name passes."""
    passes = {pass_of.get(i) for i in frames}
    return not pass_of or (len(passes) == 1 and None not in passes)


def _listed_groups(table: Table) -> list[str]:
    return [group for group in table.groups if group != "unit1_loc"]


def _known(table: Table, group: str, here: NDArray[np.bool_]) -> Path:
    """Return the first file that the table names for these windows."""
    return table.groups[group].paths[int(table.groups[group].at_NK[here][0, 0])]


def _listed(table: Table, group: str, here: NDArray[np.bool_], scenario: str) -> Names:
    """List all files of the same kind in the folder of those that the table names for this scenario.

    Raises `UserError` if two files have the same number, or no file has one.
    """
    known = _known(table, group, here)
    names: Names = {}
    for path in sorted(known.parent.glob(f"*{known.suffix}")):
        number = number_of(path)
        if number in names:
            raise UserError(f"{path} has the number of {names[number]}; files of one folder must have their own")
        if number is not None:
            names[number] = _relative(table, path)
    if not names:
        raise UserError(
            f"{known.parent} has no file *_NUMBER{known.suffix}, and {scenario} needs them: restore them, remove the "
            f"rows of {scenario} from {table.csvs[0]}, or take their modality out of data.modalities"
        )
    return names


def _passes(table: Table, here: NDArray[np.bool_]) -> dict[int, str]:
    """Return the pass of every file number; empty if the window file does not name passes."""
    if table.passes_N is None:
        return {}
    return {int(i): table.passes_N[n] for n in np.flatnonzero(here) for i in table.frame_NK[n]}


def _relative(table: Table, path: Path) -> str:
    return f"./{path.relative_to(table.root / DEVELOPMENT).as_posix()}"
