"""What the network is told of the car's two positions.

Legend: N windows of one scenario, 2 instants (the two oldest of a window), G numbers per instant. Positions are metres
east and north of the station.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import utm
from numpy.typing import NDArray

from trainables.beam.config import Data
from trainables.beam.files import BEAMS

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

WIDTH = {"local": 13, "sincos": 2, "minmax": 2, "angle2": 2}
AHEAD = 3.0  # instants between the second position and the label, in the published windows of five
LEADS = np.arange(-10.0, 10.5, 0.5)  # intervals; receivers' clocks are off by as much as this
CODEBOOK_LINE = ((BEAMS - 1) / 2, (BEAMS - 1) / (np.pi / 2))  # beams and beams per radian: all of them over 90 degrees

# Published forms. Offsets in degrees make the four stations' angles comparable; other scenarios have none.
ANGLE_OFFSET_DEG = {"scenario31": -50.52, "scenario32": 44.8, "scenario33": 55.6, "scenario34": -60.0}
MINMAX_LOW_M = np.array([-7.18029715, -97.55563452])
MINMAX_HIGH_M = np.array([40.20955233, 52.31386139])


class Timing(NamedTuple):
    """When the instants of each window were, in the interval that usually lies between its two positions.

    interval_N: between the positions. ahead_N: from the second one to the instant whose beam is known.
    """

    interval_N: Floats
    ahead_N: Floats

    def of(self, chosen_N: Bools) -> Timing:
        return Timing(self.interval_N[chosen_N], self.ahead_N[chosen_N])


def usual_timing(windows: int) -> Timing:
    return Timing(np.ones(windows), np.full(windows, AHEAD))


def offsets_m(station_N2: Floats, car_N2: Floats) -> Floats:
    """Metres east and north from station to car, both given in degrees: differences on the UTM grid, as published."""
    east0, north0, zone, _ = utm.from_latlon(station_N2[:, 0], station_N2[:, 1])
    east, north, _, _ = utm.from_latlon(car_N2[:, 0], car_N2[:, 1], force_zone_number=zone)
    return np.stack([east - east0, north - north0], axis=1)


def gps_features(
    data: Data,
    scenario: str,
    metres_N22: Floats,
    beam_N: NDArray[np.int64],
    known_N: Bools,
    timing: Timing | None = None,
) -> Floats:
    """Positions of one scenario for the network, (N, 2, G), scaled by those windows that may be learnt from: known_N.

    timing: None: as usual.
    """
    timing = timing or usual_timing(len(beam_N))
    return scaled_features(data, scenario, metres_N22, scale_of(metres_N22, beam_N, known_N, timing), timing)


def scaled_features(data: Data, scenario: str, metres_N22: Floats, scale: Scale, timing: Timing) -> Floats:
    """Positions of one scenario for the network, (N, 2, G). scale: of `gps_repr: local` alone."""
    if data.gps_repr == "minmax":
        return (metres_N22 - MINMAX_LOW_M) / (MINMAX_HIGH_M - MINMAX_LOW_M)
    if data.gps_repr in ("angle2", "sincos"):
        angle = np.rad2deg(np.arctan2(metres_N22[..., 1], metres_N22[..., 0])) - ANGLE_OFFSET_DEG.get(scenario, 0.0)
        if data.gps_repr == "sincos":  # the unit vector that the report describes
            return np.stack([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], axis=-1)
        wrapped = (angle + 90) % 180 - 90
        return np.deg2rad(np.stack([wrapped, wrapped], axis=-1))  # the same number twice, as published
    return _local(metres_N22, scale, timing)


def mirrored_m(metres_N22: Floats, beam_N: NDArray[np.int64], known_N: Bools, timing: Timing | None = None) -> Floats:
    """Positions of one scenario mirrored at the boresight, so that a beam becomes the one as far from the other end.

    The boresight is where the straight line through the known windows' beams has its middle beam.
    """
    line = _line_of(metres_N22, beam_N, known_N, timing or usual_timing(len(beam_N)))
    boresight = line.middle + ((BEAMS - 1) / 2 - line.at_middle) / line.per_radian if line.per_radian else line.middle
    cos, sin = np.cos(2 * boresight), np.sin(2 * boresight)
    return metres_N22 @ np.array([[-cos, sin], [sin, cos]])


class _Line(NamedTuple):
    """Beams as a straight line of the bearing of the car when the beam is measured."""

    late: float  # intervals by which the positions are stamped later than the beams, by clocks that differ
    middle: float  # bearing, radians
    at_middle: float  # beams
    per_radian: float


class Scale(NamedTuple):
    """What is learnt of a scenario's windows, by which positions are scaled. Metres, but for the line."""

    line: _Line
    centre: Floats  # (2,)
    spread: Floats  # (2,)
    speed: float  # in the usual interval


