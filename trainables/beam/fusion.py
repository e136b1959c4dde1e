"""Trains the fusion network to predict the best beam from camera, lidar, radar and position, or some of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trainables.beam.config import SENSORS, BeamLoss, Data, Modality, Model
from trainables.beam.data import describe, gps_width, samples, soft_targets
from trainables.beam.encoders import pretrained_weights
from trainables.beam.health import dba_of_guessing, fusion_signs
from trainables.beam.metrics import beam_scores, cross_entropy, focal_loss
from trainables.beam.network import FusionNetwork
from trainables.contract import Report, Trial, UserError
from trainables.loop import Task, fit, step_memory
from trainables.optim import Optim
from trainables.samples import Batch
from trainables.step import Pairs

REPORTED = ("dba", "top1", "top3")


@dataclass(frozen=True)
class Config:
    """One setting of fusion training."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    loss: BeamLoss = field(default_factory=BeamLoss)
    epochs: int = 30
    missing_prob: float = 0.0  # share of training windows that lack one sensor, any as often
    score_without: tuple[Modality, ...] = ()  # sensors; when any, dba_missing is the DBA without them

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"epochs = {self.epochs} must be at least 1")
        if not 0 <= self.missing_prob <= 1:
            raise UserError(f"missing_prob = {self.missing_prob} must lie between 0 and 1")
        for sensor in self.score_without:
            if sensor == "gps" or sensor not in self.data.modalities:
                raise UserError(
                    f"score_without names {sensor}, no sensor of data.modalities {list(self.data.modalities)}"
                )


def build(config: Config) -> FusionNetwork:
    network = FusionNetwork(config.model, config.data, gps_width(config))
    if config.model.pretrained_encoders is not None:
        for sensor in network.sensors:
            network.encoder(sensor).resnet.load_state_dict(pretrained_weights(sensor, config.model))
    return network


def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    assert isinstance(model, FusionNetwork)
    windows = len(batch["beam"])
    maps = model.first_maps(batch)
    gone = draw_missing(model.sensors, windows, config.missing_prob, batch["beam"].device)
    logits = model.fuse(model.withhold(maps, gone), batch.get("gps"))
    return {config.loss.kind: (beam_loss(logits, batch["beam"], config.loss).sum(), windows)}


def beam_loss(logits_K: Tensor, beam: Tensor, settings: BeamLoss) -> Tensor:
    """The loss of each window, (B,), the mean over its steps where it has several.

    `logits_K` is (B, 64) or (B, P, 64), `beam` (B,) or (B, P).
    """
    target_K = soft_targets(settings.sigma, 2.5 * settings.sigma).to(logits_K.device)[beam]
    if settings.kind == "ce":
        losses = cross_entropy(logits_K, target_K)
    else:
        losses = focal_loss(logits_K, target_K, settings.alpha, settings.gamma)
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def draw_missing(
    sensors: Sequence[Modality], windows: int, share: float, device: torch.device
) -> dict[Modality, Tensor]:
    """Which windows lack which sensor, (B,) each: about `share` of them lack one.

    Nothing is left out of the result where the share is 0, so that the tokens of missing sensors take part in every
    step: all ranks must agree on which parameters do.
    """
    lacking_B = torch.rand(windows, device=device) < share
    which_B = torch.randint(max(len(sensors), 1), (windows,), device=device)
    return {sensor: lacking_B & (which_B == number) for number, sensor in enumerate(sensors)}


def score(model: nn.Module, batch: Batch, config: Config, scenarios: Sequence[str] = ()) -> Pairs:
    """DBA and top-k accuracy, the DBA of each scenario and without `score_without`, and the fusion stages' health.

    Windows of several steps count once for each step; `dba_step1` and so on are the DBA of one step.
    """
    assert isinstance(model, FusionNetwork)
    maps = model.first_maps(batch)
    with fusion_signs(model) as signs:
        full = beam_scores(model.fuse(maps, batch.get("gps")), batch["beam"])
    pairs: dict[str, tuple[Tensor, Tensor | int]] = {name: total(full[name]) for name in REPORTED}
    pairs |= signs
    pairs |= by_step(full["dba"])
    pairs |= by_scenario(full["dba"], batch["scenario"], scenarios)
    if config.score_without:
        less = model.withhold(maps, everywhere(config.score_without, batch["beam"]))
        pairs["dba_missing"] = total(beam_scores(model.fuse(less, batch.get("gps")), batch["beam"])["dba"])
    return pairs


def everywhere(sensors: Sequence[Modality], like: Tensor) -> dict[Modality, Tensor]:
    """These sensors are missing from every window: (B,) each, where `like` is (B,) or (B, P)."""
    return {sensor: torch.ones(len(like), dtype=torch.bool, device=like.device) for sensor in sensors}


def total(values: Tensor) -> tuple[Tensor, int]:
    return values.sum(), values.numel()


def by_step(dba: Tensor) -> dict[str, tuple[Tensor, int]]:
    """`dba_step1` and so on from (B, P); nothing from (B,)."""
    return {f"dba_step{p}": total(dba_B) for p, dba_B in enumerate(dba.unbind(1), start=1)} if dba.ndim > 1 else {}


def by_scenario(dba: Tensor, scenario_B: Tensor, scenarios: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """`dba_31` and so on, from each window's index into `scenarios`; nothing where there is only one scenario.

    `dba` is (B,) or (B, P).
    """
    if len(scenarios) < 2:
        return {}
    steps = dba.numel() // len(dba)
    dba_B = dba.view(len(dba), steps).sum(1)
    here = {name: scenario_B == number for number, name in enumerate(scenarios)}
    return {
        f"dba_{name.removeprefix('scenario')}": ((dba_B * is_B).sum(), steps * is_B.sum())
        for name, is_B in here.items()
    }


TASK = Task(config=Config, model=build, data=samples, loss=loss, score=score)


def task_for(config: Config) -> Task:
    """`TASK`, which also knows the names of the scenarios at hand."""
    scenarios = samples(config, "val").scenarios
    return replace(TASK, score=functools.partial(score, scenarios=scenarios))


def prepare(config: Config) -> str:
    """Check and decode the data, and look at the pre-trained encoders, before any worker starts; a line on the data."""
    if config.model.pretrained_encoders is not None:
        for sensor in SENSORS:
            if sensor in config.data.modalities:
                pretrained_weights(sensor, config.model)
    return describe(config)


def memory_need(trial: Trial) -> int:
    return step_memory(TASK, trial)


def train(trial: Trial) -> Iterator[Report]:
    guessing = dba_of_guessing(trial.config)
    for report in fit(task_for(trial.config), trial):
        yield replace(report, metrics={**report.metrics, "dba_chance": guessing})
