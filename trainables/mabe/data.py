"""The windows of the videos in batches for the training loop, split into training and validation.

Shape suffixes: B windows of a batch, N of a split, S frames of a window with its margins, V videos, K classes, L labs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.contract import UserError
from trainables.mabe.config import CLASSES, Augment, Data
from trainables.mabe.prepare import Prepared, groups_of, prepare_data
from trainables.mabe.video import UNLABELLED
from trainables.samples import Batch

SAMPLED = 200_000  # most training frames, evenly spaced, from which scale and principal axes are computed
PER_WINDOW = ("index", "known", "lab")  # what a batch holds for each window, not for each frame


class HasData(Protocol):
    """Any config with this family's `data` and `augment` settings."""

    @property
    def data(self) -> Data: ...

    @property
    def augment(self) -> Augment: ...


@dataclass(frozen=True)
class Samples:
    """The windows of one side of the split, in batches.

    A batch holds each feature group by name, (B, S, columns) float32; label (B, S) int64, 0..3 or UNLABELLED; and
    index (B,) int64, the window's first frame in the data set; and what `of_window` has. Beyond a video's ends, its
    first or last frame is repeated, unlabelled.

    of_window: bool arrays by name. known (N, K), the classes that the window's lab annotated, is absent if all are;
        lab (N, L), which lab that is, is absent if there is only one.
    """

    first_N: NDArray[np.int64]  # each window's first frame in the data set, without the margin
    bounds_N2: NDArray[np.int64]  # first and last frame of each window's video
    length: int  # frames of a window
    margin: int  # frames before and after it
    groups: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int8]
    of_window: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.first_N)

    def __getitem__(self, indices: Tensor) -> Batch:
        chosen = indices.numpy()
        frames_BS = self.first_N[chosen, None] + np.arange(-self.margin, self.length + self.margin)
        low_B1, high_B1 = self.bounds_N2[chosen].T[..., None]
        inside_BS = np.clip(frames_BS, low_B1, high_B1)
        batch: Batch = {name: torch.from_numpy(array[inside_BS]) for name, array in self.groups.items()}
        label_BS = np.where(inside_BS == frames_BS, self.labels[inside_BS], UNLABELLED).astype(np.int64)
        batch |= {name: torch.from_numpy(array[chosen]) for name, array in self.of_window.items()}
        return {**batch, "label": torch.from_numpy(label_BS), "index": torch.from_numpy(self.first_N[chosen])}


def samples(config: HasData, split: str, ranks: object = None) -> Samples:
    """Open the side "train" or "val" of the split; cheap once the data are prepared. `ranks` is ignored."""
    data = config.data
    prepared = prepare_data(data)
    train = split == "train"
    first, bounds, videos = [], [], videos_of(prepared, data, split)
    for v in videos:
        first_n, bounds_n2 = windows_of(prepared.start[v], prepared.start[v + 1], data, train)
        first.append(first_n)
        bounds.append(bounds_n2)
    of_video = known_of(data, [prepared.known[v] for v in videos]) | lab_of([prepared.lab[v] for v in videos])
    windows = [len(first_n) for first_n in first]
    return Samples(
        first_N=np.concatenate(first),
        bounds_N2=np.concatenate(bounds),
        length=data.window,
        margin=config.augment.jitter if train else data.context,
        groups={name: prepared.group(name) for name in groups_of(data)},
        labels=prepared.labels(),
        of_window={name: np.repeat(array, windows, axis=0) for name, array in of_video.items()},
    )


def known_of(data: Data, known: Sequence[Sequence[str]]) -> dict[str, NDArray[np.bool_]]:
    """Return as "known" whether each class is among those of each video, (V, K); empty if nothing is to be masked."""
    known_VK = np.array([[name in names for name in CLASSES] for names in known])
    return {} if data.unlabelled == "other" or known_VK.all() else {"known": known_VK}


