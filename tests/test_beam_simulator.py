"""What each sensor shows is where the car is, by the same reading of the files as in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainables.beam import sensors
from trainables.beam.config import Simulated
from trainables.beam.files import fov_of, lidar_counts, radar_maps, read_points, read_position
from trainables.beam.gps import offsets_m
from trainables.beam.sensors import Car, Scene, Street
from trainables.beam.simulator import (
    GPS_NOISE_M,
    STREETS,
    TARGET_COLOUR,
    drive,
    position,
    simulate,
    wandering,
    write_ply,
)

DAY, NIGHT = STREETS[0], STREETS[2]
PLACES = [(-9.0, 14.0), (-3.0, 17.5), (2.0, 14.0), (8.0, 17.5)]


def alone(street: Street, right_m: float, ahead_m: float, speed_mps: float = 7.0) -> Scene:
    return Scene(street, (Car(right_m, ahead_m, speed_mps, 4.5, 1.8, 1.5, TARGET_COLOUR),))


@pytest.mark.parametrize("degrees", [-44.0, -20.3, 0.0, 7.7, 44.0])
def test_the_best_beam_points_at_the_car(degrees: float) -> None:
    powers = sensors.beam_powers(np.deg2rad(degrees), 20.0, np.random.default_rng(0))
    nearest = int(np.abs(np.rad2deg(sensors.BEAM_BEARINGS) - degrees).argmin())
    assert abs(int(powers.argmax()) - nearest) <= 1  # neighbours differ by less than the noise
    assert powers[nearest] > 4 * powers[(nearest + 8) % 64]


def test_power_falls_with_the_square_of_the_distance() -> None:
    near, far = (sensors.beam_powers(0.1, distance, np.random.default_rng(0)) for distance in (10.0, 30.0))
    np.testing.assert_allclose(near / far, 9.0)


@pytest.mark.parametrize(("right_m", "ahead_m"), PLACES)
@pytest.mark.parametrize("speed_mps", [-8.0, 8.0])
def test_the_radar_maps_peak_at_the_cars_distance_direction_and_speed(
    right_m: float, ahead_m: float, speed_mps: float
) -> None:
    scene = alone(DAY, right_m, ahead_m, speed_mps)
    size = sensors.RADAR_SHAPE[1]
    angle, velocity = radar_maps(sensors.radar_cube(scene, np.random.default_rng(0)), size).astype(np.float64)
    distance = np.hypot(right_m, ahead_m)
    receding = speed_mps * right_m / distance

    row, column = np.unravel_index(angle.argmax(), angle.shape)
    assert abs(row - distance / sensors.RADAR_RANGE_M * size) <= 2  # the car is longer than one bin
    turns = np.sin(sensors.bearing(DAY, right_m, ahead_m)) / 2
    off = (column / size - turns + 0.5) % 1 - 0.5
    assert abs(off) < 0.15  # four antennas that drift; without drift their lobe is a quarter wide

    speeds = velocity[row]
    speeds[[0, 1, -1]] = 0  # house fronts
    off = (speeds.argmax() / size - receding / sensors.RADAR_SPEED_MPS + 0.5) % 1 - 0.5
    assert abs(off) < 2 / sensors.RADAR_SHAPE[2]


@pytest.mark.parametrize("street", STREETS, ids=lambda street: str(street.number))
def test_the_lidar_sees_the_car_where_it_is(street: Street, tmp_path: Path) -> None:
    right_m, ahead_m = (street.left_m + street.right_m) / 2, street.lanes_m[0]
    rng = np.random.default_rng(0)
    points, intensity = sensors.lidar_points(alone(street, right_m, ahead_m), rng)
    write_ply(tmp_path / "a.ply", points, intensity)
    read = read_points(tmp_path / "a.ply")
    np.testing.assert_allclose(read, points, atol=1e-3)

    fov = fov_of(f"scenario{street.number}", per_scenario=True)
    on_car = read[(np.abs(read[:, 0] + ahead_m) < 1.1) & (np.abs(read[:, 1] - right_m) < 2.5)]
    ground = sensors.lidar_points(Scene(street, ()), np.random.default_rng(0))[0]
    at_car = ground[(np.abs(ground[:, 0] + ahead_m) < 1.1) & (np.abs(ground[:, 1] - right_m) < 2.5)]
    assert len(on_car) >= len(at_car) + 3
    assert lidar_counts(on_car, 64, fov).sum() > 0  # inside the published field of view


@pytest.mark.parametrize(("right_m", "ahead_m"), PLACES)
def test_the_car_is_in_the_picture_where_its_bearing_says(right_m: float, ahead_m: float) -> None:
    image = np.asarray(sensors.picture(alone(DAY, right_m, ahead_m), np.random.default_rng(0))).astype(int)
    red = (image[..., 0] > 110) & (image[..., 1] < 70) & (image[..., 2] < 70)
    columns = np.flatnonzero(red.any(axis=0))
    bearing = sensors.bearing(DAY, right_m, ahead_m)
    expected = sensors.PICTURE[0] / 2 + sensors.FOCAL_PX * np.tan(bearing)
    assert columns.min() < expected < columns.max()
    assert abs((columns.min() + columns.max()) / 2 - expected) < 5  # its near side lies before its middle


def test_night_is_dark_but_for_lamps() -> None:
    lit = np.asarray(sensors.picture(alone(NIGHT, -2.0, 9.0), np.random.default_rng(0)))
    day = np.asarray(sensors.picture(alone(replace(NIGHT, night=False), -2.0, 9.0), np.random.default_rng(0)))
    assert lit.mean() < day.mean() / 3
    assert lit.max() > 150


@pytest.mark.parametrize("street", STREETS, ids=lambda street: str(street.number))
def test_a_pass_is_a_steady_drive_inside_the_streets_bounds(street: Street) -> None:
    for seed in range(20):
        places = np.array([scene.cars[0].right_m for scene in drive(street, 30, np.random.default_rng(seed))])
        np.testing.assert_allclose(np.diff(places), np.diff(places)[0])
        assert places.min() >= street.left_m - 1e-9
        assert places.max() <= street.right_m + 1e-9


def test_positions_on_the_globe_are_the_places_on_the_street(tmp_path: Path) -> None:
    for street in STREETS:
        station, car = position(street, 0.0, 0.0), position(street, 12.0, 20.0)
        east, north = offsets_m(np.array([station]), np.array([car]))[0]
        assert np.hypot(east, north) == pytest.approx(np.hypot(12, 20), abs=0.01)
        bearing = np.arctan2(east, north) - street.heading
        assert np.exp(1j * bearing) == pytest.approx(np.exp(1j * np.arctan2(12, 20)), abs=1e-3)
    (tmp_path / "p.txt").write_text(f"{car[0]:.9f}\n{car[1]:.9f}\n")
    np.testing.assert_allclose(read_position(tmp_path / "p.txt"), car, atol=1e-8)


def test_position_errors_wander() -> None:
    errors = wandering(20_000, np.random.default_rng(0))
    assert errors.std() == pytest.approx(GPS_NOISE_M, rel=0.1)
    assert np.corrcoef(errors[:-1, 0], errors[1:, 0])[0, 1] == pytest.approx(np.exp(-0.2), abs=0.02)


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        simulate(tmp_path / name, Simulated(passes=2, frames=5, seed=seed))
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert len(files) == 2 * 5 * 5 + 2  # five files for each frame, the station's position, the CSV
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert any((tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes() for name in files)
