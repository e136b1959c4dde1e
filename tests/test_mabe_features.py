"""Features equal values computed by hand or point by point, and gaps make no motion."""

from __future__ import annotations

import numpy as np
import pytest

from trainables.mabe.config import FEATURES
from trainables.mabe.features import filled, geometry, group, motion, rolling, width, wrapped

GROUPS = [name for name in FEATURES if name != "pca"]


def walk(frames: int = 30, mice: int = 2, points: int = 7) -> np.ndarray:
    rng = np.random.default_rng(0)
    return 0.5 + 0.01 * rng.standard_normal((frames, mice, points, 2)).cumsum(0)


@pytest.mark.parametrize(("mice", "points"), [(2, 7), (2, 5), (1, 3), (4, 18)])
def test_groups_are_as_wide_as_they_say(mice: int, points: int) -> None:
    seen = walk(mice=mice, points=points)
    assert all(group(name, seen, 30.0).shape == (30, width(name, mice, points)) for name in GROUPS)


def test_widths_are_those_of_the_notes() -> None:
    assert [width(name, 2, 7) for name in ("coords", "geometry", "rolling", "motion")] == [28, 23, 92, 28]
    assert width("geometry", 2, 7) + width("rolling", 2, 7) + 16 == 131
    assert width("coords", 4, 18) + width("motion", 4, 18) == 288


def test_coordinates_go_mouse_by_mouse_point_by_point() -> None:
    seen = walk()
    columns = group("coords", seen, 30.0)
    assert columns[5, 2 * (1 * 7 + 3) + 1] == seen[5, 1, 3, 1]


def test_speed_and_acceleration_are_per_second() -> None:
    time_s = np.arange(6) / 25
    points = np.stack([3 * time_s, 4 * time_s], axis=-1)[:, None]
    points = np.concatenate([points, np.stack([time_s**2, 0 * time_s], axis=-1)[:, None]], axis=1)
    columns = motion(points, fps=25.0)
    np.testing.assert_allclose(columns[:, 0], 5.0)
    np.testing.assert_allclose(columns[:, 2], 0.0, atol=1e-9)
    np.testing.assert_allclose(columns[1:, 1], [(2 * k - 1) / 25 for k in range(1, 6)])
    assert columns[0, 1] == columns[1, 1]
    np.testing.assert_allclose(columns[2:, 3], 2.0)


def test_gaps_are_filled_in_a_straight_line() -> None:
    seen = np.full((5, 3, 2, 2), np.nan)
    seen[1, 0, 0], seen[3, 0, 0] = (1.0, 10.0), (3.0, 30.0)
    seen[:, 1] = 7.0
    out = filled(seen)
    np.testing.assert_allclose(out[:, 0, 0], [[1, 10], [1, 10], [2, 20], [3, 30], [3, 30]])
    np.testing.assert_allclose(out[:, 0, 1], out[:, 0, 0])  # never seen: where its mouse is
    assert (out[:, 2] == 0).all()  # a mouse never seen


def test_a_gap_makes_no_motion_that_was_not_there() -> None:
    steady = np.linspace(0, 1, 40)[:, None, None, None] * np.ones((1, 2, 5, 2))
    gappy = steady.copy()
    gappy[np.random.default_rng(1).random((40, 2, 5)) < 0.36] = np.nan
    gappy[[0, -1]] = steady[[0, -1]]
    np.testing.assert_allclose(group("motion", gappy, 30.0), group("motion", steady, 30.0), atol=1e-9)
    assert group("presence", gappy, 30.0).mean() == pytest.approx(1 - 0.36, abs=0.05)
    assert all(np.isfinite(group(name, gappy, 30.0)).all() for name in GROUPS)


def test_geometry_of_two_mice_that_stand_still() -> None:
    seen = np.zeros((3, 2, 3, 2))
    seen[:, 0] = [(0.3, 0.0), (0.0, 0.0), (-0.3, 0.0)]  # looks right
    seen[:, 1] = [(1.0, 0.6), (1.0, 0.3), (1.0, 0.0)]  # looks up
    one, other, pair = np.split(geometry(seen, np.ones((2, 3), dtype=bool))[1], [9, 18])
    spread = np.std([0.3, 0.0, -0.3])
    np.testing.assert_allclose(one, [0.6, 0, 0, 0, 0, 0, 0, 0, float(spread) / 1e-6])
    np.testing.assert_allclose(other, [0.6, 0, 0, 0, 0, np.pi / 2, 0, 0, 0], atol=1e-12)
    distances = [np.hypot(1, 0.3), np.hypot(0.7, 0.6), 0.7, np.hypot(1.3, 0.6)]
    np.testing.assert_allclose(pair, [*distances, -np.pi / 2])


def test_a_turn_across_pi_is_small() -> None:
    np.testing.assert_allclose(wrapped(np.array([3.0 - -3.0, -6.0, 0.2])), [6 - 2 * np.pi, 2 * np.pi - 6, 0.2])


def test_rolling_equals_a_window_by_window_reading() -> None:
    columns = np.random.default_rng(2).standard_normal((25, 3))
    for t, row in enumerate(rolling(columns)):
        past = columns[max(0, t - 9) : t + 1]
        expected = [past.mean(0), past.std(0), past.min(0), past.max(0)]
        np.testing.assert_allclose(row, np.concatenate(expected), atol=1e-7)


@pytest.mark.parametrize("frames", [1, 2])
def test_videos_of_a_frame_or_two_have_features(frames: int) -> None:
    assert all(np.isfinite(group(name, walk(frames), 30.0)).all() for name in GROUPS)