def lab_of(labs: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return as "lab" which of the distinct `labs` each video is of, (V, L); empty if all are of one."""
    lab_VL = np.array(labs)[:, None] == np.unique(labs)
    return {"lab": lab_VL} if lab_VL.shape[1] > 1 else {}


def names(config: HasData, indices: Sequence[int]) -> list[str]:
    """Describe the training windows with these indices by their frames, margins included, and video."""
    prepared, train = prepare_data(config.data), samples(config, "train")
    found = []
    for i in indices:
        start, last = train.bounds_N2[i]
        begin, end = train.first_N[i] - train.margin, train.first_N[i] + train.length + train.margin - 1
        frames = f"frames {max(begin, start) - start} to {min(end, last) - start}"
        video = prepared.start.index(start)
        found.append(f"{frames} of video {video + 1} ({prepared.unit[video]})")
    return found


def windows_of(start: int, stop: int, data: Data, train: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first frames of a video's windows, (n,), and its first and last frame for each of them, (n, 2).

    The video has the frames from `start` up to but not including `stop`. Training windows start every `data.stride`
    frames; validation windows cover every frame once, in order.
    """
    last = max(stop - data.window, start) if train else stop - 1
    first_n = np.arange(start, last + 1, data.stride if train else data.window)
    return first_n, np.tile([start, stop - 1], (len(first_n), 1))


def videos_of(prepared: Prepared, data: Data, split: str) -> list[int]:
    """Return the numbers of the videos of one side: a share of each lab's units is held out, at least one of two.

    Videos whose lab annotated no behaviour are not trained with where the other classes are masked: "other" is then all
    there is. Raises `UserError` if no lab has two units, or no video is left to train with.
    """
    rng = np.random.default_rng(data.split_seed)
    held: set[str] = set()
    for lab in sorted(set(prepared.lab)):
        units = sorted({unit for unit, of in zip(prepared.unit, prepared.lab, strict=True) if of == lab})
        count = min(max(1, round(data.holdout * len(units))), len(units) - 1)
        held |= set(rng.permutation(units)[:count].tolist())
    if not held:
        raise UserError(
            f"data.root = {prepared.root} must hold two videos (CalMS21: animals; an .npz: sequences) of one lab, one "
            f"to train with and one to validate; it holds {len(prepared.unit)}: {', '.join(prepared.unit[:3])}"
        )
    found = [v for v, unit in enumerate(prepared.unit) if (unit in held) == (split == "val")]
    if split == "train" and data.unlabelled == "mask":
        found = [v for v in found if len(prepared.known[v]) > 1]
    if not found:
        raise UserError(
            f"data.root = {prepared.root}: no lab annotated a behaviour in what is to be learnt; see data.unlabelled"
        )
    return found


def training_frames(data: Data) -> tuple[Batch, Tensor]:
    """Return features by group, (n, columns), and labels, (n,), of at most `SAMPLED` evenly spaced training frames."""
    prepared = prepare_data(data)
    train = [np.arange(prepared.start[v], prepared.start[v + 1]) for v in videos_of(prepared, data, "train")]
    frames = np.concatenate(train)
    chosen = frames[:: -(-len(frames) // SAMPLED)]
    groups: Batch = {name: torch.from_numpy(prepared.group(name)[chosen]) for name in groups_of(data)}
    return groups, torch.from_numpy(prepared.labels()[chosen].astype(np.int64))


def describe(config: HasData) -> str:
    """Return one line on the data: real or simulated, numbers of windows and videos, points, and class shares.

    If `data.unlabelled` masks anything, it also says in how many videos each behaviour is annotated.
    """
    data, prepared = config.data, prepare_data(config.data)
    kind = "simulated" if data.root is None else "real"
    videos = {split: len(videos_of(prepared, data, split)) for split in ("train", "val")}
    windows = {split: len(samples(config, split)) for split in ("train", "val")}
    shares = np.bincount(prepared.labels(), minlength=len(CLASSES)) / prepared.start[-1]
    shown = ", ".join(f"{name} {share:.1%}" for name, share in zip(CLASSES, shares, strict=True))
    if masked := known_of(data, prepared.known):
        counts = zip(CLASSES[1:], masked["known"].sum(0)[1:], strict=True)
        shown += f"; of {len(prepared.known)} videos, " + ", ".join(f"{count} label {name}" for name, count in counts)
    return (
        f"{kind} mabe data in {prepared.root}: {windows['train']} windows of {videos['train']} videos to train and "
        f"{windows['val']} of {videos['val']} to validate, {prepared.mice} x {len(prepared.parts)} points, {shown}"
    )
