"""Simulates what each sensor of the station measures of a street, with physics simple enough to check by hand.

Coordinates are metres from the station: `right` along the street, `ahead` across it, and `up`. Array, camera and radar
face the boresight, which is `ahead` rotated by `turn` radians to the right; the lidar is not rotated. A bearing is the
angle from the boresight, positive to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Floats = NDArray[np.float64]

ANTENNAS = 16  # of the 60 GHz array, half a wavelength apart
BEAM_BEARINGS = np.deg2rad(np.linspace(-45.0, 45.0, 64))
BEAM_NOISE_DB = 0.1  # standard deviation; the best two beams differ by about as little in the public data

PICTURE = (240, 60)  # pixels: the strip with the street, small because the loader resizes anyway
HORIZON_PX = 15
FOCAL_PX = 94.0  # a horizontal field of view of 104 degrees
GLINTS = 6  # lights in a night picture that belong to no car
CAMERA_UP_M = 3.0
LIDAR_UP_M = 3.0
LIDAR_DUST = 100  # random points in each frame: dust, spray, insects

RADAR_SHAPE = (4, 64, 16)  # antennas half a wavelength apart, samples per chirp, chirps
RADAR_NOISE = 1.0  # standard deviation per sample component; the middle of a car 10 m away has amplitude 2.6
RADAR_DRIFT = 0.2  # radians, random phase error per antenna and frame: four antennas cannot resolve angles well
RADAR_RANGE_M = 51.2  # range of one phase cycle per sample
RADAR_SPEED_MPS = 32.0  # radial speed of one phase cycle per chirp: unambiguous within half of it, away or towards


@dataclass(frozen=True)
class Car:
    right_m: float
    ahead_m: float
    speed_mps: float  # towards the right
    length_m: float
    width_m: float
    height_m: float
    colour: Colour


@dataclass(frozen=True)
class Street:
    """The street of one scenario; the receiver's car is measured between `left_m` and `right_m`."""

    number: int
    lanes_m: tuple[float, ...]  # distances of the lanes ahead of the station
    left_m: float
    right_m: float
    turn: float  # radians
    wall_m: float  # distance of the house fronts across the street
    heading: float  # of `ahead`, radians clockwise from north
    latitude: float
    longitude: float
    night: bool


@dataclass(frozen=True)
class Scene:
    """One instant of a street: the first car carries the receiver, the others only pass by."""

    street: Street
    cars: tuple[Car, ...]


def bearing(street: Street, right_m: float, ahead_m: float) -> float:
    return float(np.arctan2(right_m, ahead_m) - street.turn)


def beam_powers(bearing_rad: float, distance_m: float, rng: Generator) -> Floats:
    """Return |w_k^H a|^2 of a uniform linear array for the codebook's 64 beams, with path loss and noise, linear."""
    elements = np.arange(ANTENNAS)
    arriving = np.exp(1j * np.pi * elements * np.sin(bearing_rad))
    codebook = np.exp(1j * np.pi * np.outer(np.sin(BEAM_BEARINGS), elements)) / np.sqrt(ANTENNAS)
    gain = np.abs(codebook.conj() @ arriving) ** 2
    noise_db = BEAM_NOISE_DB * rng.standard_normal(len(gain))
    return np.asarray(gain / distance_m**2 * 10 ** (noise_db / 10))


