"""One trial as people and tables see it, read back from the study."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from search.space import Space
from search.space.decode import nearest
from search.space.sections import Limit, Objective

STATUSES = ("finished", "stopped", "diverged", "out_of_memory", "failed")
RAN_TO_END = "ran to its end"  # the reason of a finished trial about which there is nothing more to say
INTERRUPTED = "interrupted"  # not ended yet: `--resume` continues it
RUNNING = "running"  # shown instead while a process runs the search


@dataclass(frozen=True)
class Record:
    """A trial: what was tried, its outcome, and why it ended.

    metrics: of the last report. epochs: number of reports. seconds: wall time, over all attempts.
    again: the number of the failed trial that this one retries, or None.
    """

    number: int
    status: str
    reason: str
    name: str | None
    values: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    epochs: int
    seconds: float
    again: int | None = None

    def solves(self, constraints: Mapping[str, Limit]) -> bool:
        """Return whether the trial finished within every limit."""
        return self.status == "finished" and all(
            (value := self.metrics.get(name)) is not None and limit.excess(value) <= 0
            for name, limit in constraints.items()
        )


def read_record(trial: FrozenTrial, space: Space) -> Record:
    """Return the record of an Optuna trial that a ledger wrote."""
    attrs = trial.user_attrs
    decoders = {item.name: item.domain.decode for item in space.parameters}
    values = attrs.get("values") or {
        name: decoders[name](stored) for name, stored in trial.params.items() if name in decoders
    }
    running = trial.state in (TrialState.RUNNING, TrialState.WAITING)
    return Record(
        number=trial.number,
        status=INTERRUPTED if running else attrs.get("status", "failed"),
        reason=attrs.get("reason", "" if running else "unknown"),
        name=attrs.get("name"),
        values=values,
        metrics=attrs.get("metrics", {}),
        epochs=attrs.get("epochs", 0),
        seconds=attrs.get("seconds", 0.0),
        again=attrs.get("again"),
    )


def left_to_run(found: Sequence[Record], trials: int) -> int:
    """Return how many of a search's `trials` trials are still to run, including interrupted ones."""
    begun = sum(record.again is None for record in found)
    return max(0, trials - begun) + sum(record.status == INTERRUPTED for record in found)


def unmended(found: Sequence[Record]) -> list[Record]:
    """Return the failed trials that have not been retried."""
    again = {record.again for record in found}
    return [record for record in found if record.status == "failed" and record.number not in again]


def unmeasured(constraints: Mapping[str, Limit], metrics: Mapping[str, Any]) -> list[str]:
    """Describe each constraint whose metric is missing: its name, the metrics present, and the nearest of them."""
    there, found = ", ".join(metrics), []
    for name in constraints:
        if name not in metrics:
            near = nearest(name, metrics)
            hint = f"; did you mean `{near}`?" if near else ""
            found.append(f"no metric `{name}`, a constraint; it has {there}{hint}")
    return found


def length_of(space: Space, trials: Iterable[FrozenTrial]) -> int:
    """Return the epochs of a whole trial; if the space does not say, of the longest of these, at least 1."""
    return space.epochs or max([1, *(trial.user_attrs.get("epochs", 0) for trial in trials)])


def best_of(records: Sequence[Record], space: Space) -> list[Record]:
    """Return the undominated solutions, best in the first objective first; at most one with a single objective."""
    solutions = solutions_of(records, space)
    if len(space.objectives) == 1:
        return solutions[:1]
    scores = {item.number: _scores(item, space) for item in solutions}
    front: list[Record] = []
    for item in solutions:  # in this order, none is dominated by a later one
        if not any(_dominates(scores[other.number], scores[item.number]) for other in front):
            front.append(item)
    return front


def solutions_of(records: Sequence[Record], space: Space) -> list[Record]:
    """Return the trials that finished within the constraints, best in the first objective first."""
    solutions = [item for item in records if item.solves(space.constraints)]
    return sorted(solutions, key=lambda item: (_scores(item, space), -item.number), reverse=True)


def _scores(record: Record, space: Space) -> list[float]:
    return [_goodness(record, objective) for objective in space.objectives]


def _goodness(record: Record, objective: Objective) -> float:
    value = record.metrics.get(objective.metric)
    if value is None:
        return -math.inf
    return value if objective.mode == "max" else -value


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(map(operator.ge, a, b))
