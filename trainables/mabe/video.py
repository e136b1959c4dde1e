"""A tracked video, in the form that the readers of all data sets return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainables.mabe.config import CLASSES

Points = NDArray[np.float32]  # (frames, mice, points, 2) in units of picture width, not finite where not seen
Labels = NDArray[np.int8]  # (frames,), an index into CLASSES, or UNLABELLED

UNLABELLED = -1


@dataclass(frozen=True)
class Video:
    """One video. Its arrays are read on demand, because a data set may exceed the memory.

    name: for messages. key: its name in the data set, <lab_id>/<video_id> or the sequence's. lab: a share of each lab's
    units is held out. unit: what is held out as a whole, an animal or the video itself. read: returns points and
    labels. known: the classes that its lab says it annotated, "other" among them.
    """

    name: str
    key: str
    lab: str
    unit: str
    fps: float
    frames: int
    mice: int
    parts: tuple[str, ...]
    read: Callable[[], tuple[Points, Labels]]
    known: tuple[str, ...] = CLASSES


def known_classes(video: Video, labels: Labels) -> tuple[str, ...]:
    """Return the classes that a video's lab annotated: those that it says, and those of the video's `labels`."""
    there = {CLASSES[number] for number in np.unique(labels) if number != UNLABELLED}
    return tuple(name for name in CLASSES if name in there.union(video.known))
