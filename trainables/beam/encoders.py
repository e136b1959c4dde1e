"""The ResNet of one sensor, run stage by stage so that the sensors can be fused in between.

Shape suffixes: F frames (batch x history), I channels of the sensor, S side of the input in pixels, C channels,
Y X rows and columns of a map.
"""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from trainables.beam.config import Modality, Model
from trainables.beam.files import MAX_COUNT
from trainables.contract import UserError

if TYPE_CHECKING:  # imported where a network is built: it takes three seconds, and the driver seldom builds one
    from transformers import ResNetConfig

# Per channel, the offset subtracted from raw values and the scale that then divides them. The camera's are ImageNet's.
CAMERA_MEAN, CAMERA_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFSET_AND_SCALE: dict[Modality, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "image": (tuple(255 * m for m in CAMERA_MEAN), tuple(255 * s for s in CAMERA_STD)),
    "lidar": ((0.0,), (MAX_COUNT,)),
    "radar": ((0.0, 0.0), (1.0, 1.0)),
}
STEM = "embedder.embedder.convolution.weight"
# The ResNet settings that its weights depend on, except the number of input channels.
FORM = ("layer_type", "hidden_act", "embedding_size", "hidden_sizes", "depths", "downsample_in_first_stage")


class Encoder(nn.Module):
    """Turns raw frames of one sensor into the maps of four stages, at 1/4, 1/8, 1/16 and 1/32 of the input's side."""

    def __init__(self, sensor: Modality, channels: int, model: Model) -> None:
        super().__init__()
        from transformers import ResNetModel

        offset_I, scale_I = (torch.tensor(x[:channels]).view(-1, 1, 1) for x in OFFSET_AND_SCALE[sensor])
        self.register_buffer("offset_I11", offset_I, persistent=False)
        self.register_buffer("scale_I11", scale_I, persistent=False)
        self.resnet = ResNetModel(_resnet_config(sensor, channels, model))
        if model.norm == "group":
            _group_norms(self.resnet)

    def normalise(self, raw_FISS: Tensor) -> Tensor:
        """Convert raw values of any dtype to float32 of about unit size."""
        offset, scale = self.get_buffer("offset_I11"), self.get_buffer("scale_I11")
        return (raw_FISS.float() - offset) / scale

    def first(self, normalised_FISS: Tensor) -> Tensor:
        """Return the map after stem and first stage, (F, C, Y, X)."""
        return self.stage(0, self.resnet.embedder(normalised_FISS))

    def stage(self, number: int, map_FCYX: Tensor) -> Tensor:
        out_FCYX: Tensor = self.resnet.encoder.stages[number](map_FCYX)
        return out_FCYX


def _resnet_config(sensor: Modality, channels: int, model: Model) -> ResNetConfig:
    from transformers import ResNetConfig

    return ResNetConfig(
        layer_type="basic",
        num_channels=channels,
        embedding_size=model.channels[0],
        hidden_sizes=list(model.channels),
        depths=list(model.image_depths if sensor == "image" else model.sensor_depths),
    )


def pretrained_weights(sensor: Modality, channels: int, model: Model) -> dict[str, Tensor]:
    """Return the weights that `model.pretrained_encoders` names for the sensor's ResNet.

    An RGB stem is adapted to the sensor's channels: each gets the mean over colours, scaled so that an input that is
    equal in all channels gives the same map as before. Raises `UserError` if the weights cannot be read or do not fit.
    """
    source, name = str(model.pretrained_encoders), "resnet-34" if sensor == "image" else "resnet-18"
    theirs, weights = _pretrained_resnet(source, name)
    ours = _resnet_config(sensor, channels, model)
    for field in FORM:
        if getattr(theirs, field) != getattr(ours, field):
            raise UserError(
                f"model.pretrained_encoders = {source}: {name} has {field} {getattr(theirs, field)}, but the {sensor} "
                f"encoder has {getattr(ours, field)}; they must agree, and model.channels, model.image_depths and "
                "model.sensor_depths set the latter"
            )
    if ours.num_channels == theirs.num_channels:
        return weights
    stem = weights[STEM].mean(1, keepdim=True) * theirs.num_channels / ours.num_channels
    return {**weights, STEM: stem.expand(-1, ours.num_channels, -1, -1)}


@functools.lru_cache(maxsize=2)  # a network uses two; at full size they take 130 MB in every process
def _pretrained_resnet(source: str, name: str) -> tuple[ResNetConfig, dict[str, Tensor]]:
    where = f"model.pretrained_encoders = {source}"
    if source == "imagenet":
        place = f"microsoft/{name}"
        with contextlib.suppress(OSError):
            return _read_resnet(place, local_files_only=True)  # avoid a request to the hub if it is in the cache
        try:
            return _read_resnet(place, local_files_only=False)
        except OSError:
            raise UserError(
                f"{where}: {place} is not in the Hugging Face cache and cannot be downloaded; put it there with "
                "`hf download`, or name a folder that holds it"
            ) from None
    folder = Path(source).expanduser() / name
    if not folder.is_dir():
        raise UserError(f"{where}: there is no folder {folder}; name one that holds it, or write imagenet")
    try:
        return _read_resnet(str(folder), local_files_only=True)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{where}: {folder} must be as `save_pretrained` writes it, but {reason}") from None


def _read_resnet(place: str, local_files_only: bool) -> tuple[ResNetConfig, dict[str, Tensor]]:
    from transformers import ResNetModel

    resnet, found = ResNetModel.from_pretrained(
        place, dtype=torch.float32, local_files_only=local_files_only, output_loading_info=True
    )
    # Old files lack batch norm's num_batches_tracked, which nothing reads.
    if lacking := [key for key in found["missing_keys"] if not key.endswith("num_batches_tracked")]:
        raise OSError(f"it lacks {min(lacking)}")
    return resnet.config, resnet.state_dict()


def map_sides(image_size: int) -> list[int]:
    """Return the sides of the four stages' maps, in pixels; every halving rounds up."""
    return [math.ceil(image_size / 2**halvings) for halvings in (2, 3, 4, 5)]


def stand_in_input(
    kind: Literal["zerolike", "randlike"], frames: int, channels: int, size: int, device: torch.device
) -> Tensor:
    """Return the published stand-in for a missing sensor's normalised frames: zeros, or uniform noise in [0, 1)."""
    shape = (frames, channels, size, size)
    return torch.zeros(shape, device=device) if kind == "zerolike" else torch.rand(shape, device=device)


def _group_norms(module: nn.Module) -> None:
    """Replace every BatchNorm2d by a GroupNorm, so that no sample depends on the others in its batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = math.gcd(8, child.num_features)
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _group_norms(child)
