"""A tracked and labelled video, as the readers of every data set give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]  # (frames, mice, points, 2) in pictures' widths, NaN where not seen
Labels = NDArray[np.int8]  # (frames,), an index into CLASSES, or UNLABELLED

UNLABELLED = -1


@dataclass(frozen=True)
class Video:
    """One video. Its arrays are read when they are wanted, because a data set of them may exceed the memory.

    name: for messages. key: what its data set calls it: <lab_id>/<video_id>, or the name of the sequence. lab: of each,
    a share of the units is held out. unit: what is held out as a whole: an animal, or the video itself. read: returns
    points and labels.
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
