"""The rebuild of a missing sensor: what is trained and what is not, the insertion, and the network it starts from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from small_beam import SMALL, simulated
from torch import Tensor

from trainables.beam import fusion, rebuild
from trainables.beam.config import Data, Modality, Pretrain, Rebuild, RebuildLoss, Simulated
from trainables.beam.data import samples
from trainables.beam.health import fusion_signs
from trainables.beam.rebuild_network import RebuildNetwork, first_stages, insert
from trainables.beam.reconstruct import contrast_chance
from trainables.contract import Report, Trial, UserError
from trainables.memory import MIB
from trainables.optim import Optim

OPTIM = Optim(lr=1e-3, batch_size=8)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> rebuild.Config:
    data = simulated(tmp_path_factory.mktemp("cache"))
    made = rebuild.Config(data=data, model=SMALL, optim=OPTIM, pretrain=Pretrain(epochs=1, optim=OPTIM), epochs=2)
    rebuild.prepare(made)
    return made


def network(config: rebuild.Config) -> RebuildNetwork:
    return rebuild.build(config, fusion.build(config.fusion).state_dict())


def batch_of(config: rebuild.Config, count: int = 4) -> dict[str, Tensor]:
    return samples(config, "train")[torch.arange(count)]


def total(pairs: Any) -> Tensor:
    return torch.stack([summed for summed, _ in pairs.values()]).sum()


SOURCES_AND_TARGETS: list[tuple[tuple[Modality, ...], tuple[Modality, ...]]] = [
    (("lidar", "radar"), ("image",)),
    (("image", "radar"), ("lidar",)),
    (("image",), ("lidar", "radar")),
    (("image",), ("radar",)),
]


@pytest.mark.parametrize(("source", "target"), SOURCES_AND_TARGETS)
def test_gradient_reaches_what_is_trained_and_nothing_else(
    config: rebuild.Config, source: tuple[Modality, ...], target: tuple[Modality, ...]
) -> None:
    config = replace(config, rebuild=Rebuild(source=source, target=target))
    model = network(config)
    total(rebuild.loss(model, batch_of(config), config)).backward()
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert asked == reached
    first = ("resnet.embedder", "encoder.stages.0")
    assert not [name for name in asked if any(part in name for part in first) or "absent" in name]


@pytest.mark.parametrize(("ratio", "shared"), [(0.25, 2), (0.5, 4), (0.8, 6)])
def test_a_projection_is_divided_as_the_ratio_says(config: rebuild.Config, ratio: float, shared: int) -> None:
    config = replace(config, rebuild=Rebuild(shared_ratio=ratio))
    model, batch = network(config), batch_of(config)
    maps = model.fusion.first_maps(batch)
    parts = model.parts(maps)
    assert {(common.shape[1], own.shape[1]) for common, own in parts.values()} == {(shared, 8 - shared)}
    for common, own in parts.values():
        length_FP = torch.cat([common, own], 1).norm(dim=1)
        torch.testing.assert_close(length_FP, torch.ones_like(length_FP))
    assert model.translate(parts)["image"].shape == maps["image"].flatten(2).shape
    total(rebuild.loss(model, batch, config)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_each_part_of_a_projection_has_a_channel(config: rebuild.Config, ratio: float) -> None:
    with pytest.raises(UserError, match=f"rebuild.shared_ratio = {ratio} leaves . of a projection's 8 channels"):
        replace(config, rebuild=Rebuild(shared_ratio=ratio))


# What the lab notes tried, without optim.lr and optim.batch_size. Where they do not say whether encoders were trained,
# they were where the fusion network was: in R-S3 and R-S4 it was frozen, and R-S6 names frozen encoders as new.
LATER = RebuildLoss(contrast_form="plain", distance_form="norm")
EARLIER = RebuildLoss(contrast_form="plain", trans_form="l2_normalised", distance_form="mse")
NOTES = {
    "R-P1": (
        Rebuild(source=("image", "radar"), target=("lidar",), encoders="trained", fusion_lr_ratio=1.0),
        EARLIER,
        Pretrain(epochs=0),
    ),
    "R-S2": (
        Rebuild(
            source=("image", "radar"),
            target=("lidar",),
            encoders="trained",
            fusion_lr_ratio=1.0,
            pretrained_part="first_stages",
        ),
        EARLIER,
        Pretrain(),
    ),
    "R-S3": (
        Rebuild(source=("image", "radar"), target=("lidar",), fusion_lr_ratio=0.0),
        replace(EARLIER, alpha_fusion=0.0),
        Pretrain(),
    ),
    "R-S4": (
        Rebuild(fusion_lr_ratio=0.0),
        replace(EARLIER, alpha_contrast=0.5, alpha_trans=5.0, alpha_distance=2.0, alpha_fusion=0.0),
        Pretrain(),
    ),
    "R-S5": (
        Rebuild(encoders="trained", fusion_lr_ratio=1.0, share=1.0),
        replace(EARLIER, alpha_contrast=0.0, alpha_trans=5.0, alpha_distance=0.0),
        Pretrain(),
    ),
    "R-S6": (
        Rebuild(fusion_lr_ratio=0.01, share=0.25),
        replace(EARLIER, alpha_contrast=0.05, alpha_trans=5.0, alpha_distance=2.0),
        Pretrain(),
    ),
    "newest file": (
        Rebuild(
            encoders="copied",
            fusion_lr_ratio=1.0,
            share=0.25,
            mix="stand_in",
            mistakes=("eval_mode", "picture_scale"),  # training_mode is one of batch norm
        ),
        LATER,
        Pretrain(),
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_every_setting_of_the_notes_trains_what_it_names(config: rebuild.Config, name: str) -> None:
    settings, weights, pretrain = NOTES[name]
    config = replace(config, rebuild=settings, loss=weights, pretrain=pretrain)
    model = rebuild.build(config, rebuild.initial_weights(config, Trial(config))) if name == "R-P1" else network(config)
    pairs = rebuild.loss(model, batch_of(config), config)
    total(pairs).backward()
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert asked == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained_encoders = {name.split(".")[2] for name in asked if ".resnet.embedder." in name}
    concerned = {*settings.source, *settings.target}
    wanted = {"frozen": set[str](), "trained": concerned, "copied": {"image", "lidar", "radar"}}
    assert trained_encoders == wanted[settings.encoders]
    rest_trains = settings.fusion_lr_ratio > 0 and weights.alpha_fusion > 0
    assert any(name.startswith("fusion.head") for name in asked) == rest_trains
    assert pairs["distance"][0] <= 0 <= pairs["trans"][0]
    assert (pairs["fusion"][0] > 0) == (weights.alpha_fusion > 0)


def test_two_sensors_are_rebuilt_from_one(config: rebuild.Config) -> None:
    both = Rebuild(source=("image",), target=("lidar", "radar"))
    (report,) = rebuild.train(Trial(replace(config, rebuild=both, epochs=1, pretrain=Pretrain(epochs=0))))
    assert {"dba_full", "dba_missing", "dba_rebuilt", "trans"} <= report.metrics.keys()
    model, batch = network(replace(config, rebuild=both)).eval(), batch_of(config)
    blind = batch | {sensor: torch.zeros_like(batch[sensor]) for sensor in both.target}
    seen, unseen = (rebuild.score(model, x, config)["dba_rebuilt"][0] for x in (batch, blind))
    assert torch.equal(seen, unseen)


def test_windows_of_several_steps_are_rebuilt_too(config: rebuild.Config) -> None:
    batch = batch_of(config)
    batch["beam"] = batch["beam"][:, None].expand(-1, 3)
    config = replace(config, data=replace(config.data, steps=3, simulated=Simulated(frames=20)))
    model = network(config)
    total(rebuild.loss(model, batch, config)).backward()
    scores = rebuild.score(model.eval(), batch, config)
    assert scores["dba_rebuilt"][1] == 3 * 4
    assert [scores[f"dba_rebuilt_step{p}"][1] for p in (1, 2, 3)] == [4, 4, 4]


@torch.no_grad()
def test_windows_that_are_kept_apart_count_towards_their_own_scenario_alone(config: rebuild.Config) -> None:
    model, batch = network(config).eval(), batch_of(config)
    batch["apart"] = torch.tensor([False, True, False, True])
    batch["scenario"] = batch["apart"].long()
    pooled = {name: tensor[~batch["apart"]] for name, tensor in batch.items()}
    names = ("scenario31", "adaptation_31")
    both, alone = (rebuild.score(model, part, config, names) for part in (batch, pooled))
    for name in ("dba_full", "dba_rebuilt", "dba_unrebuilt", "trans", "dba_rebuilt_31"):
        for with_others, without in zip(both[name], alone[name], strict=True):
            torch.testing.assert_close(with_others, without)
    assert [int(found["dba_rebuilt_adaptation_31"][1]) for found in (both, alone)] == [2, 0]


def test_a_rebuild_from_scratch_starts_from_the_seed_of_the_pretraining(config: rebuild.Config) -> None:
    def initial(pretrain: Pretrain) -> Tensor:
        here = replace(config, pretrain=pretrain)
        return rebuild.initial_weights(here, Trial(here))["encoders.image.resnet.embedder.embedder.convolution.weight"]

    assert torch.equal(initial(Pretrain(epochs=0)), initial(Pretrain(epochs=0)))
    assert not torch.equal(initial(Pretrain(epochs=0)), initial(Pretrain(epochs=0, seed=1)))


def test_a_rebuild_may_start_from_the_first_stages_alone(config: rebuild.Config) -> None:
    given = fusion.build(config.fusion).state_dict()
    whole, part = (
        rebuild.build(replace(config, rebuild=Rebuild(pretrained_part=kept)), given).fusion.state_dict()
        for kept in ("network", "first_stages")
    )
    assert all(torch.equal(whole[name], tensor) for name, tensor in given.items())
    kept = {name for name, tensor in given.items() if torch.equal(part[name], tensor)}
    first = re.compile(r"encoders\.(image|lidar|radar)\.resnet\.(embedder|encoder\.stages\.0)\.")
    assert {name for name in given if first.match(name)} <= kept
    drawn = {name for name in given if name.endswith("weight") and given[name].ndim > 1 and not first.match(name)}
    assert drawn
    assert not drawn & kept


@pytest.mark.parametrize("frozen", ["fusion_lr_ratio", "alpha_fusion"])
def test_what_starts_from_noise_has_to_train(config: rebuild.Config, frozen: str) -> None:
    settings = Rebuild(pretrained_part="first_stages", fusion_lr_ratio=0.0 if frozen == "fusion_lr_ratio" else 1.0)
    loss = RebuildLoss(alpha_fusion=0.0 if frozen == "alpha_fusion" else 1.0)
    with pytest.raises(UserError, match=r"pretrained_part = first_stages needs rebuild\.fusion_lr_ratio and"):
        replace(config, rebuild=settings, loss=loss)


def test_windows_whose_target_is_not_rebuilt_hold_it_or_its_stand_in(config: rebuild.Config) -> None:
    """With a share of almost none: the fusion loss is that of complete windows, or that of windows without targets."""
    model, batch = network(config).eval(), batch_of(config)
    with torch.no_grad():
        model.fusion.absent["image"].fill_(3.0)
        maps, gps = model.fusion.first_maps(batch), batch["gps"]
        less = model.fusion.withhold(maps, fusion.everywhere(("image",), batch["beam"]))
        expected = {name: model.fusion.fuse(x, gps) for name, x in (("complete", maps), ("stand_in", less))}
        for mix, logits in expected.items():
            settings = replace(config, rebuild=Rebuild(share=1e-9, mix=mix))  # type: ignore[arg-type]
            loss = rebuild.loss(model, batch, settings)["fusion"][0]
            torch.testing.assert_close(loss, fusion.beam_loss(logits, batch["beam"], config.loss.beam).sum())
    assert not torch.allclose(expected["complete"], expected["stand_in"])


def test_a_learning_rate_ratio_of_zero_fixes_the_whole_fusion_network(config: rebuild.Config) -> None:
    model = network(replace(config, rebuild=Rebuild(fusion_lr_ratio=0.0)))
    assert not any(parameter.requires_grad for parameter in model.fusion.parameters())
    assert not any(module.training for module in model.fusion.modules())
    assert any(parameter.requires_grad for parameter in model.translators.parameters())


@pytest.mark.parametrize("freeze", [False, True])
def test_batch_norm_of_the_fusion_network_can_keep_its_statistics(config: rebuild.Config, freeze: bool) -> None:
    settings = Rebuild(fusion_lr_ratio=0.01, freeze_norm=freeze)
    config = replace(config, model=replace(SMALL, norm="batch"), rebuild=settings, pretrain=Pretrain(epochs=0))

    def statistics(report: Report) -> dict[str, Tensor]:
        assert report.state is not None
        weights = report.state()["model"]
        return {name: tensor.clone() for name, tensor in weights.items() if name.endswith("running_mean")}

    first, last = map(statistics, rebuild.train(Trial(config)))
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert moved == ({"heads", "translators"} if freeze else {"heads", "translators", "fusion"})
    with pytest.raises(UserError, match=r"rebuild\.freeze_norm = true needs model\.norm = batch and not group"):
        replace(config, model=SMALL, rebuild=replace(settings, freeze_norm=True))


def test_pretraining_may_hide_sensors(tmp_path: Path) -> None:
    data = simulated(tmp_path)
    for missing_prob in (0.0, 0.5):
        pretrain = Pretrain(epochs=1, optim=OPTIM, missing_prob=missing_prob)
        config = rebuild.Config(data=data, model=SMALL, optim=OPTIM, pretrain=pretrain, epochs=1)
        assert config.fusion.missing_prob == missing_prob
        rebuild.initial_weights(config, Trial(config))
    assert len(list(tmp_path.glob("fusion-*.pt"))) == 2, "networks trained otherwise are kept apart"


def test_first_stages_stay_in_eval_mode_while_the_rest_trains(config: rebuild.Config) -> None:
    encoder = network(config).fusion.encoder("lidar").resnet
    assert not encoder.embedder.training
    assert not encoder.encoder.stages[0].training
    assert encoder.encoder.stages[1].training
    encoder = network(replace(config, rebuild=Rebuild(encoders="trained"))).fusion.encoder("lidar").resnet
    assert encoder.embedder.training
    assert encoder.encoder.stages[0].training


@pytest.mark.parametrize(
    ("settings", "weights"),
    [(Rebuild(fusion_lr_ratio=0.0), RebuildLoss()), (Rebuild(fusion_lr_ratio=1.0), RebuildLoss(alpha_fusion=0.0))],
)
def test_a_fusion_network_that_stays_as_it_is_scores_as_it_did(
    config: rebuild.Config, settings: Rebuild, weights: RebuildLoss
) -> None:
    """And so its first stages, which are the encoders, cannot be trained."""
    config = replace(config, rebuild=settings, loss=weights, pretrain=Pretrain(epochs=0))
    for report in rebuild.train(Trial(config)):
        assert report.metrics["dba_full"] == pytest.approx(report.metrics["dba_upper"], rel=1e-6)
    rule = (
        r"rebuild\.encoders = trained needs rebuild\.fusion_lr_ratio and loss\.alpha_fusion above 0, not "
        rf"{settings.fusion_lr_ratio:g} and {weights.alpha_fusion:g}: .*; set rebuild\.encoders to frozen"
    )
    with pytest.raises(UserError, match=rule):
        replace(config, rebuild=replace(settings, encoders="trained"))


def test_learning_rates_of_fusion_and_rebuild(config: rebuild.Config) -> None:
    copied = rebuild.task_for(replace(config, rebuild=Rebuild(encoders="copied", fusion_lr_ratio=0.2)), {}, {})
    assert copied.lr_scale("fusion.encoders.image.resnet.encoder.stages.0.layers.0.weight") == 0.2
    task = rebuild.task_for(replace(config, rebuild=Rebuild(fusion_lr_ratio=0.2)), {}, {})
    assert task.lr_scale("fusion.head.0.weight") == 0.2
    assert task.lr_scale("translators.image.layers.0.weight") == 1.0
    assert task.lr_scale("fusion.encoders.image.resnet.encoder.stages.1.layers.0.weight") == 0.2
    assert task.lr_scale("fusion.encoders.image.resnet.encoder.stages.0.layers.0.weight") == 1.0  # trained, if at all


def test_the_target_is_not_trained_to_be_hit(config: rebuild.Config) -> None:
    # The fusion sees no target either, since each is rebuilt.
    config = replace(config, rebuild=Rebuild(encoders="trained", share=1.0), loss=RebuildLoss(1.0, 0.0, 0.0, 1.0))
    model = network(config)
    total(rebuild.loss(model, batch_of(config), config)).backward()

    def gradient(sensor: Modality) -> float:
        stem = first_stages(model.fusion, sensor)[0]
        return sum(float(x.grad.abs().sum()) for x in stem.parameters() if x.grad is not None)

    assert gradient("image") == 0
    assert gradient("lidar") > 0


def test_each_loss_is_weighted_by_its_alpha(config: rebuild.Config) -> None:
    model, batch = network(config).eval(), batch_of(config)

    def losses(weights: RebuildLoss) -> dict[str, float]:
        torch.manual_seed(0)
        pairs = rebuild.loss(model, batch, replace(config, loss=weights))
        assert {count for _, count in pairs.values()} == {4}
        return {name: summed.item() for name, (summed, _) in pairs.items()}

    plain = losses(RebuildLoss(1.0, 1.0, 1.0, 1.0))
    weighted = losses(RebuildLoss(alpha_trans=2.0, alpha_contrast=3.0, alpha_distance=5.0, alpha_fusion=0.0))
    expected = {"trans": 2.0, "contrast": 3.0, "distance": 5.0, "fusion": 0.0}
    assert weighted == pytest.approx({name: expected[name] * value for name, value in plain.items()}, rel=1e-5)


def test_rebuilt_maps_go_only_where_they_are_asked_for() -> None:
    real, rebuilt = torch.zeros(6, 2, 2, 2), torch.ones(6, 2, 4)
    maps = insert({"image": real, "lidar": real}, {"image": rebuilt}, torch.tensor([True, False, True]))
    assert maps["image"].mean((1, 2, 3)).tolist() == [1, 1, 0, 0, 1, 1]  # two frames of each window
    assert maps["lidar"] is real


def test_the_rebuild_does_not_look_at_its_target(config: rebuild.Config) -> None:
    model, batch = network(config).eval(), batch_of(config)
    blind = {**batch, "image": torch.zeros_like(batch["image"])}
    seen, unseen = (rebuild.score(model, x, config)["dba_rebuilt"][0] for x in (batch, blind))
    assert torch.equal(seen, unseen)


def test_training_reports_what_is_lost_and_won_back(config: rebuild.Config) -> None:
    cache: dict[Any, Any] = {}
    reports = list(rebuild.train(Trial(config, cache=cache)))
    assert len(reports) == 2
    for report in reports:
        wanted = {"dba_full", "dba_missing", "dba_rebuilt", "dba_unrebuilt", "trans", "loss_contrast", "loss_distance"}
        assert wanted <= report.metrics.keys()
        losses = config.loss
        assert report.metrics["loss_distance"] == losses.alpha_distance * report.metrics["unweighted_distance"] != 0
        assert "unweighted_contrast" in report.metrics
        assert report.metrics["contrasted"] == 1
    kept = list(Path(str(config.data.prepared)).glob("fusion-*.pt"))
    assert len(kept) == 1
    resumed = rebuild.train(Trial(config, resume=state_after(rebuild.train(Trial(config, cache=cache)), 1)))
    assert next(resumed).metrics["dba_rebuilt"] == reports[-1].metrics["dba_rebuilt"]


def state_after(reports: Iterator[Report], epochs: int) -> dict[str, Any]:
    for _ in range(epochs):
        report = next(reports)
    assert report.state is not None
    return report.state()


def test_a_checkpoint_of_fusion_training_can_be_given(config: rebuild.Config, checkpoint: Path) -> None:
    given = replace(config, rebuild=Rebuild(pretrained=str(checkpoint)), epochs=1)
    rebuild.prepare(given)
    assert len(list(rebuild.train(Trial(given)))) == 1


@pytest.mark.parametrize("missing", ["zerolike", "randlike"])
def test_a_checkpoint_with_tokens_serves_a_network_without(
    config: rebuild.Config, checkpoint: Path, missing: Literal["zerolike", "randlike"]
) -> None:
    """As the tables want it: fusion training has tokens, and what stands in there are zeros and noise."""
    model = replace(config.model, missing=missing)
    given = replace(config, model=model, rebuild=Rebuild(pretrained=str(checkpoint)))
    rebuild.prepare(given)
    theirs, taken = torch.load(checkpoint)["model"], rebuild.initial_weights(given, Trial(given))
    assert {name for name in theirs if name not in taken} == {
        f"absent.{sensor}" for sensor in ("image", "lidar", "radar")
    }
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in taken.items())


@pytest.fixture(scope="module")
def checkpoint(config: rebuild.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an epoch of fusion training."""
    file = tmp_path_factory.mktemp("exported") / "checkpoint.pt"
    torch.save(state_after(fusion.train(Trial(replace(config.fusion, score_without=()))), 1), file)
    return file


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("model", {"block": "bi"}, "model.block = cs_bi, and here that is bi"),
        ("model", {"align_backward": False}, "model.align_backward = True, and here that is False"),
        ("data", {"gps_repr": "minmax"}, "data.gps_repr = local, and here that is minmax"),
        ("data", {"split_seed": 1}, "data.split_seed = 290, and here that is 1"),
        ("data", {"holdout": 0.5}, "data.holdout = 0.2, and here that is 0.5"),
        ("data", {"steps": 2, "simulated": Simulated(passes=8, frames=15)}, "data.steps = 1, and here that is 2"),
        (
            "data",
            {"simulated": Simulated(passes=9)},
            "data.simulated = {'passes': 8, 'frames': 8, 'seed': 0}, and here ",
        ),
    ],
    ids=str,
)
def test_a_checkpoint_trained_otherwise_is_refused(
    part: str, change: dict[str, Any], told: str, config: rebuild.Config, checkpoint: Path
) -> None:
    """Its weights have the same shapes; but they mean something else, or have seen what is held out."""
    other = replace(config, **{part: replace(getattr(config, part), **change)})
    with pytest.raises(UserError, match=rf"rebuild\.pretrained = .*: it was trained with {re.escape(told)}"):
        rebuild.prepare(replace(other, rebuild=Rebuild(pretrained=str(checkpoint))))


