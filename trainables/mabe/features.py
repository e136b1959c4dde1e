"""The features of a tracked video, in groups, computed once over the whole video.

Shape suffixes: T frames, M mice, P points per mouse, G columns of a group. Coordinates are in units of picture width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainables.mabe.config import Feature

Floats = NDArray[np.float64]

ROLLING = 10  # frames in a rolling window, the current one included


def group(name: Feature, seen_TMP2: Floats, fps: float) -> Floats:
    """Return the columns of one group, (T, G), from points that are NaN where not seen.

    coords    2 M P   x and y of each point of each mouse, gaps filled
    presence  M P     1 where the point was seen, 0 in a gap
    geometry  9 M + 5 for each pair of mice: see `geometry`
    rolling   mean, standard deviation, minimum and maximum of each geometry column over the last 10 frames
    motion    2 M P   speed of every point, then acceleration of every point, per second and per second squared
    """
    frames = len(seen_TMP2)
    if name == "presence":
        return (~np.isnan(seen_TMP2).any(-1)).reshape(frames, -1).astype(np.float64)
    points_TMP2 = filled(seen_TMP2)
    if name == "coords":
        return points_TMP2.reshape(frames, -1)
    if name == "motion":
        return motion(points_TMP2.reshape(frames, -1, 2), fps)
    columns_TG = geometry(points_TMP2, ever_seen(seen_TMP2))
    assert name in ("geometry", "rolling"), f"{name} is not a group of columns"
    return columns_TG if name == "geometry" else rolling(columns_TG)


def width(name: Feature, mice: int, points: int) -> int:
    """Return G, the number of columns of a group."""
    geometric = 9 * mice + 5 * mice * (mice - 1) // 2
    widths: Mapping[Feature, int] = {
        "coords": 2 * mice * points,
        "presence": mice * points,
        "geometry": geometric,
        "rolling": 4 * geometric,
        "motion": 2 * mice * points,
    }
    return widths[name]


def ever_seen(seen_TMP2: Floats) -> NDArray[np.bool_]:
    """Return which points of which mice were seen in any frame, (M, P)."""
    return np.asarray((~np.isnan(seen_TMP2).any(-1)).any(0))


def filled(seen_TMP2: Floats) -> Floats:
    """Fill gaps in the points: linear interpolation in time, and constant before the first and after the last seen.

    A point that was never seen is put at the mean of its mouse's other points, and a mouse never seen at 0.
    """
    out = np.zeros_like(seen_TMP2)
    times = np.arange(len(seen_TMP2))
    known_MP = ever_seen(seen_TMP2)
    for mouse in range(known_MP.shape[0]):
        known = np.flatnonzero(known_MP[mouse])
        for point in known:
            at = np.flatnonzero(~np.isnan(seen_TMP2[:, mouse, point]).any(-1))
            for axis in range(2):
                out[:, mouse, point, axis] = np.interp(times, at, seen_TMP2[at, mouse, point, axis])
        if len(known):
            out[:, mouse, ~known_MP[mouse]] = out[:, mouse, known].mean(1, keepdims=True)
    return out


def motion(points_TN2: Floats, fps: float) -> Floats:
    """Return the speeds, then accelerations, of N points, (T, 2 N); the first frame copies the second."""
    velocity_TN2 = differences(points_TN2) * fps
    return np.concatenate(
        [np.linalg.norm(velocity_TN2, axis=-1), np.linalg.norm(differences(velocity_TN2) * fps, axis=-1)], axis=1
    )


def differences(values: Floats) -> Floats:
    """Return differences from the previous frame; the first frame copies the second, or is 0 if it is the only one."""
    steps = np.diff(values, axis=0)
    return np.concatenate([steps[:1], steps]) if len(steps) else np.zeros_like(values)


def geometry(points_TMP2: Floats, known_MP: NDArray[np.bool_]) -> Floats:
    """Return distances, motion, angles and shape, (T, 9 M + 5 per pair): for two mice the 23 columns of the lab notes.

    For each mouse: body length; velocity of its centroid (x, y, per frame), speed and change of speed; orientation and
    its wrapped change; product and ratio of the points' spreads (standard deviations) in x and y. For each pair: the
    distances between centroids, between heads, and from each head to the other's tail, and the wrapped difference of
    orientations. Head and tail are the first and last point that were ever seen.
    """
    columns: list[Floats] = []
    centres, heads, tails, turns = [], [], [], []
    for mouse, known_P in enumerate(known_MP):
        known = np.flatnonzero(known_P) if known_P.any() else np.arange(len(known_P))
        points_TP2 = points_TMP2[:, mouse, known]
        centre_T2, head_T2, tail_T2 = points_TP2.mean(1), points_TP2[:, 0], points_TP2[:, -1]
        velocity_T2 = differences(centre_T2)
        speed_T = np.linalg.norm(velocity_T2, axis=-1)
        axis_T2 = head_T2 - tail_T2
        turn_T = np.arctan2(axis_T2[:, 1], axis_T2[:, 0])
        spread_T2 = points_TP2.std(1)
        columns += [np.linalg.norm(axis_T2, axis=-1), velocity_T2[:, 0], velocity_T2[:, 1], speed_T]
        columns += [differences(speed_T), turn_T, wrapped(differences(turn_T))]
        columns += [spread_T2[:, 0] * spread_T2[:, 1], spread_T2[:, 0] / (spread_T2[:, 1] + 1e-6)]
        centres.append(centre_T2)
        heads.append(head_T2)
        tails.append(tail_T2)
        turns.append(turn_T)
    for a, b in itertools.combinations(range(len(centres)), 2):
        for one, other in ((centres[a], centres[b]), (heads[a], heads[b]), (heads[a], tails[b]), (heads[b], tails[a])):
            columns.append(np.linalg.norm(one - other, axis=-1))
        columns.append(wrapped(turns[a] - turns[b]))
    return np.stack(columns, axis=1)


def wrapped(angle: Floats) -> Floats:
    """Wrap an angle in radians to [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def rolling(columns_TG: Floats, frames: int = ROLLING) -> Floats:
    """Return mean, standard deviation, minimum and maximum of every column over the last `frames` frames, (T, 4 G).

    At the start of the video, over as many frames as there are.
    """
    sums, squares = np.zeros_like(columns_TG), np.zeros_like(columns_TG)
    least, greatest = np.full_like(columns_TG, np.inf), np.full_like(columns_TG, -np.inf)
    for back in range(min(frames, len(columns_TG))):
        past = columns_TG[: len(columns_TG) - back]
        sums[back:] += past
        squares[back:] += past**2
        np.minimum(least[back:], past, out=least[back:])
        np.maximum(greatest[back:], past, out=greatest[back:])
    count_T1 = np.minimum(np.arange(1, len(columns_TG) + 1), frames)[:, None]
    mean = sums / count_T1
    deviation = np.sqrt(np.maximum(squares / count_T1 - mean**2, 0))
    return np.concatenate([mean, deviation, least, greatest], axis=1)
