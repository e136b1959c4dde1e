"""Trains the fusion network to predict the best beam from camera, lidar, radar and position, or some of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trainables.beam.config import BeamLoss, Data, Modality, Model
from trainables.beam.data import gps_width, samples, soft_targets
from trainables.beam.health import dba_of_guessing, fusion_signs
from trainables.beam.metrics import beam_scores, cross_entropy, focal_loss
from trainables.beam.network import FusionNetwork
from trainables.beam.prepare import prepare_data
from trainables.contract import Report, Trial, UserError
from trainables.loop import Task, fit
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
    return FusionNetwork(config.model, config.data, gps_width(config))


def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    assert isinstance(model, FusionNetwork)
    windows = len(batch["beam"])
    maps = model.first_maps(batch)
    gone = draw_missing(model.sensors, windows, config.missing_prob, batch["beam"].device)
    logits_BK = model.fuse(model.withhold(maps, batch, gone), batch.get("gps"))
    return {config.loss.kind: (beam_loss(logits_BK, batch["beam"], config.loss).sum(), windows)}


def beam_loss(logits_BK: Tensor, beam_B: Tensor, settings: BeamLoss) -> Tensor:
    """The loss of each sample, (B,)."""
    target_BK = soft_targets(settings.sigma, 2.5 * settings.sigma).to(logits_BK.device)[beam_B]
    if settings.kind == "ce":
        return cross_entropy(logits_BK, target_BK)
    return focal_loss(logits_BK, target_BK, settings.alpha, settings.gamma)


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
    """DBA and top-k accuracy, the DBA of each scenario and without `score_without`, and the fusion stages' health."""
    assert isinstance(model, FusionNetwork)
    maps = model.first_maps(batch)
    with fusion_signs(model) as signs:
        full = beam_scores(model.fuse(maps, batch.get("gps")), batch["beam"])
    pairs: dict[str, tuple[Tensor, Tensor | int]] = {name: total(full[name]) for name in REPORTED}
    pairs |= signs
    pairs |= by_scenario(full["dba"], batch["scenario"], scenarios)
    if config.score_without:
        less = model.withhold(maps, batch, everywhere(config.score_without, batch["beam"]))
        pairs["dba_missing"] = total(beam_scores(model.fuse(less, batch.get("gps")), batch["beam"])["dba"])
    return pairs


def everywhere(sensors: Sequence[Modality], like_B: Tensor) -> dict[Modality, Tensor]:
    """These sensors are missing from every window."""
    return {sensor: torch.ones_like(like_B, dtype=torch.bool) for sensor in sensors}


def total(values_B: Tensor) -> tuple[Tensor, int]:
    return values_B.sum(), len(values_B)


def by_scenario(dba_B: Tensor, scenario_B: Tensor, scenarios: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """`dba_31` and so on, from each sample's index into `scenarios`; nothing where there is only one scenario."""
    if len(scenarios) < 2:
        return {}
    here = {name: scenario_B == number for number, name in enumerate(scenarios)}
    return {f"dba_{name.removeprefix('scenario')}": ((dba_B * is_B).sum(), is_B.sum()) for name, is_B in here.items()}


TASK = Task(config=Config, model=build, data=samples, loss=loss, score=score)


def task_for(config: Config) -> Task:
    """`TASK`, which also knows the names of the scenarios at hand."""
    scenarios = samples(config, "val").scenarios
    return replace(TASK, score=functools.partial(score, scenarios=scenarios))


def prepare(config: Config) -> None:
    """Check and decode the data before any worker starts."""
    prepare_data(config.data)


def train(trial: Trial) -> Iterator[Report]:
    guessing = dba_of_guessing(trial.config)
    for report in fit(task_for(trial.config), trial):
        yield replace(report, metrics={**report.metrics, "dba_chance": guessing})
