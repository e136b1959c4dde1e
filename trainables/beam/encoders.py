"""The ResNet of one sensor, run stage by stage so that the sensors can be fused in between.

Shape suffixes: F frames (batch x history), I channels of the sensor, S side of the input in pixels, C channels,
Y X rows and columns of a map.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from trainables.beam.config import Modality, Model

# What is subtracted from each channel's raw values, and what they are then divided by. The camera's are ImageNet's.
CAMERA_MEAN, CAMERA_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIDAR_MAX_COUNT = 5
OFFSET_AND_SCALE: dict[Modality, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "image": (tuple(255 * m for m in CAMERA_MEAN), tuple(255 * s for s in CAMERA_STD)),
    "lidar": ((0.0,), (LIDAR_MAX_COUNT,)),
    "radar": ((0.0, 0.0), (1.0, 1.0)),
}


class Encoder(nn.Module):
    """Raw frames of one sensor -> the maps of four stages, at 1/4, 1/8, 1/16 and 1/32 of the input's side."""

    def __init__(self, sensor: Modality, model: Model) -> None:
        super().__init__()
        offset_I, scale_I = (torch.tensor(x).view(-1, 1, 1) for x in OFFSET_AND_SCALE[sensor])
        self.register_buffer("offset_I11", offset_I, persistent=False)
        self.register_buffer("scale_I11", scale_I, persistent=False)
        self.resnet = ResNetModel(
            ResNetConfig(
                layer_type="basic",
                num_channels=len(offset_I),
                embedding_size=model.channels[0],
                hidden_sizes=list(model.channels),
                depths=list(model.image_depths if sensor == "image" else model.sensor_depths),
            )
        )
        if model.norm == "group":
            _group_norms(self.resnet)

    def normalise(self, raw_FISS: Tensor) -> Tensor:
        """Raw values of any type -> float32 of about unit size."""
        offset, scale = self.get_buffer("offset_I11"), self.get_buffer("scale_I11")
        return (raw_FISS.float() - offset) / scale

    def first(self, normalised_FISS: Tensor) -> Tensor:
        """Stem and first stage."""
        return self.stage(0, self.resnet.embedder(normalised_FISS))

    def stage(self, number: int, map_FCYX: Tensor) -> Tensor:
        out_FCYX: Tensor = self.resnet.encoder.stages[number](map_FCYX)
        return out_FCYX


def map_sides(image_size: int) -> list[int]:
    """Sides of the four stages' maps: every halving rounds up."""
    return [math.ceil(image_size / 2**halvings) for halvings in (2, 3, 4, 5)]


def stand_in_input(kind: Literal["zerolike", "randlike"], like_FISS: Tensor) -> Tensor:
    """What the published evaluation feeds to the encoder of a missing sensor, in place of its normalised input."""
    return torch.zeros_like(like_FISS) if kind == "zerolike" else torch.rand_like(like_FISS)


def _group_norms(module: nn.Module) -> None:
    """Put a GroupNorm in the place of every BatchNorm2d: no sample then depends on the others of its batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = math.gcd(8, child.num_features)
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _group_norms(child)