def radar_cube(scene: Scene, rng: Generator) -> NDArray[np.complex64]:
    """Return raw radar samples, (antennas, samples, chirps): a complex tone per reflector, and noise.

    A car reflects at its middle and, more weakly, near its ends; house fronts are static reflectors.
    """
    reflectors = []  # right, ahead, speed towards the right, amplitude
    for car in scene.cars:
        for along, amplitude in ((-0.4, 0.5), (0.0, 1.0), (0.4, 0.5)):
            size = amplitude * np.sqrt(car.length_m * car.height_m)
            reflectors.append((car.right_m + along * car.length_m, car.ahead_m, car.speed_mps, size))
    street = scene.street
    fronts = np.linspace(street.left_m - 10, street.right_m + 10, 9)
    reflectors += [(right, street.wall_m, 0.0, 3.0) for right in fronts]
    right, ahead, speed, size = np.array(reflectors).T
    distance = np.hypot(right, ahead)
    receding = speed * right / distance
    angle = np.sin(np.arctan2(right, ahead) - street.turn) / 2
    antenna, sample, chirp = (np.arange(n) for n in RADAR_SHAPE)
    # Amplitude falls with the distance squared (power with its fourth power); 10 m is the reference.
    tone = size * (10.0 / distance) ** 2 * np.exp(2j * np.pi * rng.random(len(distance)))
    cube = np.einsum(
        "r,ra,rs,rc->asc",
        tone,
        np.exp(2j * np.pi * np.outer(angle, antenna)),
        np.exp(2j * np.pi * np.outer(distance / RADAR_RANGE_M, sample)),
        np.exp(2j * np.pi * np.outer(receding / RADAR_SPEED_MPS, chirp)),
        optimize=True,
    )
    drift = np.exp(1j * RADAR_DRIFT * rng.standard_normal(RADAR_SHAPE[0]))
    noise = rng.standard_normal((2, *RADAR_SHAPE)) * RADAR_NOISE
    return (cube * drift[:, None, None] + noise[0] + 1j * noise[1]).astype(np.complex64)


def _on_box(car: Car, count: int, rng: Generator) -> Floats:
    """Return random points on the car's sides that face the station, (count, 3): the near side and one end."""
    along = (rng.random(count) - 0.5) * car.length_m
    across = np.full(count, -car.width_m / 2)
    on_end = rng.random(count) < car.width_m / (car.width_m + car.length_m)
    along[on_end] = -np.sign(car.right_m) * car.length_m / 2
    across[on_end] = (rng.random(int(on_end.sum())) - 0.5) * car.width_m
    up = rng.random(count) * car.height_m
    return np.stack([car.right_m + along, car.ahead_m + across, up], axis=1)


def lidar_points(scene: Scene, rng: Generator) -> tuple[Floats, NDArray[np.uint16]]:
    """Return points in the lidar's frame, (N, 3), and intensities, (N,); x points away from the street, y right."""
    street = scene.street
    still = np.random.default_rng(street.number)  # the same background in every frame, except for noise
    near, width = 2.0, street.right_m - street.left_m + 12
    ground = still.random((300, 3)) * (width, street.wall_m - near, 0) + (street.left_m - 6, near, 0)
    fronts = still.random((300, 3)) * (width, 0.5, 6) + (street.left_m - 6, street.wall_m, 0)
    dust = rng.random((LIDAR_DUST, 3)) * (width, street.wall_m - near, 3) + (street.left_m - 6, near, 0)
    parts = [ground, fronts, dust]
    for car in scene.cars:
        distance = np.hypot(car.right_m, car.ahead_m)
        parts.append(_on_box(car, int(min(100, 6000 / distance**2 * car.length_m / 4.5)), rng))
    points = np.concatenate(parts) + 0.03 * rng.standard_normal((sum(map(len, parts)), 3))
    seen = points[rng.random(len(points)) > 0.1]
    turned = np.stack([-seen[:, 1], seen[:, 0], seen[:, 2] - LIDAR_UP_M], axis=1)
    return turned, rng.integers(0, 4096, len(turned)).astype(np.uint16)


def pixel(street: Street, point: Floats) -> tuple[float, float]:
    """Project a point (right, ahead, up) into the picture; return column and row."""
    right, ahead, up = point
    cos, sin = np.cos(street.turn), np.sin(street.turn)
    depth = max(right * sin + ahead * cos, 0.5)  # a point beside or behind the camera must not wrap around
    aside = right * cos - ahead * sin
    column = PICTURE[0] / 2 + FOCAL_PX * aside / depth
    row = HORIZON_PX + FOCAL_PX * (CAMERA_UP_M - up) / depth
    return float(column), float(row)


