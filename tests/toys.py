"""Small trainables that behave, or misbehave, as their config says; the tests of the engine run them."""

from __future__ import annotations

import json
import os
import queue
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainables.contract import Diverged, Report, Trial


def descend(trial: Trial) -> Iterator[Report]:
    """Gradient descent on w^2 from 5: diverges above lr 1. `config["pause_s"]` stretches an epoch. Prints each."""
    config = trial.config
    w = trial.resume["w"] if trial.resume else 5.0
    start = trial.resume["epoch"] + 1 if trial.resume else 0
    for epoch in range(start, config["epochs"]):
        time.sleep(config.get("pause_s", 0.0))
        w -= config["lr"] * 2 * w
        print(f"epoch {epoch}")
        metrics = {"loss": w * w, "started_at": start, "lr_seen": config["lr"], "pid": os.getpid()}
        yield Report(metrics, state=lambda: {"epoch": epoch, "w": w})


def counting(trial: Trial) -> Iterator[Report]:
    """As `descend`; `copies`: how many checkpoints Tune has in `config["folder"]` at each report."""
    for report in descend(trial):
        yield Report(
            {**report.metrics, "copies": len([*Path(trial.config["folder"]).rglob("checkpoint_*")])}, report.state
        )


def heavy(trial: Trial) -> Iterator[Report]:
    """As `descend`, with a state of 300 kB."""
    for report in descend(trial):
        assert report.state is not None
        state = report.state()
        yield Report(report.metrics, state=lambda: {**state, "weights": torch.zeros(75_000)})


def surrounded(trial: Trial) -> Iterator[Report]:
    """Writes the environment of its rank into the folder `config["folder"]`. A program of torchrun's, too."""
    file = Path(trial.config["folder"]) / f"rank-{trial.rank}.json"
    file.write_text(json.dumps(dict(os.environ)))
    yield Report({"loss": 0.0})


def misbehave(trial: Trial) -> Iterator[Report]:
    """As `descend`, but at epoch 2 does what `config["kind"]` says; `aside` is a metric that nothing depends on."""
    for epoch, report in enumerate(descend(trial), trial.resume["epoch"] + 1 if trial.resume else 0):
        if epoch == 2:
            _misbehave(trial.config["kind"], Path(trial.config["flag"]))
        metrics = dict(report.metrics)
        if epoch == 2 and trial.config["kind"] == "nan":
            metrics["loss"] = float("nan")
        if trial.config["kind"] == "aside":
            metrics["aside"] = float("inf")
        yield Report(metrics, report.state)


def _misbehave(kind: str, flag: Path) -> None:
    if kind == "diverge":
        raise Diverged("loss_trans is not finite", step=812)
    if kind == "bug":
        raise KeyError("no such batch")
    if kind == "memory":
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    if kind == "killed" and not flag.exists():
        flag.write_text("once")
        os.kill(os.getpid(), signal.SIGKILL)


def network(trial: Trial) -> Iterator[Report]:
    """A small network with dropout on random data; all ranks average their gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    y = x.sum(1, keepdim=True)
    torch.manual_seed(trial.seed)
    first = nn.Linear(8, 16)
    model = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.config["lr"])
    for epoch in range(trial.config["epochs"]):
        share = slice(trial.rank, None, trial.world_size)
        loss = (model(x[share]) - y[share]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if trial.world_size > 1:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        yield Report({"loss": loss.item(), "weight": first.weight.sum().item()}, state=lambda: {"epoch": epoch})


def late(trial: Trial) -> Iterator[dict[str, Any]]:
    """Scores 0.2 throughout, as guessing does, or learns: below chance first, then above it."""
    for score in [0.1, 0.1, 0.5, 0.8] if trial.config["learns"] else [0.2] * 4:
        yield {"score": score, "score_chance": 0.2}


def one_rank_blows(trial: Trial) -> Iterator[dict[str, Any]]:
    """Rank 1 diverges alone while the others wait for it in a collective."""
    yield {"loss": 1.0}
    if trial.rank == 1 and trial.config["lr"] > 0.5:
        raise Diverged("rank 1 alone")
    dist.all_reduce(torch.ones(1))
    yield {"loss": 0.5}


def one_rank_hangs(trial: Trial) -> Iterator[Report]:
    """Rank 1 waits for a batch that never comes, unless `config["flag"]` says that this has happened before."""
    start = trial.resume["epoch"] + 1 if trial.resume else 0
    for epoch in range(start, 3):
        if trial.rank == 1 and epoch == 1 and not Path(trial.config["flag"]).exists():
            Path(trial.config["flag"]).write_text("once")
            _wait_for_a_batch()
        dist.all_reduce(torch.ones(1))
        yield Report({"loss": 1.0, "started_at": start}, state=lambda: {"epoch": epoch})


def _wait_for_a_batch() -> None:
    queue.Queue[int]().get()
