"""How many slots run side by side, and what each worker gets: a pure function of the space and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.space import Space
from trainables.contract import UserError


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Plan:
    """`slots` trials at a time, each on a group of `workers` ranks."""

    slots: int
    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    limit: str  # what keeps it from being more slots

    @property
    def gpus(self) -> float:
        """GPUs in use when every slot is busy."""
        return self.slots * self.workers * self.gpus_per_worker

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        each = f"{self.cpus_per_worker} CPU" + (f" and {self.gpus_per_worker:g} GPU" if self.gpus_per_worker else "")
        slots = f"{self.slots} slot{'s' if self.slots > 1 else ''}"
        return f"{slots} x {workers} x {each} ({self.limit})"


def make_plan(space: Space, nodes: Sequence[Node]) -> Plan:
    """As many groups as the nodes hold, at most one for each trial.

    A group may spread over nodes; a worker may not. Raises UserError when not even one group fits.
    """
    wanted = space.resources
    gpus = wanted.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    if gpus > 1 and gpus != int(gpus):
        raise UserError(f"resources.gpus_per_worker: {gpus:g} must be a whole number or below 1")
    places = sum(_workers_on(node, wanted.cpus_per_worker, gpus) for node in nodes)
    fits = places // wanted.workers
    if fits == 0:
        cpus_there = "+".join(f"{node.cpus:g}" for node in nodes)
        gpus_there = "+".join(f"{node.gpus:g}" for node in nodes)
        raise UserError(
            f"resources: a group of {wanted.workers} x ({wanted.cpus_per_worker} CPU, {gpus:g} GPU) does not fit on "
            f"the {len(nodes)} node(s) with {cpus_there} CPU and {gpus_there} GPU; "
            f"lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
        )
    trials = space.search.trials
    if trials < fits:
        return Plan(trials, wanted.workers, wanted.cpus_per_worker, gpus, f"{trials} trials; {fits} groups would fit")
    total = f"{sum(node.cpus for node in nodes):g} CPU and {sum(node.gpus for node in nodes):g} GPU"
    return Plan(fits, wanted.workers, wanted.cpus_per_worker, gpus, f"all that fits on {total}")


def _workers_on(node: Node, cpus: int, gpus: float) -> int:
    by_cpu = int(node.cpus // cpus)
    if gpus == 0:
        return by_cpu
    by_gpu = int(node.gpus // gpus) if gpus >= 1 else int(node.gpus) * int(1 / gpus + 1e-9)
    return min(by_cpu, by_gpu)


def estimate(space: Space, plan: Plan, epoch_s: float | None) -> str:
    """How much a search will cost, in words. epoch_s: seconds per epoch of one trial, where they were measured."""
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
    """Two digits that count, and never an exponent."""
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}" if hours >= 0.01 else "less than 0.01"


def expected_epochs(space: Space) -> float:
    """Epochs of a trial on average: under asha and hyperband one in `reduction` passes each rung."""
    assert space.epochs is not None
    if space.scheduler.name not in ("asha", "hyperband"):
        return space.epochs
    total, share, done, rung = 0.0, 1.0, 0, space.scheduler.grace_epochs
    while done < space.epochs:
        upto = min(rung, space.epochs)
        total += share * (upto - done)
        done, rung, share = upto, rung * space.scheduler.reduction, share / space.scheduler.reduction
    return total
