"""Reads a data set once into arrays on disk, which all processes of a machine then share through the page cache.

One folder per data set: points and labels of all videos, concatenated, and an array for each feature group ever asked
for. Its name is a digest of the files (path, size, modification time), so that changed files are read anew. A process
checks every file once, and again when a folder of the data set, or a file directly in it, has changed. A file that is
overwritten deep in the challenge's folders is noticed only by the next process, and so by the next search.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainables.cache import Stamp, cache_folder, make_once, reserved_array, stamp_of
from trainables.contract import UserError
from trainables.mabe import calms21, challenge, simulator
from trainables.mabe.config import Data, Feature
from trainables.mabe.features import group, width
from trainables.mabe.video import Points, Video, known_classes

VERSION = 4  # increment it whenever reading or a feature changes


@dataclass(frozen=True)
class Prepared:
    """All videos of a data set, concatenated: video v has the frames start[v]:start[v + 1].

    tracked: for each video, its number of mice and the body parts tracked. known: for each video, the classes that its
    lab annotated, "other" among them.
    """

    root: Path
    folder: Path
    lab: Sequence[str]
    unit: Sequence[str]
    fps: Sequence[float]
    start: Sequence[int]
    mice: int
    parts: Sequence[str]
    tracked: Sequence[tuple[int, Sequence[str]]]
    known: Sequence[Sequence[str]]

    def points(self) -> NDArray[np.float32]:
        """Return (frames, mice, parts, 2) in units of picture width, memory-mapped; NaN where not seen."""
        return np.load(self.folder / "points.npy", mmap_mode="r")

    def labels(self) -> NDArray[np.int8]:
        """Return (frames,), indices into CLASSES, or UNLABELLED."""
        return np.load(self.folder / "labels.npy")

    def group(self, name: Feature) -> NDArray[np.float32]:
        """Return a feature group that `prepare_data` has made, (frames, columns), memory-mapped."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")


def data_root(data: Data) -> Path:
    """Return the data set's folder; simulated data are generated on the first call."""
    if data.root is not None:
        return Path(data.root).expanduser()
    settings = data.simulated
    key = "-".join(str(part) for part in (simulator.VERSION, *astuple(settings)))
    root = _cache(data) / f"simulated-{key}"
    if make_once(root, lambda unfinished: simulator.simulate(unfinished, settings)):
        print(f"mabe data: {settings.videos} simulated videos of {settings.seconds} s in {root}", flush=True)
    return root


def groups_of(data: Data) -> tuple[Feature, ...]:
    """Return the groups kept as arrays: those in `data.features`, with coords in place of pca."""
    wanted: list[Feature] = ["coords" if name == "pca" else name for name in data.features]
    return tuple(dict.fromkeys(wanted))


def prepare_data(data: Data) -> Prepared:
    """Check and read the data that `data` describes, unless already done.

    Raises `UserError` with file, place and remedy for data that cannot be read. Several processes may call it at once.
    """
    root = data_root(data)
    folder = _cache(data) / "prepared" / _digest(root, _stamps(root))
    if not folder.exists():
        print(f"mabe data: reading {root}", flush=True)
    make_once(folder, lambda unfinished: _write_points(unfinished, _videos(root, data)))
    prepared = _opened(root, folder, stamp_of(folder / "index.json"))
    for name in groups_of(data):
        make_once(folder / f"{name}.npy", _write_group(prepared, name))
    return prepared


def _cache(data: Data) -> Path:
    return cache_folder(data.prepared) / "mabe"


def _stamps(root: Path) -> tuple[Stamp, ...]:
    """Return stamps of a data set's folder, its direct entries, and the challenge's folders per lab: some fifty."""
    return tuple(stamp_of(path) for path in sorted([root, *root.glob("*"), *root.glob("train_*/*")]))


@functools.lru_cache(maxsize=4)
def _digest(root: Path, stamps: tuple[Stamp, ...]) -> str:
    """Return a digest of a data set's files (path, size, modification time); `stamps` invalidate the cached one."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(root)]
    return hashlib.sha256(repr((VERSION, stats)).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def _opened(root: Path, folder: Path, stamp: Stamp) -> Prepared:
    """Open a prepared folder; `stamp`, of its index, invalidates the cache when the folder is remade."""
    return Prepared(root, folder, **json.loads((folder / "index.json").read_text()))


def _is_challenge(root: Path) -> bool:
    return (root / "train.csv").is_file()


def _videos(root: Path, data: Data) -> list[Video]:
    return challenge.read(root) if _is_challenge(root) else calms21.read(calms21.found(root), data.trust_pickle)


def _files(root: Path) -> list[Path]:
    """Return the files of a data set, whose kind its folder's content shows; raises `UserError` if it has none."""
    if not root.is_dir():
        raise UserError(f"data.root = {root}: no such folder; give the one of a data set, or null")
    if _is_challenge(root):
        return challenge.files(root)
    if files := calms21.found(root):
        return files
    raise UserError(
        f"data.root = {root} holds neither train.csv (MABe challenge) nor calms21_task1_train*.json or .npy, nor a "
        ".npz extract of CalMS21; give the folder of one of them"
    )


def _write_points(folder: Path, videos: list[Video]) -> None:
    """Write points and labels of all videos to arrays with room for every mouse and body part that any of them has."""
    parts = challenge.head_first(sorted({part for video in videos for part in video.parts}))
    if all(video.parts == videos[0].parts for video in videos):
        parts = videos[0].parts
    mice = max(video.mice for video in videos)
    start = np.cumsum([0, *(video.frames for video in videos)]).tolist()
    folder.mkdir()
    shape = (start[-1], mice, len(parts), 2)
    points = reserved_array(folder / "points.npy", shape, np.float32)
    labels = np.zeros(start[-1], dtype=np.int8)
    known: list[tuple[str, ...]] = []
    for video, first in zip(videos, start, strict=False):
        here = slice(first, first + video.frames)
        seen, labels[here] = video.read()
        points[here] = placed(seen, video.parts, mice, parts)
        known.append(known_classes(video, labels[here]))
    points.flush()
    np.save(folder / "labels.npy", labels)
    index = {
        "lab": [video.lab for video in videos],
        "unit": [video.unit for video in videos],
        "fps": [video.fps for video in videos],
        "start": start,
        "mice": mice,
        "parts": parts,
        "tracked": [(video.mice, video.parts) for video in videos],
        "known": known,
    }
    (folder / "index.json").write_text(json.dumps(index))


def placed(seen: Points, seen_parts: Sequence[str], mice: int, parts: Sequence[str]) -> Points:
    """Return a video's points in an array with room for `mice` mice and all `parts`.

    NaN where the video has none, or one of which a coordinate is not finite.
    """
    points: Points = np.full((len(seen), mice, len(parts), 2), np.nan, dtype=np.float32)
    whole = np.isfinite(seen).all(-1, keepdims=True)
    points[:, : seen.shape[1], [parts.index(part) for part in seen_parts]] = np.where(whole, seen, np.nan)
    return points


def _write_group(prepared: Prepared, name: Feature) -> Callable[[Path], None]:
    def make(unfinished: Path) -> None:
        points = prepared.points()
        shape = (len(points), width(name, prepared.mice, len(prepared.parts)))
        array = reserved_array(unfinished, shape, np.float32)
        for v, fps in enumerate(prepared.fps):
            here = slice(prepared.start[v], prepared.start[v + 1])
            array[here] = group(name, np.asarray(points[here], dtype=np.float64), fps)
        array.flush()

    return make
