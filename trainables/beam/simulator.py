"""Writes a simulated data set in the DeepSense 6G layout, for use when the real one is not available.

The loader treats both alike. An extra column, `seq_index`, names the pass of the car, which is known here.
"""

from __future__ import annotations

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import utm
from numpy.random import Generator
from numpy.typing import NDArray

from trainables.beam.config import Simulated
from trainables.beam.sensors import Car, Colour, Scene, Street, beam_powers, bearing, lidar_points, picture, radar_cube

VERSION = 2  # part of the cache's key: increment it whenever the output changes
INSTANTS = 5  # per window
INTERVAL_S = 0.1  # from one instant to the next

TARGET_COLOUR: Colour = (225, 30, 25)
GPS_NOISE_M = 1.0  # standard deviation, far above RTK's, so that the position alone does not determine the beam
GPS_MEMORY_S = 0.5  # correlation time of the error, after which e^-1 of it is left


def _street(number: int, lanes_m: tuple[float, ...], extent_m: tuple[float, float], turn_deg: float) -> Street:
    step = number - 31
    return Street(
        number=number,
        lanes_m=lanes_m,
        left_m=extent_m[0],
        right_m=extent_m[1],
        turn=float(np.deg2rad(turn_deg)),
        wall_m=lanes_m[-1] + 9,
        heading=float(np.deg2rad(40 + 75 * step)),
        latitude=33.42 + 0.002 * step,
        longitude=-111.93 + 0.001 * step,
        night=number >= 33,
    )


# The part of the street that cars use lies inside the scenario's published lidar field of view.
STREETS = (
    _street(31, (10.0, 13.0), (-14.0, 9.0), -7.0),
    _street(32, (14.0, 17.0, 20.0), (-34.0, 4.0), -27.0),
    _street(33, (8.0, 11.0), (-11.0, 6.0), -9.0),
    _street(34, (9.0, 12.0), (-14.0, 7.5), -10.0),
)

KINDS = (  # length, width and height of passing vehicles, metres
    (4.3, 1.8, 1.5),
    (4.6, 1.9, 1.9),
    (6.5, 2.2, 2.8),
    (2.2, 0.8, 1.4),
)


