"""Reads CalMS21 task 1: calms21_task1_*.json or .npy as published, and .npz extracts.

A .npz extract holds keypoints_<i>, and annotations_<i> or labels_<i>, for i from 0 on. Sources: Sun et al., "The
Multi-Agent Behavior Dataset: Mouse Dyadic Social Interactions", 2021, and its data descriptions.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.contract import UserError
from trainables.mabe.config import CLASSES
from trainables.mabe.video import UNLABELLED, Labels, Points, Video

PARTS = ("nose", "left_ear", "right_ear", "neck", "left_hip", "right_hip", "tail_base")
VOCABULARY = {"attack": 0, "investigation": 1, "mount": 2, "other": 3}
FPS, WIDTH_PX = 30.0, 1024.0
# What reading a file raises that was cut off, or is of another kind.
BROKEN = (OSError, EOFError, ValueError, AttributeError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


def found(root: Path) -> list[Path]:
    """Return the files to read in a folder: all .npz extracts, or else the published training files, JSON first."""
    extracts = sorted(root.glob("*.npz"))
    texts, pickles = (sorted(root.glob(f"calms21_task1_train*.{suffix}")) for suffix in ("json", "npy"))
    return extracts or texts or pickles


def read(paths: list[Path], trust_pickle: bool, unlabelled: bool = False) -> list[Video]:
    """Return the videos in these files; raises UserError for one without annotations unless `unlabelled`."""
    videos: list[Video] = []
    for path in paths:
        videos += _extract(path, unlabelled) if path.suffix == ".npz" else _published(path, trust_pickle, unlabelled)
    return videos


def _published(path: Path, trust_pickle: bool, unlabelled: bool) -> Iterator[Video]:
    for annotator, sequences in _mapping(_tree(path, trust_pickle), str(path)).items():
        for name, record in _mapping(sequences, f"{path}: {annotator}").items():
            where = f"{path}: {name}"
            fields = _mapping(record, where)
            for key in ("keypoints", "annotations"):
                if fields.get(key) is None and not (key == "annotations" and unlabelled):
                    raise UserError(f"{where} has no {key}, but {_listed(fields)}; keep the layout of the public data")
            metadata = _mapping(fields.get("metadata", {}), f"{where}: metadata")
            animal = re.search(r"mouse\d+", name)
            yield _video(
                where,
                (name, animal.group() if animal else name),
                (fields["keypoints"], fields.get("annotations")),
                _mapping(metadata.get("vocab", VOCABULARY), f"{where}: metadata.vocab"),
            )


def _tree(path: Path, trust_pickle: bool) -> Any:
    if path.suffix == ".npy" and not trust_pickle:
        raise UserError(
            f"{path} is a pickle, which can run any code when read; take the .json file instead, "
            "or set data.trust_pickle = true if you trust where it comes from"
        )
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=True).item()
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except BROKEN as error:
        raise UserError(f"{path} cannot be read: {error}; download it again") from None


def _extract(path: Path, unlabelled: bool) -> Iterator[Video]:
    try:
        arrays = np.load(io.BytesIO(path.read_bytes()))  # given a path, it leaves a broken archive's file open
        names = list(arrays.files)
    except BROKEN as error:
        raise UserError(f"{path} cannot be read: {error}; download it again") from None
    numbers = sorted(int(name.removeprefix("keypoints_")) for name in names if re.fullmatch(r"keypoints_\d+", name))
    if not numbers:
        raise UserError(f"{path} holds no keypoints_0 and so on, but {_listed(names)}; keep the layout of the extract")
    for i in numbers:
        labels = next((name for name in (f"annotations_{i}", f"labels_{i}") if name in names), None)
        if labels is None and not unlabelled:
            raise UserError(f"{path} holds neither annotations_{i} nor labels_{i}, but {_listed(names)}")
        try:
            given = arrays[f"keypoints_{i}"], None if labels is None else arrays[labels]
        except BROKEN as error:  # an object array is a pickle
            raise UserError(f"{path}: sequence {i} cannot be read: {error}; it must hold plain arrays") from None
        yield _video(f"{path}: sequence {i}", (f"keypoints_{i}", f"{path.name}/{i}"), given, VOCABULARY)


def _video(where: str, names: tuple[str, str], given: tuple[Any, Any], vocabulary: Mapping[str, Any]) -> Video:
    """Check and scale one video; raises UserError for wrong shapes or labels.

    names: the video's key and its unit. given: keypoints (frames, mice, 2, points) in pixels, and annotations (frames,)
    or None.
    """
    try:
        points_T2 = np.asarray(given[0], dtype=np.float32)
        numbers_T = np.asarray(given[1])
    except ValueError as error:
        raise UserError(f"{where}: keypoints must be one array of numbers: {error}") from None
    if points_T2.ndim != 4 or points_T2.shape[2] != 2 or 0 in points_T2.shape:
        raise UserError(f"{where}: keypoints are {points_T2.shape}, they must be (frames, mice, 2, points)")
    if given[1] is None:
        labels: Labels = np.full(len(points_T2), UNLABELLED, dtype=np.int8)
    elif numbers_T.shape == points_T2.shape[:1]:
        labels = _labels(where, numbers_T, vocabulary)
    else:
        raise UserError(f"{where}: annotations are {numbers_T.shape}, they must be {points_T2.shape[:1]}, one a frame")
    key, unit = names
    points: Points = np.ascontiguousarray(points_T2.swapaxes(2, 3)) / np.float32(WIDTH_PX)
    parts = PARTS if points.shape[2] == len(PARTS) else tuple(f"point{i}" for i in range(points.shape[2]))
    return Video(where, key, "calms21", unit, FPS, len(points), points.shape[1], parts, lambda: (points, labels))


def _labels(where: str, numbers_T: NDArray[Any], vocabulary: Mapping[str, Any]) -> Labels:
    """Map a file's label numbers, (frames,), to indices into CLASSES."""
    if missing := [name for name in CLASSES if name not in vocabulary]:
        raise UserError(f"{where}: metadata.vocab names {_listed(vocabulary)} and not {missing[0]}; take task 1")
    ours = {int(vocabulary[name]): number for number, name in enumerate(CLASSES)}
    if strange := sorted(set(np.unique(numbers_T).tolist()) - ours.keys()):
        raise UserError(f"{where}: the annotation {strange[0]} is none of {sorted(ours)}; take task 1")
    return np.array([ours.get(number, 0) for number in range(max(ours) + 1)], dtype=np.int8)[numbers_T.astype(int)]


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is a {type(value).__name__}, it must be names with what they stand for")
    return value


def _listed(names: Any) -> str:
    shown = [str(name) for name in names][:8]
    return (", ".join(shown) + (", ..." if len(names) > len(shown) else "")) or "nothing"
