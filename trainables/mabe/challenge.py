"""Reads data in the layout of the MABe challenge of 2025 (social action recognition in mice).

    train.csv                                   a row per video
    train_tracking/<lab_id>/<video_id>.parquet  video_frame, mouse_id, bodypart, x, y in pixels, a row per visible point
    train_annotation/<lab_id>/<video_id>.parquet  agent_id, target_id, action, start_frame, stop_frame (exclusive)

A frame gets one label, regardless of which mice it concerns. If the CSV has the column behaviors_labeled, a class is
known in a video whose cell names any of the class's actions, for any of the mice. A CSV of another name has folders
named after it, such as test_tracking/.
"""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainables.contract import UserError
from trainables.mabe.config import CLASSES
from trainables.mabe.video import UNLABELLED, Labels, Points, Video

COLUMNS = ("lab_id", "video_id", "frames_per_second", "video_width_pix", "body_parts_tracked")
TRACKING = ("video_frame", "mouse_id", "bodypart", "x", "y")
ANNOTATION = ("agent_id", "target_id", "action", "start_frame", "stop_frame")

# The published mapping; every other action is class 0, and of simultaneous classes the highest number wins.
ACTIONS = {
    "investigation": ("sniff", "sniffgenital", "sniffface", "sniffbody", "reciprocalsniff", "approach", "follow"),
    "mount": ("mount", "intromit", "attemptmount", "ejaculate"),
    "attack": ("attack", "chase", "chaseattack", "bite", "dominance", "defend", "flinch"),
}
CLASS_OF = {action: CLASSES.index(name) for name, actions in ACTIONS.items() for action in actions}


def files(root: Path) -> list[Path]:
    """Return all files that `read` reads for training."""
    return [root / "train.csv", *sorted(root.glob("train_*/*/*.parquet"))]


def read(root: Path, name: str = "train", unlabelled: bool = False) -> list[Video]:
    """Return the annotated videos of `name`.csv and, if `unlabelled`, also the others.

    Raises `UserError` with file, row and column for data that cannot be read.
    """
    path = root / f"{name}.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}; restore the file") from None
    for column in COLUMNS:
        if column not in header:
            raise UserError(f"{path} has no column {column}; keep the layout of the public data")
    if not rows:
        raise UserError(f"{path} has no rows; it must name a video in each")
    videos = []
    for number, row in enumerate(rows, start=1):
        file_name = f"{row['lab_id']}/{row['video_id']}.parquet"
        tracking, annotation = (root / f"{name}_{kind}" / file_name for kind in ("tracking", "annotation"))
        labelled = annotation.exists()
        if labelled or unlabelled:
            videos.append(_video(row, tracking, annotation if labelled else None, f"row {number} of {path}"))
    if not videos:
        raise UserError(f"{root / f'{name}_annotation'} has no <lab_id>/<video_id>.parquet of any video in {path}")
    return videos


def _video(row: dict[str, str], tracking: Path, annotation: Path | None, line: str) -> Video:
    table = _table(tracking, TRACKING, ("video_frame", "mouse_id"))
    frame = _numbers(table, "video_frame", tracking)
    mice = mouse_numbers(table.column("mouse_id"), tracking)
    if not len(frame):
        raise UserError(f"{tracking} has no rows; remove it and {line}")
    if frame.min() < 0:
        raise UserError(f"{tracking}: video_frame = {frame.min():.0f} must not be negative")
    parts = head_first(_names(row, "body_parts_tracked", line))
    width_px = _positive(row, "video_width_pix", line)
    shape = (int(frame.max()) + 1, int(mice.max()), len(parts), 2)
    unit = f"{row['lab_id']}/{row['video_id']}"
    return Video(
        name=str(tracking),
        key=unit,
        lab=row["lab_id"],
        unit=unit,
        fps=_positive(row, "frames_per_second", line),
        frames=shape[0],
        mice=shape[1],
        parts=parts,
        read=functools.partial(_read, tracking, annotation, parts, (shape, width_px)),
        known=_known(row, line),
    )


def _read(
    tracking: Path, annotation: Path | None, parts: tuple[str, ...], scale: tuple[tuple[int, ...], float]
) -> tuple[Points, Labels]:
    shape, width_px = scale
    unlabelled = np.full(shape[0], UNLABELLED, dtype=np.int8)
    given = unlabelled if annotation is None else labels(annotation, shape[0])
    return points(tracking, parts, shape) / np.float32(width_px), given


