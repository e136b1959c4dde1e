"""The network's inputs from the car's two positions.

Legend: N windows of one scenario, 2 instants with a known position, G numbers per instant. Positions are metres east
and north of the station.
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
LEADS = np.arange(-10.0, 10.5, 0.5)  # candidate leads, intervals; receivers' clocks are off by as much as this
FEW = 20  # windows, below which a cubic fits their noise as well with any lead
CODEBOOK_LINE = ((BEAMS - 1) / 2, (BEAMS - 1) / (np.pi / 2))  # beam, beams per radian: all beams span 90 degrees

# Constants of the published forms. Offsets make the four stations' angles comparable; other scenarios have none.
ANGLE_OFFSET_DEG = {"scenario31": -50.52, "scenario32": 44.8, "scenario33": 55.6, "scenario34": -60.0}
MINMAX_LOW_M = np.array([-7.18029715, -97.55563452])
MINMAX_HIGH_M = np.array([40.20955233, 52.31386139])


class Timing(NamedTuple):
    """Timing of each window, in units of the usual interval between a window's two positions.

    interval_N: from the first position to the second. ahead_N: from the second to the instant of the label.
    """

    interval_N: Floats
    ahead_N: Floats

    def of(self, chosen_N: Bools) -> Timing:
        return Timing(self.interval_N[chosen_N], self.ahead_N[chosen_N])


def usual_timing(windows: int) -> Timing:
    return Timing(np.ones(windows), np.full(windows, AHEAD))


def offsets_m(station_N2: Floats, car_N2: Floats) -> Floats:
    """Return metres east and north from station to car, (N, 2), from latitudes and longitudes in degrees.

    These are differences on the UTM grid, as published.
    """
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
    """Return one scenario's positions as network inputs, (N, 2, G), scaled by the training windows `known_N`.

    timing: None: the usual timing.
    """
    timing = timing or usual_timing(len(beam_N))
    return scaled_features(data, scenario, metres_N22, scale_of(metres_N22, beam_N, known_N, timing), timing)


def scaled_features(data: Data, scenario: str, metres_N22: Floats, scale: Scale, timing: Timing) -> Floats:
    """Return one scenario's positions as network inputs, (N, 2, G). scale: used for `gps_repr: local` only."""
    if data.gps_repr == "minmax":
        return (metres_N22 - MINMAX_LOW_M) / (MINMAX_HIGH_M - MINMAX_LOW_M)
    if data.gps_repr in ("angle2", "sincos"):
        angle = np.rad2deg(np.arctan2(metres_N22[..., 1], metres_N22[..., 0])) - ANGLE_OFFSET_DEG.get(scenario, 0.0)
        if data.gps_repr == "sincos":  # the unit vector described in the published report
            return np.stack([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], axis=-1)
        wrapped = (angle + 90) % 180 - 90
        return np.deg2rad(np.stack([wrapped, wrapped], axis=-1))  # the same number twice, as published
    return _local(metres_N22, scale, timing)


def mirrored_m(metres_N22: Floats, beam_N: NDArray[np.int64], known_N: Bools, timing: Timing | None = None) -> Floats:
    """Mirror one scenario's positions at the boresight, so that beam b becomes beam BEAMS - 1 - b.

    The boresight is the bearing of the middle beam on the line fitted to the known windows.
    """
    line = _line_of(metres_N22, beam_N, known_N, timing or usual_timing(len(beam_N)))
    boresight = line.middle + ((BEAMS - 1) / 2 - line.at_middle) / line.per_radian if line.per_radian else line.middle
    cos, sin = np.cos(2 * boresight), np.sin(2 * boresight)
    return metres_N22 @ np.array([[-cos, sin], [sin, cos]])


class _Line(NamedTuple):
    """The beam as a linear function of the car's bearing at the time of the label."""

    late: float  # further intervals to extrapolate positions, because clocks of positions and beams differ
    middle: float  # bearing, radians
    at_middle: float  # beam at that bearing
    per_radian: float  # beams per radian


class Scale(NamedTuple):
    """What is learnt from a scenario's windows to scale its positions. In metres, except for the line."""

    line: _Line
    centre: Floats  # (2,)
    spread: Floats  # (2,)
    speed: float  # per usual interval


