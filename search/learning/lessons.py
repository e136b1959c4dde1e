"""What the end of a trial teaches the sampler, in Optuna's terms: constraints with a severity, and a finite penalty.

A setting under which training blows up is a bad setting, not a missing one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from search.space import Space
from search.space.sections import OWN_CONSTRAINTS

FEASIBLE = -1.0  # the constraint of a trial that neither diverged nor ran out of memory


def constraints_told(
    space: Space, status: str, epochs: int, longest: int, metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Return every constraint of a trial by name; it is feasible if none is above 0. All trials have the same names."""
    return {
        "diverged": severity(epochs, longest) if status == "diverged" else FEASIBLE,
        "out_of_memory": 1.0 if status == "out_of_memory" else FEASIBLE,
        **limits_told(space, status, metrics),
    }


def limits_told(space: Space, status: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the constraints on metrics. A stopped trial does not violate limits of metrics it has not reported."""
    unknown = {name: FEASIBLE if status == "stopped" and name not in metrics else 1.0 for name in space.constraints}
    return {
        name: unknown[name] if (value := metrics.get(name)) is None else limit.excess(value)
        for name, limit in space.constraints.items()
    }


def severity(epochs: int, longest: int) -> float:
    """Return how bad a divergence is: 2 in the first epoch, towards 1 at the end. Above 0: violated."""
    return 2.0 - min(1.0, epochs / longest)


def penalties(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[float]:
    """Return for each objective a finite value worse than any measured one, by at least a tenth of the span.

    Reports of a diverged trial count only while there are no others: a loss of 1e30 before the NaN would make all other
    values look alike to a sampler that models them.
    """
    found = []
    sound = [trial for trial in trials if not is_penalised(trial)]
    measured = sound if any(trial.values or trial.intermediate_values for trial in sound) else trials
    for i, direction in enumerate(directions):
        sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        seen = [sign * trial.values[i] for trial in measured if trial.values and not is_penalised(trial)]
        if len(directions) == 1:
            seen += [sign * value for trial in measured for value in trial.intermediate_values.values()]
        worst, best = (max(seen), min(seen)) if seen else (0.0, 0.0)
        beyond = worst + max(0.1 * (worst - best), 1e-3 * (abs(worst) or 1.0))
        found.append(sign * min(beyond, sys.float_info.max))
    return found


def is_penalised(trial: FrozenTrial) -> bool:
    """Return whether the values of a trial are penalties and not measurements."""
    return trial.user_attrs.get("status") in OWN_CONSTRAINTS
