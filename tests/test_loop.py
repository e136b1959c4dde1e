"""The shared training loop keeps its promises: what is computed does not depend on how it is divided or interrupted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_task import (
    CPU,
    SEED,
    TOY,
    WIDTH,
    Config,
    assert_same,
    order,
    run,
    toy_data,
    toy_loss,
    toy_model,
    toy_score,
    weights_of,
)

from search.workers.states import Watch
from trainables.contract import State, Trial, UserError
from trainables.exported import load_weights
from trainables.loop import Task, fit
from trainables.optim import EarlyStop, Optim, Plateau
from trainables.resume import seed_everything
from trainables.samples import Batch, Ranks, TensorSamples
from trainables.step import Loss, Pairs

EVERYTHING = Config(
    Optim(
        lr=0.02,
        batch_size=8,
        micro_batch=3,
        clip_norm=0.5,
        schedule="cosine",
        warmup_epochs=1.5,
        ema=0.9,
        ema_warmup=True,
    ),
    epochs=4,
    dropout=0.4,
    lengths=True,
)


def plain_weights(config: Config, mean_of_means: bool = False) -> tuple[Tensor, Tensor]:
    """The weights, and their shadow, of a loop written plainly: whole batches, torch's own clipping, ema by hand."""
    optim = config.optim
    seed_everything(SEED, "model")
    model = toy_model(config)
    train = toy_data(config, "train", Ranks())
    spared = [parameter for parameter in model.parameters() if parameter.ndim < 2 and optim.decayed == "weights"]
    others = [parameter for parameter in model.parameters() if all(parameter is not one for one in spared)]
    groups = [{"params": others, "weight_decay": optim.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr)
    shadow, steps = weights_of(model), 0
    for epoch in range(config.epochs):
        for batch in order(config, epoch):
            parts = batch.split(optim.micro_batch or len(batch)) if mean_of_means else (batch,)
            optimizer.zero_grad()
            for part in parts:
                pairs = toy_loss(model, train[part], config)
                (sum(total / count for total, count in pairs.values()) / len(parts)).backward()  # type: ignore[union-attr]
            if optim.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            steps += 1
            decay = min(0.9, (1 + steps) / (10 + steps)) if optim.ema_warmup else 0.9
            shadow = decay * shadow + (1 - decay) * weights_of(model)
    return weights_of(model), shadow


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_trial_is_the_uninterrupted_one_bit_for_bit(precision: Any, tmp_path: Path) -> None:
    config = replace(EVERYTHING, optim=replace(EVERYTHING.optim, precision=precision))
    whole = run(config)
    for epoch, state in enumerate(whole.states):
        torch.save(state, tmp_path / "state.pt")
        resumed = run(config, resume=torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.metrics == whole.metrics[epoch + 1 :]
        assert_same(resumed.states, whole.states[epoch + 1 :])


def test_what_a_resumed_trial_draws_from_any_generator_is_what_it_would_have_drawn() -> None:
    drawn: list[tuple[float, float, float]] = []

    def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return toy_loss(model, batch, config)

    first = run(Config(), replace(TOY, loss=loss)).states[0]
    run(Config(), replace(TOY, loss=loss), resume=first)
    assert len(drawn) == 6 + 3, "three steps an epoch"
    assert drawn[6:] == drawn[3:6]
    for column in zip(*drawn[:6], strict=True):
        assert len(set(column)) == 6


def test_a_trial_after_another_is_as_in_a_fresh_process() -> None:
    first = run(EVERYTHING)
    run(Config())
    again = run(EVERYTHING)
    assert first.metrics == again.metrics
    assert_same(first.states, again.states)


def test_a_state_is_changed_neither_by_later_steps_nor_by_resuming_from_it(tmp_path: Path) -> None:
    def lasting(steps: int) -> State:
        reports = fit(TOY, Trial(EVERYTHING, seed=SEED, device=CPU))
        report = next(reports)
        assert report.state is not None
        state = report.state()
        for _ in range(steps):
            next(reports)
        return state

    early, late = lasting(0), lasting(2)
    assert_same(early, late)
    run(EVERYTHING, resume=late)
    assert_same(early, late)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.6, 2.5])  # each binds in some steps of one loss or the other
def test_accumulation_counts_and_clipping_are_those_of_a_plain_loop(
    lengths: bool, micro_batch: int | None, clip_norm: float | None
) -> None:
    config = Config(Optim(lr=0.01, batch_size=8, micro_batch=micro_batch, clip_norm=clip_norm), lengths=lengths)
    weights, _ = plain_weights(config)
    torch.testing.assert_close(run(config).weights[-1], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [0.01, 0.0])
