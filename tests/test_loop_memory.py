"""The loop under a memory limit: the micro-batch shrinks, and the effective batch stays what was asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from toy_task import CPU, SEED, TOY, WIDTH, Config, toy_loss

from trainables.contract import Trial
from trainables.loop import Task, fit, step_memory
from trainables.memory import MIB, LiveBytes
from trainables.optim import Optim
from trainables.samples import Batch
from trainables.step import Pairs

SAMPLES = 96


def config_of(batch_size: int) -> Config:
    return Config(Optim(lr=0.01, batch_size=batch_size), epochs=1, samples=SAMPLES)


class Family:
    """The toy family that writes down how many samples each pass had, and the gradient of each training step."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.gradients: list[torch.Tensor] = []

    @property
    def task(self) -> Task:
        def model(config: Config) -> nn.Module:
            network = TOY.model(config)
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.gradients.append(torch.zeros(0) if p.grad is None else p.grad.clone())
                )
            return network

        def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
            self.passes.append(len(batch["index"]))
            return toy_loss(network, batch, config)

        return replace(TOY, model=model, loss=loss)

    def run(self, config: Config, limit_mb: float | None, cache: dict[Any, Any] | None = None) -> dict[str, float]:
        self.passes.clear()
        self.gradients.clear()
        trial = Trial(config, seed=SEED, device=CPU, cache={} if cache is None else cache, memory_limit_mb=limit_mb)
        *_, report = fit(self.task, trial)
        return dict(report.metrics)


def need_mb(samples: int) -> float:
    """What a step on so many samples takes: the least limit under which they stay together."""
    return step_memory(Family().task, Trial(config_of(samples), device=CPU)) / MIB


@pytest.fixture(scope="module")
def limit_mb() -> float:
    """So that four samples fit, and not five."""
    limit = need_mb(4)
    assert need_mb(5) > limit
    return limit


@pytest.mark.parametrize("batch_size", [2, 3, 4, 6, 8, 16, 24, 48])
def test_every_batch_is_taken_in_micro_batches_that_fit(batch_size: int, limit_mb: float) -> None:
    family = Family()
    metrics = family.run(config_of(batch_size), limit_mb)
    assert metrics["micro_batch"] == min(batch_size, 4)
    steps = SAMPLES // batch_size
    assert sum(family.passes[-steps * -(-batch_size // 4) :]) == SAMPLES, (
        "each sample once: the effective batch is kept"
    )
    without = Family().run(config_of(batch_size), None)
    assert without.pop("micro_batch") == batch_size
    for name in ("loss", "grad_norm", "error", "update_ratio"):
        assert metrics[name] == pytest.approx(without[name], rel=1e-4)


def test_accumulated_gradients_are_those_of_the_large_batch(limit_mb: float) -> None:
    small, large = Family(), Family()
    small.run(config_of(48), limit_mb)
    large.run(config_of(48), None)
    parameters = len(large.gradients) // 2  # two steps
    whole = large.gradients[:parameters]
    first_step = small.gradients[-2 * 12 * parameters :][11 * parameters : 12 * parameters]  # the twelfth micro-batch
    for mine, theirs in zip(first_step, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_a_shape_is_probed_once_in_a_search(limit_mb: float) -> None:
    family, cache = Family(), dict[Any, Any]()
    family.run(config_of(48), limit_mb, cache)
    assert len(family.passes) > 24, "the probe has passes of its own"
    family.run(config_of(48), limit_mb, cache)
    assert family.passes == [4] * 24
    family.run(replace(config_of(32), optim=Optim(lr=0.3, batch_size=32, clip_norm=0.1)), limit_mb, cache)
    assert family.passes == [4] * 24, "what is searched is no other shape"
    family.run(replace(config_of(48), loudness=0.5), limit_mb, cache)
    assert family.passes == [4] * 24, "nor is a weight of the loss"
    family.run(replace(config_of(48), epochs=2), limit_mb, cache)
    assert family.passes == [4] * 48, "nor is a longer training"


@pytest.mark.parametrize("change", [{"loudness": 0.0}, {"lengths": True}])
def test_what_only_the_loss_reads_is_probed_again(change: dict[str, Any], limit_mb: float) -> None:
    family, cache = Family(), dict[Any, Any]()
    family.run(config_of(48), limit_mb, cache)
    family.run(replace(config_of(48), **change), limit_mb, cache)
    assert len(family.passes) > 24


def test_a_single_sample_that_does_not_fit_ends_the_trial(limit_mb: float) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"a single sample does not fit .* the limit is 0\.00 MiB"):
        Family().run(config_of(8), 1024 / MIB)


@pytest.mark.parametrize("batch_size", [2, 4, 24])
def test_what_a_step_is_said_to_take_is_the_least_limit_that_leaves_it_whole(batch_size: int) -> None:
    trial = Trial(config_of(batch_size), seed=SEED, device=CPU)
    said_bytes = step_memory(TOY, trial)
    for limit_bytes, whole in ((said_bytes, True), (said_bytes - 1, False)):
        (report,) = fit(TOY, replace(trial, cache={}, memory_limit_mb=limit_bytes / MIB))
        assert (report.metrics["micro_batch"] == batch_size) == whole


def test_a_step_for_which_memory_runs_out_is_said_to_take_all_of_it() -> None:
    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        raise torch.OutOfMemoryError("no room")

    assert step_memory(replace(TOY, loss=loss), Trial(config_of(8), device=CPU)) == sys.maxsize


@pytest.mark.parametrize("ema", [None, 0.9])
def test_training_takes_no_more_than_a_step_is_said_to_take(ema: float | None) -> None:
    """Not even at the end of an epoch, where a network's weights are most of what it takes."""

    def model(config: Config) -> nn.Module:
        return nn.Sequential(*(nn.Linear(size, 300) for size in (WIDTH, *[300] * 9)), nn.Linear(300, WIDTH))

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        return {"square": ((network(batch["x"]) - batch["y"]).square().sum(), len(batch["x"]))}

    task = replace(TOY, model=model, loss=loss)
    trial = Trial(Config(Optim(lr=1e-3, batch_size=9, ema=ema)), seed=SEED, device=CPU)
    said_bytes = step_memory(task, trial)
    with LiveBytes(nn.Identity()) as live:
        assert len(list(fit(task, trial))) == 2
    assert live.peak <= said_bytes


@pytest.mark.parametrize("optim", [Optim(batch_size=48), Optim(batch_size=8, micro_batch=48)])
def test_no_more_samples_are_probed_than_a_batch_can_hold(optim: Optim) -> None:
    family = Family()
    metrics = family.run(Config(optim, epochs=1, samples=8), limit_mb=1024.0)
    assert metrics["micro_batch"] == 8
    assert set(family.passes) == {8}


def test_what_a_step_takes_is_tried_once_for_each_shape() -> None:
    passes: list[int] = []

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        passes.append(len(batch["index"]))
        return toy_loss(network, batch, config)

    cache: dict[Any, Any] = {}
    watched = replace(TOY, loss=loss)
    needs = [step_memory(watched, Trial(config_of(size), device=CPU, cache=cache)) for size in (8, 8, 48, 8)]
    assert passes == [8, 48]
    assert needs[0] == needs[1] == needs[3] < needs[2]
