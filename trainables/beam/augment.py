"""Changed copies of windows, as published: other light, fewer or shaken lidar points, radar noise; and mirrored ones.

What a copy looks like follows from its window and its number alone, so that a sample is the same whenever it is drawn.
Factors are drawn once for all instants of a window: a scene does not flicker.

Legend: H instants, P pixels of a side, N lidar points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from trainables.beam.config import Modality

KINDS: dict[Modality, int] = {"image": 8, "lidar": 3, "radar": 2}  # of each sensor, the unchanged one included
LIDAR_KEPT = 0.9
LIDAR_SHAKEN_M = 0.4
RADAR_NOISE = (0.025, 0.1)

# Range of the factor of each kind of picture; kind 0 is as measured.
BRIGHTNESS, CONTRAST, GAMMA, HUE, SATURATION, SHARPNESS, BLUR = range(1, 8)
FACTORS = {
    BRIGHTNESS: (0.5, 3.0),
    CONTRAST: (0.5, 4.0),
    GAMMA: (0.5, 3.0),
    HUE: (-0.5, 0.5),  # turns
    SATURATION: (0.0, 4.0),
    SHARPNESS: (0.0, 10.0),
    BLUR: (3.0, 5.0),  # pixels of a picture of 960 x 540
}
PUBLISHED_PICTURE = (960, 540)
BLUR_SIZE = (9, 7)  # width and height of the blur, pixels of such a picture
LUMA = torch.tensor([0.299, 0.587, 0.114])
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Change(NamedTuple):
    """Which kind of picture, of lidar points and of radar maps a copy holds; 0 is as measured."""

    image: int
    lidar: int
    radar: int


def change_of(modalities: Sequence[Modality], window: int, copy: int) -> Change:
    """The change of a window's copy, counted from 1; 47 copies are all there are of three sensors, as published.

    Fewer copies are other ones in neighbouring windows; more begin anew, with other factors.
    """
    kinds = [KINDS[sensor] if sensor in modalities else 1 for sensor in KINDS]
    others = int(np.prod(kinds)) - 1
    number = 1 + (copy - 1 + window) % others
    image, lidar, radar = (int(i) for i in np.unravel_index(number, kinds))
    return Change(image, lidar, radar)


def changed_pictures(image_H3PP: Tensor, kind: int, rng: Generator) -> Tensor:
    """Pictures (H, 3, P, P) uint8 in another light, or blurred."""
    factor = float(rng.uniform(*FACTORS[kind]))
    if kind in (BRIGHTNESS, CONTRAST, GAMMA):
        levels = torch.arange(256) / 255
        if kind == CONTRAST:
            grey = float((image_H3PP.float().mean(dim=(0, 2, 3)) * LUMA).sum() / 255)
            levels = grey + factor * (levels - grey)
        else:
            levels = levels * factor if kind == BRIGHTNESS else levels**factor
        return (255 * levels).round().clamp(0, 255).to(torch.uint8)[image_H3PP.int()]
    x = image_H3PP.float()
    if kind == HUE:  # turned in the plane of YIQ, which leaves the brightness
        angle = torch.tensor(2 * torch.pi * factor)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.eye(3)
        turn[1, 1], turn[1, 2], turn[2, 1], turn[2, 2] = cos, -sin, sin, cos
        x = torch.einsum("ij,hjpq->hipq", YIQ.inverse() @ turn @ YIQ, x)
    elif kind == SATURATION:
        grey_H1PP = (x * LUMA[:, None, None]).sum(1, keepdim=True)
        x = grey_H1PP + factor * (x - grey_H1PP)
    elif kind == SHARPNESS:
        smooth = _filtered(x, (torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13))
        x = smooth + factor * (x - smooth)
    else:
        x = _filtered(x, _blur(factor, image_H3PP.shape[-1]))
    return x.round().clamp(0, 255).to(torch.uint8)


def _blur(sigma: float, size: int) -> Tensor:
    """The published blur, of a picture that has been resized since; rows and columns of weights."""
    columns, rows = (
        _bell(count * size / full, sigma * size / full)
        for count, full in zip(BLUR_SIZE, PUBLISHED_PICTURE, strict=True)
    )
    return torch.outer(rows, columns)


def _bell(width: float, sigma: float) -> Tensor:
    reach = max(1, round(width / 2))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    return weights / weights.sum()


def _filtered(image_H3PP: Tensor, weights: Tensor) -> Tensor:
    rows, columns = (count // 2 for count in weights.shape)
    padded = F.pad(image_H3PP, (columns, columns, rows, rows), mode="replicate")
    return F.conv2d(padded, weights.expand(3, 1, *weights.shape), groups=3)


def changed_points(points_N3: NDArray[np.float64], kind: int, rng: Generator) -> NDArray[np.float64]:
    """Lidar points of kind 1, nine of ten of them, or of kind 2, each shaken along every axis."""
    if kind == 1:
        return points_N3[rng.random(len(points_N3)) < LIDAR_KEPT]
    return points_N3 + rng.uniform(-LIDAR_SHAKEN_M, LIDAR_SHAKEN_M, points_N3.shape)


def changed_radar(radar_H2PP: Tensor, rng: Generator) -> Tensor:
    """Maps (H, 2, P, P) float16 with every cell a little stronger, each map scaled to 0..1 again."""
    low, high = RADAR_NOISE
    noise = torch.from_numpy(rng.random(radar_H2PP.shape, dtype=np.float32))
    x = radar_H2PP.float() * (1 + low + (high - low) * noise)
    least, most = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return ((x - least) / (most - least).clamp(min=1e-9)).to(radar_H2PP.dtype)


def mirrored(name: Modality, x: Tensor) -> Tensor:
    """What the sensor would see of the mirrored street; `x` is (..., channels, P, P).

    Columns are the picture's left to right, and the lidar's y. Those of a radar's angles are waves across the antennas:
    column k becomes -k, and 0, straight ahead, stays; its speeds, towards the station, stay too.
    """
    if name != "radar":
        return x.flip(-1)
    angle, velocity = x.split(1, dim=-3)
    return torch.cat([angle.flip(-1).roll(1, -1), velocity], dim=-3)
