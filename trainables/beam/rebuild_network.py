"""The network that rebuilds the first maps of missing sensors, around the fusion network that uses them.

Shape suffixes: B windows, F frames (batch x history), I channels of a sensor, C channels of a map, Y X rows and columns
of either, P = Y X, S channels of the shared part of a projection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trainables.beam.config import Modality, Model, Rebuild
from trainables.beam.encoders import Encoder
from trainables.beam.network import FusionNetwork, Maps
from trainables.beam.reconstruct import FeatureTrans, ProjectHead
from trainables.samples import Batch


class RebuildNetwork(nn.Module):
    """A fusion network, a projection head for each source and target, and a translator for each target.

    shared: channels of a projection that the sensors share. fusion_frozen: the fusion network is not trained.
    """

    def __init__(self, rebuild: Rebuild, model: Model, shared: int, fusion: FusionNetwork, fusion_frozen: bool) -> None:
        super().__init__()
        self.source, self.target = rebuild.source, rebuild.target
        concerned, width = (*self.source, *self.target), model.channels[0]
        self.fusion = fusion
        self.heads = nn.ModuleDict({sensor: ProjectHead(width, shared, model.norm) for sensor in concerned})
        self.translators = nn.ModuleDict(
            {
                sensor: FeatureTrans(len(self.source), shared, width, model.norm, rebuild.dropout)
                for sensor in self.target
            }
        )
        copied = concerned if rebuild.encoders == "copied" else ()
        self.copies = nn.ModuleDict({sensor: first_stage_alone(fusion.encoder(sensor)) for sensor in copied})
        # Stand-in tokens are frozen, and so are the first stages that rebuild.encoders does not train.
        trained = {"frozen": (), "trained": concerned, "copied": fusion.sensors}[rebuild.encoders]
        first = [stage for sensor in fusion.sensors if sensor not in trained for stage in first_stages(fusion, sensor)]
        freeze([self.copies, fusion if fusion_frozen else fusion.absent, *first])
        if rebuild.freeze_norm:
            for module in fusion.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        self.mistakes = rebuild.mistakes
        self.scored = Scored() if "eval_mode" in self.mistakes else None

    def fused_maps(self, batch: Batch) -> Maps:
        """Return the first maps that the fusion network gets, (F, C, Y, X), for each of its sensors."""
        if "picture_scale" in self.mistakes and self.training and "image" in self.fusion.sensors:
            batch = {**batch, "image": self.fusion.encoder("image").normalise(batch["image"])}
        return self.fusion.first_maps(batch)

    def seen_maps(self, batch: Batch, fused: Maps) -> Maps:
        """Return the first maps that the heads get, of sensors in `fused`: those maps, or the copied encoders' own."""
        if not self.copies:
            return fused
        return {sensor: self._seen_map(sensor, batch) for sensor in fused if sensor in self.copies}

    def _seen_map(self, sensor: Modality, batch: Batch) -> Tensor:
        encoder, frames_FIYX = self.copies[sensor], batch[sensor].flatten(0, 1)
        assert isinstance(encoder, Encoder)
        if "training_mode" in self.mistakes:
            encoder.train()
        as_they_are = sensor == "image" and "picture_scale" in self.mistakes and not self.training
        return encoder.first(frames_FIYX.float() if as_they_are else encoder.normalise(frames_FIYX))

    def parts(self, maps: Maps) -> dict[Modality, tuple[Tensor, Tensor]]:
        """Return shared and own part, (F, S, P) and (F, 2 C - S, P), of every sensor with a head and a map."""
        return {sensor: self.heads[sensor](maps[sensor].flatten(2)) for sensor in maps if sensor in self.heads}

    def translate(self, parts: Mapping[Modality, tuple[Tensor, Tensor]]) -> dict[Modality, Tensor]:
        """Return the rebuilt first map of each target, (F, C, P)."""
        shared = [parts[sensor][0] for sensor in self.source]
        return {sensor: self.translators[sensor](shared) for sensor in self.target}

    @property
    def stuck_in_eval(self) -> bool:
        """Whether the mistake `eval_mode` is in effect: once scored, the network never returns to training mode."""
        return self.scored is not None and self.scored.yet

    def note_scored(self) -> None:
        if self.scored is not None:
            self.scored.yet = True

    def set_modes(self) -> None:
        """Call before a training step: repeats the mistake `eval_mode`, which the loop undoes after scoring."""
        if self.stuck_in_eval and self.heads.training:
            for part in (self.heads, self.translators, self.fusion):
                part.eval()


class Scored(nn.Module):
    """Remembers, in checkpoints too, whether the network was ever scored."""

    def __init__(self) -> None:
        super().__init__()
        self.yet = False

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.yet)

    def set_extra_state(self, state: Tensor) -> None:
        self.yet = bool(state)


def freeze(modules: Iterable[nn.Module]) -> None:
    """Put modules in eval mode and disable their gradients; the loop then leaves them so."""
    for module in modules:
        module.eval().requires_grad_(False)


def first_stages(network: FusionNetwork, sensor: Modality) -> list[nn.Module]:
    """Return the modules that compute a sensor's first map: stem and first stage."""
    resnet = network.encoder(sensor).resnet
    return [resnet.embedder, resnet.encoder.stages[0]]


def of_first_stage(name: str) -> bool:
    """Return whether the named parameter or buffer belongs to `first_stages`."""
    return ".resnet.embedder." in name or ".resnet.encoder.stages.0." in name


def first_stage_alone(encoder: Encoder) -> Encoder:
    """Return a copy of the encoder with only its stem and first stage."""
    copied = copy.deepcopy(encoder)
    copied.resnet.encoder.stages = copied.resnet.encoder.stages[:1]
    return copied


def insert(maps: Maps, rebuilt: Mapping[Modality, Tensor], replaced_B: Tensor) -> Maps:
    """Return `maps`, replaced by the rebuilt ones in windows where `replaced_B` is true."""
    out = dict(maps)
    for sensor, rebuilt_FCP in rebuilt.items():
        real_FCYX = maps[sensor]
        replaced_F111 = replaced_B.repeat_interleave(len(real_FCYX) // len(replaced_B)).view(-1, 1, 1, 1)
        out[sensor] = torch.where(replaced_F111, rebuilt_FCP.view_as(real_FCYX).to(real_FCYX.dtype), real_FCYX)
    return out
