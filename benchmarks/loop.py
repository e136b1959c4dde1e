"""What the shared training loop costs over a bare PyTorch loop with the same model, data and optimizer, on a CPU.

    python -m benchmarks.loop [--steps 100] [--pairs 15]

The bare loop does what every loop must: gather a batch, forward, backward, clip with `clip_grad_norm_`, a step of fused
AdamW. `fit` also checks every loss and gradient before the update, keeps exact sums for its metrics, follows a schedule
and scores the model. Runs alternate in one process, on one thread. Times are the process's CPU seconds, which on one
thread equal wall time except for what other processes take. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trainables.contract import Trial
from trainables.loop import Task, fit
from trainables.optim import Optim
from trainables.samples import Batch, Ranks, Samples, TensorSamples
from trainables.step import Pairs

CPU = torch.device("cpu")
CLASSES = 10


@dataclass(frozen=True)
class Config:
    """The config of a benchmark trial: one epoch of `steps` batches."""

    steps: int
    conv: bool
    epochs: int = 1
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, clip_norm=1.0, batch_size=32))


@functools.lru_cache(maxsize=4)  # drawn only once, in the warm-up
def pictures(config: Config, split: str, ranks: Ranks) -> Samples:
    """Return random pictures with random labels."""
    samples = config.steps * config.optim.batch_size if split == "train" else 1
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randn(samples, 3, 32, 32, generator=generator)
    label_B = torch.randint(CLASSES, (samples,), generator=generator)
    return TensorSamples({"image": image_BCHW, "label": label_B})


def network(config: Config) -> nn.Module:
    """Return a small conv net, or a multilayer perceptron, whose steps are shorter."""
    if not config.conv:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(3072, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, CLASSES)
        )
    widths = [3, 16, 32, 64, 128]
    stages: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        stages += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(widths[-1] * 4, CLASSES))


def loss(model: nn.Module, batch: Batch, config: Any) -> Pairs:
    summed = functional.cross_entropy(model(batch["image"]), batch["label"], reduction="sum")
    return {"label": (summed, len(batch["label"]))}


TASK = Task(config=Config, model=network, data=pictures, loss=loss, score=loss)


def shared_loop(config: Config) -> None:
    for _ in fit(TASK, Trial(config, device=CPU)):
        pass


def bare_loop(config: Config) -> None:
    torch.manual_seed(0)
    model, train = network(config), pictures(config, "train", Ranks())
    optim = config.optim
    assert optim.clip_norm is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    for indices in torch.randperm(len(train)).split(optim.batch_size):
        batch = train[indices]
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(batch["image"]), batch["label"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the system; whether it does is chance, worth a fifth of a step."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**30)


def seconds(loop: Callable[[Config], None], config: Config) -> float:
    began_s = time.process_time()
    loop(config)
    return time.process_time() - began_s


def compare(config: Config, pairs: int) -> str:
    """Time pairs of runs and return a row of the table; the first pair is a warm-up and not counted."""
    timed = []
    for pair in range(pairs + 1):
        # Alternate the order, so that neither loop always finds the caches as the other left them.
        order = (bare_loop, shared_loop) if pair % 2 else (shared_loop, bare_loop)
        took = {loop: seconds(loop, config) for loop in order}
        timed.append((took[bare_loop], took[shared_loop]))
    del timed[0]
    bare_ms, shared_ms = (1000 * statistics.median(times) / config.steps for times in zip(*timed, strict=True))
    ratios = [shared / bare for bare, shared in timed]
    return (
        f"| {'conv net' if config.conv else 'perceptron'} | {bare_ms:.2f} | {shared_ms:.2f} "
        f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What the shared training loop costs beside a bare one.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| model | bare, ms a step | fit, ms a step | fit / bare, median | min | max |")
    print("|---|---|---|---|---|---|")
    for conv in (True, False):
        print(compare(Config(arguments.steps, conv), arguments.pairs), flush=True)


if __name__ == "__main__":
    main()
