"""`trainables.beam.fusion` with a loss that is NaN from BAD_STEP on; events are logged to the file $NAN_EVENTS."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trainables.beam.fusion import TASK, Config, prepare
from trainables.contract import Report, Trial
from trainables.loop import fit
from trainables.samples import Batch
from trainables.step import Pairs

__all__ = ["Config", "prepare", "train"]

BAD_STEP = 20


def tell(event: str) -> None:
    with Path(os.environ["NAN_EVENTS"]).open("a") as file:
        file.write(f"{os.getpid()} {time.time():.4f} {event}\n")


def train(trial: Trial) -> Iterator[Report]:
    tell("begin")
    steps = 0

    def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        nonlocal steps
        steps += 1
        if steps >= BAD_STEP:
            tell("nan")
        bad = torch.nan if steps >= BAD_STEP else 1.0
        return {name: (total * bad, count) for name, (total, count) in TASK.loss(model, batch, config).items()}

    yield from fit(replace(TASK, loss=loss), trial)
