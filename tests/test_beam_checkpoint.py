"""Fusion training that goes on from a checkpoint of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_beam import SMALL, simulated
from torch import Tensor

from trainables.beam import fusion, rebuild
from trainables.beam.checkpoint import given_weights, unseen_settings
from trainables.beam.config import Data, Rebuild
from trainables.contract import Report, Trial, UserError
from trainables.optim import Optim


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> fusion.Config:
    data = simulated(tmp_path_factory.mktemp("cache"))
    made = fusion.Config(data=data, model=SMALL, optim=Optim(lr=3e-3, batch_size=8, ema=0.9), epochs=2)
    fusion.prepare(made)
    return made


@pytest.fixture(scope="module")
def trained(config: fusion.Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A checkpoint, and the last report of its training."""
    file = tmp_path_factory.mktemp("exported") / "checkpoint.pt"
    *_, last = fusion.train(Trial(config))
    assert last.state is not None
    torch.save(last.state(), file)
    return file, last


def test_it_goes_on_from_the_weights_that_were_scored(config: fusion.Config, trained: tuple[Path, Report]) -> None:
    """At a rate of almost nothing the first report is that of the checkpoint."""
    file, last = trained
    still = Optim(lr=1e-12, batch_size=8, weight_decay=0.0)
    going_on = replace(config, pretrained=str(file), optim=still, epochs=1)
    assert fusion.prepare(going_on) == fusion.prepare(config)
    (report,) = fusion.train(Trial(going_on))
    assert report.metrics["dba"] == pytest.approx(last.metrics["dba"], abs=1e-6)
    assert report.metrics["dba"] != pytest.approx(next(fusion.train(Trial(config))).metrics["dba"], abs=1e-6)


def test_encoders_from_elsewhere_are_not_asked_for(config: fusion.Config, trained: tuple[Path, Report]) -> None:
    """The checkpoint has them."""
    model = replace(SMALL, norm="batch", pretrained_encoders="/nowhere")
    with pytest.raises(UserError, match="there is no folder /nowhere"):
        fusion.prepare(replace(config, model=model))
    file = trained[0].with_name("batch.pt")
    network = fusion.build(replace(config, model=replace(model, pretrained_encoders=None)))
    torch.save({"model": network.state_dict()}, file)
    built = fusion.build(replace(config, model=model, pretrained=str(file)))
    theirs: dict[str, Tensor] = network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in built.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_told_before_anything_starts(
    config: fusion.Config, trained: tuple[Path, Report]
) -> None:
    file, _ = trained
    with pytest.raises(UserError, match=r"^pretrained = /nowhere\.pt: there is no such file$"):
        fusion.prepare(replace(config, pretrained="/nowhere.pt"))
    seen = replace(config, data=replace(config.data, split_seed=1), pretrained=str(file))
    with pytest.raises(
        UserError, match=r"^pretrained = .*it was trained with data\.split_seed = 290, and here that is 1"
    ):
        fusion.prepare(seen)
    rebuilt = rebuild.Config(data=config.data, model=SMALL, rebuild=Rebuild(mistakes=("eval_mode",)))
    other = file.with_name("rebuild.pt")
    torch.save({"model": rebuild.build(rebuilt, rebuild.untrained_weights(rebuilt)).state_dict()}, other)
    with pytest.raises(UserError, match=r"^pretrained = .*: a checkpoint of a rebuild, and not of fusion training$"):
        fusion.prepare(replace(config, pretrained=str(other)))
    wider = replace(config, model=replace(SMALL, channels=(4, 8, 12, 20)), pretrained=str(file))
    with pytest.raises(UserError, match=r"^pretrained = .*: weights of another fusion network: "):
        fusion.prepare(wider)


def refusal(theirs: Data, ours: Data, file: Path) -> str:
    """Why a checkpoint that was trained with one setting of the data may not be used with another; empty if it may."""
    torch.save({"model": {}, "settings": unseen_settings(fusion.Config(data=theirs))}, file)
    try:
        given_weights("pretrained", str(file), fusion.Config(data=ours))
    except UserError as error:
        return str(error)
    return ""


def test_the_adaptation_set_may_be_trained_on_afterwards_and_never_validated_on(tmp_path: Path) -> None:
    """The protocol of the challenge is to go on with the adaptation set."""
    file, scored = tmp_path / "x.pt", Data(root="r")
    trained = replace(scored, adaptation="train")
    assert not refusal(scored, trained, file)
    assert not refusal(trained, trained, file)
    assert "trained with data.adaptation = train, and here that is score" in refusal(trained, scored, file)


def test_blocks_must_be_as_long_as_they_were(tmp_path: Path) -> None:
    file, data = tmp_path / "x.pt", Data(root="r", history=20, steps=5)
    assert not refusal(data, replace(data, block=172), file)
    assert "trained with data.block = 172, and here that is 50" in refusal(data, replace(data, block=50), file)
    legacy = replace(data, split="legacy")
    assert not refusal(legacy, replace(legacy, block=50), file)
