"""The memory that the trials of a search take, measured once before it so that several slots can share a GPU."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.interruption import Interruption
from search.plan import MIB, Measured, Node, Unmeasured, is_simulated, obstacle
from search.space import Space, Values
from search.space.domain import Choice, Integer
from search.space.loading import Trainable, load
from search.workers.surroundings import Surroundings, settle
from trainables.contract import Trial, default_device

DRAWS = 200  # random settings from which the largest are chosen
LARGEST = 5  # of them that are measured, besides the known settings
WAIT_S = 600.0  # for a measurement, reading the data included; after that, every worker gets a whole GPU
LOOK_S = 0.5  # how often to check for Ctrl-C meanwhile


@dataclass(frozen=True)
class Measurement:
    """What a machine is to measure: `configs` as trees. limit_mb: the search's own limit of a GPU in MiB, or None."""

    trainable: str
    paths: tuple[str, ...]
    configs: Sequence[dict[str, Any]]
    seed: int
    threads: int
    limit_mb: float | None


def cannot_share(space: Space, trainable: Trainable, nodes: Sequence[Node]) -> Unmeasured | None:
    """Return why slots cannot share GPUs, so that there is nothing to measure; None if they can."""
    if trainable.memory_need is None:
        return obstacle(space, nodes) or Unmeasured(f"the module of {space.trainable} has no function memory_need")
    return obstacle(space, nodes)


def measure(space: Space, nodes: Sequence[Node], interruption: Interruption) -> Measured | Unmeasured:
    """Measure the largest settings on a GPU of each machine, on all machines at once; Ray must be running.

    The GPUs of one machine are assumed to be alike. Any failure, and the interruption, is returned as the reason why
    nothing was measured.
    """
    job = Measurement(
        trainable=space.trainable,
        paths=space.paths,
        configs=[space.config(values) for values in large_settings(space)],
        seed=space.search.seed,
        threads=space.resources.cpus_per_worker,
        limit_mb=space.resources.memory_limit_mb,
    )
    print(f"measuring the memory of a training step, for {len(job.configs)} setting(s)", flush=True)
    task = ray.remote(num_cpus=job.threads, max_calls=1, max_retries=0)(needs)  # one call, as its exit frees the GPU
    if is_simulated(space, nodes):
        tasks = [task.remote(job)]
    else:
        machines = [
            entry["NodeID"] for entry in ray.nodes() if entry["Alive"] and entry["Resources"].get("GPU", 0) >= 1
        ]
        there = [NodeAffinitySchedulingStrategy(machine, soft=False) for machine in machines]
        tasks = [task.options(num_gpus=1, scheduling_strategy=strategy).remote(job) for strategy in there]
    if not tasks:
        return Unmeasured("the machines with a GPU were lost")
    until, done, late = time.monotonic() + WAIT_S, [], tasks
    while late and time.monotonic() < until and not interruption.came:
        done, late = ray.wait(tasks, num_returns=len(tasks), timeout=min(LOOK_S, WAIT_S))
    for reference in late:
        ray.cancel(reference, force=True)
    if interruption.came:
        return Unmeasured("the search was interrupted")
    if late:
        return Unmeasured(f"{len(late)} machine(s) had not measured a training step within {WAIT_S:g} s")
    try:
        return on_every_machine(ray.get(done))
    except ray.exceptions.RayError as error:  # the process died
        return Unmeasured(f"the measuring process died: {type(error).__name__}")


def on_every_machine(found: Sequence[Measured | Unmeasured]) -> Measured | Unmeasured:
    """Combine the measurements of all machines into one that holds on each; the first failure if there is any."""
    measured = [item for item in found if isinstance(item, Measured)]
    for item in found:
        if isinstance(item, Unmeasured):
            return item
    return Measured(
        settings=measured[0].settings,
        need_bytes=max(item.need_bytes for item in measured),
        besides_bytes=max(item.besides_bytes for item in measured),
        device_bytes=min(item.device_bytes for item in measured),
    )


def needs(job: Measurement) -> Measured | Unmeasured:
    """Return the largest need of the settings, measured in this process on its GPU, or on a simulated one."""
    device = default_device()
    cache: dict[Any, Any] = {}
    largest = 0
    try:
        trainable = load(job.trainable, job.paths)
        assert trainable.memory_need is not None
        surroundings = Surroundings()
        for config in job.configs:
            surroundings.restore()
            settle(job.seed, job.threads)
            trial = Trial(trainable.config(config), job.seed, rank=0, world_size=1, device=device, cache=cache)
            largest = max(largest, trainable.memory_need(trial))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        return Unmeasured(f"memory could not be measured: {type(error).__name__}: {reason}")
    limit_bytes = math.inf if job.limit_mb is None else job.limit_mb * MIB
    if device.type != "cuda":
        if job.limit_mb is None:
            return Unmeasured("PyTorch finds no GPU on a machine where Ray counts one")
        return Measured(len(job.configs), largest, 0, int(limit_bytes))
    gc.collect()
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    besides_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    return Measured(len(job.configs), largest, besides_bytes, int(min(total_bytes, limit_bytes)))


def large_settings(space: Space) -> list[Values]:
    """Return the known settings, and random ones that look as if they took the most memory; each shape once.

    The sizes of a model and of a batch are integers and choices, and memory is roughly proportional to their product.
    If a larger number makes a smaller model, this misses the very largest settings: a trial that needs more than its
    share then passes its batch through in parts.
    """
    rng = random.Random(space.search.seed)
    known = [space.draw(rng, setting.values) for setting in space.try_first]
    drawn = sorted((space.draw(rng) for _ in range(DRAWS)), key=lambda values: -_log_size(space, values))
    shapes: dict[str, Values] = {}
    for setting in known:
        shapes.setdefault(repr(_sizes(space, setting)), setting)
    most = len(shapes) + LARGEST
    for setting in drawn:
        if len(shapes) < most:
            shapes.setdefault(repr(_sizes(space, setting)), setting)
    return list(shapes.values())


def _sizes(space: Space, values: Mapping[str, Any]) -> Values:
    """Return the values of a setting that may alter a shape: real numbers, such as rates, do not."""
    sized = [item.name for item in space.parameters if isinstance(item.domain, (Choice, Integer))]
    return {name: values[name] for name in sized if name in values}


def _log_size(space: Space, values: Mapping[str, Any]) -> float:
    return sum(math.log1p(_magnitude(value)) for value in _sizes(space, values).values())


def _magnitude(value: Any) -> float:
    """Return the magnitude of a number, or the sum over a list, in which a word counts 1; 0 for what has no order."""
    if isinstance(value, list):
        return sum(1.0 if isinstance(item, str) else _magnitude(item) for item in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return abs(value) if is_number else 0.0
