"""The guard of the loop: what its post-mortem holds, the spike rule, and fp16's overflows."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_task import (
    CPU,
    TOY,
    WIDTH,
    Config,
    Run,
    SpoilGradient,
    assert_same,
    order,
    run,
    toy_data,
    toy_loss,
    toy_model,
    toy_score,
    weights_of,
)

from trainables.contract import Diverged, Trial, UserError
from trainables.guard import KEPT, SETTLED, usual_loss
from trainables.loop import Task, fit
from trainables.optim import Optim, Spike
from trainables.samples import Batch, Ranks, TensorSamples
from trainables.step import Pairs

BATCH = Config(Optim(lr=0.01, batch_size=8), epochs=3)


class Poisoned(nn.Module):
    """The layer `inner`, with NaN for the sample `index` in what it gives or in the gradient it passes on."""

    def __init__(self, inner: nn.Module, where: str) -> None:
        super().__init__()
        self.inner, self.where, self.bad_B = inner, where, torch.zeros(0, dtype=torch.bool)

    def forward(self, x_BC: Tensor) -> Tensor:
        if self.where == "forward":
            return self.inner(x_BC).masked_fill(self.bad_B[:, None], torch.nan)
        return self.inner(SpoilGradient.apply(x_BC, self.bad_B[:, None]))


def poisoned(layer: int, where: str, index: int) -> Any:
    """The toy task with a poisoned layer."""

    def model(config: Config) -> nn.Module:
        network = toy_model(config)
        network[layer] = Poisoned(network[layer], where)  # type: ignore[index, operator]
        return network

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        network[layer].bad_B = batch["index"] == index  # type: ignore[index]
        return toy_loss(network, batch, config)

    return replace(TOY, model=model, loss=loss)


def diverged(done: Run) -> dict[str, Any]:
    assert done.diverged is not None
    json.loads(json.dumps(done.diverged.details, allow_nan=False))
    return dict(done.diverged.details)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_module_whose_output_is_nan_is_named(layer: int, precision: Any) -> None:
    config = replace(BATCH, optim=replace(BATCH.optim, precision=precision, micro_batch=3), dropout=0.3)
    done = run(config, poisoned(layer, "forward", int(order(config)[2][4])))
    details = diverged(done)
    assert done.diverged is not None
    assert (done.diverged.step, details["epoch"]) == (2, 0)
    assert details["found"]["module"] == str(layer)
    assert f"{layer}" in done.diverged.reason
    assert details["terms"]["square"] == "nan"
    assert (details["loss_scale"] is None) == (precision != "fp16")
    assert len(details["losses"]) == len(details["grad_norms"]) == 3
    assert all(isinstance(value, float) for value in details["losses"][:-1])
    assert sorted(details["batch"]) == sorted(order(config)[2].tolist())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_nan_ends_the_trial_where_its_gradient_is_cut_off(precision: Any) -> None:
    """`clamp` passes none on of what is NaN: the gradient norm is finite."""
    config = replace(BATCH, optim=replace(BATCH.optim, precision=precision))
    task = poisoned(5, "forward", int(order(config)[2][4]))

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        return {
            name: (total.clamp(max=1e4), count) for name, (total, count) in task.loss(network, batch, config).items()
        }

    done = run(config, replace(task, loss=loss))
    details = diverged(done)
    assert done.diverged is not None
    assert done.diverged.step == 2
    assert done.diverged.reason.startswith("loss_size and loss_square are not finite at lr 0.01; ")
    assert details["found"]["module"] == "5"
    assert math.isfinite(details["grad_norms"][-1])
    assert torch.equal(done.weights[-1], done.weights[2]), "not even this step was taken"


def test_the_checkpoint_of_a_diverged_trial_loads_and_scores() -> None:
    config = replace(BATCH, optim=replace(BATCH.optim, spike=Spike(factor=8.0, patience=1)), epochs=9)
    done = run(config, loud_from(14, 1e4))
    assert done.diverged is not None
    assert len(done.states) == 4, "one for each epoch before"
    again = run(replace(config, epochs=5), resume=done.states[-1])
    assert len(again.metrics) == 1
    assert all(math.isfinite(value) for value in again.metrics[0].values())


def test_a_replay_that_raises_ends_the_trial_all_the_same() -> None:
    """An error on one rank must not leave the others waiting for what it found."""
    calls = iter(range(10**6))

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        if next(calls) > 0:
            raise KeyError("seen before")
        return {name: (total * torch.nan, count) for name, (total, count) in toy_loss(network, batch, config).items()}

    done = run(replace(BATCH, samples=8), replace(TOY, loss=loss))  # one step an epoch: the second call is the replay's
    assert done.diverged is not None
    assert done.diverged.step == 0
    assert done.diverged.reason.endswith("running the step again raised KeyError: 'seen before'")


def refusing(task: Task) -> Task:
    """The task, whose loss and gradients raise where they are not finite."""

    def refuse(x: Tensor) -> None:
        if not x.isfinite().all():
            raise ArithmeticError("no finite number\nbut another")

    def model(config: Config) -> nn.Module:
        network = task.model(config)
        for parameter in network.parameters():
            parameter.register_hook(refuse)
        return network

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        pairs = task.loss(network, batch, config)
        for total, _ in pairs.values():
            refuse(total)
        return pairs

    return replace(task, model=model, loss=loss)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_refuses_what_is_not_finite_is_a_divergence_of_its_module(where: str) -> None:
    config = replace(BATCH, optim=replace(BATCH.optim, micro_batch=3), dropout=0.3)
    done = run(config, refusing(poisoned(3, where, int(order(config)[2][4]))))
    details = diverged(done)
    assert done.diverged is not None
    assert done.diverged.step == 2
    assert done.diverged.reason.startswith("the loss raised ArithmeticError at lr 0.01; ")
    assert isinstance(done.diverged.__cause__, ArithmeticError)
    assert details["raised"] == "ArithmeticError: no finite number"
    assert details["found"]["module" if where == "forward" else "gradient_module"] == "3"
    assert len(details["losses"]) == 2
    assert sorted(details["batch"]) == sorted(order(config)[2].tolist())


def test_a_score_that_refuses_what_is_not_finite_is_a_divergence_of_its_module() -> None:
    """The first to see what the last step of an epoch did to the weights."""

    def score(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        if not network(batch["x"]).isfinite().all():
            raise ArithmeticError("no finite number")
        return toy_score(network, batch, config)

    def linear(config: Config) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    done = run(Config(Optim(lr=1e15, batch_size=27)), replace(TOY, model=linear, score=score))
    details = diverged(done)
    assert done.diverged is not None
    assert done.diverged.step == 0
    sentence = "the score raised ArithmeticError at lr 1e+15; the output of 2 was first not finite"
    assert done.diverged.reason == sentence
    assert isinstance(done.diverged.__cause__, ArithmeticError)
    assert details["raised"] == "ArithmeticError: no finite number"
    assert len(details["losses"]) == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (KeyError("a bug"), 2),
        (UserError("a mistake"), 1),
        (Diverged("says the family"), 1),
        (torch.OutOfMemoryError("no room"), 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), 1),
    ],
)
def test_what_a_healthy_step_or_score_raises_propagates(error: Exception, passes: int) -> None:
    """And is not run again where that could tell nothing."""
    calls: list[int] = []

    def refuse(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        calls.append(len(batch["x"]))
        raise error

    for task in (replace(TOY, loss=refuse), replace(TOY, score=refuse)):
        calls.clear()
        with pytest.raises(type(error)) as caught:
            list(fit(task, Trial(BATCH, device=CPU)))
        assert caught.value is error
        assert len(calls) == passes


def test_a_step_that_raises_after_one_that_diverged_is_not_the_culprit() -> None:
    task, calls = poisoned(3, "forward", int(order(BATCH)[1][0])), itertools.count()

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        if next(calls) == 2:
            raise KeyError("a bug")
        return task.loss(network, batch, config)

    done = run(BATCH, replace(task, loss=loss))
    assert done.diverged is not None
    assert done.diverged.step == 1


def test_a_batch_that_is_not_finite_is_told_from_a_loss_that_is_not() -> None:
    def unlabelled(config: Config, split: str, ranks: Ranks) -> TensorSamples:
        samples = toy_data(config, "train", ranks)
        samples.tensors["y"][3] = torch.nan  # the target of one sample
        return samples

    config = replace(BATCH, optim=replace(BATCH.optim, micro_batch=3))
    batch, loss = run(config, replace(TOY, data=unlabelled)).diverged, run(replace(config, nan_loss_of=3)).diverged
    assert batch is not None
    assert loss is not None
    begins = "loss_square is not finite at lr 0.01; the"
    told = "batch itself, in its y, was first not finite, and then the loss, outside the model"
    assert batch.reason == f"{begins} {told}"
    assert loss.reason == f"{begins} loss, outside the model, was first not finite"


def test_the_samples_of_a_step_are_told_by_name_where_a_task_has_names() -> None:
    named = replace(TOY, names=lambda config, indices: [f"{i} of {config.samples}" for i in indices])
    for wrong in ({"nan_loss_of": 3}, {"optim": Optim(lr=3e38, batch_size=27)}):
        details = diverged(run(replace(BATCH, **wrong), named))
        assert details["names"] == [f"{i} of 27" for i in details["batch"]]
        assert "names" not in diverged(run(replace(BATCH, **wrong)))


def test_names_that_cannot_be_had_end_the_trial_all_the_same() -> None:
    def names(config: Config, indices: Sequence[int]) -> list[str]:
        raise OSError("the data have gone")

    details = diverged(run(replace(BATCH, nan_loss_of=3), replace(TOY, names=names)))
    assert details["names"] == ["naming them raised OSError: the data have gone"]


def test_a_step_that_is_run_again_draws_the_numbers_that_it_drew() -> None:
    drawn: list[tuple[float, float, float]] = []

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        drawn.append((random.random(), np.random.randn(), float(torch.rand(()))))
        return toy_loss(network, batch, config)

    config = replace(BATCH, nan_loss_of=int(order(BATCH)[1][0]))
    run(config, replace(TOY, loss=loss))
    _, failing, after, again = drawn  # the step after it has begun
    assert again == failing != after


@pytest.mark.parametrize("layer", [3, 5])  # the first layer passes no gradient on
def test_a_module_whose_gradient_is_nan_is_named(layer: int) -> None:
    details = diverged(run(BATCH, poisoned(layer, "backward", int(order(BATCH)[1][0]))))
    assert details["found"]["module"] is None
    assert details["found"]["gradient_module"] == str(layer)
    assert details["terms"]["square"] > 0
    assert details["grad_norms"][-1] == "nan"


def loud_from(step: int, times: float) -> Any:
    """The toy task whose loss is `times` as large from the training step `step` on."""
    steps = iter(range(10**6))

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        loud = times if next(steps) >= step else 1.0
        return {name: (total * loud, count) for name, (total, count) in toy_loss(network, batch, config).items()}

    return replace(TOY, loss=loss)


@pytest.mark.parametrize(("times", "ends"), [(30.0, True), (3.0, False)])
def test_a_spike_ends_a_trial_only_where_the_rule_is_on(times: float, ends: bool) -> None:
    optim = Optim(lr=1e-4, batch_size=8, spike=Spike(factor=8.0, patience=2))
    config = Config(optim, epochs=8)
    done = run(config, loud_from(15, times))
    assert (done.diverged is not None) == ends
    if done.diverged is not None:
        assert done.diverged.step == 16, "the second step in a row"
        assert done.diverged.reason.startswith("the loss was above 8 times its running median for 2 steps, ")
        assert "found" not in done.diverged.details, "nothing is not finite, so there is nothing to find"
        assert sorted(done.diverged.details["batch"]) == sorted(order(config, epoch=5)[1].tolist())
        assert torch.equal(done.weights[-1], done.weights[16]), "not even this step was taken"
    assert run(replace(config, optim=replace(optim, spike=None)), loud_from(15, times)).diverged is None


def test_the_spike_rule_waits_for_a_median_that_means_something() -> None:
    config = Config(Optim(lr=1e-4, batch_size=8, spike=Spike(factor=2.0, patience=1)), epochs=3)
    assert run(config, loud_from(SETTLED - 2, 100.0)).diverged is None


@pytest.mark.parametrize("first", [SETTLED, KEPT + 5])
@pytest.mark.parametrize("patience", [5, 12, 20])
def test_a_spike_that_lasts_does_not_become_the_measure_of_itself(first: int, patience: int) -> None:
    """Where half of the losses are those of the spike."""
    done = run(Config(Optim(lr=1e-4, batch_size=8, spike=Spike(8.0, patience)), epochs=27), loud_from(first, 30.0))
    assert done.diverged is not None
    assert done.diverged.step == first + patience - 1


def losing(losses: Iterable[float]) -> Task:
    """The toy task with these losses, step by step."""
    to_come = iter(losses)

    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        square, count = toy_loss(network, batch, config)["square"]
        return {"likelihood": (0 * square + next(to_come) * count, count)}

    return replace(TOY, loss=loss)


def test_a_loss_that_changes_its_sign_is_no_spike() -> None:
    """As a likelihood's may, which is near zero in most steps and far from it in some."""
    config = Config(Optim(lr=1e-4, batch_size=8, spike=Spike(factor=8.0, patience=5)), epochs=30)
    assert run(config, losing(itertools.cycle([0.01] * 20 + [-0.01] + [1.0] * 9))).diverged is None


