"""The rebuild as it was published: encoders that the heads have for themselves, and the program's mistakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
from small_beam import SMALL, simulated
from torch import Tensor

from trainables.beam import fusion, rebuild
from trainables.beam.config import Mistake, Pretrain, Rebuild
from trainables.beam.data import samples
from trainables.beam.rebuild_network import RebuildNetwork, first_stages
from trainables.contract import Trial
from trainables.loop import evaluating
from trainables.optim import Ema, Optim

OPTIM = Optim(lr=1e-2, batch_size=8)
NOTHING = Pretrain(epochs=0)
MISTAKES: tuple[Mistake, ...] = get_args(Mistake)
PUBLISHED = Rebuild(encoders="copied", fusion_lr_ratio=1.0, share=0.25, mix="stand_in", mistakes=MISTAKES)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> rebuild.Config:
    data, model = simulated(tmp_path_factory.mktemp("cache")), replace(SMALL, norm="batch")
    made = rebuild.Config(data=data, model=model, optim=OPTIM, rebuild=PUBLISHED, pretrain=NOTHING, epochs=3)
    rebuild.prepare(made)
    return made


def without(config: rebuild.Config, *mistakes: Mistake) -> rebuild.Config:
    """The published setting with these mistakes alone."""
    return replace(config, rebuild=replace(PUBLISHED, mistakes=mistakes))


def network(config: rebuild.Config) -> RebuildNetwork:
    torch.manual_seed(0)
    return rebuild.build(config, fusion.build(config.fusion).state_dict())


def batch_of(config: rebuild.Config, side: Literal["train", "val"] = "train") -> dict[str, Tensor]:
    found: dict[str, Tensor] = samples(config, side)[torch.arange(4)]
    return found


def loss_of(model: RebuildNetwork, config: rebuild.Config) -> Tensor:
    pairs = rebuild.loss(model, batch_of(config), config)
    return torch.stack([torch.as_tensor(summed) for summed, _ in pairs.values()]).sum()


def same(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a.keys() & b.keys())


def test_copied_encoders_stay_while_the_fusion_network_trains_its_own(config: rebuild.Config) -> None:
    """With a stand-in or a rebuilt map in its place the real target is never seen: nothing trains its first stage."""
    config = without(config)
    model = network(config)
    copies, own = (
        {name: tensor.clone() for name, tensor in part.named_parameters()} for part in (model.copies, model.fusion)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    loss_of(model, config).backward()
    optimizer.step()
    assert same(copies, dict(model.copies.named_parameters()))
    moved = {name for name, tensor in model.fusion.named_parameters() if not torch.equal(tensor, own[name])}
    stem = "resnet.embedder.embedder.convolution.weight"
    first = {sensor: f"encoders.{sensor}.{stem}" in moved for sensor in ("image", "lidar", "radar")}
    assert first == {"image": False, "lidar": True, "radar": True}
    assert {name for name in moved if name.startswith("head.")}


def test_copies_see_what_the_fusion_network_s_own_encoders_did(config: rebuild.Config) -> None:
    model, batch = network(without(config)).eval(), batch_of(config, "val")
    seen = model.seen_maps(batch, fused := model.fused_maps(batch))
    assert set(seen) == {"image", "lidar", "radar"}
    assert same(seen, fused)


def test_a_copy_is_a_first_stage_and_no_more(config: rebuild.Config) -> None:
    model = network(config)
    for sensor in model.fusion.sensors:
        own = [tensor for part in first_stages(model.fusion, sensor) for tensor in part.state_dict().values()]
        copied = list(model.copies[sensor].state_dict().values())
        assert len(copied) == len(own)
        assert all(torch.equal(a, b) for a, b in zip(copied, own, strict=True))
        assert not {tensor.data_ptr() for tensor in copied} & {tensor.data_ptr() for tensor in own}


def test_after_a_validation_nothing_returns_to_training_mode(config: rebuild.Config) -> None:
    config = without(config, "eval_mode")
    model = network(config)

    def training() -> bool:
        return any(part.training for root in (model.heads, model.translators, model.fusion) for part in root.modules())

    def validate() -> None:
        with evaluating(model, Ema(model, Optim())):
            rebuild.score(model, batch_of(config, "val"), config)

    loss_of(model, config)
    assert training()
    validate()
    first, second = loss_of(model, config), loss_of(model, config)
    assert not training()
    assert first == second, "nothing drops out, and every window has its target rebuilt"
    torch.testing.assert_close(first, loss_of(model, replace(config, rebuild=replace(config.rebuild, share=1.0))))
    validate()
    assert loss_of(model, config) == first
    assert not training()


def test_without_the_mistake_training_goes_on_in_training_mode(config: rebuild.Config) -> None:
    config = without(config)
    model = network(config)
    with evaluating(model, Ema(model, Optim())):
        rebuild.score(model, batch_of(config, "val"), config)
    loss_of(model, config)
    assert model.heads.training
    assert model.translators.training
    assert model.fusion.training


@pytest.mark.parametrize("mistaken", [True, False])
def test_encoders_in_training_mode_go_by_each_batch(config: rebuild.Config, mistaken: bool) -> None:
    model = network(without(config, "training_mode") if mistaken else without(config)).eval()
    batch = batch_of(config, "val")

    def seen_of_first(count: int) -> Tensor:
        few = {name: values[:count] for name, values in batch.items()}
        return model.seen_maps(few, model.fused_maps(few))["radar"][:2]  # two instants of the first window

    alone, among = seen_of_first(1), seen_of_first(4)
    assert torch.allclose(alone, among, atol=1e-5) != mistaken
    means = {name: mean.clone() for name, mean in model.copies.named_buffers() if name.endswith("running_mean")}
    seen_of_first(4)
    buffers = dict(model.copies.named_buffers())
    assert means
    assert all(torch.equal(mean, buffers[name]) != mistaken for name, mean in means.items() if "radar" in name)


def test_pictures_are_normalised_twice_and_not_at_all(config: rebuild.Config) -> None:
    model, batch = network(without(config, "picture_scale")), batch_of(config)
    for part in (model.fusion, model.copies):
        part.eval()
    encoder, raw = model.fusion.encoder("image"), batch["image"].flatten(0, 1)
    once, twice = encoder.normalise(raw), encoder.normalise(encoder.normalise(raw))
    fused = model.fused_maps(batch)
    torch.testing.assert_close(fused["image"], encoder.first(twice))
    torch.testing.assert_close(model.seen_maps(batch, fused)["image"], encoder.first(once))
    model.eval()
    fused = model.fused_maps(batch)
    torch.testing.assert_close(fused["image"], encoder.first(once))
    torch.testing.assert_close(model.seen_maps(batch, fused)["image"], encoder.first(raw.float()))


@pytest.mark.slow
def test_a_trial_that_is_resumed_goes_on_with_its_mistakes(config: rebuild.Config) -> None:
    config = without(config, "eval_mode", "picture_scale")
    trial = rebuild.train(Trial(config))
    first = next(trial)
    assert first.state is not None
    after_first = first.state()
    uninterrupted, resumed = list(trial), list(rebuild.train(Trial(config, resume=after_first)))
    for one, other in zip(uninterrupted, resumed, strict=True):
        timed = {"samples_per_s": 0.0}
        assert {**one.metrics, **timed} == {**other.metrics, **timed}


def test_predictions_are_those_that_were_scored(config: rebuild.Config) -> None:
    model, batch = network(config).eval(), batch_of(config, "val")
    with torch.no_grad():
        maps = model.fused_maps(batch)
        seen = model.seen_maps(batch, maps)
        rebuilt = model.translate(model.parts({sensor: seen[sensor] for sensor in model.source}))
        maps["image"] = rebuilt["image"].view_as(maps["image"])
        scored = model.fusion.fuse(maps, batch["gps"])
        blind = {name: values for name, values in batch.items() if name != "image"}
        torch.testing.assert_close(rebuild.logits_without_targets(model, blind), scored)
