"""Predicts what settings will score at the end of a trial, from whole trials and from stopped ones.

A score is modelled from rung to rung of the scheduler, each as a multiple of the one before plus a difference (Kennedy
and O'Hagan 2000). The rungs are fitted one after the other, as by Le Gratiet and Garnier (2014), which requires that a
trial on one rung has reached those below: a trial reports every epoch.

The scores of a stopped trial at the rungs above are unknown. They are assumed to be as expected, but no better than the
best. If left open, its setting would stay the most promising of all: whatever is tried there is stopped again, and
shows nothing of its end.

Shapes: N trials, K of them on a rung, G stopped before it, M settings, D features, J objectives.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from search.learning.features import Array
from search.learning.regression import Regression, within_reach
from search.records.health import compared
from search.space import Space

ENOUGH = 3  # trials on a rung above the first before it is modelled
ALL = 0.05  # weight of the sum over all objectives, beside the one furthest from its best

Scores = Mapping[int, float]  # by rung, an epoch; lower is better


class Ladder:
    """Predicts the score at the highest rung that enough of the trials have reached. Needs at least one trial.

    A rung from which all trials have gone on to the next one adds no information and is skipped.
    """

    def __init__(self, x_ND: Array, trials: Sequence[Scores], rungs: Sequence[int]) -> None:
        self._steps: list[tuple[float, Regression]] = []  # factor on the rung before, model of the difference
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
        """Return means and standard deviations, without measurement noise."""
        mean_M, variance_M = np.zeros(len(x_MD)), np.zeros(len(x_MD))
        for rest, regression in self._steps:
            more_M, deviation_M = regression.predict(x_MD)
            mean_M = rest * mean_M + more_M
            variance_M = rest**2 * variance_M + deviation_M**2
        return mean_M, np.sqrt(variance_M)

    def believe(self, x_MD: Array) -> None:
        """Treat the model's own means as measured, so that what already runs is not proposed again."""
        for _, regression in self._steps:
            mean_M, _ = regression.predict(x_MD)
            regression.add(x_MD, mean_M)


def _slope(x_K: Array, y_K: Array) -> float:
    """Return the least-squares slope of y over x, at least 0, with a prior worth one more trial of slope 1."""
    x_K, y_K = x_K - x_K.mean(), y_K - y_K.mean()
    one = float(np.mean(x_K**2)) or 1.0
    return max(0.0, (float(x_K @ y_K) + one) / (float(x_K @ x_K) + one))


def scores_of(
    space: Space, trials: Sequence[FrozenTrial], longest: int, rng: random.Random
) -> Iterator[tuple[Mapping[str, Any], Scores]]:
    """Yield the settings of finished and stopped trials that reached the first rung, and their scores.

    A trial that finished before its last epoch keeps its score to the end; one of an earlier search, which may have had
    fewer epochs, does not. With several objectives, which no scheduler compares, only whole trials have a score: a
    trade-off between the objectives, with weights drawn from rng.
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
        scores = {rung: reports.get(rung, last) for rung in space.scheduler.rungs(longest)}
        reached = {rung: score for rung, score in scores.items() if score is not None}
        if reached:
            yield item.user_attrs["values"], reached


def _own(trial: FrozenTrial) -> bool:
    """Return whether the trial is of this search, and not taken over from an earlier one."""
    return "from" not in trial.user_attrs


def _compared(space: Space, trial: FrozenTrial) -> Scores:
    """Return scores by epoch, as schedulers see them; lower is better."""
    objective, last = space.objectives[0], trial.user_attrs["metrics"]  # the last report has the level of chance, too
    sign = 1.0 if objective.mode == "min" else -1.0
    values = trial.intermediate_values.items()
    seen = {epoch: compared({**last, objective.metric: value}, objective) for epoch, value in values}
    return {epoch: sign * value for epoch, value in seen.items() if value is not None}


def _traded_off(space: Space, trials: Sequence[FrozenTrial], rng: random.Random) -> list[float]:
    """Return the largest weighted distance from the best, plus a share of all of them (ParEGO: Knowles 2006)."""
    if not trials:
        return []
    signs = [1.0 if item.mode == "min" else -1.0 for item in space.objectives]
    y_NJ = np.apply_along_axis(within_reach, 0, np.array([item.values for item in trials]) * signs)
    span_J = np.ptp(y_NJ, axis=0)
    weights = np.array([rng.expovariate(1.0) for _ in signs])
    away_NJ = (y_NJ - y_NJ.min(axis=0)) / np.where(span_J > 0, span_J, 1.0) * weights / weights.sum()
    return (away_NJ.max(axis=1) + ALL * away_NJ.sum(axis=1)).tolist()
