"""Several trials on one GPU compared with one at a time: `mabe` on its laptop profile, on a simulated GPU.

    PYTHONPATH=. python benchmarks/packing.py [--slots 4] [--trials 16] [--epochs 2] [--limit-mb 400]

The same settings are trained twice, for --epochs epochs without a scheduler: by one slot with the whole memory, and by
as many slots as the plan finds room for. Ray gets one CPU per slot, whether these exist or not. Trials per minute are
counted over the later half of the trials, to exclude the start. Every tensor of the running trials is counted
(`packing_tagging.py`), which slows both searches alike.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from measured import cost_per_further_trial

from search import cluster
from search import run as engine
from search.interruption import Interruption
from search.packing import measure
from search.plan import Measured, Plan, Unmeasured, make_plan, told
from search.records.folder import STUDY
from search.records.provenance import write_space
from search.records.record import Record
from search.space import Space
from search.space.file import load_space
from search.study import open_study

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Arm:
    """One search of the comparison: its trials, and the time they took."""

    records: tuple[Record, ...]
    wall_s: float
    per_minute: float


def search(space: Space, plan: Plan) -> Arm:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "packing"
        results.mkdir()
        write_space(results, space)
        study = open_study(results / STUDY, space, create=True)
        began = time.monotonic()
        outcome = engine.run(space, plan, results)
        wall_s = time.monotonic() - began
        ends = [trial.datetime_complete.timestamp() for trial in study.trials if trial.datetime_complete is not None]
    assert all(record.status == "finished" for record in outcome.records), outcome.records
    return Arm(outcome.records, wall_s, 60 * plan.slots / cost_per_further_trial(ends, plan.slots))


def peaks(records: tuple[Record, ...]) -> list[float]:
    """Return each slot's peak memory over its trials, in MiB, in ascending order."""
    by_slot: dict[float, float] = {}
    for record in records:
        slot, peak_mb = (record.metrics[name] or 0.0 for name in ("slot", "peak_mb"))
        by_slot[slot] = max(by_slot.get(slot, 0.0), peak_mb)
    return sorted(by_slot.values())


def cut(records: tuple[Record, ...]) -> int:
    """Return how many trials split their batch into micro-batches, because the whole would exceed the limit."""
    return sum((record.metrics["micro_batch"] or 0) < record.values["optim.batch_size"] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=4, metavar="N", help="at most, by CPUs")
    parser.add_argument("--trials", type=int, default=16, metavar="N")
    parser.add_argument("--epochs", type=int, default=2, metavar="N")
    parser.add_argument("--limit-mb", type=float, default=400, metavar="MB", help="memory of the simulated GPU")
    arguments = parser.parse_args()
    overrides = [
        f"config.epochs={arguments.epochs}",
        f"search={{sampler: random, trials: {arguments.trials}, survival: false}}",
        "scheduler={name: none}",
        f"resources={{gpus_per_worker: auto, memory_limit_mb: {arguments.limit_mb}}}",
    ]
    # The trainable is imported from this script's folder, here and in every worker.
    space, trainable = load_space(
        ROOT / "search_spaces/mabe.yaml", [*overrides, "trainable=packing_tagging:train"], has_gpu=False
    )
    assert trainable.prepare is not None
    trainable.prepare(trainable.config(space.config(space.draw(random.Random(0)))))
    os.environ.update(cluster.RAY_ENVIRONMENT)
    ray.init(num_cpus=arguments.slots, include_dashboard=False, log_to_driver=False)
    nodes = cluster.start_ray(None)

    began = time.monotonic()
    memory = measure(space, nodes, Interruption())
    measuring_s = time.monotonic() - began
    assert isinstance(memory, Measured), memory
    one, several = make_plan(space, nodes, Unmeasured("to compare with")), make_plan(space, nodes, memory)
    print(f"{told(memory)} ({measuring_s:.1f} s, a process's start included)\nplan: {several}", flush=True)
    alone, together = search(space, one), search(space, several)
    assert [record.values for record in alone.records] == [record.values for record in together.records]

    print("| slots | trials | cut | wall s | trials/min | limit of a slot MiB | highest in each slot MiB | sum MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for plan, arm in ((one, alone), (several, together)):
        by_slot = peaks(arm.records)
        highest = ", ".join(f"{peak_mb:.1f}" for peak_mb in by_slot)
        figures = (
            f"{arm.wall_s:.1f} | {arm.per_minute:.1f} | {plan.memory_limit_mb:.1f} | {highest} | {sum(by_slot):.1f}"
        )
        print(f"| {plan.slots} | {len(arm.records)} | {cut(arm.records)} | {figures} |")
    print(f"ratio: {together.per_minute / alone.per_minute:.2f} x")


if __name__ == "__main__":
    main()
