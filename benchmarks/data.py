"""What prepared arrays gain over decoding the files for every sample: windows per second, and memory.

    python -m benchmarks.data [--seconds 30] [--loaders 2] [--readers 4]

Sixty simulated frames with files of the public data's shapes: JPEG 960 x 540, ASCII PLY of 17 000 points, radar cubes
(4, 256, 250). Full size: 256 pixels, five instants, four modalities. The same number of processes gathers batches from
files and from arrays, both in the page cache; the decoders are the family's own, which are not needlessly slow.
Then several processes open and read all arrays: if each had a copy, their proportional set sizes (from
/proc/self/smaps_rollup, where a page shared by k processes counts 1/k in each) would add up to as many copies.
Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trainables.beam.config import SENSORS, Data, Simulated
from trainables.beam.data import Samples, samples
from trainables.beam.files import (
    fov_of,
    lidar_counts,
    radar_maps,
    read_cube,
    read_image,
    read_points,
    read_position,
    read_power,
)
from trainables.beam.prepare import find_table, prepare_data
from trainables.beam.simulator import simulate, write_ply
from trainables.beam.table import GROUPS, POWER, Table, scenario_of

PICTURE, POINTS, CUBE = (960, 540), 17_000, (4, 256, 250)
BATCH = 12
MIB = 2**20


@dataclass(frozen=True)
class Config:
    data: Data


def write_files(root: Path) -> None:
    """Write a simulated data set whose files have the public files' shapes; their content does not matter here."""
    simulate(root, Simulated(passes=2, frames=30))
    rng = np.random.default_rng(0)
    for path in sorted(root.rglob("*.jpg")):
        with Image.open(path) as image:
            large = np.asarray(image.resize(PICTURE)) + 6 * rng.standard_normal((PICTURE[1], PICTURE[0], 1))
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    for path in sorted(root.rglob("*.ply")):
        points = rng.normal(0, 30, (POINTS, 3))
        write_ply(path, points, rng.integers(0, 4096, POINTS).astype(np.uint16))
    for path in sorted(root.rglob("radar_data_*.npy")):
        parts = rng.standard_normal((2, *CUBE))
        np.save(path, (parts[0] + 1j * parts[1]).astype(np.complex64))


def decoded(table: Table, data: Data, windows: Tensor) -> dict[str, Tensor]:
    """Decode the sensors, positions and powers of a batch from the files."""
    size = data.image_size
    readers: dict[str, Callable[[Path], NDArray[Any]]] = {
        "unit1_rgb_": lambda path: read_image(path, size),
        "unit1_lidar_": lambda path: lidar_counts(read_points(path), size, fov_of(scenario_of(path), True)),
        "unit1_radar_": lambda path: radar_maps(read_cube(path), size),
        "unit1_loc": read_position,
        "unit2_loc_": read_position,
        POWER: read_power,
    }
    batch: dict[str, Tensor] = {}
    for group, files in table.groups.items():
        rows = [np.stack([readers[group](files.paths[i]) for i in files.at_NK[n]]) for n in windows.tolist()]
        batch[group] = torch.from_numpy(np.stack(rows))
    return batch


def gathering(
    data: Data, how: str, seconds: float, seed: int, start: Barrier, told: Queue[tuple[float, float]]
) -> None:
    """Run one loader process; put its windows per second, and per second of CPU time, into `told`."""
    torch.set_num_threads(1)
    side, table = samples(Config(data), "train"), find_table(data)
    rng = np.random.default_rng(seed)

    def gather() -> None:
        windows = torch.from_numpy(rng.integers(0, len(side), BATCH))
        batch = side[windows] if how == "arrays" else decoded(table, data, windows)
        assert all(len(x) == BATCH for x in batch.values())

    gather()
    start.wait()
    began_s, used_s, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began_s < seconds:
        gather()
        done += BATCH
    told.put((done / (time.perf_counter() - began_s), done / (time.process_time() - used_s)))


def memory_mib() -> tuple[float, float]:
    """Return resident and proportional set size of this process, in MiB."""
    fields = {line.split()[0]: line.split()[1] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]}
    return int(fields["Rss:"]) / 1024, int(fields["Pss:"]) / 1024


def reading(data: Data, start: Barrier, told: Queue[tuple[float, float]]) -> None:
    """Run one of several processes that read every array; put the growth of its two sizes, in MiB, into `told`."""
    torch.set_num_threads(1)
    samples(Config(data), "train")[torch.arange(1)]  # warm up: allocations and libraries of a first batch
    start.wait()
    before = memory_mib()
    start.wait()
    sides: list[Samples] = [samples(Config(data), side) for side in ("train", "val")]
    for side in sides:
        for i in range(len(side)):
            side[torch.tensor([i])]
    start.wait()
    after = memory_mib()
    start.wait()  # no process exits while another still measures
    told.put((after[0] - before[0], after[1] - before[1]))


def rates(data: Data, how: str, loaders: int, seconds: float) -> tuple[float, float]:
    """Return windows per second of all loaders together, and per second of CPU time of one."""
    context = mp.get_context("spawn")
    start, told = context.Barrier(loaders), context.Queue()
    processes = [
        context.Process(target=gathering, args=(data, how, seconds, seed, start, told)) for seed in range(loaders)
    ]
    for process in processes:
        process.start()
    found = [told.get(timeout=60 + 10 * seconds) for _ in processes]
    for process in processes:
        process.join()
    return sum(pair[0] for pair in found), sum(pair[1] for pair in found) / loaders


def rises(data: Data, readers: int) -> tuple[float, float]:
    """Return the growth in MiB, resident and proportional, of all readers together."""
    context = mp.get_context("spawn")
    start, told = context.Barrier(readers), context.Queue()
    processes = [context.Process(target=reading, args=(data, start, told)) for _ in range(readers)]
    for process in processes:
        process.start()
    sizes = [told.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return sum(size[0] for size in sizes), sum(size[1] for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description="What prepared arrays are worth.")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--loaders", type=int, default=2)
    parser.add_argument("--readers", type=int, default=4)
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # inherited by the loader processes, which have one thread each, as loaders do
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder) / "root")
        data = Data(root=f"{folder}/root", prepared=f"{folder}/prepared", split="legacy", holdout=0.1)
        began_s = time.perf_counter()
        table = prepare_data(data)
        frames = len(table.groups[GROUPS["image"][0]].paths)
        took_s = time.perf_counter() - began_s
        arrays = sum(path.stat().st_size for path in Path(data.prepared or "").rglob("*.npy")) / MIB
        print(f"preparation: {frames} frames of {len(SENSORS)} sensors in {took_s:.1f} s, {os.cpu_count()} CPUs\n")
        print(f"| {arguments.loaders} loader processes | windows a second | times | a CPU second | times |")
        print("|---|---|---|---|---|")
        slow, fast = (rates(data, how, arguments.loaders, arguments.seconds) for how in ("files", "arrays"))
        print(f"| decoding the files for every sample | {slow[0]:.1f} | 1 | {slow[1]:.1f} | 1 |")
        times = fast[0] / slow[0], fast[1] / slow[1]
        print(f"| prepared arrays | {fast[0]:.0f} | {times[0]:.0f} | {fast[1]:.0f} | {times[1]:.0f} |\n")
        print("| processes | arrays, MiB | resident, MiB | proportional, MiB |\n|---|---|---|---|")
        for readers in (1, arguments.readers):
            resident, proportional = rises(data, readers)
            print(f"| {readers} | {arrays:.1f} | {resident:.1f} | {proportional:.1f} |", flush=True)


if __name__ == "__main__":
    main()