def test_what_is_no_checkpoint_is_a_mistake_of_the_user(
    config: rebuild.Config, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torn.pt").write_bytes(checkpoint.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("weights")
    torch.save([1], tmp_path / "list.pt")
    told = {
        "/nowhere.pt": "there is no such file",
        str(checkpoint.parent): f"it is a folder; give the checkpoint in it, {checkpoint} if exported",
        str(tmp_path / "torn.pt"): "it cannot be read as a checkpoint: ",
        str(tmp_path / "text.pt"): "it cannot be read as a checkpoint: ",
        str(tmp_path / "list.pt"): "not a checkpoint of the training loop, it has no entry `model`",
    }
    for path, why in told.items():
        with pytest.raises(UserError, match=f"^{re.escape(f'rebuild.pretrained = {path}: {why}')}"):
            rebuild.prepare(replace(config, rebuild=Rebuild(pretrained=path)))
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    rebuild.prepare(replace(config, rebuild=Rebuild(pretrained="~/checkpoint.pt")))


@pytest.mark.parametrize(
    ("upper", "missing", "now", "expected"),
    [(0.9, 0.5, 0.7, {"recovered": 0.5}), (0.9, 0.5, 0.4, {"recovered": -0.25}), (0.5, 0.5, 0.7, {})],
)
def test_recovered(upper: float, missing: float, now: float, expected: dict[str, float]) -> None:
    assert rebuild.recovered(upper, missing, now) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "sizes", "contrasted"),
    [
        (24, 24, 1, [24], 1.0),
        (24, 16, 1, [12, 12], 1.0),
        (25, 8, 2, [7, 6, 6, 6], 1.0),
        (9, 8, 1, [5, 4], 1.0),
        (3, 8, 2, [2, 1], 2 / 3),
        (5, 1, 1, [1, 1, 1, 1, 1], 0.0),
        (2, 8, 4, [1, 1], 0.0),  # one window each of two ranks, none of the others
    ],
)
def test_the_chance_level_of_the_contrast_is_that_of_the_micro_batches(
    batch: int, micro_batch: int, ranks: int, sizes: list[int], contrasted: float
) -> None:
    loss = RebuildLoss(alpha_contrast=0.5)
    assert rebuild.micro_sizes(batch, micro_batch, ranks) == sizes
    signs = rebuild.contrast_signs(sizes, loss)
    chance = sum(size * contrast_chance(size, loss.temperature, loss.contrast_form) for size in sizes)
    assert signs == pytest.approx({"loss_contrast_chance": 0.5 * chance / batch, "contrasted": contrasted})


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        ({"batch_size": 1}, r"batch_size = 1 and optim\.micro_batch = None"),
        ({"batch_size": 8, "micro_batch": 1}, r"batch_size = 8 and optim\.micro_batch = 1"),
    ],
)
def test_a_contrast_of_windows_that_are_always_alone_is_refused(
    config: rebuild.Config, optim: dict[str, Any], told: str
) -> None:
    """Its loss would be 0, as if it were learnt."""
    alone = replace(OPTIM, **optim)
    with pytest.raises(UserError, match=rf"^loss\.alpha_contrast = 1 needs two windows in a micro-batch, .*{told}"):
        replace(config, optim=alone)
    replace(config, optim=alone, loss=RebuildLoss(alpha_contrast=0.0))