def scale_of(metres_N22: Floats, beam_N: NDArray[np.int64], known_N: Bools, timing: Timing) -> Scale:
    """Learnt from the known windows; where none is, from where the cars of all of them drive."""
    line = _line_of(metres_N22, beam_N, known_N, timing)
    if not known_N.any():
        known_N = np.ones_like(known_N)
    step_N2 = _step(metres_N22, timing)
    return Scale(
        line,
        centre=metres_N22[known_N].mean(axis=(0, 1)),
        spread=np.maximum(metres_N22[known_N].std(axis=(0, 1)), 0.1),  # a car that never moves must not divide by zero
        speed=max(float(np.sqrt((step_N2[known_N] ** 2).sum(axis=1).mean())), 0.01),
    )


def _line_of(metres_N22: Floats, beam_N: NDArray[np.int64], known_N: Bools, timing: Timing) -> _Line:
    """Fitted to the known windows; a guess where there are none."""
    learnable = bool(known_N.any())
    if not learnable:  # a scenario that only validates: where its cars drive may be known, their beams may not
        known_N = np.ones_like(known_N)
    known, timing = metres_N22[known_N], timing.of(known_N)
    late = _late(known, timing, beam_N[known_N]) if learnable else 0.0
    bearing_N = _bearing(_at_label(known, timing, late))
    middle = _middle(bearing_N)
    fit = _fitted(_wrapped(bearing_N - middle), beam_N[known_N]) if learnable else CODEBOOK_LINE
    return _Line(late, middle, *fit)


def _step(metres_N22: Floats, timing: Timing) -> Floats:
    """How far the car moves in the usual interval, (N, 2)."""
    return np.asarray((metres_N22[:, 1] - metres_N22[:, 0]) / timing.interval_N[:, None])


def _at_label(metres_N22: Floats, timing: Timing, late: float) -> Floats:
    """The second position, carried on at its speed to when the beam is measured, (N, 2)."""
    return np.asarray(metres_N22[:, 1] + (timing.ahead_N + late)[:, None] * _step(metres_N22, timing))


def _local(metres_N22: Floats, scale: Scale, timing: Timing) -> Floats:
    """Position, movement and direction, scaled by what is known of the scenario; either instant alone tells it all.

    The beam follows the bearing of the car at the label's time. So the newest position is carried on at its speed for
    as long as suits the known windows best: what the files' numbers say, but positions are stamped early or late, by
    another time in every scenario. Directions are given in beams, by a straight line through the known
    windows. The same number then means the same beam in every scenario. Waves of the direction spare a small network
    the fine steps.
    """
    line, centre, spread, speed = scale
    step_N2, label_N2 = _step(metres_N22, timing), _at_label(metres_N22, timing, line.late)

    def direction(place: Floats) -> Floats:  # about -2..2 from the first beam to the last
        beam = line.at_middle + line.per_radian * _wrapped(_bearing(place) - line.middle)
        return np.asarray((beam - (BEAMS - 1) / 2) / 16)[..., None]

    towards_N1 = direction(label_N2)
    waves = [wave(turns * towards_N1) for turns in (2, 4) for wave in (np.sin, np.cos)]
    both = np.concatenate([step_N2 / speed, (label_N2 - centre) / spread, towards_N1, *waves], axis=1)
    own = [(metres_N22 - centre) / spread, direction(metres_N22), np.log(_norm(metres_N22) / 10)]
    return np.concatenate([*own, np.repeat(both[:, None], 2, axis=1)], axis=2)


def _late(metres_N22: Floats, timing: Timing, beam_N: NDArray[np.int64]) -> float:
    """For how many intervals more a position is to be carried on, so that its bearing tells the beam best."""
    misses = []
    usual = float(np.median(timing.ahead_N))
    for lead in LEADS:
        bearing = _bearing(_at_label(metres_N22, timing, lead - usual))
        relative = _wrapped(bearing - _middle(bearing))
        powers_NK = np.vander(relative, 4)  # a cubic
        factors_K, *_ = np.linalg.lstsq(powers_NK, beam_N)
        misses.append(np.abs(powers_NK @ factors_K - beam_N).mean())
    return float(LEADS[np.argmin(misses)]) - usual


def _norm(metres: Floats) -> Floats:
    return np.maximum(np.linalg.norm(metres, axis=-1, keepdims=True), 0.1)  # the car does not stand in the station


def _bearing(metres: Floats) -> Floats:
    return np.asarray(np.arctan2(metres[..., 0], metres[..., 1]))


def _middle(angle_N: Floats) -> float:
    return float(np.angle(np.exp(1j * angle_N).mean()))


def _wrapped(angle: Floats) -> Floats:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _fitted(x: Floats, y: NDArray[np.int64]) -> tuple[float, float]:
    """Least-squares intercept and slope; slope 0 where all x are alike."""
    spread = float(x.var())
    slope = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 1e-9 else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope
