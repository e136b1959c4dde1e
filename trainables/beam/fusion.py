"""Trains the fusion network to predict the best beam from camera, lidar, radar and position, or a subset of these."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trainables.beam.checkpoint import load_given, settings_of
from trainables.beam.config import SENSORS, BeamLoss, Data, Modality, Model
from trainables.beam.data import describe, gps_width, names, samples
from trainables.beam.encoders import pretrained_weights
from trainables.beam.health import dba_of_guessing, fusion_part, fusion_signs, stage_spreads
from trainables.beam.metrics import beam_scores, cross_entropy, focal_loss, soft_targets
from trainables.beam.network import FusionNetwork
from trainables.checkpoint import with_settings
from trainables.contract import Report, Trial, UserError
from trainables.loop import Task, fit, step_memory
from trainables.optim import Optim, require
from trainables.samples import Batch
from trainables.step import Pairs

REPORTED = ("dba", "top1", "top2", "top3")


@dataclass(frozen=True)
class Config:
    """One setting of fusion training."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    loss: BeamLoss = field(default_factory=BeamLoss)
    epochs: int = 30
    missing_prob: float = 0.0  # share of training windows that lack one sensor, each equally often
    score_without: tuple[Modality, ...] = ()  # sensors; if any, dba_missing is the DBA without all of them
    # A fusion checkpoint to start from, encoders included, with a fresh schedule and optimizer. All machines must be
    # able to read it for as long as the search may be resumed.
    pretrained: str | None = None
    score_each: bool = False  # also report the DBA without each single sensor: dba_without_image and so on

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "be at least 1")
        require(0 <= self.missing_prob <= 1, "missing_prob", self.missing_prob, "lie between 0 and 1")
        for sensor in self.score_without:
            if sensor == "gps" or sensor not in self.data.modalities:
                raise UserError(
                    f"score_without names {sensor}, no sensor of data.modalities {list(self.data.modalities)}"
                )


def build(config: Config) -> FusionNetwork:
    network = FusionNetwork(config.model, config.data, gps_width(config))
    if config.pretrained is not None:
        load_given(network, "pretrained", config.pretrained, config)
    elif config.model.has_pretrained_encoders:
        for sensor in network.sensors:
            weights = pretrained_weights(sensor, network.channels[sensor], config.model)
            network.encoder(sensor).resnet.load_state_dict(weights)
    return network


def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    assert isinstance(model, FusionNetwork)
    windows = len(batch["beam"])
    # Tokens take part in every step, because all ranks must use the same parameters.
    draws = config.missing_prob > 0 or model.missing == "token"
    gone = draw_missing(model.sensors, windows, config.missing_prob, batch["beam"].device) if draws else {}
    logits = model.fuse(model.first_maps(batch, gone), batch.get("gps"))
    return {config.loss.kind: (beam_loss(logits, batch["beam"], config.loss).sum(), windows)}


def beam_loss(logits_K: Tensor, beam: Tensor, settings: BeamLoss) -> Tensor:
    """Return the loss of each window, (B,), averaged over its steps if it has several.

    `logits_K` is (B, 64) or (B, P, 64), `beam` (B,) or (B, P).
    """
    target_K = soft_targets(settings.sigma, settings.scale, logits_K.device)[beam]
    if settings.kind == "ce":
        losses = cross_entropy(logits_K, target_K)
    else:
        losses = focal_loss(logits_K, target_K, settings.alpha, settings.gamma)
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def draw_missing(
    sensors: Sequence[Modality], windows: int, share: float, device: torch.device
) -> dict[Modality, Tensor]:
    """Draw a mask (B,) per sensor of the windows that lack it; about `share` of the windows lack one sensor.

    The result has every sensor, even one that no window lacks.
    """
    lacking_B = torch.rand(windows, device=device) < share
    which_B = torch.randint(max(len(sensors), 1), (windows,), device=device)
    return {sensor: lacking_B & (which_B == number) for number, sensor in enumerate(sensors)}


