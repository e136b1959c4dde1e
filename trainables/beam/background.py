"""What stands still in every lidar frame of a scenario, and what is left of a frame without it.

Legend: N points of a frame, M of the background. Points are metres from the lidar; height plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from trainables.contract import UserError

FRAMES = 100  # a scenario's background is made of as many, evenly spread: what drives has left some of them

Floats = NDArray[np.float64]


def reach_m(points_N2: Floats) -> Floats:
    """How near to the background a point must be to belong to it, as published: far away, points lie far apart."""
    range_N = np.hypot(points_N2[:, 0], points_N2[:, 1])
    return np.asarray(0.3 + 4.7 * (range_N / 30) ** 4)


def background(frames: Iterable[Floats]) -> Floats:
    """The running intersection of frames (N, 3): points (M, 2) of the first that have a neighbour in all others."""
    standing_M2: Floats | None = None
    for points_N3 in frames:
        seen_N2 = points_N3[:, :2]
        standing_M2 = seen_N2 if standing_M2 is None else standing_M2[_near(standing_M2, seen_N2)]
    if standing_M2 is None:
        raise UserError("a background needs at least one lidar frame")
    return standing_M2


def without(points_N3: Floats, background_M2: Floats) -> Floats:
    """The points of a frame that do not belong to the background."""
    return points_N3[~_near(points_N3[:, :2], background_M2)]


def _near(points_N2: Floats, others_M2: Floats) -> NDArray[np.bool_]:
    if not len(points_N2) or not len(others_M2):
        return np.zeros(len(points_N2), dtype=bool)
    distance_N, _ = cKDTree(others_M2).query(points_N2)
    return np.asarray(distance_N < reach_m(points_N2))
