"""A family small enough to train in milliseconds, and how the tests of the shared loop run it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainables.contract import Diverged, Report, State, Trial
from trainables.loop import Task, fit, step_memory
from trainables.optim import Optim
from trainables.resume import seed_from
from trainables.samples import Batch, Ranks, TensorSamples, epoch_shares
from trainables.step import Pairs

CPU = torch.device("cpu")
SEED = 3
WIDTH = 6  # of the toy samples


@dataclass(frozen=True)
class Config:
    optim: Optim = field(default_factory=lambda: Optim(lr=0.01, batch_size=8))
    epochs: int = 2
    dropout: float = 0.0
    samples: int = 27
    lengths: bool = False  # a loss over as many elements of each sample as it has, instead of all
    loudness: float = 1.0  # what the loss is multiplied by
    nan_loss_of: int | None = None  # the sample whose loss is NaN
    nan_gradient_of: int | None = None  # the sample that spoils the gradient and not the loss


class SpoilGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN where `spoil` is true."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spoil: Tensor) -> Tensor:
        ctx.save_for_backward(spoil)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (spoil,) = ctx.saved_tensors
        return gradient.masked_fill(spoil, math.nan), None


def toy_model(config: Config) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, WIDTH)
    )


def toy_data(config: Config, split: str, ranks: Ranks) -> TensorSamples:
    """Samples whose targets are a fixed map of their inputs, and whose lengths differ."""
    samples, seed = (config.samples, 1) if split == "train" else (11, 2)
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(samples, WIDTH, generator=generator)
    length_N = torch.randint(1, WIDTH + 1, (samples,), generator=generator)
    return TensorSamples({"x": x_NC, "y": x_NC.flip(1).sin(), "length": length_N, "index": torch.arange(samples)})


def squares(model: nn.Module, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """The squared errors of the elements that count, and which those are."""
    y_BC = model(batch["x"])
    if config.nan_gradient_of is not None:
        y_BC = SpoilGradient.apply(y_BC, (batch["index"] == config.nan_gradient_of)[:, None])
    counts_BC = torch.arange(WIDTH) < (batch["length"][:, None] if config.lengths else WIDTH)
    counts_BC = counts_BC.expand_as(y_BC)
    return (y_BC - batch["y"]).square() * counts_BC, counts_BC


def toy_loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    squares_BC, counts_BC = squares(model, batch, config)
    count = counts_BC.sum() if config.lengths else len(squares_BC)
    if config.nan_loss_of is not None:
        squares_BC = squares_BC.masked_fill((batch["index"] == config.nan_loss_of)[:, None], math.nan)
    square = config.loudness * squares_BC.sum()
    return {"square": (square, count), "size": (0.01 * model(batch["x"]).square().sum(), count)}


def toy_score(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    squares_BC, counts_BC = squares(model, batch, config)
    even = batch["index"] % 2 == 0
    return {"error": (squares_BC.sum(), counts_BC.sum()), "even": (squares_BC[even].sum(), counts_BC[even].sum())}


TOY = Task(config=Config, model=toy_model, data=toy_data, loss=toy_loss, score=toy_score)


@dataclass(frozen=True)
class Run:
    """What a trial left behind."""

    metrics: list[dict[str, float]]
    states: list[State]
    weights: list[Tensor]  # before each call of the loss, and at last
    diverged: Diverged | None = None


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def run(config: Config, task: Task = TOY, resume: State | None = None, rank: int = 0, world_size: int = 1) -> Run:
    """Run a trial to its end, or to its divergence."""
    models: list[nn.Module] = []
    weights: list[Tensor] = []

    def model_kept(config: Config) -> nn.Module:
        models.append(task.model(config))
        return models[0]

    def loss_watched(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        weights.append(weights_of(model))
        return task.loss(model, batch, config)

    trial = Trial(config, seed=SEED, rank=rank, world_size=world_size, device=CPU, resume=resume)
    done = Run([], [], weights)
    try:
        for report in fit(replace(task, model=model_kept, loss=loss_watched), trial):
            assert report.state is not None
            done.metrics.append({name: value for name, value in report.metrics.items() if name != "samples_per_s"})
            done.states.append(report.state())
    except Diverged as diverged:
        done = replace(done, diverged=diverged)
    weights.append(weights_of(models[0]))
    return done


def train(trial: Trial) -> Iterator[Report]:
    """The toy family as a space names it."""
    yield from fit(TOY, trial)


def memory_need(trial: Trial) -> int:
    return step_memory(TOY, trial)


def order(config: Config, epoch: int = 0) -> list[Tensor]:
    """The samples of each batch of an epoch."""
    shares = epoch_shares(
        config.samples, config.optim.batch_size, config.optim.micro_batch, Ranks(), seed_from(SEED, "order", epoch)
    )
    return [torch.cat(share.micros) for share in shares]


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, through nested dicts and lists."""
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for mine, yours in zip(one, other, strict=True):
            assert_same(mine, yours)
    else:
        assert one == other
