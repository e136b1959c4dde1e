"""Trains the rebuild of missing sensors, inside a fusion network that was trained with every sensor."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trainables.beam import features, fusion
from trainables.beam.checkpoint import given_weights, load_given, settings_of
from trainables.beam.config import Data, Modality, Model, Pretrain, Rebuild, RebuildLoss
from trainables.beam.data import names
from trainables.beam.health import dba_of_guessing, fusion_part, fusion_signs, stage_spreads
from trainables.beam.metrics import beam_scores
from trainables.beam.network import FusionNetwork, Maps
from trainables.beam.pretrained import trained_once
from trainables.beam.rebuild_network import RebuildNetwork, insert, of_first_stage
from trainables.beam.reconstruct import contrast_chance, contrast_loss, distance_loss, trans_loss
from trainables.checkpoint import Weights, with_settings
from trainables.contract import Report, Trial, UserError
from trainables.loop import Task, evaluate, fit, step_memory
from trainables.optim import Optim, require
from trainables.resume import seed_everything
from trainables.samples import Batch, Ranks, share_of
from trainables.step import Pairs

NO_LOSS = 0.01  # DBA; missing sensors that cost no more than this leave nothing to recover


@dataclass(frozen=True)
class Config:
    """One setting of rebuild training."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    rebuild: Rebuild = field(default_factory=Rebuild)
    loss: RebuildLoss = field(default_factory=RebuildLoss)
    pretrain: Pretrain = field(default_factory=Pretrain)
    epochs: int = 30

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "be at least 1")
        for name, sensors in (("source", self.rebuild.source), ("target", self.rebuild.target)):
            for sensor in sensors:
                if sensor not in self.data.modalities:
                    raise UserError(
                        f"rebuild.{name} names {sensor}, which data.modalities {list(self.data.modalities)} lacks"
                    )
        if not 0 < self.shared < 2 * self.model.channels[0]:
            raise UserError(
                f"rebuild.shared_ratio = {self.rebuild.shared_ratio:g} leaves {self.shared} of a projection's "
                f"{2 * self.model.channels[0]} channels to share; at least one must be shared, and one not"
            )
        if self.rebuild.encoders == "trained" and self.fusion_frozen:
            raise UserError(
                "rebuild.encoders = trained needs rebuild.fusion_lr_ratio and loss.alpha_fusion above 0, not "
                f"{self.rebuild.fusion_lr_ratio:g} and {self.loss.alpha_fusion:g}: the fusion network shares its first "
                "stages with the encoders, so that one which stays as it is would be ruined by training them; set "
                "rebuild.encoders to frozen, or let the fusion network train too"
            )
        if "training_mode" in self.rebuild.mistakes and self.model.norm != "batch":
            raise UserError(
                f"rebuild.mistakes = {list(self.rebuild.mistakes)} needs model.norm = batch and not {self.model.norm}: "
                "only batch norm is another in training mode"
            )
        if self.rebuild.freeze_norm and self.model.norm != "batch":
            raise UserError(
                f"rebuild.freeze_norm = true needs model.norm = batch and not {self.model.norm}: only batch norm keeps "
                "statistics"
            )
        if "picture_scale" in self.rebuild.mistakes and "image" not in self.data.modalities:
            raise UserError(
                f"rebuild.mistakes = {list(self.rebuild.mistakes)} needs image among data.modalities "
                f"{list(self.data.modalities)}: there are no pictures"
            )
        if self.rebuild.pretrained_part == "first_stages" and self.fusion_frozen:
            raise UserError(
                "rebuild.pretrained_part = first_stages needs rebuild.fusion_lr_ratio and loss.alpha_fusion above 0, "
                f"not {self.rebuild.fusion_lr_ratio:g} and {self.loss.alpha_fusion:g}: the rest of the fusion network "
                "starts from noise, and would stay untrained"
            )
        alone = min(self.optim.batch_size, self.optim.micro_batch or self.optim.batch_size) == 1
        if self.loss.alpha_contrast > 0 and alone:
            raise UserError(
                f"loss.alpha_contrast = {self.loss.alpha_contrast:g} needs two windows in a micro-batch, not "
                f"optim.batch_size = {self.optim.batch_size} and optim.micro_batch = {self.optim.micro_batch}: raise "
                "them to 2 or more, or set loss.alpha_contrast to 0"
            )
        if self.rebuild.cache_features and (self.data.augment or self.data.flip):
            raise UserError(
                f"rebuild.cache_features = true needs data.augment = 0 and data.flip = false, not {self.data.augment} "
                f"and {str(self.data.flip).lower()}: only frames as they were measured have features that are kept"
            )

    @property
    def shared(self) -> int:
        """How many channels of a projection the sensors share; a projection has twice a first map's channels."""
        return round(2 * self.model.channels[0] * self.rebuild.shared_ratio)

    @property
    def fusion_frozen(self) -> bool:
        """Whether the fusion network is frozen. Without its loss, weight decay alone would change it."""
        return self.rebuild.fusion_lr_ratio == 0 or self.loss.alpha_fusion == 0

    @property
    def fusion(self) -> fusion.Config:
        """The config of pre-training, made only of settings that a search of the rebuild does not vary."""
        return fusion.Config(
            data=self.data,
            model=self.model if self.rebuild.pretrained is None else replace(self.model, pretrained_encoders=None),
            optim=self.pretrain.optim,
            loss=self.loss.beam,
            epochs=max(self.pretrain.epochs, 1),  # a valid value; with 0 epochs of pre-training it is not used
            score_without=self.rebuild.target,
            missing_prob=self.pretrain.missing_prob,
        )


