"""What a rebuild's training step costs from frames, from cached first maps of its frozen encoders, and channels last.

    PYTHONPATH=. .venv/bin/python benchmarks/features.py

The three alternate in one process, on one thread. Times are CPU time, including gathering the batch from disk. Full
size is 256 pixels, five instants and the published widths. Windows are simulated.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from search.space.file import load_space
from trainables.beam import features, fusion, rebuild
from trainables.beam.config import Data, Simulated
from trainables.contract import Trial
from trainables.step import Loss

WAYS = ("from frames", "from kept maps", "from frames, channels last")
SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "rebuild.yaml"


def laptop(folder: str) -> rebuild.Config:
    space, trainable = load_space(SPACE, profile="laptop", has_gpu=False)
    config: rebuild.Config = trainable.config(space.config(space.draw(random.Random(0), {"optim.batch_size": 16})))
    return replace(config, data=replace(config.data, prepared=folder))


def full_size(folder: str) -> rebuild.Config:
    return rebuild.Config(data=Data(prepared=folder, simulated=Simulated(passes=8, frames=5)))


def step_s(loss: Loss, samples: Any, windows: int) -> float:
    """Return the CPU seconds of one step's forward and backward pass, gathering its batch included."""
    began_s = time.process_time()
    _, total = loss(samples[torch.arange(windows)])
    total.backward()
    loss.zero_grad()
    return time.process_time() - began_s


def compare(config: rebuild.Config, windows: int, rounds: int) -> list[list[float]]:
    """Return, for each round, the CPU seconds of a step in each of WAYS."""
    torch.manual_seed(0)
    network = fusion.build(config.fusion).eval()
    maps = features.first_maps(config.data, network, config.optim, Trial(config))
    last = replace(config, model=replace(config.model, channels_last=True))
    as_it_is, channels_last = (Loss(rebuild.loss, rebuild.build(x, network.state_dict()), x) for x in (config, last))
    frames, kept = (features.samples(config, "train", maps=x) for x in ({}, maps))
    ways = [(as_it_is, frames), (as_it_is, kept), (channels_last, frames)]
    for loss, samples in ways:
        step_s(loss, samples, windows)
    return [[step_s(loss, samples, windows) for loss, samples in ways] for _ in range(rounds)]


def rows(name: str, rounds: Sequence[Sequence[float]]) -> str:
    lines = []
    for number, way in enumerate(WAYS):
        median_ms = 1000 * statistics.median(taken[number] for taken in rounds)
        ratios = [taken[number] / taken[0] for taken in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        told = f"{middle:.3f} | {low:.3f} to {high:.3f}" if number else " | "
        lines.append(f"| {name if number == 0 else ''} | {way} | {median_ms:.1f} | {told} |")
    return "\n".join(lines)


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--rounds", type=int, default=40, help="steps each way on the laptop's network")
    command.add_argument("--full-rounds", type=int, default=3, help="at full size")
    given = command.parse_args()
    torch.set_num_threads(1)
    print("| network | a step | ms | times | middle half |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, config, windows, rounds in (
            ("laptop", laptop(folder), 16, given.rounds),
            ("full size", full_size(folder), 2, given.full_rounds),
        ):
            for losses, weights in (
                ("four losses", config.loss),
                ("no fusion loss", replace(config.loss, alpha_fusion=0.0)),
            ):
                taken = compare(replace(config, loss=weights), windows, rounds)
                print(rows(f"{name}, {losses}, {windows} windows", taken), flush=True)


if __name__ == "__main__":
    main()