@pytest.mark.slow
def test_a_contrast_that_memory_left_no_pairs_for_is_reported_as_none(
    config: rebuild.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, pretrain=Pretrain(epochs=0), optim=replace(OPTIM, batch_size=2), epochs=1)
    alone = replace(config, optim=replace(OPTIM, batch_size=1), loss=replace(config.loss, alpha_contrast=0.0))
    need_mb = [rebuild.memory_need(Trial(one)) / MIB for one in (alone, config)]
    (report,) = rebuild.train(Trial(config, memory_limit_mb=sum(need_mb) / 2))
    assert (report.metrics["micro_batch"], report.metrics["contrasted"], report.metrics["loss_contrast"]) == (1, 0, 0)
    assert "so the contrastive loss is 0 and teaches nothing" in capsys.readouterr().out


def test_the_chance_level_of_the_contrast_is_that_of_an_epoch_shorter_than_a_batch(config: rebuild.Config) -> None:
    config = replace(config, pretrain=Pretrain(epochs=0), optim=replace(OPTIM, batch_size=8, epoch_samples=3), epochs=1)
    (report,) = rebuild.train(Trial(config))
    expected = contrast_chance(3, config.loss.temperature, config.loss.contrast_form)
    assert report.metrics["loss_contrast_chance"] == pytest.approx(config.loss.alpha_contrast * expected)


