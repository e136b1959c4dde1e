"""Behaviour that shows in how mice move is learnt in the laptop profile, and random labels are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.space.file import load_space
from trainables.contract import Trial
from trainables.mabe.tagging import Config, prepare, train

SPACE = Path(__file__).parents[1] / "search_spaces/mabe.yaml"


def last_scores(config: Config) -> dict[str, float]:
    prepare(config)
    *_, last = train(Trial(config))
    return dict(last.metrics)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The first of the known settings, as the laptop profile has it, for half of its epochs."""
    space, trainable = load_space(SPACE, profile="laptop", has_gpu=False)
    found: Config = trainable.config(space.config(space.try_first[0].values))
    return replace(found, data=replace(found.data, prepared=str(tmp_path)), epochs=4)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["behaviour", "random"])
def test_only_what_shows_in_the_motion_is_learnt(config: Config, labels: Any) -> None:
    simulated = replace(config.data.simulated, labels=labels)
    scores = last_scores(replace(config, data=replace(config.data, simulated=simulated)))
    if labels == "behaviour":
        assert scores["macro_f1"] > 0.6
        assert min(scores["f1_investigation"], scores["f1_mount"], scores["f1_attack"]) > 0.4
    else:
        assert scores["macro_f1"] < 0.3  # a guess that knows the classes' shares alone gets 0.25