def build(config: Config, weights: Weights) -> RebuildNetwork:
    """Build the network to train, around a fusion network that starts from `weights` or only their first stages."""
    network = fusion.build(config.fusion)
    if config.rebuild.pretrained_part == "first_stages":
        taken = {name: tensor for name, tensor in weights.items() if of_first_stage(name)}
        weights = {**network.state_dict(), **taken}
    network.load_state_dict(weights)
    return RebuildNetwork(config.rebuild, config.model, config.shared, network, config.fusion_frozen)


def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    """Return the four weighted losses of a batch."""
    assert isinstance(model, RebuildNetwork)
    weights, history, windows = config.loss, model.fusion.history, len(batch["beam"])
    model.set_modes()
    maps = model.fused_maps(batch)
    seen = model.seen_maps(batch, maps)
    parts = model.parts(seen)
    rebuilt = model.translate(parts)
    # The target's features are detached: trained encoders must not make them easier to predict.
    trans_B = mean(
        trans_loss(rebuilt[s], seen[s].flatten(2).detach(), history, weights.trans_form) for s in model.target
    )
    pairs = list(itertools.combinations(parts.values(), 2))
    contrast_B = mean(contrast_loss(a[0], b[0], history, weights.temperature, weights.contrast_form) for a, b in pairs)
    distance_B = mean(distance_loss(a[1], b[1], history, weights.distance_form) for a, b in pairs)
    fusion_B = torch.zeros_like(trans_B)
    if weights.alpha_fusion > 0:
        fusion_B = fusion.beam_loss(mixed_logits(model, batch, maps, rebuilt, config), batch["beam"], weights.beam)
    return {
        "trans": (weights.alpha_trans * trans_B.sum(), windows),
        "contrast": (weights.alpha_contrast * contrast_B.sum(), windows),
        "distance": (weights.alpha_distance * distance_B.sum(), windows),
        "fusion": (weights.alpha_fusion * fusion_B.sum(), windows),
    }


def mixed_logits(
    model: RebuildNetwork, batch: Batch, maps: Maps, rebuilt: Mapping[Modality, Tensor], config: Config
) -> Tensor:
    """Return the fusion network's logits for a batch in which a random share of windows has rebuilt targets."""
    beam_B, rebuild = batch["beam"], config.rebuild
    replaced_B = torch.rand(len(beam_B), device=beam_B.device) < (1.0 if model.stuck_in_eval else rebuild.share)
    if rebuild.mix == "stand_in":
        maps = model.fusion.withhold(maps, fusion.everywhere(model.target, beam_B))
    return model.fusion.fuse(insert(maps, rebuilt, replaced_B), batch.get("gps"))