def test_samples_may_count_in_part_or_not_at_all(weight: float) -> None:
    def weighted(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        pairs = toy_loss(model, batch, config)
        count = torch.tensor(weight * len(batch["x"]))
        return {name: (weight * total, count) for name, (total, _) in pairs.items()}

    config = Config(Optim(lr=0.01, batch_size=8, weight_decay=0.0))
    done = run(config, replace(TOY, loss=weighted))
    expected = plain_weights(config)[0] if weight else done.weights[0]
    assert done.diverged is None
    torch.testing.assert_close(done.weights[-1], expected, rtol=0, atol=1e-6)


def counting(uncounted: int, count: float) -> Task:
    """The toy family, whose loss counts `count` in the batch with the sample `uncounted`, and else its samples."""

    def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        found = torch.where((batch["index"] == uncounted).any(), count, float(len(batch["x"])))
        return {name: (total, found) for name, (total, _) in toy_loss(model, batch, config).items()}

    return replace(TOY, loss=loss)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_where_nothing_counts_the_sum_is_minimised_as_it_is(precision: Any) -> None:
    """Divided by next to nothing it would be finite still, and AdamW would take no notice of any later step."""
    config = Config(Optim(lr=0.01, batch_size=8, ema=0.9, precision=precision), epochs=1, loudness=0.1)
    first = int(order(config)[0][0])
    none, one = (run(config, counting(first, count)) for count in (0.0, 1.0))
    assert torch.equal(none.weights[-1], one.weights[-1])
    assert none.metrics[0]["grad_norm"] == one.metrics[0]["grad_norm"]
    assert 16 * none.metrics[0]["loss"] == pytest.approx(17 * one.metrics[0]["loss"], rel=1e-5)


def test_an_epoch_in_which_nothing_counts_has_a_finite_loss() -> None:
    config = Config(Optim(lr=0.01, batch_size=8, weight_decay=0.0), epochs=1, samples=8)
    done = run(config, counting(3, 0.0))
    assert 0 < done.metrics[0]["loss"] < 1e3
    assert 0 < done.metrics[0]["grad_norm"] < 1e3


@pytest.mark.parametrize(("count", "square"), [(0.0, "nan"), (math.nan, "nan")])
def test_a_step_in_which_nothing_counts_is_told_like_any_other(count: float, square: str) -> None:
    config = Config(Optim(lr=0.01, batch_size=8), nan_loss_of=None if math.isnan(count) else 3)
    done = run(config, counting(3, count))
    assert done.diverged is not None
    terms = done.diverged.details["terms"]
    assert terms["square"] == square
    assert math.isnan(count) or 0 < terms["size"] < 1e3


@pytest.mark.parametrize("decayed", ["all", "weights"])
def test_weight_decay_may_leave_out_biases(decayed: Any) -> None:
    config = Config(Optim(lr=0.05, batch_size=8, weight_decay=0.9, decayed=decayed))
    torch.testing.assert_close(run(config).weights[-1], plain_weights(config)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("eval_batch", [1, 3, 100])
def test_validation_may_pass_more_samples_at_once_or_fewer(eval_batch: int) -> None:
    sizes: list[int] = []

    def score(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        sizes.append(len(batch["x"]))
        return toy_score(model, batch, config)

    optim = Optim(lr=0.01, batch_size=8, micro_batch=2)
    done = run(Config(replace(optim, eval_batch=eval_batch), epochs=1), replace(TOY, score=score))
    val = len(toy_data(Config(), "val", Ranks()))
    assert max(sizes) == min(eval_batch, val)
    assert sum(sizes) == val
    assert done.metrics[-1] == pytest.approx(run(Config(optim, epochs=1)).metrics[-1], rel=1e-5)
    assert done.metrics[-1]["micro_batch"] == 2


def test_a_mean_of_means_would_be_noticed() -> None:
    config = Config(Optim(lr=0.01, batch_size=8, micro_batch=3), lengths=True)
    right, wrong = plain_weights(config)[0], plain_weights(config, mean_of_means=True)[0]
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("warmup", [False, True])
def test_scores_are_those_of_the_shadow_and_the_state_holds_both(warmup: bool) -> None:
    config = Config(Optim(lr=0.01, batch_size=8, ema=0.9, ema_warmup=warmup))
    weights, shadow = plain_weights(config)
    done = run(config)
    state = done.states[-1]
    torch.testing.assert_close(
        torch.cat([value.flatten() for value in state["model"].values()]), weights, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        torch.cat([value.flatten() for value in state["ema"].values()]), shadow, rtol=0, atol=1e-6
    )

    model = toy_model(config)
    model.load_state_dict(state["ema"])
    val = toy_data(config, "val", Ranks())
    for name, (total, count) in toy_score(model, val[torch.arange(len(val))], config).items():
        assert done.metrics[-1][name] == pytest.approx(float(total.detach() / count), rel=1e-5)


class Tied(nn.Module):
    """Two layers with one weight between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.second(self.first(x_BC).tanh())


def test_a_tied_weight_has_one_shadow_that_is_loaded_under_every_name(tmp_path: Path) -> None:
    config = Config(Optim(lr=0.05, batch_size=8, ema=0.9))
    tied = replace(TOY, model=lambda config: Tied())
    whole = run(config, tied)
    state = whole.states[-1]
    assert not torch.equal(state["ema"]["first.weight"], state["model"]["first.weight"])
    model = Tied()
    load_weights(model, state, tmp_path)
    assert torch.equal(model.first.weight, state["ema"]["first.weight"])
    assert run(config, tied, resume=whole.states[0]).metrics == whole.metrics[1:]


LAYERS = {"first": 0, "second": 3}  # parts of the toy's model; its last layer is of none


def part_of(name: str) -> str | None:
    return next((part for part, at in LAYERS.items() if name.startswith(f"{at}.")), None)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_of_a_part_is_that_of_the_last_batch_before_it_is_clipped(
    precision: Any, micro_batch: int | None, lengths: bool
) -> None:
    optim = Optim(
        lr=1e-12, batch_size=8, micro_batch=micro_batch, clip_norm=0.01, weight_decay=0.0, precision=precision
    )
    config = Config(optim, lengths=lengths, loudness=0.1)  # too quiet to overflow in fp16
    done = run(config, replace(TOY, part=part_of))
    assert len(done.metrics) == 2
    for epoch, metrics in enumerate(done.metrics):
        seed_everything(SEED, "model")
        model = toy_model(config)
        pairs = toy_loss(model, toy_data(config, "train", Ranks())[order(config, epoch)[-1]], config)
        torch.stack([total / count for total, count in pairs.values()]).sum().backward()
        gradients: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients.setdefault(str(part_of(name)), []).append(parameter.grad)
        found = {name: value for name, value in metrics.items() if name.startswith("grad_norm_")}
        rel = 1e-2 if precision == "fp16" else 1e-4
        wanted = {f"grad_norm_{part}": float(nn.utils.get_total_norm(gradients[part])) for part in LAYERS}
        assert found == pytest.approx(wanted, rel=rel)


def test_train_metrics_are_means_over_the_samples_of_the_epoch() -> None:
    config = Config(Optim(lr=1e-12, batch_size=8), epochs=1, lengths=True)
    done = run(config)
    seed_everything(SEED, "model")
    batch = toy_data(config, "train", Ranks())[torch.cat(order(config))]
    pairs = toy_loss(toy_model(config), batch, config)
    means = {f"loss_{name}": float(total.detach() / count) for name, (total, count) in pairs.items()}
    assert done.metrics[0] == pytest.approx(
        done.metrics[0] | means | {"loss": sum(means.values()), "lr": 1e-12}, rel=1e-5
    )


def test_the_update_ratio_is_that_of_the_last_step_to_the_weights_before_it() -> None:
    done = run(Config(Optim(lr=0.5, batch_size=8), epochs=1))
    *_, before, after = done.weights
    assert done.metrics[0]["update_ratio"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


@pytest.mark.parametrize("step", [0, 1, 2])  # of 3 in an epoch
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_ends_the_trial_before_the_update(step: int, precision: Any) -> None:
    config = Config(Optim(lr=0.01, batch_size=8, micro_batch=5, precision=precision))
    done = run(replace(config, nan_loss_of=int(order(config)[step][0])))
    assert done.diverged is not None
    assert done.diverged.reason.startswith("loss_square is not finite at lr 0.01; ")
    assert done.diverged.step == step
    assert torch.equal(done.weights[-1], done.weights[2 * step])  # two micro-batches, so two calls, a step
    assert not done.metrics


@pytest.mark.parametrize("step", [0, 2])
def test_a_gradient_that_is_not_finite_ends_the_trial_before_the_update(step: int) -> None:
    config = Config(Optim(lr=0.01, batch_size=8))
    done = run(replace(config, nan_gradient_of=int(order(config)[step][0])))
    assert done.diverged is not None
    assert done.diverged.reason.startswith("the gradient norm is not finite at lr 0.01; ")
    assert done.diverged.step == step
    assert torch.equal(done.weights[-1], done.weights[step])


def test_steps_are_counted_from_the_start_of_the_trial_when_it_was_resumed() -> None:
    config = Config(Optim(lr=0.01, batch_size=8), epochs=3)
    state = run(config).states[0]
    done = run(replace(config, nan_loss_of=int(order(config, epoch=1)[2][0])), resume=state)
    assert done.diverged is not None
    assert done.diverged.step == 5


def louder(config: Config, epoch: int) -> Config:
    return replace(config, loudness=config.loudness + epoch)


def test_the_loss_may_change_from_epoch_to_epoch_and_a_resumed_trial_goes_on_with_its_own() -> None:
    seen = list[float]()

    def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        seen.append(config.loudness)
        return toy_loss(model, batch, config)

    def score(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        assert config.loudness == 1, "scores of different epochs are comparable"
        return toy_score(model, batch, config)

    task, config = replace(TOY, loss=loss, score=score, annealed=louder), replace(EVERYTHING, epochs=3)
    whole = run(config, task)
    assert seen == sorted(seen)
    assert set(seen) == {1.0, 2.0, 3.0}
    resumed = run(config, task, resume=whole.states[0])
    assert resumed.metrics == whole.metrics[1:]
    assert_same(resumed.states, whole.states[1:])


@pytest.mark.parametrize("place", [0, 2])  # in the first step of an epoch, and in its last
def test_a_step_is_run_again_as_its_epoch_had_it(place: int) -> None:
    bad = int(order(Config(), epoch=1)[place][0])

    def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        return toy_loss(model, batch, replace(config, nan_loss_of=bad if config.loudness == 2 else None))

    done = run(replace(Config(), epochs=3), replace(TOY, loss=loss, annealed=louder))
    assert done.diverged is not None
    assert done.diverged.step == 3 + place
    assert done.diverged.details["found"]["reproduced"]


def test_weights_that_are_not_finite_are_never_reported() -> None:
    done = run(Config(Optim(lr=3e38, batch_size=27)))
    assert done.diverged is not None
    assert str(done.diverged).startswith("0.weight and 5 more parameters are not finite after an update at lr 3e+38")
    assert done.diverged.details["parameter"] == "0.weight"
    assert done.diverged.step == 0, "the only one"
    assert math.isfinite(done.diverged.details["losses"][-1])
    assert sorted(done.diverged.details["batch"]) == list(range(27))
    assert not done.states


def test_a_weight_that_is_not_finite_is_named() -> None:
    optim = Optim(lr=3e38, batch_size=27, weight_decay=0.0)
    done = run(Config(optim), replace(TOY, lr_scale=lambda name: 3.0 if name == "3.bias" else 0.0))
    assert str(done.diverged) == "3.bias is not finite after an update at lr 3e+38 (step 0)"
    done = run(Config(optim), replace(TOY, lr_scale=lambda name: 0.01 if name == "3.bias" else 0.0))
    assert str(done.diverged) == "the norm of the weights is not finite after an update at lr 3e+38 (step 0)"


def test_a_state_of_other_settings_is_taken_over() -> None:
    """As population-based training hands it on, where precision and patience are searched."""
    plain = Config(Optim(lr=0.01, batch_size=8), epochs=3)
    state = run(replace(plain, epochs=1)).states[0]
    other = replace(plain.optim, precision="fp16", early_stop=EarlyStop("error", "min", 2), ema=0.9)
    for config, taken in ((replace(plain, optim=other), state), (plain, run(replace(plain, optim=other)).states[0])):
        done = run(config, resume=taken)
        assert done.diverged is None
        assert len(done.metrics) == 2


def test_a_late_overflow_that_is_mended_does_not_look_like_a_blow_up() -> None:
    """The scale grows again in a long training, and is at times too large."""
    config = Config(Optim(lr=0.01, batch_size=8, precision="fp16"), epochs=2)
    watch, (first, *_) = Watch(), run(config).states
    assert watch.look(first) is None
    first["scaler"]["scale"] = 2.0**40
    late = run(replace(config, epochs=3), resume=first).states[0]
    assert math.inf in late["guard"]["norms"]
    assert watch.look(late) is None


def test_an_overflow_that_a_smaller_loss_scale_mends_is_no_divergence() -> None:
    config = Config(Optim(lr=0.01, batch_size=8, precision="fp16"), epochs=4, loudness=100.0)
    done = run(config, replace(TOY, part=part_of))
    assert done.diverged is None
    stepped = [math.isfinite(state["guard"]["norms"][-1]) for state in done.states]  # the last step of the epoch
    assert ["grad_norm_first" in metrics for metrics in done.metrics] == stepped
    assert not stepped[0]
    assert stepped[-1]
    assert "grad_norm" not in done.metrics[0], "of no step in the first epoch"
    assert all({"loss", "loss_square"} <= metrics.keys() for metrics in done.metrics), "they may be the objective"
    assert torch.equal(done.weights[0], done.weights[1])
    assert not torch.equal(done.weights[0], done.weights[-1])
    assert all(math.isfinite(value) for metrics in done.metrics for value in metrics.values())
    watch = Watch()
    assert [watch.look(state) for state in done.states] == [None] * 4  # one would end the trial as diverged


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision: Any) -> None:
    done = run(Config(Optim(lr=0.01, batch_size=9, precision=precision), epochs=12))
    assert done.metrics[-1]["error"] < 0.7 * done.metrics[0]["error"]
    assert all(value.dtype == torch.float32 for value in done.states[-1]["model"].values())


def test_loss_terms_in_half_precision_add_up_in_single() -> None:
    """Each is below the largest number that half precision has, 65504, and their sum is not."""

    def loss(model: nn.Module, batch: Batch, config: Any) -> Pairs:
        term = torch.tensor(4e4, dtype=torch.float16)
        return {"a": (term, 1), "b": (term, 1)}

    pairs, total = Loss(loss, nn.Linear(1, 1), None)({"x": torch.zeros(1)})
    assert total.item() == 2 * pairs["a"][0].item() == 8e4


def test_half_precision_is_not_for_what_the_samples_compute() -> None:
    gathered: list[torch.dtype] = []

    class Turned(TensorSamples):
        def __getitem__(self, indices: Tensor) -> Batch:
            batch = super().__getitem__(indices)
            gathered.append((batch["x"] @ torch.eye(WIDTH)).dtype)
            return batch

    def turned(config: Config, split: str, ranks: Ranks) -> Turned:
        return Turned(toy_data(config, split, ranks).tensors)

    run(Config(Optim(lr=0.01, batch_size=9, micro_batch=4, precision="bf16")), replace(TOY, data=turned))
    assert set(gathered) == {torch.float32}


def test_frozen_parameters_and_modules_in_eval_mode_stay_as_the_family_left_them() -> None:
    modes: list[tuple[bool, bool]] = []

    def half_frozen(config: Config) -> nn.Module:
        model = toy_model(config)
        assert isinstance(model, nn.Sequential)
        model[0].requires_grad_(False)
        model[2].eval()
        return model

    def watched(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        assert isinstance(model, nn.Sequential)
        modes.append((model.training, model[2].training))
        return toy_loss(model, batch, config)

    config = Config(Optim(lr=0.01, batch_size=8, weight_decay=0.5, ema=0.9), dropout=0.5)
    done = run(config, replace(TOY, model=half_frozen, loss=watched))
    frozen = WIDTH * 16 + 16
    assert torch.equal(done.weights[0][:frozen], done.weights[-1][:frozen])
    assert not torch.equal(done.weights[0][frozen:], done.weights[-1][frozen:])
    assert len(done.states[-1]["optimizer"]["state"]) == 4
    assert set(modes) == {(True, False)}  # in the second epoch too, after an evaluation


def frozen_first(config: Config) -> nn.Module:
    model = toy_model(config)
    assert isinstance(model, nn.Sequential)
    model[0].requires_grad_(False)
    return model


FROZEN = replace(TOY, model=frozen_first, derived=lambda scores: {"stalled": 1.0})
LEFT_OUT = replace(FROZEN, saved=lambda name: not name.startswith("0."))
WAITING = replace(EVERYTHING, optim=replace(EVERYTHING.optim, early_stop=EarlyStop("stalled", "max", 9)))


def test_what_a_state_leaves_out_is_made_anew_and_a_resumed_trial_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, with_all = run(WAITING, LEFT_OUT), run(WAITING, FROZEN)
    assert whole.metrics == with_all.metrics
    for epoch, state in enumerate(whole.states):
        for model in (state["model"], state["best"]["weights"]["model"]):
            assert model.keys() == {"3.weight", "3.bias", "5.weight", "5.bias"}
        torch.save(state, tmp_path / "state.pt")
        resumed = run(WAITING, LEFT_OUT, resume=torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.metrics == whole.metrics[epoch + 1 :]
        assert_same(resumed.states, whole.states[epoch + 1 :])


def test_a_frozen_part_that_is_kept_from_trial_to_trial_changes_none_of_them() -> None:
    """As docs/bring-a-model.md has it."""

    def model(config: Config) -> nn.Module:
        if "backbone" not in cache:
            with torch.random.fork_rng(devices=[]):
                cache["backbone"] = nn.Linear(WIDTH, 16).eval().requires_grad_(False)
        return nn.Sequential(cache["backbone"], nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(16, WIDTH))

    cache: dict[str, nn.Module] = {}
    task = replace(LEFT_OUT, model=model)
    first = run(EVERYTHING, task)
    blown_up = run(replace(EVERYTHING, nan_gradient_of=3, optim=Optim(batch_size=27)), task)
    later = run(EVERYTHING, task)
    assert blown_up.diverged is not None
    assert first.metrics == later.metrics
    assert_same(first.states, later.states)
    assert_same(run(EVERYTHING, task, resume=first.states[0]).states, first.states[1:])


def test_a_state_must_hold_what_is_saved_and_may_hold_the_rest() -> None:
    whole, state = run(EVERYTHING, LEFT_OUT), run(EVERYTHING, FROZEN).states[1]
    assert "0.weight" in state["model"]
    assert_same(run(EVERYTHING, LEFT_OUT, resume=state).states, whole.states[2:])
    lacking, strange = ({**whole.states[1], "model": dict(whole.states[1]["model"])} for _ in range(2))
    del lacking["model"]["3.bias"]
    strange["model"]["7.bias"] = torch.zeros(1)
    for wrong, message in (
        (lacking, r'Missing key\(s\) in state_dict: "3.bias"'),
        (strange, r'Unexpected .* "7.bias"'),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(EVERYTHING, LEFT_OUT, resume=wrong)


def test_scores_take_no_gradient_and_no_dropout() -> None:
    seen: list[tuple[bool, bool]] = []

    def score(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        seen.append((torch.is_grad_enabled(), any(module.training for module in model.modules())))
        return toy_score(model, batch, config)

    run(Config(), replace(TOY, score=score))
    assert set(seen) == {(False, False)}


def test_validation_samples_are_scored_in_whole_micro_batches() -> None:
    """Figures were published of a network that, by a mistake, scores windows by what stands beside them."""
    sizes: list[int] = []

    def score(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        sizes.append(len(batch["index"]))
        return toy_score(model, batch, config)

    run(Config(Optim(batch_size=8, micro_batch=8), epochs=1), replace(TOY, score=score))
    assert sizes == [8, 3]


def test_lr_scale_is_a_parameters_own_ratio() -> None:
    config = Config(Optim(lr=0.01, batch_size=27, weight_decay=0.0), epochs=1)
    done = run(config, replace(TOY, lr_scale=lambda name: 0.1 if name.startswith("0.") else 1.0))
    moved = (done.weights[-1] - done.weights[0]).abs()
    scaled = WIDTH * 16 + 16
    # AdamW's first step is the learning rate itself, wherever there is a gradient to speak of.
    assert float(moved[:scaled].median()) == pytest.approx(0.001, rel=1e-3)
    assert float(moved[scaled:].median()) == pytest.approx(0.01, rel=1e-3)


def test_the_rate_of_a_step_is_that_of_its_middle() -> None:
    config = Config(Optim(lr=0.01, batch_size=9, schedule="cosine", warmup_epochs=1.0))  # three steps an epoch
    last = [metrics["lr"] for metrics in run(config).metrics]
    assert last == pytest.approx([0.01 * 2.5 / 3, 0.01 * (1 + math.cos(math.pi * 2.5 / 3)) / 2])


def test_a_small_data_set_is_one_ragged_batch_and_else_the_ragged_one_is_dropped() -> None:
    assert [len(batch) for batch in order(Config(samples=27))] == [8, 8, 8]
    assert [len(batch) for batch in order(Config(samples=5))] == [5]
    assert len(set(torch.cat(order(Config(samples=27))).tolist())) == 24


def test_an_epoch_of_some_samples_has_so_many_steps_and_is_resumed_as_it_was() -> None:
    config = replace(EVERYTHING, optim=replace(EVERYTHING.optim, micro_batch=None, epoch_samples=17))
    whole = run(config)
    assert len(whole.weights) == 4 * 2 + 1
    assert_same(run(config, resume=whole.states[1]).states, whole.states[2:])
    tiny = replace(config, optim=replace(config.optim, epoch_samples=3))
    assert [metrics["micro_batch"] for metrics in run(tiny).metrics] == [3] * 4


def test_scores_without_a_sample_are_left_out() -> None:
    def absent(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        return {"there": (torch.tensor(3.0), 2), "absent": (torch.tensor(0.0), 0)}

    metrics = run(Config(), replace(TOY, score=absent)).metrics[-1]
    assert metrics["there"] == 1.5
    assert "absent" not in metrics


@dataclass(frozen=True)
class With:
    """The toy's samples, and something more."""

    more: dict[str, Any]

    def __len__(self) -> int:
        return 9

    def __getitem__(self, indices: Tensor) -> Batch:
        return {**toy_data(Config(), "train", Ranks())[indices], **self.more}


class Tuples(With):
    def __getitem__(self, indices: Tensor) -> Any:
        return torch.ones(len(indices), 6), torch.ones(len(indices), 6)


def terms_of(names: Callable[[Batch], Sequence[str]]) -> Callable[..., Pairs]:
    """A loss with these terms, each as large as its name is long."""
    return lambda model, batch, config: {
        name: (0 * model(batch["x"]).sum() + len(name) * len(batch["x"]), len(batch["x"])) for name in names(batch)
    }


@pytest.mark.parametrize("config", [Config(), Config(Optim(batch_size=8, micro_batch=1))])
def test_the_terms_of_a_loss_may_come_in_any_order(config: Config) -> None:
    loss = terms_of(lambda batch: ["a", "four"][:: 1 if batch["index"][0] % 2 else -1])
    (metrics, *_) = run(config, replace(TOY, loss=loss)).metrics
    assert (metrics["loss_a"], metrics["loss_four"], metrics["loss"]) == (1, 4, 5)


@pytest.mark.parametrize("config", [Config(), Config(Optim(batch_size=8, micro_batch=1))])
@pytest.mark.parametrize("other", [["a"], ["a", "five"]])
def test_the_terms_of_a_loss_are_those_of_every_batch(other: list[str], config: Config) -> None:
    loss = terms_of(lambda batch: ["a", "four"] if batch["index"][0] % 2 else other)
    with pytest.raises(UserError, match=r"terms of a batch are a.*, and of another a.*: they must be the same"):
        run(config, replace(TOY, loss=loss))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": lambda m, b, c: {"a": (m(b["x"]).sum(), 8), "b": (m(b["x"]).sum(), 4)}}, "a, b must share one count"),
        ({"loss": lambda m, b, c: {"a": (m(b["x"]).sum(), 8.0)}}, "a must count in an int or a .*, not float"),
        ({"loss": lambda m, b, c: {"a": (m(b["x"]).sum(), np.int64(8))}}, "a must count in an int or a .*, not int64"),
        (
            {"loss": lambda m, b, c: {"a": (m(b["x"]).sum(), torch.ones(1))}},
            r"both scalar, and in 'a' there is a tensor of shape \(1,\)",
        ),
        # Not summed, it would scale the gradient by a wrong number, or be broadcast to one that has no sum.
        (
            {"loss": lambda m, b, c: {"a": (m(b["x"])[:, :1], 8)}},
            r"loss must .* in 'a' there is a tensor of shape \(8, 1",
        ),
        ({"loss": lambda m, b, c: {"a": m(b["x"]).sum()}}, r"loss must return, by .*'a' is a tensor of shape \(\)"),
        ({"loss": lambda m, b, c: {"a": (m(b["x"]).sum(), 8), "b": (0, 8)}}, "in 'b' the sum is a int, not a tensor"),
        ({"loss": lambda m, b, c: {}}, "loss must return, by name, pairs .* both scalar, and returned none"),
        ({"loss": lambda m, b, c: m(b["x"]).sum()}, r"loss must return, by .* and returned a tensor of shape \(\)"),
        ({"score": lambda m, b, c: {"a": (torch.ones(3), 8)}}, r"score must .* in 'a' there is a tensor of shape \(3,"),
        ({"score": lambda m, b, c: {"a": 0.5}}, "score must return, by name, pairs .* 'a' is a float"),
        ({"score": lambda m, b, c: {"loss": (torch.tensor(1.0), 1)}}, "name of a training metric: loss"),
        ({"data": lambda c, split, ranks: []}, "the split 'train' holds no sample"),
        (
            {"data": lambda c, split, ranks: Tuples({})},
            r"samples\[indices\] must return a flat dict of tensors, not a tuple",
        ),
        (
            {"data": lambda c, split, ranks: With({"map": {"x": torch.ones(6)}})},
            "must return a flat dict of tensors: 'map' is a dict; make tensors of it, or leave it out",
        ),
        (
            {"data": lambda c, split, ranks: TensorSamples({"x": torch.ones(3, 6), "y": torch.ones(2, 6)})},
            "must hold the same number of samples: x holds 3, y holds 2",
        ),
        ({"data": lambda c, split, ranks: TensorSamples({})}, "must hold the same number of samples: there are none"),
        ({"config": Optim}, "trial.config is of the class Config and must be of Optim"),
        ({"lr_scale": lambda name: -1.0}, r"lr_scale\('0.weight'\) = -1.0 must be 0 or a positive"),
        ({"saved": lambda name: name != "5.bias"}, r"saved\('5.bias'\) = False must be true of a parameter that is tr"),
    ],
)
def test_a_task_that_breaks_its_promises_is_told_so(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):  # which a search does not retry
        run(Config(), replace(TOY, **wrong))


def stalling(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {"stalled": 1.0, "twice": 2 * scores["error"], "even": None}


STALLING = replace(TOY, derived=stalling)
PATIENT = Config(
    Optim(0.02, batch_size=8, plateau=Plateau("stalled", "max", patience=0), early_stop=EarlyStop("stalled", "max", 3)),
    epochs=9,
)


def test_what_is_derived_is_reported_and_can_end_a_trial_and_lower_its_rate() -> None:
    done = run(PATIENT, STALLING)
    rates = [state["optimizer"]["param_groups"][0]["lr"] for state in done.states]
    assert rates == [0.02, 0.02, 0.01, 0.005]  # the first is the best
    assert all(metrics["twice"] == 2 * metrics["error"] for metrics in done.metrics)
    assert not any("even" in metrics for metrics in done.metrics), "a score that others are derived from alone"
    assert done.diverged is None


def test_all_scores_may_be_derived() -> None:
    """As an average precision is, from what `score` noted of every batch."""
    noted: list[int] = []

    def score(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        noted.extend(batch["index"].tolist())
        return {}

    def derived(scores: Mapping[str, float]) -> dict[str, float]:
        assert scores == {}
        return {"noted": len(noted)}

    done = run(Config(), replace(TOY, score=score, derived=derived))
    assert [metrics["noted"] for metrics in done.metrics] == [11, 22]


@pytest.mark.parametrize("epochs", [9, 3, 1])
def test_a_trial_that_may_stop_early_ends_with_its_best_epoch(epochs: int) -> None:
    done = run(replace(PATIENT, epochs=epochs, optim=replace(PATIENT.optim, ema=0.9)), STALLING)
    assert len(done.metrics) == min(epochs, 4)
    assert done.metrics[-1] == {**done.metrics[0], "best_epoch": 1}
    for part in ("model", "ema"):
        assert_same(done.states[-1][part], done.states[0][part])
    assert done.states[-1]["epoch"] == len(done.metrics) - 1


def test_a_metric_that_is_never_a_number_has_no_best_epoch() -> None:
    done = run(PATIENT, replace(TOY, derived=lambda scores: {"stalled": math.nan}))
    assert len(done.metrics) == 3
    assert "best_epoch" not in done.metrics[-1]


def test_a_trial_that_waits_resumes_bit_for_bit_and_stays_ended() -> None:
    whole = run(PATIENT, STALLING)
    for epoch, state in enumerate(whole.states):
        resumed = run(PATIENT, STALLING, resume=state)
        assert resumed.metrics == whole.metrics[epoch + 1 :]
        assert_same(resumed.states, whole.states[epoch + 1 :])


def test_no_trial_waits_for_what_differs_between_ranks() -> None:
    """Their rates would part, or one would stop and leave the others in a collective."""
    config = Config(Optim(batch_size=8, plateau=Plateau("samples_per_s", "max")))
    with pytest.raises(UserError, match=r"^optim.plateau.metric = samples_per_s must be one of error, .*update_ratio$"):
        run(config)


def test_several_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(UserError, match="world_size = 2 must come with a process group"):
        run(Config(), world_size=2)