def _others(street: Street, rng: Generator) -> list[Car]:
    """Return random passing cars without a receiver: any colour but the target's, any lane, either direction.

    By day the street is busier, and the camera can tell the target by its colour. At night the camera sees little, but
    the street is nearly empty, so that lidar and radar suffice.
    """
    cars = []
    for _ in range(int(rng.random() < 0.3) if street.night else int(rng.integers(0, 3))):
        length, width, height = KINDS[rng.integers(len(KINDS))]
        shade = rng.integers(40, 230, 3)
        cars.append(
            Car(
                right_m=float(rng.uniform(street.left_m - 8, street.right_m + 8)),
                ahead_m=float(rng.choice(street.lanes_m)),
                speed_mps=float(rng.choice([-1, 1]) * rng.uniform(2, 9)),
                length_m=length,
                width_m=width,
                height_m=height,
                colour=(int(shade[0]) // 2, int(shade[1]), int(shade[2])),
            )
        )
    return cars


def drive(street: Street, frames: int, rng: Generator) -> list[Scene]:
    """Return the scenes of one pass: the target drives along (part of) the street at constant speed among others."""
    lane = int(rng.integers(len(street.lanes_m)))
    extent = street.right_m - street.left_m
    duration_s = (frames - 1) * INTERVAL_S
    speed = min(rng.uniform(4, 11), extent / duration_s)
    slack = extent - speed * duration_s
    start = street.left_m + rng.uniform(0, slack) if slack > 0 else street.left_m
    if lane % 2:  # neighbouring lanes have opposite directions
        speed, start = -speed, street.left_m + street.right_m - start
    target = Car(start, street.lanes_m[lane], speed, 4.5, 1.8, 1.5, TARGET_COLOUR)
    cars = [target, *_others(street, rng)]
    return [
        Scene(street, tuple(replace(car, right_m=car.right_m + car.speed_mps * INTERVAL_S * i) for car in cars))
        for i in range(frames)
    ]


def position(street: Street, right_m: float, ahead_m: float) -> tuple[float, float]:
    """Return latitude and longitude, in degrees, of a point of the street."""
    east0, north0, zone, letter = utm.from_latlon(street.latitude, street.longitude)
    sin, cos = np.sin(street.heading), np.cos(street.heading)
    east, north = east0 + ahead_m * sin + right_m * cos, north0 + ahead_m * cos - right_m * sin
    latitude, longitude = utm.to_latlon(east, north, zone, letter)
    return float(latitude), float(longitude)


def wandering(count: int, rng: Generator) -> NDArray[np.float64]:
    """Return errors of consecutive positions, (count, 2), metres, from a first-order autoregressive process."""
    kept = float(np.exp(-INTERVAL_S / GPS_MEMORY_S))
    errors = GPS_NOISE_M * rng.standard_normal((count, 2))
    for i in range(1, count):
        errors[i] = kept * errors[i - 1] + np.sqrt(1 - kept**2) * errors[i]
    return errors


def write_ply(path: Path, points: NDArray[np.float64], intensity: NDArray[np.uint16]) -> None:
    header = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n"
    header += "".join(f"property double {axis}\n" for axis in "xyz") + "property ushort intensity\nend_header\n"
    numbers = np.column_stack([points, intensity]).ravel()
    path.write_text(header + "%.3f %.3f %.3f %d\n" * len(points) % tuple(numbers.tolist()))


def _write_frame(folder: Path, i: int, scene: Scene, gps_error_m: NDArray[np.float64], rng: Generator) -> int:
    """Write everything measured at one instant; return the best beam, counted from 1."""
    target, street = scene.cars[0], scene.street
    picture(scene, rng).save(folder / f"unit1/camera_data/image_BS1_{i}.jpg", quality=90)
    write_ply(folder / f"unit1/lidar_data/lidar_data_{i}.ply", *lidar_points(scene, rng))
    np.save(folder / f"unit1/radar_data/radar_data_{i}.npy", radar_cube(scene, rng))
    angle = bearing(street, target.right_m, target.ahead_m)
    powers = beam_powers(angle, float(np.hypot(target.right_m, target.ahead_m)), rng)
    (folder / f"unit1/mmWave_data/mmWave_power_{i}.txt").write_text("".join(f"{power:.8g}\n" for power in powers))
    place = position(street, target.right_m + gps_error_m[0], target.ahead_m + gps_error_m[1])
    (folder / f"unit2/GPS_data/GPS_location_{i}.txt").write_text("".join(f"{degrees:.9f}\n" for degrees in place))
    return int(powers.argmax()) + 1


def _write_pass(root: Path, number: int, street: Street, settings: Simulated) -> list[dict[str, str | int]]:
    """Write one pass of a car; return the CSV rows of its windows (without `index`)."""
    rng = np.random.default_rng([settings.seed, number])
    name = f"scenario{street.number}"
    first = number * settings.frames
    gps_errors_m = wandering(settings.frames, rng)
    scenes = drive(street, settings.frames, rng)
    beams = [_write_frame(root / name, first + i, scene, gps_errors_m[i], rng) for i, scene in enumerate(scenes)]
    rows = []
    for oldest in range(settings.frames - INSTANTS + 1):
        ids = [first + oldest + k for k in range(INSTANTS)]
        row: dict[str, str | int] = {"seq_index": f"{street.number}-{number}"}
        for k, i in enumerate(ids, start=1):
            row[f"unit1_rgb_{k}"] = f"./{name}/unit1/camera_data/image_BS1_{i}.jpg"
            row[f"unit1_lidar_{k}"] = f"./{name}/unit1/lidar_data/lidar_data_{i}.ply"
            row[f"unit1_radar_{k}"] = f"./{name}/unit1/radar_data/radar_data_{i}.npy"
        for k in (1, 2):
            row[f"unit2_loc_{k}"] = f"./{name}/unit2/GPS_data/GPS_location_{ids[k - 1]}.txt"
        row["unit1_loc"] = f"./{name}/unit1/GPS_data/gps_location.txt"
        row["unit1_pwr_60ghz"] = f"./{name}/unit1/mmWave_data/mmWave_power_{ids[-1]}.txt"
        row["unit1_beam"] = beams[oldest + INSTANTS - 1]
        rows.append(row)
    return rows


def simulate(root: Path, settings: Simulated) -> None:
    """Write `root`/Multi_Modal with its CSV and every file that it names."""
    folder = root / "Multi_Modal"
    streets = STREETS[: min(len(STREETS), settings.passes // 2)]  # at least two passes each, so that one is held out
    for street in streets:
        for part in ("camera_data", "lidar_data", "radar_data", "mmWave_data", "GPS_data"):
            (folder / f"scenario{street.number}/unit1/{part}").mkdir(parents=True)
        (folder / f"scenario{street.number}/unit2/GPS_data").mkdir(parents=True)
        station = "".join(f"{degrees:.9f}\n" for degrees in (street.latitude, street.longitude))
        (folder / f"scenario{street.number}/unit1/GPS_data/gps_location.txt").write_text(station)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passes = range(settings.passes)
        done = pool.map(lambda i: _write_pass(folder, i, streets[i % len(streets)], settings), passes)
        rows = [row for rows in done for row in rows]
    with (folder / "ml_challenge_dev_multi_modal.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", *rows[0]])
        writer.writeheader()
        writer.writerows({"index": i, **row} for i, row in enumerate(rows, start=1))
