"""What settings will score at the end of a trial, learned from whole trials and from stopped ones.

A score is modelled from rung to rung of the scheduler, each as the one before and what comes to it from there (Kennedy
and O'Hagan 2000). One rung after the other, as Le Gratiet and Garnier (2014) do, which needs that whoever has reached a
rung has reached those below: a trial reports every epoch.

Of a trial that was stopped nothing is known of the rungs above. It is taken to get there as expected, and no better
than the best did. Were it left open, it would stay the most promising place of all: whatever is tried there is stopped
again, and shows nothing of its end.

Shapes: N trials, K of them on a rung, G gone before it, M settings, D features.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from search.learning.features import Array
from search.learning.regression import Regression, within_reach
from search.records.health import CHANCE, compared
from search.space import Space

ENOUGH = 3  # trials on a rung above the first, from which on it is modelled
ALL = 0.05  # how much all objectives count beside the furthest one

Scores = Mapping[int, float]  # by rung, an epoch; the lower the better


class Ladder:
    """The score at the highest rung that enough of the trials have reached. There is at least one trial.

    A rung from which all have gone on to the next one tells nothing that this does not.
    """

    def __init__(self, x_ND: Array, trials: Sequence[Scores], rungs: Sequence[int]) -> None:
        self._steps: list[tuple[float, Regression]] = []  # what is left of the rung before, and what comes to it
        before_N = np.zeros(len(trials))
        reached = [[i for i, scores in enumerate(trials) if rung in scores] for rung in rungs]
        for rung, there, beyond in zip(rungs, reached, [*reached[1:], []], strict=True):
            if len(there) < (ENOUGH if self._steps else 1) or there == beyond:
                continue
            y_K = within_reach(np.array([trials[i][rung] for i in there]))
            rest = _slope(before_N[there], y_K) if self._steps else 0.0
            regression = Regression(x_ND[there], y_K - rest * before_N[there])
            gone = np.setdiff1d(np.arange(len(trials)), there)
            if self._steps and len(gone):
                expected_G, _ = regression.predict(x_ND[gone])
                come_G = np.maximum(expected_G, y_K.min() - rest * before_N[gone])
                regression.add(x_ND[gone], come_G)
                before_N[gone] = rest * before_N[gone] + come_G
            before_N[there] = y_K
            self._steps.append((rest, regression))

    def predict(self, x_MD: Array) -> tuple[Array, Array]:
        """Means and standard deviations, without the noise of a measurement."""
        mean_M, variance_M = np.zeros(len(x_MD)), np.zeros(len(x_MD))
        for rest, regression in self._steps:
            more_M, deviation_M = regression.predict(x_MD)
            mean_M = rest * mean_M + more_M
            variance_M = rest**2 * variance_M + deviation_M**2
        return mean_M, np.sqrt(variance_M)

    def believe(self, x_MD: Array) -> None:
        """Take its own means for measured: what runs already is not to be proposed again."""
        for _, regression in self._steps:
            mean_M, _ = regression.predict(x_MD)
            regression.add(x_MD, mean_M)


def _slope(x_K: Array, y_K: Array) -> float:
    """Of y over x by least squares, never falling; one more trial is taken to say 1."""
    x_K, y_K = x_K - x_K.mean(), y_K - y_K.mean()
    one = float(np.mean(x_K**2)) or 1.0
    return max(0.0, (float(x_K @ y_K) + one) / (float(x_K @ x_K) + one))


def rungs(space: Space, longest: int) -> list[int]:
    """The epochs after which scores are compared, up to the last one."""
    found = [min(space.scheduler.grace_epochs, longest)]
    while found[-1] < longest:
        found.append(min(found[-1] * space.scheduler.reduction, longest))
    return found


def scores_of(
    space: Space, trials: Sequence[FrozenTrial], longest: int, rng: random.Random
) -> Iterator[tuple[Mapping[str, Any], Scores]]:
    """The settings of finished and stopped trials that reached the first rung, and their scores.

    A trial that finished before its last epoch keeps its score to the end; one of an earlier search, which may have had
    fewer epochs, does not. Of several objectives, which no scheduler compares, whole trials alone have a score: one of
    the trade-offs between them, drawn from rng.
    """
    if len(space.objectives) > 1:
        whole = [item for item in trials if item.values and (_own(item) or item.user_attrs["epochs"] >= longest)]
        for item, score in zip(whole, _traded_off(space, whole, rng), strict=True):
            yield item.user_attrs["values"], {longest: score}
        return
    for item in trials:
        reports = _compared(space, item)
        early = item.user_attrs["status"] == "finished" and _own(item)
        last = reports[max(reports)] if early and reports else None
        scores = {rung: reports.get(rung, last) for rung in rungs(space, longest)}
        reached = {rung: score for rung, score in scores.items() if score is not None}
        if reached:
            yield item.user_attrs["values"], reached


def _own(trial: FrozenTrial) -> bool:
    """Whether it is one of this search, and not taken over from an earlier one."""
    return "from" not in trial.user_attrs


def _compared(space: Space, trial: FrozenTrial) -> Scores:
    """By epoch, as schedulers see it."""
    objective = space.objectives[0]
    sign = 1.0 if objective.mode == "min" else -1.0
    chance = {key: value for key, value in trial.user_attrs["metrics"].items() if key == objective.metric + CHANCE}
    seen = {
        epoch: compared({objective.metric: value, **chance}, objective)
        for epoch, value in trial.intermediate_values.items()
    }
    return {epoch: sign * value for epoch, value in seen.items() if value is not None}


def _traded_off(space: Space, trials: Sequence[FrozenTrial], rng: random.Random) -> list[float]:
    """The largest weighted distance from the best in each objective (ParEGO: Knowles 2006)."""
    if not trials:
        return []
    signs = [1.0 if item.mode == "min" else -1.0 for item in space.objectives]
    y_NK = np.apply_along_axis(within_reach, 0, np.array([item.values for item in trials]) * signs)
    span_K = np.ptp(y_NK, axis=0)
    weights = np.array([rng.expovariate(1.0) for _ in signs])
    away_NK = (y_NK - y_NK.min(axis=0)) / np.where(span_K > 0, span_K, 1.0) * weights / weights.sum()
    scores: list[float] = (away_NK.max(axis=1) + ALL * away_NK.sum(axis=1)).tolist()
    return scores
