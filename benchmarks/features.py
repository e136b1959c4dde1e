"""What a rebuild's training step costs from decoded frames, and from the kept first maps of its frozen encoders.

    PYTHONPATH=. .venv/bin/python benchmarks/features.py

Both in one process, on one thread, in turns; processor time, the batch gathered from disk included. Full size is 256
pixels, five instants and the published widths, with files of the public data's shapes.
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

from search.space_file import load_space
from trainables.beam import features, fusion, rebuild
from trainables.beam.config import Data, Simulated
from trainables.contract import Trial
from trainables.step import Loss

SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "rebuild.yaml"


def laptop(folder: str) -> rebuild.Config:
    space, trainable = load_space(SPACE, profile="laptop", has_gpu=False)
    config: rebuild.Config = trainable.config(space.config(space.draw(random.Random(0), {"optim.batch_size": 16})))
    return replace(config, data=replace(config.data, prepared=folder))


def full_size(folder: str) -> rebuild.Config:
    return rebuild.Config(data=Data(prepared=folder, simulated=Simulated(passes=8, frames=5)))


def step_s(loss: Loss, samples: Any, windows: int) -> float:
    """Of one step, its batch included."""
    began_s = time.process_time()
    _, total = loss(samples[torch.arange(windows)])
    total.backward()
    loss.zero_grad()
    return time.process_time() - began_s


def compare(config: rebuild.Config, windows: int, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of steps from frames, and from maps."""
    torch.manual_seed(0)
    network = fusion.build(config.fusion).eval()
    maps = features.first_maps(config.data, network, config.optim, Trial(config))
    loss = Loss(rebuild.loss, rebuild.build(config, network.state_dict()), config)
    sides = [features.samples(config, "train", maps=kept) for kept in ({}, maps)]
    for samples in sides:
        step_s(loss, samples, windows)
    taken = [[step_s(loss, samples, windows) for samples in sides] for _ in range(pairs)]
    from_frames, from_maps = zip(*taken, strict=True)
    return list(from_frames), list(from_maps)


def row(name: str, losses: str, windows: int, from_frames: Sequence[float], from_maps: Sequence[float]) -> str:
    ratios = [kept / whole for whole, kept in zip(from_frames, from_maps, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    ms = [f"{1000 * statistics.median(taken):.1f}" for taken in (from_frames, from_maps)]
    return f"| {name} | {losses} | {windows} | {ms[0]} | {ms[1]} | {middle:.3f} | {low:.3f} to {high:.3f} |"


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--pairs", type=int, default=40, help="steps each way on the laptop's network")
    command.add_argument("--full-pairs", type=int, default=3, help="at full size")
    given = command.parse_args()
    torch.set_num_threads(1)
    print("| network | losses | windows | ms from frames | ms from maps | ratio | middle half |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, config, windows, pairs in (
            ("laptop", laptop(folder), 16, given.pairs),
            ("full size", full_size(folder), 2, given.full_pairs),
        ):
            for losses, weights in (
                ("all four", config.loss),
                ("without fusion", replace(config.loss, alpha_fusion=0.0)),
            ):
                taken = compare(replace(config, loss=weights), windows, pairs)
                print(row(name, losses, windows, *taken), flush=True)


if __name__ == "__main__":
    main()
