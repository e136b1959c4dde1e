"""What a trial's metrics over its epochs reveal, beyond how it ended.

A trainable may report a metric's chance level, its value if nothing is learnt, as `<metric>_chance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from search.space.sections import Objective

CHANCE_SUFFIX = "_chance"
PATIENCE = 3  # epochs before a trial is said to learn nothing
NEAR = 0.2  # an objective this close to chance, as a fraction of chance or of what lies above, counts as chance
PERFECT = (1.0, 100.0)  # what scores are mostly out of: with nine in ten right by chance, no score is a fifth better
AT = 0.02  # so does any other metric this close to its own chance level

Metrics = Mapping[str, float | None]


def remarks(epochs: Sequence[Metrics], objective: Objective) -> list[str]:
    """Return remarks on a trial, given its metrics after each epoch; empty if there is nothing to say."""
    if len(epochs) < PATIENCE:
        return []
    last, said = epochs[-1], []
    if stuck := _stuck(epochs, objective):
        said.append(stuck + _fall([row.get("loss") for row in epochs]))
    for name, value in last.items():
        chance = last.get(name + CHANCE_SUFFIX)
        if name != objective.metric and value is not None and chance and abs(value - chance) <= AT * abs(chance):
            said.append(f"{name} is at its chance level of {chance:.4g}")
    return said


def _stuck(epochs: Sequence[Metrics], objective: Objective) -> str:
    values = [value for row in epochs if (value := row.get(objective.metric)) is not None]
    chance = epochs[-1].get(objective.metric + CHANCE_SUFFIX)
    if not values or chance is None:
        return ""
    better = max if objective.mode == "max" else min
    best = better(values)
    if _learnt(best, chance, objective):
        return ""
    return f"{objective.metric} stayed at chance, {best:.4g} at best where guessing gives {chance:.4g}"


def compared(metrics: Metrics, objective: Objective) -> float | None:
    """Return an epoch's objective as schedulers see it: a score hardly better than chance is replaced by chance.

    A network that will learn often scores below chance first, and one that learns nothing stays at chance: halving by
    the raw scores would keep the latter. None if the objective was not measured.
    """
    value, chance = metrics.get(objective.metric), metrics.get(objective.metric + CHANCE_SUFFIX)
    return value if value is None or chance is None or _learnt(value, chance, objective) else chance


def _learnt(value: float, chance: float, objective: Objective) -> bool:
    if objective.mode == "min":
        return chance - value > NEAR * abs(chance)
    perfect = next((score for score in PERFECT if 0 < chance < score), math.inf)
    return value - chance > NEAR * min(abs(chance), perfect - chance)


def _fall(losses: Sequence[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if len(known) < 2 or known[-1] >= known[0]:
        return ""
    return f", while the loss fell from {known[0]:.4g} to {known[-1]:.4g}"
