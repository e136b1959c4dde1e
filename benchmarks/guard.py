"""What the guard costs: training steps of the laptop fusion model with and without it, in pairs.

    PYTHONPATH=. python benchmarks/guard.py [--pairs 40]

Without it, no step is judged, no verdict is copied to the host and no generator state is saved; the rest of `fit` is
the same. A pair is an epoch of each, in alternating order, in one process on one thread; the result is the median of
the pairs' ratios, with their middle half. Also measured: the time from a trial's first non-finite loss to the
exception, including the replay of the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search.space.file import load_space
from trainables import loop
from trainables.beam import fusion
from trainables.beam.data import samples
from trainables.contract import Diverged, Trial
from trainables.guard import Guard, Step
from trainables.loop import fit
from trainables.resume import generators
from trainables.samples import Batch
from trainables.step import Pairs, Summed

SPACE = Path(__file__).parents[1] / "search_spaces" / "fusion.yaml"


class NoGuard(Guard):
    """A guard that judges nothing."""

    def judge(self, loss: Tensor, norm: Tensor, scale: Tensor, next_scale: Tensor) -> tuple[Tensor, Tensor]:
        return self._diverged, self._diverged

    def follow(self, step: Step, summed: Summed) -> None:
        pass

    def check(self) -> None:
        pass


class TimedGuard(Guard):
    """A guard that adds up the time it takes on the host."""

    spent_s = 0.0

    def judge(self, loss: Tensor, norm: Tensor, scale: Tensor, next_scale: Tensor) -> tuple[Tensor, Tensor]:
        return self._timed(super().judge, loss, norm, scale, next_scale)

    def follow(self, step: Step, summed: Summed) -> None:
        self._timed(super().follow, step, summed)

    def check(self) -> None:
        self._timed(super().check)

    def _timed(self, act: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return act(*arguments)
        finally:
            TimedGuard.spent_s += time.perf_counter() - began


def laptop_config() -> fusion.Config:
    """Return the second known setting of the laptop profile, with enough epochs for one per pair."""
    space, trainable = load_space(SPACE, ["config.epochs=1000"], "laptop")
    config = trainable.config(space.config(space.try_first[1].values))
    assert isinstance(config, fusion.Config)
    return config


def steps_of(config: fusion.Config) -> int:
    return len(samples(config, "train")) // config.optim.batch_size


def epochs_s(config: fusion.Config, guard: type[Guard], keep: Callable[..., Any]) -> Iterator[float]:
    """Yield the mean duration of a training step in each epoch, in seconds."""
    reports = fit(replace(fusion.TASK, score=nothing, derived=dict), Trial(config))
    while True:
        use(guard, keep)
        yield config.optim.batch_size / next(reports).metrics["samples_per_s"]


def use(guard: type[Guard], keep: Callable[..., Any]) -> None:
    """Replace `Guard` and `generators` in `trainables.loop`, which `fit` looks up at the start and in each step."""
    vars(loop).update(Guard=guard, generators=keep)


def nothing(model: nn.Module, batch: Batch, config: Any) -> Pairs:
    return {}


def seconds_to_the_exception(config: fusion.Config, bad_step: int = 20) -> tuple[float, int]:
    """Return the seconds from the forward pass that gives NaN to `Diverged`, and the number of steps begun after it."""
    use(Guard, generators)
    calls, after, began = 0, 0, 0.0

    def loss(model: nn.Module, batch: Batch, config: fusion.Config) -> Pairs:
        nonlocal calls, after, began
        calls += 1
        if calls == bad_step:
            began = time.perf_counter()
        after = max(0, calls - bad_step - 1)  # the last call is the replay's
        bad = torch.nan if calls >= bad_step else 1.0
        return {name: (total * bad, count) for name, (total, count) in fusion.loss(model, batch, config).items()}

    try:
        next(iter(fit(replace(fusion.TASK, loss=loss, score=nothing, derived=dict), Trial(config))))
    except Diverged:
        return time.perf_counter() - began, after
    raise AssertionError("the loss is NaN, and nothing was raised")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    config = laptop_config()
    fusion.prepare(config)
    guarded, bare = epochs_s(config, TimedGuard, generators), epochs_s(config, NoGuard, lambda device: ())
    next(guarded), next(bare)  # the first epoch warms up
    TimedGuard.spent_s = 0.0
    with_s, without_s = list[float](), list[float]()
    for pair in range(pairs):
        for runs, kept in ((guarded, with_s), (bare, without_s))[:: 1 if pair % 2 else -1]:
            kept.append(next(runs))
    low, middle, high = statistics.quantiles([a / b for a, b in zip(with_s, without_s, strict=True)], n=4)
    own_s = TimedGuard.spent_s / (pairs * steps_of(config))
    delay_s, after = seconds_to_the_exception(config)
    step_s = statistics.median(without_s)
    print("| step ms | guard's own time | with / without | middle half | steps begun after NaN | ms to the exception |")
    print("|---|---|---|---|---|---|")
    own = f"{1e3 * own_s:.3f} ms, {own_s / step_s:.2%}"
    ratio = f"{middle:.4f} | {low:.4f} to {high:.4f}"
    print(f"| {1e3 * step_s:.1f} | {own} | {ratio} | {after} | {1e3 * delay_s:.0f} |")


if __name__ == "__main__":
    main()
