"""The static background of a scenario's lidar frames, and its removal from a frame.

Legend: N points of a frame, M of the background. Points are in metres from the lidar; height is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from trainables.contract import UserError

FRAMES = 100  # evenly spread frames that make a scenario's background: moving objects are absent from some

Floats = NDArray[np.float64]


def reach_m(points_N2: Floats) -> Floats:
    """Return how near to the background a point must be to belong to it, (N,), as published; grows with range."""
    range_N = np.hypot(points_N2[:, 0], points_N2[:, 1])
    return np.asarray(0.3 + 4.7 * (range_N / 30) ** 4)


def background(frames: Iterable[Floats]) -> Floats:
    """Return the intersection of frames (N, 3): points (M, 2) of the first frame with a neighbour in all others."""
    standing_M2: Floats | None = None
    for points_N3 in frames:
        seen_N2 = points_N3[:, :2]
        standing_M2 = seen_N2 if standing_M2 is None else standing_M2[_near(standing_M2, seen_N2)]
    if standing_M2 is None:
        raise UserError("a background needs at least one lidar frame")
    return standing_M2


def without(points_N3: Floats, background_M2: Floats) -> Floats:
    """Return the points of a frame that do not belong to the background."""
    return points_N3[~_near(points_N3[:, :2], background_M2)]


def _near(points_N2: Floats, others_M2: Floats) -> NDArray[np.bool_]:
    if not len(points_N2) or not len(others_M2):
        return np.zeros(len(points_N2), dtype=bool)
    distance_N, _ = cKDTree(others_M2).query(points_N2)
    return np.asarray(distance_N < reach_m(points_N2))