@torch.no_grad()
def test_the_health_signs_are_those_of_what_the_objective_scores(config: rebuild.Config) -> None:
    model, batch = network(config).eval(), batch_of(config)
    model.fusion.absent["image"].fill_(3.0)  # its stand-in is nothing like what is rebuilt
    maps = model.fusion.first_maps(batch)
    rebuilt = insert(maps, model.translate(model.parts(maps)), torch.ones(4, dtype=torch.bool))
    less = model.fusion.withhold(maps, fusion.everywhere(("image",), batch["beam"]))
    found = rebuild.score(model, batch, config)
    for variant, same in ((rebuilt, True), (less, False), (maps, False)):
        with fusion_signs(model.fusion) as signs:
            model.fusion.fuse(variant, batch["gps"])
        assert len(signs) == 4 * 4
        assert all(torch.equal(found[name][0], sign[0]) for name, sign in signs.items()) == same


def test_what_is_reported_is_measured_by_the_network_as_it_came(
    config: rebuild.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "scores_before", lambda *_: {"dba_upper": 0.9, "dba_missing": 0.1})
    config = replace(config, optim=replace(OPTIM, micro_batch=5), pretrain=Pretrain(epochs=0), epochs=1)
    (report,) = rebuild.train(Trial(config))
    assert report.metrics["recovered"] == pytest.approx((report.metrics["dba_rebuilt"] - 0.1) / 0.8)
    assert report.metrics["loss_contrast_chance"] == contrast_chance(4, 0.1)
    assert report.metrics["contrasted"] == 1