def test_a_spike_is_measured_by_the_latest_losses_alone() -> None:
    config = Config(Optim(lr=1e-4, batch_size=8, spike=Spike(factor=8.0, patience=1)), epochs=40)
    done = run(config, losing([100.0] * (KEPT + 10) + [1.0] * KEPT + [20.0]))
    assert done.diverged is not None
    assert done.diverged.step == 2 * KEPT + 10


def test_a_loss_that_is_infinite_is_no_spike_but_told_with_its_culprit() -> None:
    config = Config(Optim(lr=1e-4, batch_size=8, spike=Spike(factor=8.0, patience=1)), epochs=8)
    details = diverged(done := run(config, loud_from(15, math.inf)))
    assert done.diverged is not None
    assert done.diverged.reason.startswith("loss_size and loss_square are not finite at lr 0.0001; ")
    assert details["found"]["reproduced"]


def test_a_resumed_trial_is_judged_as_if_it_had_not_stopped() -> None:
    config = Config(Optim(lr=1e-4, batch_size=8, spike=Spike(factor=8.0, patience=4)), epochs=8)
    whole = run(config, loud_from(16, 30.0))  # two steps before an epoch ends
    resumed = run(config, loud_from(0, 30.0), resume=whole.states[5])
    assert whole.diverged is not None
    assert resumed.diverged is not None
    assert (whole.diverged.step, whole.diverged.reason) == (resumed.diverged.step, resumed.diverged.reason)
    assert_same(whole.states[5], run(config, loud_from(16, 30.0)).states[5])