def points(path: Path, parts: Sequence[str], shape: tuple[int, ...]) -> Points:
    """Return the points in pixels, of `shape` (frames, mice, points, 2); NaN where the file has no row or value."""
    table = _table(path, TRACKING, TRACKING)
    names, which = categories(table.column("bodypart"))
    if strange := [name for name in names if name not in parts]:
        raise UserError(
            f"{path}: bodypart = {strange[0]} is not in body_parts_tracked of its row in the CSV; correct it"
        )
    part = np.array([parts.index(name) for name in names], dtype=np.int64)[which]
    out = np.full(shape, np.nan, dtype=np.float32)
    at = _numbers(table, "video_frame", path).astype(int), mouse_numbers(table.column("mouse_id"), path) - 1, part
    for axis, name in enumerate(("x", "y")):
        out[(*at, axis)] = _numbers(table, name, path)
    return out


def labels(path: Path, frames: int) -> Labels:
    """Return the class of every frame, (frames,), from events; their stop_frame is exclusive."""
    table = _table(path, ANNOTATION, ANNOTATION[2:])
    start, stop = (_numbers(table, name, path) for name in ("start_frame", "stop_frame"))
    if len(wrong := np.flatnonzero((start < 0) | (stop < start))):
        raise UserError(
            f"{path}: row {wrong[0] + 1}: start_frame = {start[wrong[0]]:.0f} and stop_frame = {stop[wrong[0]]:.0f} "
            "must be 0 or more, in this order"
        )
    out = np.zeros(frames, dtype=np.int8)
    for action, first, last in zip(
        table.column("action").to_pylist(), start.astype(int), stop.astype(int), strict=True
    ):
        out[first:last] = np.maximum(out[first:last], CLASS_OF.get(action, 0))
    return out


def mouse_numbers(column: Any, path: Path) -> NDArray[np.int64]:
    """Return each row's mouse number, from 1, written as 1 or mouse1; raises `UserError` for any other form."""
    texts, which = categories(column)
    found = [re.fullmatch(r"(?:mouse)?([1-9]\d?)", text) for text in texts]
    if None in found:
        raise UserError(f"{path}: mouse_id = {texts[found.index(None)]} must be 1, 2 and so on, or mouse1 and so on")
    return np.array([int(match.group(1)) for match in found if match], dtype=np.int64)[which]


def categories(column: Any) -> tuple[list[str], NDArray[np.int64]]:
    """Return a column's distinct values, as text, and each row's index into them."""
    encoded = pc.dictionary_encode(pc.fill_null(column.cast(pa.string()), "")).unify_dictionaries().combine_chunks()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def head_first(parts: Sequence[str]) -> tuple[str, ...]:
    """Sort body parts in one order for all labs: nose or head first, tail last, its base before its tip."""

    def rank(name: str) -> tuple[int, str]:
        fixed = {"nose": -3, "head": -2, "neck": -1, "tail_base": 1, "tail_midpoint": 2, "tail_tip": 3}
        return fixed.get(name, 0), name

    return tuple(sorted(parts, key=rank))


def _known(row: dict[str, str], line: str) -> tuple[str, ...]:
    """Return the classes that a video's lab annotated; all of them if the row does not say."""
    if (row.get("behaviors_labeled") or "").strip() in ("", "[]"):
        return CLASSES
    # "mouse1,mouse2,sniff"; some rows of the public data quote each part, or only some: "mouse1','mouse2','sniff'".
    entries = _names(row, "behaviors_labeled", line)
    there = {CLASS_OF.get(entry.rpartition(",")[2].strip(" '\""), 0) for entry in entries}
    return tuple(name for number, name in enumerate(CLASSES) if number in there | {0})


def _names(row: dict[str, str], column: str, line: str) -> list[str]:
    try:
        names = json.loads(row[column])
    except (TypeError, ValueError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{line}: {column} = {row[column]!r} must be a JSON list of names")
    return names


def _positive(row: dict[str, str], column: str, line: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < np.inf:
        raise UserError(f"{line}: {column} = {row[column]!r} must be a positive number")
    return value


def _table(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> Any:
    """Read the `wanted` columns of a parquet file; raises `UserError` if it lacks any of `columns`."""
    try:
        names = pq.read_schema(path).names
        for column in columns:
            if column not in names:
                raise UserError(f"{path} has no column {column}, but {', '.join(names)}; keep the layout of the data")
        return pq.read_table(path, columns=list(wanted))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}; restore the file") from None


def _numbers(table: Any, column: str, path: Path) -> NDArray[np.float64]:
    if not table.num_rows:  # then a column may well be of the type null
        return np.zeros(0)
    kind = table.schema.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise UserError(f"{path}: the column {column} is of type {kind}, it must hold numbers")
    numbers = table.column(column).cast(pa.float64()).to_numpy()
    if column not in ("x", "y") and not np.isfinite(numbers).all():
        raise UserError(f"{path}: the column {column} lacks a number in row {np.isfinite(numbers).argmin() + 1}")
    return np.asarray(numbers)
