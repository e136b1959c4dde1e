"""Changed copies of windows, as published (other light, fewer or shaken lidar points, radar noise), and mirror images.

A copy depends only on its window, its number and the seed, so that a sample is the same whenever it is drawn. Picture
factors are drawn once for all instants of a window: a scene does not flicker.

Legend: H instants, C maps of a radar frame, P pixels per side, N lidar points.
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

KINDS: dict[Modality, int] = {"image": 8, "lidar": 3, "radar": 2}  # kinds per sensor, the unchanged one included
LIDAR_KEPT = 0.9
LIDAR_SHAKEN_M = 0.4
RADAR_NOISE = (0.025, 0.1)

# Range of the factor of each kind of picture change; kind 0 is as measured.
BRIGHTNESS, CONTRAST, GAMMA, HUE, SATURATION, SHARPNESS, BLUR = range(1, 8)
FACTORS = {
    BRIGHTNESS: (0.5, 3.0),
    CONTRAST: (0.5, 4.0),
    GAMMA: (0.5, 3.0),
    HUE: (-0.5, 0.5),  # of a full rotation
    SATURATION: (0.0, 4.0),
    SHARPNESS: (0.0, 10.0),
    BLUR: (3.0, 5.0),  # standard deviation, pixels of a 960 x 540 picture
}
PUBLISHED_PICTURE = (960, 540)
BLUR_SIZE = (9, 7)  # width and height of the blur kernel, pixels of such a picture
LUMA = torch.tensor([0.299, 0.587, 0.114])
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class Change(NamedTuple):
    """The kinds of picture, lidar points and radar maps in a copy; 0 is as measured."""

    image: int
    lidar: int
    radar: int


def change_of(modalities: Sequence[Modality], window: int, copy: int) -> Change:
    """Return the change of a window's copy, counted from 1; three sensors have 47 different ones, as published.

    With fewer copies, neighbouring windows get different changes; with more, changes repeat with other factors.
    """
    kinds = [KINDS[sensor] if sensor in modalities else 1 for sensor in KINDS]
    others = int(np.prod(kinds)) - 1
    number = 1 + (copy - 1 + window) % others
    image, lidar, radar = (int(i) for i in np.unravel_index(number, kinds))
    return Change(image, lidar, radar)


def changed_pictures(image_H3PP: Tensor, kind: int, rng: Generator) -> Tensor:
    """Return pictures (H, 3, P, P) uint8 with other light or colours, sharpened, or blurred, as `kind` says."""
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
    if kind == HUE:  # rotate the IQ plane of YIQ, which keeps the brightness
        angle = torch.tensor(2 * torch.pi * factor)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.eye(3)
        turn[1, 1], turn[1, 2], turn[2, 1], turn[2, 2] = cos, -sin, sin, cos
        x = torch.einsum("ij,hjpq->hipq", YIQ.inverse() @ turn @ YIQ, x)
    elif kind == SATURATION:
        grey_H1PP = (x * LUMA[:, None, None]).sum(1, keepdim=True)
        x = grey_H1PP + factor * (x - grey_H1PP)
    elif kind == SHARPNESS:
        mean = _weighted(_weighted(x, 3 * [1 / 3], -1), 3 * [1 / 3], -2)
        smooth = (9 * mean + 4 * x) / 13  # 3 x 3 kernel of ones with 5 in the middle, as published
        x = smooth + factor * (x - smooth)
    else:
        x = _blurred(x, factor)
    return x.round().clamp(0, 255).to(torch.uint8)


def _blurred(image_H3PP: Tensor, sigma: float) -> Tensor:
    """Apply the published blur, a truncated Gaussian, scaled to the resized picture, along both axes."""
    size = image_H3PP.shape[-1]
    for dim, width, full in zip((-1, -2), BLUR_SIZE, PUBLISHED_PICTURE, strict=True):
        reach = max(1, round(width * size / full / 2))
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) * full / (size * sigma)) ** 2)
        image_H3PP = _weighted(image_H3PP, (weights / weights.sum()).tolist(), dim)
    return image_H3PP


def _weighted(image_H3PP: Tensor, weights: Sequence[float], dim: int) -> Tensor:
    """Convolve along one axis, with the edge pixel repeated beyond the edge. Faster than conv2d."""
    reach, size = len(weights) // 2, image_H3PP.shape[dim]
    margin = (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach)
    padded = F.pad(image_H3PP, margin, mode="replicate")
    total = torch.zeros_like(image_H3PP)
    for first, weight in enumerate(weights):
        total.add_(padded.narrow(dim, first, size), alpha=weight)
    return total


def changed_points(points_N3: NDArray[np.float64], kind: int, rng: Generator) -> NDArray[np.float64]:
    """Return lidar points (N, 3) with a random tenth removed (kind 1), or each moved along every axis (kind 2)."""
    if kind == 1:
        return points_N3[rng.random(len(points_N3)) < LIDAR_KEPT]
    return points_N3 + rng.uniform(-LIDAR_SHAKEN_M, LIDAR_SHAKEN_M, points_N3.shape)


def changed_radar(radar_HCPP: Tensor, rng: Generator) -> Tensor:
    """Return maps (H, C, P, P) float16 with every cell amplified by a random 2.5 to 10 %, each rescaled to 0..1."""
    low, high = RADAR_NOISE
    noise = torch.from_numpy(rng.random(radar_HCPP.shape, dtype=np.float32))
    x = radar_HCPP.float() * (1 + low + (high - low) * noise)
    least, most = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return ((x - least) / (most - least).clamp(min=1e-9)).to(radar_HCPP.dtype)


def mirrored(name: Modality, x: Tensor) -> Tensor:
    """Return what the sensor would see of the mirrored street; `x` is (..., channels, P, P).

    Columns are a picture's left to right, and the lidar's y. Columns of the radar's angle map are FFT bins over the
    antennas: column k becomes -k, and 0, straight ahead, stays. Its velocity map is unchanged.

    The lidar's field of view is mirrored with its points. If each scenario has its own (`data.scenario_fov`), whose
    middle is metres beside the station, a column of the mirrored map is another place than in the measured one: the
    mirrored street is that of another station. In an unmirrored field of view most of it would lie outside: scenario
    32's reaches from y -40 to 5.5 m.
    """
    if name != "radar":
        return x.flip(-1)
    angle, velocity = x[..., :1, :, :], x[..., 1:, :, :]
    return torch.cat([angle.flip(-1).roll(1, -1), velocity], dim=-3)