def test_losses_of_other_settings_are_no_measure_of_a_spike() -> None:
    """As population-based training changes settings, between a checkpoint and what goes on from it."""
    config = Config(Optim(lr=1e-4, batch_size=8, spike=Spike(factor=8.0, patience=1)), epochs=5)
    state = run(replace(config, epochs=4)).states[-1]
    assert run(replace(config, loudness=100.0), resume=state).diverged is None
    faster = replace(config, optim=replace(config.optim, lr=2e-4))
    assert run(faster, loud_from(0, 100.0), resume=state).diverged is not None


def test_a_loss_scale_that_keeps_collapsing_is_a_divergence() -> None:
    config = Config(Optim(lr=0.01, batch_size=8, precision="fp16"), epochs=20, loudness=1e9)
    done = run(config)
    details = diverged(done)
    assert details["loss_scale"] <= 1.0
    assert done.diverged is not None
    assert (done.diverged.step or 0) > 3, "every step before halved the scale"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_finite_gradient_whose_norm_overflows_is_no_overflow_that_a_smaller_scale_cures(precision: Any) -> None:
    def loss(network: nn.Module, batch: Batch, config: Config) -> Pairs:
        steep = sum(parameter.sum() * 1e24 for parameter in network.parameters()) - 1e24 * weights_of(network).sum()
        return {"steep": (steep, len(batch["x"]))}

    config = Config(Optim(lr=1e-4, batch_size=8, precision=precision))
    done = run(config, replace(TOY, loss=loss))
    details = diverged(done)
    assert done.diverged is not None
    assert done.diverged.step == 0
    assert "was finite but too large for a norm" in details["found"]["sentence"]


def test_a_step_is_run_again_at_the_scale_at_which_it_failed() -> None:
    """One that fails by less than a factor of 1.3, so that half the scale, which the next step has, would mend it."""
    runs = (
        run(Config(Optim(lr=1e-9, batch_size=8, precision="fp16"), epochs=12, loudness=2e4 * 1.3**power))
        for power in range(20)
    )
    done = next(done for done in runs if done.diverged is not None)
    details = diverged(done)
    assert details["loss_scale"] == 1.0
    assert details["found"]["reproduced"]


@pytest.mark.parametrize("count", [1, 2, 9, 10])
@pytest.mark.parametrize("streak", [0, 1, 20])
def test_the_usual_loss_is_the_median_before_a_streak(count: int, streak: int) -> None:
    torch.manual_seed(count)
    losses = torch.rand(count + streak)
    torch.testing.assert_close(usual_loss(losses, torch.tensor(streak)), losses[:count].median())
    losses[0] = 0.0
    assert usual_loss(losses, torch.tensor(streak)) == math.inf
