"""`trainables.mabe.tagging`, with the trial's peak memory in its reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from trainables.contract import Report, Trial
from trainables.loop import fit, micro_batch_that_fits
from trainables.mabe.tagging import TASK, Config, memory_need, prepare
from trainables.memory import MIB, LiveBytes
from trainables.resume import seed_everything
from trainables.samples import ranks_of
from trainables.step import Loss

__all__ = ["Config", "memory_need", "prepare", "train"]


def train(trial: Trial) -> Iterator[Report]:
    """As the family's `train`; `peak_mb` is the peak of weights, optimizer, steps and scoring together, in MiB.

    It excludes the data set, which a GPU does not hold, and the search for the micro-batch: allocations beyond the
    limit are refused on a GPU, but made and counted here.
    """
    ranks, config = ranks_of(trial), trial.config
    seed_everything(trial.seed, "model")
    network = TASK.model(config)
    splits = {name: TASK.data(config, name, ranks) for name in ("train", "val")}
    micro_batch_that_fits(Loss(TASK.loss, network, config), splits["train"], trial)  # result is cached for `fit`
    reports = fit(replace(TASK, model=lambda _: network, data=lambda _, name, __: splits[name]), trial)
    live = LiveBytes(network)
    while True:
        with live:
            report = next(reports, None)
        if report is None:
            return
        yield replace(report, metrics={**report.metrics, "peak_mb": live.peak / MIB, "slot": os.getpid()})