def _face(street: Street, car: Car, side: Literal["near", "end"], low: float, high: float) -> list[tuple[float, float]]:
    """Return the corners, in the picture, of one visible side of a car between two heights (shares of the car's)."""
    half_length, near = car.length_m / 2, car.ahead_m - car.width_m / 2
    if side == "near":
        ends = [(car.right_m - half_length, near), (car.right_m + half_length, near)]
    else:
        right = car.right_m - np.sign(car.right_m) * half_length
        ends = [(right, near), (right, near + car.width_m)]
    corners = [(*ends[0], low), (*ends[1], low), (*ends[1], high), (*ends[0], high)]
    return [pixel(street, np.array([right, ahead, up * car.height_m])) for right, ahead, up in corners]


def _shade(colour: Colour, light: float) -> Colour:
    red, green, blue = (min(255, int(part * light)) for part in colour)
    return red, green, blue


def _draw_street(draw: ImageDraw.ImageDraw, street: Street, light: float) -> None:
    still = np.random.default_rng(street.number)
    width, height = PICTURE
    draw.rectangle((0, 0, width, HORIZON_PX), fill=_shade((150, 190, 235), light))
    draw.rectangle((0, HORIZON_PX, width, height), fill=_shade((110, 110, 112), light))
    edges = np.linspace(street.left_m - 30, street.right_m + 30, 13)
    for left, right in pairwise(edges):
        up = still.uniform(2, 5)
        colour = still.integers(120, 160) + still.integers(0, 25, 3)
        base = pixel(street, np.array([left, street.wall_m, 0])), pixel(street, np.array([right, street.wall_m, 0]))
        top = pixel(street, np.array([right, street.wall_m, up])), pixel(street, np.array([left, street.wall_m, up]))
        draw.polygon([*base, *top], fill=_shade((int(colour[0]), int(colour[1]), int(colour[2])), light))
    for lane in street.lanes_m:
        ends = [pixel(street, np.array([right, lane - 1.6, 0])) for right in (street.left_m - 6, street.right_m + 6)]
        draw.line(ends, fill=_shade((225, 225, 225), light))


def picture(scene: Scene, rng: Generator) -> Image.Image:
    """Render what the camera sees. At night little more than the cars' lamps is visible."""
    street = scene.street
    light = 0.1 if street.night else 1.0
    image = Image.new("RGB", PICTURE)
    draw = ImageDraw.Draw(image)
    _draw_street(draw, street, light)
    for car in sorted(scene.cars, key=lambda car: -car.ahead_m):  # the nearest covers the others
        draw.polygon(_face(street, car, "end", 0.15, 0.6), fill=_shade(car.colour, 0.6 * light))
        draw.polygon(_face(street, car, "near", 0.15, 0.6), fill=_shade(car.colour, light))
        draw.polygon(_face(street, car, "near", 0.6, 1.0), fill=_shade((60, 70, 90), light))
        if street.night:
            front = car.right_m + np.copysign(car.length_m / 2, car.speed_mps)
            for right, colour in ((front, (255, 250, 220)), (2 * car.right_m - front, (200, 20, 20))):
                column, row = pixel(street, np.array([right, car.ahead_m - car.width_m / 2, 0.6]))
                draw.ellipse((column - 1, row - 1, column + 1, row + 1), fill=colour)
    if street.night:
        for column, row in rng.random((GLINTS, 2)) * PICTURE:
            draw.ellipse((column - 1, row - 1, column + 1, row + 1), fill=(255, 250, 220))
        image = image.filter(ImageFilter.GaussianBlur(1))
    noise = rng.standard_normal((PICTURE[1], PICTURE[0], 1)) * (20 if street.night else 4)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
