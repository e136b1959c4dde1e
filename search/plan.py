"""How many slots run side by side and what each worker gets: a pure function of the space and the machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from search.space import Space
from search.workers.ranks import ALLOCATOR_ROOM
from trainables.contract import UserError

MIB = 2**20
MANY_CPUS = 1e9  # more than all workers need
MOST_ON_ONE_GPU = 64


@dataclass(frozen=True)
class Node:
    """The resources of one machine of the cluster."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Measured:
    """GPU memory as measured before a search, on a worker that had a GPU to itself.

    need_bytes: peak of a training step of the largest of `settings` settings.
    besides_bytes: what a process takes of a GPU besides PyTorch's allocator, such as the CUDA context. Includes what
        other processes hold on that GPU, so it may be too high, but never too low.
    device_bytes: memory of the smallest GPU, or `resources.memory_limit_mb` if that is less.
    """

    settings: int
    need_bytes: int
    besides_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class Unmeasured:
    """Why there is no memory measurement."""

    reason: str


NO_GPU = Unmeasured("there is no GPU to share")
AT_THE_START = Unmeasured("what a training step takes is measured at the start")


@dataclass(frozen=True)
class Plan:
    """`slots` trials at a time, each on a group of `workers` ranks.

    gpus_per_worker: counts GPUs known to Ray; a simulated GPU counts as none.
    memory_limit_mb: limit of each rank's training step, in MiB; None: all that its GPU has.
    """

    slots: int
    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    limit: str  # what keeps the plan from having more slots
    memory_limit_mb: float | None = None

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        each = f"{self.cpus_per_worker} CPU" + (f" and {self.gpus_per_worker:g} GPU" if self.gpus_per_worker else "")
        slots = f"{self.slots} slot{'s' if self.slots > 1 else ''}"
        return f"{slots} x {workers} x {each} ({self.limit})"


def make_plan(space: Space, nodes: Sequence[Node], memory: Measured | Unmeasured = AT_THE_START) -> Plan:
    """Return the plan with as many groups as fit on the nodes, at most one for each trial.

    A group may span nodes; a worker may not. memory: determines how many slots share a GPU if
    `resources.gpus_per_worker` is `auto`. Raises UserError if not even one group fits, or for an impossible GPU share.
    """
    wanted = space.resources
    if wanted.gpus_per_worker == "auto":
        return _shared(space, nodes, memory)
    gpus = wanted.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    if gpus > 1 and gpus != int(gpus):
        raise UserError(f"resources.gpus_per_worker: {gpus:g} must be a whole number or below 1")
    if 0 < gpus < 1 and wanted.workers > 1:
        raise UserError(
            f"resources.gpus_per_worker: {gpus:g} with resources.workers = {wanted.workers}: NCCL does not allow "
            "two ranks on one GPU; write a whole number, or one worker"
        )
    return _whole(space, nodes, gpus)