def mean(values: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def logits_without_targets(model: RebuildNetwork, batch: Batch) -> Tensor:
    """Return the fusion network's logits for a batch without the target sensors, using their rebuilt maps."""
    sensors = model.fusion.sensors
    maps = {sensor: model.fusion.first_map(sensor, batch) for sensor in sensors if sensor not in model.target}
    rebuilt, like = model.translate(model.parts(model.seen_maps(batch, maps))), maps[model.source[0]]
    every = {sensor: maps[sensor] if sensor in maps else rebuilt[sensor].view_as(like).to(like) for sensor in sensors}
    return model.fusion.fuse(every, batch.get("gps"))


def score(model: nn.Module, batch: Batch, config: Config, scenarios: Sequence[str] = ()) -> Pairs:
    """Return DBA with all sensors, with rebuilt targets and with stand-ins, and the error of the rebuilt features.

    DBA with stand-ins shows how much of a gain is only the network's adaptation to a missing sensor. For rebuilt
    targets there are also the DBA of each scenario and step, and `fusion_signs`.
    """
    assert isinstance(model, RebuildNetwork)
    model.note_scored()
    network, maps, gps, beam_B = model.fusion, model.fused_maps(batch), batch.get("gps"), batch["beam"]
    seen = model.seen_maps(batch, maps)
    left = {sensor: x for sensor, x in seen.items() if sensor not in model.target}
    rebuilt = model.translate(model.parts(left))

    def dba(x: Maps) -> Tensor:
        return beam_scores(network.fuse(x, gps), beam_B)["dba"]

    with fusion_signs(network) as signs:  # of the forward pass that the objective scores
        rebuilt_dba = dba(insert(maps, rebuilt, torch.ones(len(beam_B), dtype=torch.bool, device=beam_B.device)))
    scores = {
        "dba_full": dba(maps),
        "dba_rebuilt": rebuilt_dba,
        "dba_unrebuilt": dba(network.withhold(maps, fusion.everywhere(model.target, beam_B))),
        "trans": mean(trans_loss(rebuilt[s], seen[s].flatten(2), network.history) for s in model.target),
    }
    pooled_B = ~batch["apart"]
    return {
        **{name: fusion.total(values, pooled_B) for name, values in scores.items()},
        **fusion.by_step(rebuilt_dba, pooled_B, "dba_rebuilt"),
        **fusion.by_scenario(rebuilt_dba, batch["scenario"], scenarios, "dba_rebuilt"),
        **signs,
    }


def scores_before(config: Config, network: FusionNetwork, maps: features.Maps, trial: Trial) -> dict[str, float]:
    """Score the initial network: DBA with all sensors (`dba_upper`) and without the targets (`dba_missing`)."""
    seed_everything(trial.seed, "before", trial.rank)  # a noise stand-in must not depend on whether pre-training ran
    windows, before = features.samples(config, "val", maps=maps), replace(trial, config=config.fusion)
    at_once = config.optim.eval_batch or config.optim.micro_batch
    with torch.no_grad():
        scores = evaluate(fusion.TASK, network, windows, before, at_once)
    return {"dba_upper": scores["dba"], "dba_missing": scores["dba_missing"]}


def recovered(upper: float, missing: float, rebuilt: float) -> dict[str, float]:
    """Return the share of the DBA lost with the targets that the rebuild recovers; empty if next to none was lost.

    upper, missing: DBA of the initial network with and without the targets; with all sensors, the fine-tuned network
    may be better, or ruined.
    """
    return {"recovered": (rebuilt - missing) / (upper - missing)} if upper - missing > NO_LOSS else {}


def unweighted(metrics: Mapping[str, float], loss: RebuildLoss) -> dict[str, float]:
    """Return the loss terms without their weights, to be compared between trials; those of weight 0 are omitted."""
    weights = {name: getattr(loss, f"alpha_{name}") for name in ("trans", "contrast", "distance", "fusion")}
    return {f"unweighted_{name}": metrics[f"loss_{name}"] / weight for name, weight in weights.items() if weight > 0}


def micro_sizes(batch: int, micro_batch: int, ranks: int) -> list[int]:
    """Return the sizes, in windows, of an effective batch's micro-batches over all ranks."""
    shares = [share_of(torch.arange(batch), Ranks(rank, ranks), micro_batch) for rank in range(ranks)]
    return [len(micro) for share in shares if share.weight for micro in share.micros]


def contrast_signs(sizes: Sequence[int], loss: RebuildLoss) -> dict[str, float]:
    """Return metrics for interpreting `loss_contrast`, which compares windows only within a micro-batch.

    loss_contrast_chance: its value at chance level. contrasted: the share of windows with another in their micro-batch.
    A lone window has no contrast: if memory allows one window per micro-batch, or each rank has one of a small batch,
    the loss is 0 and trains nothing.

    sizes: windows in each micro-batch.
    """
    batch = sum(sizes)
    chance = sum(size * contrast_chance(size, loss.temperature, loss.contrast_form) for size in sizes) / batch
    contrasted = sum(size for size in sizes if size > 1) / batch
    return {"loss_contrast_chance": loss.alpha_contrast * chance, "contrasted": contrasted}


def task_for(config: Config, weights: Weights, maps: features.Maps) -> Task:
    scenarios = features.samples(config, "val").scenarios
    return Task(
        config=Config,
        model=functools.partial(build, weights=weights),
        data=functools.partial(features.samples, maps=maps),
        loss=loss,
        score=functools.partial(score, scenarios=scenarios),
        lr_scale=functools.partial(lr_scale, rebuild=config.rebuild),
        derived=stage_spreads,
        part=fusion_part,
        names=names,
    )


def lr_scale(name: str, rebuild: Rebuild) -> float:
    """Return the ratio of `optim.lr`: `fusion_lr_ratio` in the fusion network, else 1, also in `trained` encoders."""
    with_rebuild = of_first_stage(name) and rebuild.encoders != "copied"
    return rebuild.fusion_lr_ratio if name.startswith("fusion.") and not with_rebuild else 1.0


def prepare(config: Config) -> str:
    """Check and decode the data, and check a given pre-trained network; return a line on the data."""
    told = fusion.prepare(config.fusion)
    if config.rebuild.cache_features:
        features.announce(config.data, config.model, config.optim)
    given = config.rebuild.pretrained
    if given is not None:
        load_given(fusion.build(config.fusion), "rebuild.pretrained", given, config.fusion)
    return told


def initial_weights(config: Config, trial: Trial) -> Weights:
    """Return the weights of the fusion network that the rebuild starts from, pre-training it if none is given."""
    given, pretrain = config.rebuild.pretrained, config.pretrain
    if given is not None:
        return given_weights("rebuild.pretrained", given, config.fusion)
    if pretrain.epochs > 0:
        return trained_once(config.fusion, pretrain.seed, trial)
    return untrained_weights(config)


def untrained_weights(config: Config) -> Weights:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.pretrain.seed)
        return fusion.build(config.fusion).state_dict()