@pytest.mark.parametrize(
    ("settings", "size"), [({"micro_batch": 5}, 5), ({"micro_batch": 5, "eval_batch": 3}, 3), ({}, None)]
)
def test_the_network_as_it_came_is_measured_by_as_many_windows_at_once_as_the_trial_may_take(
    settings: dict[str, Any], size: int | None, config: rebuild.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int | None] = []

    def evaluated(
        task: object, network: object, windows: object, trial: Trial, at_once: int | None
    ) -> dict[str, float]:
        sizes.append(at_once)
        return {"dba": 0.9, "dba_missing": 0.1}

    monkeypatch.setattr(rebuild, "evaluate", evaluated)
    config = replace(config, optim=replace(OPTIM, **settings))
    rebuild.scores_before(config, fusion.build(config.fusion), {}, Trial(config))
    assert sizes == [size]


def test_noise_in_the_place_of_a_sensor_is_the_same_whatever_was_drawn_before(config: rebuild.Config) -> None:
    config = replace(config, model=replace(SMALL, missing="randlike"))
    untrained, found = fusion.build(config.fusion).eval(), []
    for drawn in (1, 1000, 100_000):
        torch.rand(drawn)
        found.append(rebuild.scores_before(config, untrained, {}, Trial(config)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ("lidar", "image")}, r"rebuild\.source and rebuild\.target both name \['image'\]"),
        ({"target": ()}, r"rebuild\.target is empty"),
        ({"source": ("lidar", "lidar")}, r"rebuild\.source names one twice"),
        ({"source": ("gps",)}, r"rebuild\.source names gps"),
        ({"share": 0.0}, r"rebuild\.share = 0\.0"),
        ({"dropout": 1.0}, r"rebuild\.dropout = 1\.0"),
        ({"fusion_lr_ratio": -1.0}, r"rebuild\.fusion_lr_ratio = -1\.0"),
        ({"mistakes": ("eval_mode", "eval_mode")}, r"rebuild\.mistakes names one twice"),
        (
            {"mistakes": ("eval_mode", "picture_scale")},
            r"needs rebuild\.encoders = copied and not frozen: picture_scale",
        ),
        ({"encoders": "copied", "cache_features": True}, r"needs rebuild\.encoders = frozen and not copied"),
    ],
)
def test_settings_that_clash_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rebuild(**settings)