def _whole(space: Space, nodes: Sequence[Node], gpus: float, kind: str = "GPU") -> Plan:
    """Return the plan whose workers have `gpus` GPUs each, or that fraction of one."""
    wanted = space.resources
    fits = _groups(space, nodes, gpus)
    if fits == 0:
        cpus_there = "+".join(f"{node.cpus:g}" for node in nodes)
        gpus_there = "+".join(f"{node.gpus:g}" for node in nodes)
        raise UserError(
            f"resources: a group of {wanted.workers} x ({wanted.cpus_per_worker} CPU, {gpus:g} {kind}) does not fit on "
            f"the {len(nodes)} node(s) with {cpus_there} CPU and {gpus_there} {kind}; "
            f"lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
        )
    trials = space.search.trials
    limit = f"all that fits on {sum(n.cpus for n in nodes):g} CPU and {sum(n.gpus for n in nodes):g} {kind}"
    by_gpu = _groups(space, [replace(node, cpus=MANY_CPUS) for node in nodes], gpus) if gpus else fits
    if by_gpu > fits and wanted.cpus_per_worker > 1:
        limit += f"; the GPUs would suffice for {by_gpu} with fewer CPUs each: lower resources.cpus_per_worker"
    if trials < fits:
        limit = f"{trials} trials; {fits} groups would fit"
    slots = min(trials, fits)
    spread = slots - sum(_workers_on(node, wanted.cpus_per_worker, gpus) // wanted.workers for node in nodes)
    if spread > 0:
        limit += f"; {spread} of the slots over several machines"
    return Plan(slots, wanted.workers, wanted.cpus_per_worker, gpus, limit, wanted.memory_limit_mb)


def _shared(space: Space, nodes: Sequence[Node], memory: Measured | Unmeasured) -> Plan:
    """Return the plan for `auto`: as many slots on each GPU as have room there, or whole GPUs if that is unknown."""
    simulated = is_simulated(space, nodes)
    if not simulated and not any(node.gpus >= 1 for node in nodes):
        plan = _whole(space, nodes, 0.0)
        return replace(plan, limit=f"{NO_GPU.reason}; {plan.limit}")
    kind = "simulated GPU" if simulated else "GPU"
    if simulated:
        nodes = [replace(node, gpus=1) for node in nodes]
    whole = _whole(space, nodes, 1.0, kind)
    memory = obstacle(space, nodes) or memory
    if isinstance(memory, Unmeasured):
        plan, why = whole, f"a whole {kind} for each worker: {memory.reason}"
    else:
        room = room_on_one(memory)
        most = _whole(space, nodes, share_of_gpu(room), kind)
        # No more slots on a GPU than the total requires: Ray would fill the first GPUs and leave the others idle.
        sharing = next(k for k in range(1, room + 1) if _groups(space, nodes, share_of_gpu(k)) >= most.slots)
        limit_mb = share_mb(memory, sharing) if sharing > 1 else whole.memory_limit_mb
        plan = replace(most, gpus_per_worker=share_of_gpu(sharing), memory_limit_mb=limit_mb)
        why = f"{sharing} slot{'s' if sharing > 1 else ''} on one {kind}"
        why += (f", where {room} have room" if room > sharing else "") + f": {told(memory)}"
    return replace(plan, gpus_per_worker=0.0 if simulated else plan.gpus_per_worker, limit=f"{why}; {plan.limit}")


def obstacle(space: Space, nodes: Sequence[Node]) -> Unmeasured | None:
    """Return what keeps slots from sharing a GPU regardless of their memory; None if nothing does."""
    if space.resources.workers > 1:
        return Unmeasured("NCCL does not allow two ranks of a group on one GPU")
    return None if is_simulated(space, nodes) or any(node.gpus >= 1 for node in nodes) else NO_GPU


def is_simulated(space: Space, nodes: Sequence[Node]) -> bool:
    """Return whether `auto` shares simulated GPUs: one on each machine, of `resources.memory_limit_mb`."""
    wanted = space.resources
    is_limited = wanted.gpus_per_worker == "auto" and wanted.memory_limit_mb is not None
    return is_limited and not any(node.gpus for node in nodes)


def share_of_gpu(slots: int) -> float:
    """Return what each of so many slots gets of a GPU, rounded down: Ray counts in 1/10000 and would round 1/6 up."""
    return math.floor(10_000 / slots) / 10_000


def room_on_one(memory: Measured) -> int:
    """Return how many slots fit on a GPU if each takes what the largest setting takes; 1 even if none fits."""
    each = ALLOCATOR_ROOM * memory.need_bytes + memory.besides_bytes
    return max(1, min(MOST_ON_ONE_GPU, int(memory.device_bytes // max(each, 1))))


def share_mb(memory: Measured, slots: int) -> float:
    """Return the limit of a training step, in MiB, for each of `slots` slots on one GPU."""
    return (memory.device_bytes / slots - memory.besides_bytes) / ALLOCATOR_ROOM / MIB


def told(memory: Measured) -> str:
    """Describe the measurement in words."""
    unit, name = (1024 * MIB, "GiB") if memory.device_bytes >= 1024 * MIB else (MIB, "MiB")
    besides = f" and its process {memory.besides_bytes / unit:.1f} besides" if memory.besides_bytes else ""
    count = f"the largest of {memory.settings} settings" if memory.settings > 1 else "the only setting"
    return f"{count} took {memory.need_bytes / unit:.1f}{besides} of {memory.device_bytes / unit:.1f} {name}"


def _groups(space: Space, nodes: Sequence[Node], gpus: float) -> int:
    """Return how many groups the nodes hold when each worker takes `gpus` GPUs."""
    return sum(_workers_on(node, space.resources.cpus_per_worker, gpus) for node in nodes) // space.resources.workers


def _workers_on(node: Node, cpus: int, gpus: float) -> int:
    by_cpu = int(node.cpus // cpus)
    if gpus == 0:
        return by_cpu
    by_gpu = int(node.gpus // gpus) if gpus >= 1 else int(node.gpus) * int(1 / gpus + 1e-9)
    return min(by_cpu, by_gpu)


def estimate(space: Space, plan: Plan, epoch_s: float | None) -> str:
    """Return the cost of a search in words. epoch_s: measured seconds per epoch of one trial, or None."""
    trials = space.search.trials
    if space.epochs is None:
        return f"{trials} trials; their length is not known (the space fixes no config.epochs)"
    most = trials * space.epochs
    expected = round(trials * expected_epochs(space))
    epochs = f"at most {most} epochs" + (f", about {expected} under {space.scheduler.name}" if expected < most else "")
    if epoch_s is None:
        return f"{epochs}; GPU-hours follow once an epoch has been timed (no earlier search in the results folder)"
    hours = expected * epoch_s / 3600
    gpus = plan.workers * plan.gpus_per_worker
    used = f"{_hours(hours * gpus)} GPU-hours" if gpus else f"{_hours(hours * plan.workers)} worker-hours without a GPU"
    return f"{epochs}; {used}, {_hours(hours / plan.slots)} h on the clock ({epoch_s:.3g} s an epoch measured before)"


def _hours(hours: float) -> str:
    """Format hours to about two significant digits, never with an exponent."""
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}" if hours >= 0.01 else "less than 0.01"


def expected_epochs(space: Space) -> float:
    """Return the mean epochs of a trial: under asha one in `reduction` passes each rung; else its full length.

    How many epochs other schedulers save cannot be predicted.
    """
    assert space.epochs is not None
    if space.scheduler.name != "asha":
        return space.epochs
    total, share, done = 0.0, 1.0, 0
    for rung in space.scheduler.rungs(space.epochs):
        total, done, share = total + share * (rung - done), rung, share / space.scheduler.reduction
    return total