def memory_need(trial: Trial) -> int:
    """Return the peak bytes of a rebuild from frames; cached first maps take less. Pre-training must fit in as much."""
    return step_memory(task_for(trial.config, untrained_weights(trial.config), maps={}), trial)


def train(trial: Trial) -> Iterator[Report]:
    config: Config = trial.config
    weights = initial_weights(config, trial)
    network = fusion.build(config.fusion).to(trial.device).eval()
    network.load_state_dict(weights)
    maps = features.first_maps(config.data, network, config.optim, trial) if config.rebuild.cache_features else {}
    before, guessing = scores_before(config, network, maps, trial), dba_of_guessing(config)
    del network
    batch = config.optim.largest_batch(len(features.samples(config, "train")))
    settings = settings_of(config.fusion)
    for count, report in enumerate(fit(task_for(config, weights, maps), trial)):
        assert report.state is not None
        share = recovered(before["dba_upper"], before["dba_missing"], report.metrics["dba_rebuilt"])
        sizes = micro_sizes(batch, int(report.metrics["micro_batch"]), trial.world_size)
        if config.loss.alpha_contrast > 0 and max(sizes) == 1 and count == 0:
            print("beam rebuild: no window has another beside it, so the contrastive loss is 0 and teaches nothing")
        more = {
            **before,
            **share,
            **unweighted(report.metrics, config.loss),
            "dba_rebuilt_chance": guessing,
            **contrast_signs(sizes, config.loss),
        }
        state = functools.partial(with_settings, report.state, settings)
        yield replace(report, metrics={**report.metrics, **more}, state=state)
