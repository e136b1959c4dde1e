"""The schedules agree with values computed by hand, and settings that make no sense are refused."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from trainables.contract import UserError
from trainables.optim import (
    EarlyStop,
    Ema,
    Optim,
    Patience,
    Plateau,
    Restarts,
    Spike,
    adamw,
    clip_divisor,
    lr_factor,
    mark_undecayed,
)


@pytest.mark.parametrize(
    ("epoch", "lr"),  # the lab notes' own table for lr 1e-4
    [(0, 2.5e-6), (4, 3.6e-5), (7, 8.0e-5), (10, 1.0e-4), (24, 3.6e-6), (25, 1.25e-4), (35, 1.25e-4), (35.9, 1.25e-4)],
)
def test_the_schedule_of_the_notes(epoch: float, lr: float) -> None:
    optim = Optim(lr=1e-4, schedule="notes", warmup_epochs=10)
    assert optim.lr * lr_factor(optim, epoch, 50) == pytest.approx(lr, rel=0.02)


@pytest.mark.parametrize(
    ("schedule", "warmup_epochs", "factors"),  # after 0, 1, 2, 4, 6 and 10 of 10 epochs
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0, 0.25, 0.5, 1, 1, 1]),
        ("cosine", 0, [1, 0.975528, 0.904508, 0.654508, 0.345492, 0]),
        ("cosine", 2, [0, 0.5, 1, 0.853553, 0.5, 0]),
        ("cosine", 12, [0, 1 / 12, 1 / 6, 1 / 3, 0.5, 10 / 12]),
    ],
)
def test_constant_and_cosine_schedules(schedule: Any, warmup_epochs: float, factors: list[float]) -> None:
    optim = Optim(schedule=schedule, warmup_epochs=warmup_epochs)
    assert [lr_factor(optim, epoch, 10) for epoch in (0, 1, 2, 4, 6, 10)] == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize("clip_norm", [1e-6, 0.5, 2.0])
def test_a_small_gradient_too_is_clipped_as_by_torch(clip_norm: float) -> None:
    for size in (0.0, 1e-6, 0.5, 1.0, 3.0):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.tensor([size])
        norm = torch.nn.utils.clip_grad_norm_([weight], clip_norm)
        assert size / float(clip_divisor(norm, clip_norm)) == pytest.approx(float(weight.grad), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("lr", 0.0, "be a positive number"),
        ("lr", math.nan, "be a positive number"),
        ("clip_norm", 0.0, "be a positive number"),
        ("batch_size", 0, "be at least 1"),
        ("micro_batch", 0, "be at least 1"),
        ("eval_batch", 0, "be at least 1"),
        ("epoch_samples", 0, "be at least 1"),
        ("decayed", "none", "be one of all, weights"),
        ("weight_decay", -0.1, "be 0 or a positive number"),
        ("schedule", "linear", "be one of constant, cosine, notes"),
        ("warmup_epochs", -1, "be 0 or a positive number"),
        ("precision", "fp8", "be one of fp32, bf16, fp16"),
        ("ema", 0.0, "lie between 0 and 1"),
        ("ema", 1.0, "lie between 0 and 1"),
    ],
)
def test_optim_refuses(name: str, value: Any, rule: str) -> None:
    with pytest.raises(UserError, match=f"^optim.{name} = {value} must {rule}$"):
        Optim(**{name: value})


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 2])
def test_a_plateau_lowers_the_rate_as_torch_does(mode: Any, patience: int) -> None:
    values = [3.0, 2.0, 2.0, 2.5, 1.0, math.nan, 1.5, 1.2, 1.0, 4.0, 5.0, 6.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.4, patience=patience, threshold=0.0, min_lr=0.1
    )
    ours = Patience(Optim(plateau=Plateau("loss", mode, factor=0.4, patience=patience, floor_ratio=0.1)))
    for value in values:
        reference.step(value)
        ours.look({"loss": value})
        assert ours.lr_ratio == pytest.approx(optimizer.param_groups[0]["lr"])
        assert not ours.over
    assert ours.lr_ratio < 1


def test_a_best_that_is_hardly_better_is_a_new_best() -> None:
    """Where torch's own threshold takes it for none."""
    patience = Patience(Optim(plateau=Plateau("f1", "max", patience=0)))
    for value in (0.5, 0.5 + 1e-6, 0.5 + 2e-6):
        patience.look({"f1": value})
    assert patience.lr_ratio == 1.0
    patience.look({"f1": 0.5 + 2e-6})
    assert patience.lr_ratio == 0.5


def test_a_trial_ends_after_its_patience_and_not_while_it_improves() -> None:
    patience = Patience(Optim(early_stop=EarlyStop("f1", "max", patience=2)))
    ended = []
    for value in (0.1, 0.3, 0.2, 0.4, 0.4, 0.39):
        patience.look({"f1": value})
        ended.append(patience.over)
    assert ended == [False, False, False, False, False, True]
    assert patience.lr_ratio == 1.0


def test_a_metric_that_nobody_reports_is_named() -> None:
    patience = Patience(Optim(early_stop=EarlyStop("macro_f1", "max")))
    with pytest.raises(UserError, match=r"^optim.early_stop.metric = macro_f1 must be one of dba, loss$"):
        patience.look({"loss": 1.0, "dba": 0.5})


