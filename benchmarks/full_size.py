"""Windows per second and peak memory of full-size fusion training on a GPU, in the shared loop.

    PYTHONPATH=. .venv/bin/python benchmarks/full_size.py [--laptop]

Full size is 256 pixels, five instants, four modalities and the published widths; windows are simulated, the effective
batch is 24. Rows are bf16 and fp32, each without and with `model.channels_last`; the second of two epochs is measured.
Without a GPU the rows say so. --laptop: the small network, on GPU or CPU, to check that everything runs.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from search.space.file import load_space
from trainables.beam import fusion
from trainables.beam.config import Data, Simulated
from trainables.contract import Trial, default_device
from trainables.optim import Optim

SPACE = Path(__file__).resolve().parents[1] / "search_spaces" / "fusion.yaml"


def full_size(folder: str) -> fusion.Config:
    data = Data(prepared=folder, simulated=Simulated(passes=40, frames=5))
    return fusion.Config(data=data, optim=Optim(batch_size=24), epochs=2)


def laptop(folder: str) -> fusion.Config:
    space, trainable = load_space(SPACE, profile="laptop", has_gpu=False)
    config: fusion.Config = trainable.config(space.config(space.draw(random.Random(0))))
    data = replace(config.data, prepared=folder, simulated=Simulated(passes=12, frames=10))
    return replace(config, data=data, epochs=2)


def row(config: fusion.Config) -> str:
    trial = Trial(config)
    on_gpu = trial.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(trial.device)
    *_, last = fusion.train(trial)
    peak = f"{torch.cuda.max_memory_allocated(trial.device) / 2**30:.1f} GiB" if on_gpu else "not counted on a CPU"
    return f"{last.metrics['samples_per_s']:.1f} | {last.metrics['micro_batch']:.0f} | {peak}"


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--laptop", action="store_true", help="the small network, on a CPU too")
    given = command.parse_args()
    there = default_device().type == "cuda"
    kernel = "mamba-ssm's kernel" if there and find_spec("selective_scan_cuda") is not None else "plain scan"
    print(
        "| precision | channels last | scan | windows a second | micro-batch | peak memory |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        config = laptop(folder) if given.laptop else full_size(folder)
        for precision in ("bf16", "fp32"):
            for channels_last in (False, True):
                tried = replace(
                    config,
                    optim=replace(config.optim, precision=precision),
                    model=replace(config.model, channels_last=channels_last),
                )
                told = row(tried) if there or given.laptop else "no GPU at hand | |"
                print(f"| {precision} | {'yes' if channels_last else 'no'} | {kernel} | {told} |", flush=True)


if __name__ == "__main__":
    main()
