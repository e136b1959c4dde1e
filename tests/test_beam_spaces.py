"""The beam family's spaces at their full size: the last report, which decides, comes when the rate has come down."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest

from search.space.file import load_space
from trainables.beam.config import Mistake
from trainables.beam.network import FusionNetwork
from trainables.contract import Diverged, Trial
from trainables.optim import Optim, lr_factor

SPACES = Path(__file__).parents[1] / "search_spaces"
EPOCHS = 6


@pytest.mark.parametrize("name", ["blocks", "fusion", "rebuild"])
def test_trials_are_compared_at_the_end_of_a_cycle(name: str) -> None:
    space, trainable = load_space(SPACES / f"{name}.yaml", has_gpu=True)
    config = trainable.config(space.config(space.draw(random.Random(0))))
    trained: list[tuple[Optim, int]] = [(config.optim, config.epochs)]
    if name != "rebuild":  # whose rungs on the way down have not been measured
        trained += [(config.optim, rung) for rung in space.scheduler.rungs(config.epochs)]
    if name == "rebuild":
        trained.append((config.pretrain.optim, config.pretrain.epochs))
    for optim, epochs in trained:
        assert lr_factor(optim, epochs - 0.5, epochs) < 0.1


@pytest.mark.parametrize("name", ["fusion", "rebuild"])
def test_what_is_published_can_be_trained_as_it_was(name: str) -> None:
    """By the rates of the notes' schedule, with their network at its size, and by their program's mistakes."""
    space, trainable = load_space(SPACES / f"{name}.yaml", profile="published", has_gpu=True)
    config = trainable.config(space.config({}))
    whole = config if name == "fusion" else config.fusion
    assert (whole.data.split, whole.data.holdout, whole.data.split_seed) == ("legacy", 0.1, 100)
    assert whole.data.augment == (47 if name == "fusion" else 0)
    assert (whole.epochs, whole.optim.batch_size, whole.optim.precision) == (50, 24, "fp32")
    assert whole.optim.clip_norm is None
    rates = [whole.optim.lr * lr_factor(whole.optim, epoch, 50) for epoch in (0, 4, 10, 25)]
    assert rates == pytest.approx([2.5e-6, 3.6e-5, 1.0e-4, 1.25e-4], rel=0.02)
    network = FusionNetwork(replace(whole.model, pretrained_encoders=None), whole.data, gps_width=2)
    assert sum(parameter.numel() for parameter in network.parameters()) == 103_461_924
    if name == "rebuild":
        assert config.optim.lr * lr_factor(config.optim, 7, config.epochs) == 2.5e-6
        assert set(config.rebuild.mistakes) == set(get_args(Mistake))
        assert space.constraints == {}


@pytest.mark.parametrize("profile", [None, "laptop"])
def test_a_search_over_the_history_scores_all_on_the_same_windows(profile: str | None) -> None:
    space, _ = load_space(SPACES / "blocks.yaml", profile=profile, has_gpu=profile is None)
    (history,) = (item.domain for item in space.parameters if item.name == "data.history")
    assert space.tree["data"]["longest_history"] == max(history.grid())


@pytest.mark.slow
def test_the_first_known_block_blows_up_as_published_and_not_in_its_fixed_form() -> None:
    """P1 of the notes, at the rate that the small network takes: as far as the epoch after that of the NaN."""
    space, trainable = load_space(SPACES / "blocks.yaml", profile="laptop", has_gpu=False)
    config = trainable.config(space.config(space.try_first[0].values))
    model = replace(config.model, mamba_init="mamba", residual=True)
    assert config.model.block == "uni"
    with pytest.raises(Diverged) as blown_up:
        list(islice(trainable.train(Trial(config)), EPOCHS))
    assert blown_up.value.details["found"]["reproduced"]
    reports = list(islice(trainable.train(Trial(replace(config, model=model))), EPOCHS))
    assert len(reports) == EPOCHS
