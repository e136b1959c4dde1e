"""The fusion network: one encoder per sensor, fused after each of four stages, then over time, into 64 beam logits.

Shape suffixes: B batch, H history, F = B H frames, T tokens, C channels, Y X rows and columns of a map, G numbers per
position, K tokens of one sensor, P predicted steps, Z the 64 beams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.beam.blocks import Fusion, swap_channels
from trainables.beam.config import SENSORS, Data, Modality, Model
from trainables.beam.encoders import Encoder, map_sides, stand_in_input
from trainables.beam.files import BEAMS
from trainables.beam.mamba import Mamba
from trainables.beam.positions import POSITIONS, PositionTokens
from trainables.contract import UserError

Maps = dict[Modality, Tensor]  # each sensor's map, (F, C, Y, X), at the same stage


def map_key(sensor: Modality) -> str:
    """Return the batch key of a sensor's precomputed first maps, (B, H, C, Y, X)."""
    return f"{sensor}_map"


class FusionNetwork(nn.Module):
    """Predicts the beam logits of a batch of windows, from any subset of the modalities.

    `first_maps` and `fuse` are the two halves of `forward`. Missing sensors are replaced in the first (required in
    training) or between the two.
    """

    def __init__(self, model: Model, data: Data, gps_width: int) -> None:
        super().__init__()
        self.sensors = [sensor for sensor in SENSORS if sensor in data.modalities]
        self.fused = list(SENSORS) if model.tokens == "all" and self.sensors else self.sensors
        self.history, self.image_size = data.history, data.image_size
        self.missing, self.swap = model.missing, model.block == "cs_bi"
        self.channels = {sensor: data.channels(sensor) for sensor in self.sensors}
        self.encoders = nn.ModuleDict({name: Encoder(name, count, model) for name, count in self.channels.items()})
        self.absent = nn.ParameterDict(
            {
                sensor: nn.Parameter(torch.zeros(model.channels[0]))
                for sensor in self.sensors
                if model.missing == "token"
            }
        )
        gps = "gps" in data.modalities
        self.positions = PositionTokens(gps_width, model) if gps else None
        # A map smaller than the anchor grid is not upsampled to it.
        self.anchors = [min(model.anchors, side) for side in map_sides(data.image_size)]
        self.fusions = nn.ModuleList(
            Fusion(len(self.fused) * data.history * anchors**2 + POSITIONS * gps, width, model)
            for anchors, width in zip(self.anchors, model.channels, strict=True)
        )
        self.over_time = OverTime(data.history, len(self.sensors) > 0, gps, model)
        self.head = _head(model.channels[-1])
        self.ahead = Ahead(data.steps) if data.steps > 1 else None
        if model.channels_last:
            # Convolutions use their weights' layout; DDP needs gradients in that layout too, even for 1x1 kernels.
            self.encoders.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the beam logits, (B, 64), or (B, P, 64) for P > 1 steps."""
        return self.fuse(self.first_maps(batch), batch.get("gps"))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; raises one short `UserError` for those of another network, where torch would list them all."""
        if strict:
            self._expect_own(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _expect_own(self, weights: Mapping[str, Tensor]) -> None:
        ours = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        theirs = {name: list(tensor.shape) for name, tensor in weights.items()}
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"weights of another fusion network: {name} is {theirs.get(name, 'not among them')}, and "
                    f"{ours.get(name, 'not wanted')} here; model, data.history, data.steps, data.modalities, "
                    "data.image_size, data.radar and data.gps_repr must be those it was trained with"
                )

    def first_maps(self, batch: Mapping[str, Tensor], gone: Mapping[Modality, Tensor] = {}) -> Maps:
        """Return the sensors' maps, (F, C, Y, X), after their first stages; maps already in the batch are used as is.

        gone: as for `withhold`, which in eval mode has the same effect on complete maps. In training, stand-ins replace
        the missing frames within each encoder's one batch: a separate batch of stand-ins would distort batch norm's
        statistics.
        """
        tokens = self.missing == "token"
        maps = {
            sensor: batch[map_key(sensor)].flatten(0, 1)
            if map_key(sensor) in batch
            else self.first_map(sensor, batch, None if tokens else gone.get(sensor))
            for sensor in self.sensors
        }
        return self.withhold(maps, gone) if tokens else maps

    def first_map(self, sensor: Modality, batch: Mapping[str, Tensor], unseen_B: Tensor | None = None) -> Tensor:
        """Return one sensor's map after its first stage, with stand-in frames in windows where `unseen_B` is true."""
        encoder = self.encoder(sensor)
        frames_FISS = encoder.normalise(batch[sensor].flatten(0, 1))
        if unseen_B is not None:
            nothing_FISS = self._nothing(sensor, frames_FISS)
            frames_FISS = torch.where(self._frames(unseen_B), nothing_FISS, frames_FISS)
        return encoder.first(frames_FISS)

    def encoder(self, sensor: Modality) -> Encoder:
        encoder = self.encoders[sensor]
        assert isinstance(encoder, Encoder)
        return encoder

    def stand_in(self, sensor: Modality, like_FCYX: Tensor) -> Tensor:
        """Return what replaces a missing sensor's first map: its token, or its encoder's map of a stand-in input.

        The encoder runs in eval mode, as in scoring, so that a batch of stand-ins does not affect batch norm's
        statistics. Gradients still reach the encoder.
        """
        if self.missing == "token":
            return self.absent[sensor].view(1, -1, 1, 1).expand(like_FCYX.shape)
        encoder = self.encoder(sensor)
        training = [module for module in encoder.modules() if module.training]
        encoder.eval()
        try:
            return encoder.first(self._nothing(sensor, like_FCYX))
        finally:
            for module in training:
                module.training = True

    def _nothing(self, sensor: Modality, like_F: Tensor) -> Tensor:
        """Return the stand-in for missing frames, as normalised encoder input."""
        assert self.missing != "token", "a token takes the place of a map"
        return stand_in_input(self.missing, len(like_F), self.channels[sensor], self.image_size, like_F.device)

    def _frames(self, windows_B: Tensor) -> Tensor:
        """Repeat a mask of windows, (B,), for each of their frames: (F, 1, 1, 1)."""
        return windows_B.repeat_interleave(self.history).view(-1, 1, 1, 1)

    def withhold(self, maps: Maps, gone: Mapping[Modality, Tensor]) -> Maps:
        """Return `maps` with stand-ins for missing sensors; `gone[sensor]` is (B,), True in windows that lack it."""
        out = dict(maps)
        for sensor, gone_B in gone.items():
            out[sensor] = torch.where(self._frames(gone_B), self.stand_in(sensor, maps[sensor]), maps[sensor])
        return out

    def fuse(self, maps: Maps, gps_B2G: Tensor | None) -> Tensor:
        """Return logits, (B, 64) or (B, P, 64), from the first maps of all configured sensors and the positions."""
        description_B2W = self.positions.description(gps_B2G) if self.positions and gps_B2G is not None else None
        positions_B2C: Tensor | None = None
        for stage, fusion in enumerate(self.fusions):
            if stage:
                maps = {sensor: self.encoder(sensor).stage(stage, maps[sensor]) for sensor in self.sensors}
            # An omitted sensor has no encoder: what its tokens get from the others in a stage does not reach the next.
            maps = {sensor: maps[sensor] if sensor in maps else _nothing_like(maps) for sensor in self.fused}
            if self.positions and description_B2W is not None:
                positions_B2C = self.positions(stage, description_B2W, positions_B2C)
            maps, positions_B2C = self._fuse_stage(fusion, self.anchors[stage], maps, positions_B2C)
        frames = [x_FCYX.mean((2, 3)).unflatten(0, (-1, self.history)) for x_FCYX in maps.values()]
        fused_BC = self.over_time(frames, positions_B2C).float()
        # In bfloat16, beams next to each other would tie, and the order of a tie decides what is ranked first.
        with torch.autocast(fused_BC.device.type, enabled=False):
            logits_BZ: Tensor = self.head(fused_BC)
            return logits_BZ if self.ahead is None else self.ahead(logits_BZ)

    def _fuse_stage(
        self, fusion: nn.Module, anchors: int, maps: Maps, positions_B2C: Tensor | None
    ) -> tuple[Maps, Tensor | None]:
        tokens = [_tokens(F.adaptive_avg_pool2d(x_FCYX, anchors), self.history) for x_FCYX in maps.values()]
        if self.swap:
            tokens = swap_channels(tokens)
        counts = [x.shape[1] for x in tokens]
        if positions_B2C is not None:
            tokens.append(positions_B2C)
            counts.append(POSITIONS)
        mixed = fusion(torch.cat(tokens, 1)).split(counts, dim=1)
        fused: Maps = {}
        for (sensor, x_FCYX), mixed_BKC in zip(maps.items(), mixed, strict=False):  # the positions' tokens come last
            grid = mixed_BKC.reshape(x_FCYX.shape[0], anchors, anchors, -1).permute(0, 3, 1, 2)
            fused[sensor] = x_FCYX + F.interpolate(grid, size=x_FCYX.shape[2:], mode="bilinear")
        return fused, mixed[-1] if positions_B2C is not None else None