def scale_of(metres_N22: Floats, beam_N: NDArray[np.int64], known_N: Bools, timing: Timing) -> Scale:
    """Learn the scale from the known windows, or if there are none, from the positions of all windows."""
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
    """Fit the line to the known windows; without any, guess it."""
    learnable = bool(known_N.any())
    if not learnable:  # the scenario is only validated on: its positions may be used, its beams not
        known_N = np.ones_like(known_N)
    known, timing = metres_N22[known_N], timing.of(known_N)
    late = _late(known, timing, beam_N[known_N]) if learnable else 0.0
    bearing_N = _bearing(_at_label(known, timing, late))
    middle = _middle(bearing_N)
    fit = _fitted(_wrapped(bearing_N - middle), beam_N[known_N]) if learnable else CODEBOOK_LINE
    return _Line(late, middle, *fit)


def _step(metres_N22: Floats, timing: Timing) -> Floats:
    """Return how far the car moves in the usual interval, (N, 2), metres."""
    return np.asarray((metres_N22[:, 1] - metres_N22[:, 0]) / timing.interval_N[:, None])


def _at_label(metres_N22: Floats, timing: Timing, late: float) -> Floats:
    """Return the second position extrapolated at constant velocity to the time of the label, (N, 2), metres."""
    return np.asarray(metres_N22[:, 1] + (timing.ahead_N + late)[:, None] * _step(metres_N22, timing))


def _local(metres_N22: Floats, scale: Scale, timing: Timing) -> Floats:
    """Return position, movement and direction, (N, 2, 13), scaled by scenario; inputs from both go to both instants.

    The beam follows the car's bearing at the time of the label. So the second position is extrapolated at constant
    velocity, by the time that file numbers show plus `late`: positions are stamped early or late, by a different time
    in every scenario. Directions are converted to beams by the fitted line, so that the same number means the same beam
    in every scenario. Sines and cosines of the direction spare a small network learning fine steps.
    """
    line, centre, spread, speed = scale
    step_N2, label_N2 = _step(metres_N22, timing), _at_label(metres_N22, timing, line.late)

    def direction(place: Floats) -> Floats:  # in units of 16 beams: about -2..2 from first to last
        beam = line.at_middle + line.per_radian * _wrapped(_bearing(place) - line.middle)
        return np.asarray((beam - (BEAMS - 1) / 2) / 16)[..., None]

    towards_N1 = direction(label_N2)
    waves = [wave(turns * towards_N1) for turns in (2, 4) for wave in (np.sin, np.cos)]
    both = np.concatenate([step_N2 / speed, (label_N2 - centre) / spread, towards_N1, *waves], axis=1)
    own = [(metres_N22 - centre) / spread, direction(metres_N22), np.log(_norm(metres_N22) / 10)]
    return np.concatenate([*own, np.repeat(both[:, None], 2, axis=1)], axis=2)


def _late(metres_N22: Floats, timing: Timing, beam_N: NDArray[np.int64]) -> float:
    """Return by how many more intervals to extrapolate positions, so that their bearings best predict the beams.

    0 if the windows are too few to tell.
    """
    if len(beam_N) < FEW:
        return 0.0
    usual, misses = float(np.median(timing.ahead_N)), []
    for lead in LEADS:
        bearing = _bearing(_at_label(metres_N22, timing, lead - usual))
        relative = _wrapped(bearing - _middle(bearing))
        powers_NK = np.vander(relative, 4)  # for a cubic fit
        factors_K, *_ = np.linalg.lstsq(powers_NK, beam_N)
        misses.append(np.abs(powers_NK @ factors_K - beam_N).mean())
    return float(LEADS[np.argmin(misses)]) - usual


def _norm(metres: Floats) -> Floats:
    return np.maximum(np.linalg.norm(metres, axis=-1, keepdims=True), 0.1)  # never 0, for the logarithm


def _bearing(metres: Floats) -> Floats:
    return np.asarray(np.arctan2(metres[..., 0], metres[..., 1]))


def _middle(angle_N: Floats) -> float:
    return float(np.angle(np.exp(1j * angle_N).mean()))


def _wrapped(angle: Floats) -> Floats:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _fitted(x: Floats, y: NDArray[np.int64]) -> tuple[float, float]:
    """Return least-squares intercept and slope; slope 0 if all x are alike."""
    spread = float(x.var())
    slope = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 1e-9 else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope
