"""Readers of the raw files in the DeepSense 6G layout: one file in, one array out.

A file that cannot be read completely raises `UserError` with its path; zeros in its place would go unnoticed.

Legend: N points, A antennas, S samples per chirp, C chirps, P pixels per side (`image_size`).
"""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import fft

from trainables.contract import UserError

BEAMS = 64
MAX_COUNT = 5  # cap on the lidar points of a cell; more carry no further information

Range = tuple[float, float]
# Ranges of x and y in metres, by scenario number: the part of the lidar's view that lies on the street.
LIDAR_FOV: dict[int, tuple[Range, Range]] = {
    31: ((-70.0, 0.0), (-25.0, 14.0)),
    32: ((-60.0, 0.0), (-40.0, 5.5)),
    33: ((-50.0, 0.0), (-12.0, 7.0)),
    34: ((-50.0, 0.0), (-20.0, 10.0)),
}
DEFAULT_FOV: tuple[Range, Range] = ((-50.0, 0.0), (-50.0, 50.0))


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Read a camera picture as (3, P, P) RGB in 0..255; the aspect ratio is not preserved."""
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:  # PIL reports broken files by all three
        raise UserError(f"{path}: not a whole image ({error})") from None
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _numbers(path: Path, text: bytes) -> NDArray[np.float64]:
    if not text.strip():
        return np.empty(0)
    try:
        return np.fromstring(text, dtype=np.float64, sep=" ")
    except (ValueError, DeprecationWarning):  # older NumPy warns and returns a part, which the caller's count catches
        raise UserError(f"{path}: something that is not a number") from None


def read_points(path: Path) -> NDArray[np.float64]:
    """Read the points of an ASCII PLY, (N, 3): x, y, z in metres. Its first element must be `vertex`.

    Points that are not finite, which may stand for lidar beams without a return, are dropped.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    head, end, body = content.partition(b"end_header")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not end or lines[0] != ["ply"]:
        raise UserError(f"{path}: not a PLY file (no `ply` ... `end_header`)")
    if ["format", "ascii", "1.0"] not in lines:
        raise UserError(f"{path}: a binary PLY; write it as `format ascii 1.0`")
    elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]]
    first = lines[elements[0]][1:] if elements else []
    if len(first) != 2 or first[0] != "vertex" or not first[1].isdecimal():
        raise UserError(f"{path}: the first element of the PLY is not `vertex` and a number of them")
    count = int(first[1])
    upto = elements[1] if len(elements) > 1 else len(lines)
    names = [line[-1] for line in lines[elements[0] : upto] if line[:1] == ["property"]]
    if not {"x", "y", "z"} <= set(names):
        raise UserError(f"{path}: the PLY's points have {names}, not x, y and z")
    values = _numbers(path, body)
    if len(values) < count * len(names) or (len(elements) == 1 and len(values) > count * len(names)):
        raise UserError(f"{path}: the header promises {count} points of {len(names)} numbers, {len(values)} are there")
    table = values[: count * len(names)].reshape(count, len(names))
    points_N3 = table[:, [names.index("x"), names.index("y"), names.index("z")]]
    return points_N3[np.isfinite(points_N3).all(axis=1)]


def lidar_counts(points_N3: NDArray[np.float64], size: int, fov: tuple[Range, Range]) -> NDArray[np.uint8]:
    """Count points per cell seen from above, (1, P, P), capped at `MAX_COUNT`. Rows are x, columns y."""
    counts, _, _ = np.histogram2d(points_N3[:, 0], points_N3[:, 1], bins=size, range=fov)
    return np.minimum(counts, MAX_COUNT).astype(np.uint8)[None]


def fov_of(scenario: str, per_scenario: bool) -> tuple[Range, Range]:
    """Return the lidar's field of view, ranges of x and y in metres, for a scenario such as `scenario31`."""
    number = int(scenario.removeprefix("scenario"))
    return LIDAR_FOV.get(number, DEFAULT_FOV) if per_scenario else DEFAULT_FOV


def read_cube(path: Path) -> NDArray[np.complex64]:
    """Read raw radar samples, complex (A, S, C)."""
    try:
        with path.open("rb") as file:
            cube_ASC = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: not a whole .npy file ({error})") from None
    if not isinstance(cube_ASC, np.ndarray):
        raise UserError(f"{path}: an archive of arrays (np.savez), not one array (np.save)")
    if cube_ASC.ndim != 3 or not np.iscomplexobj(cube_ASC) or 0 in cube_ASC.shape:
        raise UserError(
            f"{path}: {cube_ASC.dtype} of shape {cube_ASC.shape}, not a complex (antennas, samples, chirps)"
        )
    if not np.isfinite(cube_ASC).all():
        raise UserError(f"{path}: radar samples that are not finite")
    return cube_ASC.astype(np.complex64)


def radar_maps(cube_ASC: NDArray[np.complex64], size: int) -> NDArray[np.float16]:
    """Return range-angle and range-velocity magnitudes, (2, P, P), each map scaled to 0..1 on its own. Rows are range.

    Every axis is zero-padded to a multiple of P before its FFT, and the cells of a pixel are max-pooled, so that a
    point stays a peak; at (4, 256, 250) and P = 256 nothing is pooled. No axis is shifted: bin 0 is straight ahead, or
    zero velocity. Half floats have 11 significant bits, which keep a weak reflection beside a strong one; 8 bits would
    not.
    """
    antennas, samples, chirps = cube_ASC.shape
    range_ARC = fft(cube_ASC, n=_padded(samples, size), axis=1)
    moving_ARC = range_ARC - range_ARC.mean(axis=2, keepdims=True)  # remove static clutter
    angle_RG = _angles(moving_ARC, _padded(antennas, size))
    velocity_RV = np.abs(fft(range_ARC, n=_padded(chirps, size), axis=2)).sum(axis=0)
    return np.stack([_unit(_pool(angle_RG, size)), _unit(_pool(velocity_RV, size))]).astype(np.float16)


def _angles(moving_ARC: NDArray[np.complex64], bins: int) -> NDArray[np.float32]:
    """Return the magnitude of the FFT over antennas, zero-padded to `bins`, summed over chirps: (R, bins).

    A few chirps at a time, because all take 130 MB at the published shape. A DFT by matrix product, with so few
    antennas, is twice as fast on one thread, but BLAS starts its own threads, and beside the decoding threads it took
    five to twenty times as long.
    """
    _, ranges, chirps = moving_ARC.shape
    moving_CRA = np.ascontiguousarray(moving_ARC.transpose(2, 1, 0))
    total_RG = np.zeros((ranges, bins), dtype=np.float32)
    for first in range(0, chirps, 16):
        total_RG += np.abs(fft(moving_CRA[first : first + 16], n=bins)).sum(axis=0)
    return total_RG


def _padded(length: int, size: int) -> int:
    return size * -(-length // size)


def _pool(map_RX: NDArray[np.floating], size: int) -> NDArray[np.floating]:
    rows, columns = map_RX.shape
    return map_RX.reshape(size, rows // size, size, columns // size).max(axis=(1, 3))


def _unit(values: NDArray[np.floating]) -> NDArray[np.floating]:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _text_numbers(path: Path, count: int, what: str) -> NDArray[np.float64]:
    try:
        words = path.read_text().split()
        values = np.array([float(word) for word in words])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # or undecodable bytes
        raise UserError(f"{path}: not {count} numbers ({error})") from None
    if len(values) != count:
        raise UserError(f"{path}: {len(values)} numbers instead of {count} ({what})")
    return values


def read_sweep(path: Path) -> NDArray[np.float64]:
    """Read the received power of the 64 beams, linear, (64,). Some or all may be NaN, as in the public release."""
    return _text_numbers(path, BEAMS, "one power per beam")


def read_power(path: Path) -> NDArray[np.float64]:
    """Read a sweep as `read_sweep`; raises `UserError` if every power is NaN, so that there is no best beam."""
    power = read_sweep(path)
    if np.isnan(power).all():
        raise UserError(f"{path}: every power is NaN, so there is no best beam")
    return power


def read_position(path: Path) -> NDArray[np.float64]:
    """Read latitude and longitude in degrees, (2,). Two zeros, as receivers write without a fix, are refused."""
    position = _text_numbers(path, 2, "latitude, longitude")
    if not (-80 <= position[0] <= 84 and -180 <= position[1] < 180 and position.any()):  # UTM's range; NaN fails too
        raise UserError(f"{path}: latitude {position[0]}, longitude {position[1]} is not a position in degrees")
    return position