def _nothing_like(maps: Maps) -> Tensor:
    return torch.zeros_like(next(iter(maps.values())))


def _tokens(pooled_FCYX: Tensor, history: int) -> Tensor:
    """Flatten maps into tokens, frame by frame and row by row: (B, H Y X, C)."""
    return pooled_FCYX.flatten(2).mT.unflatten(0, (-1, history)).flatten(1, 2)


class OverTime(nn.Module):
    """Sums the frames of every sensor and the two positions into one vector.

    sum: plain sum. v1: a Mamba layer, shared by the sensors, first runs over each sensor's frames. v2: as v1, then each
    sensor's frames, and the positions, are weighted by a softmax computed from their maximum and mean over channels.
    """

    def __init__(self, history: int, sensors: bool, gps: bool, model: Model) -> None:
        super().__init__()
        self.residual = model.residual or model.block == "transformer"
        width = model.channels[-1]
        weigh, mamba = model.time_fusion == "v2", model.time_fusion != "sum"
        self.mamba = Mamba(width, model.d_state, model.d_conv, model.expand) if mamba and sensors else None
        self.frame_weights = nn.Linear(history, history) if weigh and sensors else None
        self.position_weights = nn.Linear(POSITIONS, POSITIONS) if weigh and gps else None

    def forward(self, sensors: list[Tensor], positions_B2C: Tensor | None) -> Tensor:
        """Return (B, C) from each sensor's frames, (B, H, C), and the positions' tokens."""
        vectors = []
        for frames_BHC in sensors:
            if self.mamba is not None:
                mixed_BHC = self.mamba(frames_BHC)
                frames_BHC = frames_BHC + mixed_BHC if self.residual else mixed_BHC
            vectors.append(_weighted_sum(frames_BHC, self.frame_weights))
        if positions_B2C is not None:
            vectors.append(_weighted_sum(positions_B2C, self.position_weights))
        return torch.stack(vectors).sum(0)