@pytest.mark.parametrize(
    ("rule", "name", "value", "told"),
    [
        (Plateau, "factor", 1.0, "lie between 0 and 1"),
        (Plateau, "patience", -1, "not be negative"),
        (Plateau, "floor_ratio", 1, "lie in [0, 1)"),
        (Plateau, "mode", "maximize", "be one of min, max"),
        (EarlyStop, "patience", 0, "be at least 1"),
        (EarlyStop, "mode", "maximize", "be one of min, max"),
        (Spike, "factor", 1.0, "be a number above 1"),
        (Spike, "patience", 0, "lie in 1..20"),
        (Spike, "patience", 21, "lie in 1..20"),
        (Restarts, "first_epochs", 0, "be at least 1"),
        (Restarts, "every_epochs", 0, "be at least 1"),
        (Restarts, "restart_ratio", 0.0, "be a positive number"),
        (Restarts, "floor_ratio", 1.0, "lie in [0, 1)"),
    ],
)
def test_the_rules_refuse(rule: Any, name: str, value: Any, told: str) -> None:
    section = {Plateau: "plateau", EarlyStop: "early_stop", Spike: "spike", Restarts: "restarts"}[rule]
    watched = {"metric": "loss", "mode": "min"} if rule in (Plateau, EarlyStop) else {}
    with pytest.raises(UserError, match=re.escape(f"optim.{section}.{name} = {value} must {told}") + "$"):
        rule(**{**watched, name: value})


@pytest.mark.parametrize(("theirs", "ours"), [(0.5, 0.25), (0.5, 1.0), (1.0, 0.5)])
def test_a_state_brings_its_moments_along_and_not_its_settings(theirs: float, ours: float) -> None:
    """Nor its groups, of which there are two while the ratio is not 1."""
    donor, clone = small_optimizer(0.1, {"weight": theirs}), small_optimizer(0.3, {"weight": ours})
    donor.step()
    clone.load_state_dict(donor.state_dict())
    assert [group["weight_decay"] for group in clone.param_groups] == [0.3] * len(clone.param_groups)
    assert [group["lr_scale"] for group in clone.param_groups] == list(dict.fromkeys((ours, 1.0)))
    of_donor, of_clone = (
        {state["exp_avg"].shape: state["exp_avg"] for state in optimizer.state.values()} for optimizer in (donor, clone)
    )
    assert of_clone.keys() == of_donor.keys() == {(1, 2), (1,)}
    for shape, moment in of_clone.items():
        assert torch.equal(moment, of_donor[shape])


def test_what_was_not_trained_before_begins_anew() -> None:
    donor, clone = small_optimizer(0.1, {}, "weight"), small_optimizer(0.1, {})
    donor.step()
    clone.load_state_dict(donor.state_dict())
    assert [state["step"].item() for state in clone.state.values()] == [1]
    clone.step()
    assert sorted(state["step"].item() for state in clone.state.values()) == [1, 2]


def small_optimizer(weight_decay: float, ratios: dict[str, float], *trained: str) -> torch.optim.AdamW:
    """Over a layer of two inputs and one output that has its gradients. ratios: of the learning rate, by name."""
    layer = nn.Linear(2, 1)
    layer(torch.tensor([[1.0, 2.0]])).sum().backward()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not trained or name in trained)
    return adamw(layer, lambda name: ratios.get(name, 1.0), Optim(lr=0.1, weight_decay=weight_decay))


def test_what_an_optimizer_knows_takes_the_layout_of_the_weights_it_is_for() -> None:
    """The fused step walks through both in the order in which they lie in memory."""
    x_BCHW = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    models = [nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)]
    weight = models[1].weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    optimizers = [adamw(model, lambda name: 1.0, Optim(lr=0.1)) for model in models]
    for step in range(2):
        models[1].load_state_dict(models[0].state_dict())
        if step:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x_BCHW).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


def test_an_average_that_a_state_lacks_begins_with_the_loaded_weights() -> None:
    """As where population-based training turns averaging on."""
    layer = nn.Linear(2, 1)
    ema = Ema(layer, Optim(ema=0.9))
    layer.load_state_dict({"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    ema.load_state_dict({"bias": torch.zeros(1)})
    assert {name: value.tolist() for name, value in ema.state_dict().items()} == {"weight": [[1.0, 1.0]], "bias": [0.0]}


class Net(nn.Module):
    """Parameters of every kind that weight decay treats differently."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.plane = nn.LayerNorm((2, 4))  # its weight is a matrix
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
        self.marked, self.unmarked = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 4), requires_grad=False)
        mark_undecayed(self.marked)


@pytest.mark.parametrize(("decayed", "expected"), [("weights", {"linear.weight", "unmarked"}), ("all", None)])
def test_weight_decay_applies_to_what_it_says(decayed: Any, expected: set[str] | None) -> None:
    net = Net()
    optimizer = adamw(net, lambda name: 0.5 if name.startswith("linear") else 1.0, Optim(decayed=decayed))
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decay.keys() == trained, "each once, whatever its group"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    assert {name for name, value in decay.items() if value} == (trained if expected is None else expected)
    ratios = {name: group["lr_scale"] for group in optimizer.param_groups for name in group["param_names"]}
    assert all(ratio == (0.5 if name.startswith("linear") else 1.0) for name, ratio in ratios.items())