def test_a_mistake_that_could_not_show_is_refused() -> None:
    settings = Rebuild(source=("lidar",), target=("radar",), encoders="copied", mistakes=("training_mode",))
    with pytest.raises(UserError, match=r"needs model\.norm = batch and not group"):
        rebuild.Config(model=SMALL, rebuild=settings)
    with pytest.raises(UserError, match=r"needs image among data\.modalities \['lidar', 'radar'\]"):
        rebuild.Config(Data(modalities=("lidar", "radar")), rebuild=replace(settings, mistakes=("picture_scale",)))


def test_a_sensor_that_is_not_read_cannot_take_part() -> None:
    with pytest.raises(UserError, match=r"rebuild\.source names lidar, which data\.modalities \['image'"):
        rebuild.Config(data=Data(modalities=("image", "radar")))


def test_weights_that_are_negative_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.alpha_trans = -1"):
        RebuildLoss(alpha_trans=-1)
    with pytest.raises(UserError, match=r"loss\.temperature = 0"):
        RebuildLoss(temperature=0)
    with pytest.raises(UserError, match=r"pretrain\.epochs = -1"):
        Pretrain(epochs=-1)
    with pytest.raises(UserError, match=r"pretrain\.missing_prob = 2 must lie between 0 and 1"):
        Pretrain(missing_prob=2)


def test_a_loss_of_weight_zero_has_no_value_without_it() -> None:
    metrics = {"loss_trans": 6.0, "loss_contrast": 0.0, "loss_distance": 0.5, "loss_fusion": 1.0}
    weights = RebuildLoss(alpha_trans=3.0, alpha_contrast=0.0, alpha_distance=0.1)
    assert rebuild.unweighted(metrics, weights) == {
        "unweighted_trans": 2.0,
        "unweighted_distance": 5.0,
        "unweighted_fusion": 1.0,
    }