class Ahead(nn.Module):
    """Predicts the beams of several steps, one after another, from the head's output.

    That output is the initial state of a GRU cell. Each step feeds it the previous logits (zeros at first) and adds to
    them a linear function of its new state.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.memory = nn.GRUCell(BEAMS, BEAMS)
        self.change = nn.Linear(BEAMS, BEAMS)

    def forward(self, memory_BZ: Tensor) -> Tensor:
        """Return the logits of all steps, (B, P, 64), from the head's output, (B, 64)."""
        logits_BZ, logits = torch.zeros_like(memory_BZ), []
        for _ in range(self.steps):
            memory_BZ = self.memory(logits_BZ, memory_BZ)
            logits_BZ = logits_BZ + self.change(memory_BZ)
            logits.append(logits_BZ)
        return torch.stack(logits, 1)


def _weighted_sum(x_BTC: Tensor, weights: nn.Linear | None) -> Tensor:
    if weights is None:
        return x_BTC.sum(1)
    share_BT = weights(x_BTC.amax(2) + x_BTC.mean(2)).softmax(1)
    return torch.einsum("bt,btc->bc", share_BT, x_BTC)


def _head(width: int) -> nn.Sequential:
    """Return the MLP head. Its layers have at least 64 units: a quarter of a small network's width is a bottleneck."""
    half, quarter = max(BEAMS, width // 2), max(BEAMS, width // 4)
    return nn.Sequential(
        nn.Linear(width, half), nn.ReLU(), nn.Linear(half, quarter), nn.ReLU(), nn.Linear(quarter, BEAMS)
    )