def score(model: nn.Module, batch: Batch, config: Config, scenarios: Sequence[str] = ()) -> Pairs:
    """Return DBA, top-k accuracy, DBA by scenario and without the sensors in `lacking`, and `fusion_signs`.

    Windows with several steps count once per step; `dba_step1` and so on are the DBA of one step. Windows marked
    `apart` count only in the score of their scenario.
    """
    assert isinstance(model, FusionNetwork)
    maps, gps, beam = model.first_maps(batch), batch.get("gps"), batch["beam"]
    with fusion_signs(model) as signs:
        full = beam_scores(model.fuse(maps, gps), beam)
    pooled_B = ~batch["apart"]
    pairs: dict[str, tuple[Tensor, Tensor | int]] = {name: total(full[name], pooled_B) for name in REPORTED}
    pairs |= signs
    pairs |= by_step(full["dba"], pooled_B)
    pairs |= by_scenario(full["dba"], batch["scenario"], scenarios)
    for name, sensors in lacking(config, model.sensors).items():
        less = model.withhold(maps, everywhere(sensors, beam))
        pairs[name] = total(beam_scores(model.fuse(less, gps), beam)["dba"], pooled_B)
    return pairs


def lacking(config: Config, sensors: Sequence[Modality]) -> dict[str, tuple[Modality, ...]]:
    """Return, by the name of each score with missing sensors, which sensors those are."""
    together = {"dba_missing": config.score_without} if config.score_without else {}
    alone = {f"dba_without_{sensor}": (sensor,) for sensor in sensors} if config.score_each else {}
    return {**together, **alone}


def everywhere(sensors: Sequence[Modality], like: Tensor) -> dict[Modality, Tensor]:
    """Return masks (B,) that mark these sensors as missing in every window; `like` is (B,) or (B, P)."""
    return {sensor: torch.ones(len(like), dtype=torch.bool, device=like.device) for sensor in sensors}


def total(values: Tensor, windows_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum and count of `values`, (B,) or (B, P), over the windows where `windows_B` is true."""
    value_B = values.reshape(len(values), -1).sum(1)
    return torch.where(windows_B, value_B, 0).sum(), values.numel() // len(values) * windows_B.sum()


def by_step(dba: Tensor, windows_B: Tensor, name: str = "dba") -> dict[str, tuple[Tensor, Tensor]]:
    """Return sum and count of each step's DBA, `dba_step1` and so on, where `windows_B` is true; empty for (B,)."""
    steps = dba.unbind(1) if dba.ndim > 1 else ()
    return {f"{name}_step{p}": total(dba_B, windows_B) for p, dba_B in enumerate(steps, start=1)}


def by_scenario(
    dba: Tensor, scenario_B: Tensor, scenarios: Sequence[str], name: str = "dba"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sum and count of each scenario's DBA, `dba_31` and so on; empty if there is only one scenario.

    `dba` is (B,) or (B, P), `scenario_B` each window's index into `scenarios`.
    """
    if len(scenarios) < 2:
        return {}
    return {
        f"{name}_{scenario.removeprefix('scenario')}": total(dba, scenario_B == number)
        for number, scenario in enumerate(scenarios)
    }


TASK = Task(
    config=Config,
    model=build,
    data=samples,
    loss=loss,
    score=score,
    derived=stage_spreads,
    part=fusion_part,
    names=names,
)


def task_for(config: Config) -> Task:
    """Return `TASK` with scores for each scenario in the data."""
    scenarios = samples(config, "val").scenarios
    return replace(TASK, score=functools.partial(score, scenarios=scenarios))


def prepare(config: Config) -> str:
    """Check and decode the data, and check pre-trained weights, before any worker starts; return a line on the data."""
    if config.pretrained is not None:
        build(config)
    elif config.model.has_pretrained_encoders:
        for sensor in SENSORS:
            if sensor in config.data.modalities:
                pretrained_weights(sensor, config.data.channels(sensor), config.model)
    return describe(config)


def memory_need(trial: Trial) -> int:
    return step_memory(TASK, trial)


def train(trial: Trial) -> Iterator[Report]:
    guessing, settings = dba_of_guessing(trial.config), settings_of(trial.config)
    for report in fit(task_for(trial.config), trial):
        assert report.state is not None
        state = functools.partial(with_settings, report.state, settings)
        yield replace(report, metrics={**report.metrics, "dba_chance": guessing}, state=state)
