"""A model of which settings survive, and what survival probability to demand of a proposal.

It is Gaussian-process classification with the Laplace approximation (Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006, algorithms 3.1 and 3.2). Its kernel is the sum of a linear one, which extends a learned edge to
untried regions, and a squared exponential, which lets the edge bend.

Shapes: N tried settings, M others, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import expit

from search.learning.features import Array, feature_rows
from search.records.record import length_of
from search.space import Space

MAPPED = 10  # ended trials before the model is used: the first settings map the space, its edge included
KNOWN = 20  # ended trials for each parameter after which the odds of survival that are demanded double
LATEST = 200  # ended trials that the model learns from: its cost is cubic in their number
BIAS, SLOPE, BEND, BEND_LENGTH = 1.0, 4.0, 1.0, 2.0  # of the kernel; a parameter's range is 2 wide
SCALES = (1.0, 10.0, 100.0, 1000.0)  # prior variances of the log-odds
SURVIVED = {"finished": 1.0, "stopped": 1.0, "diverged": 0.0, "out_of_memory": 0.0}  # a failed trial tells nothing


class Survival:
    """The probability that a setting neither diverges nor runs out of memory, learned from tried settings.

    weights: how much of an observation each tried setting counts. The steepness of the edge is the most probable one of
    `SCALES`.
    """

    def __init__(
        self, space: Space, tried: Sequence[Mapping[str, Any]], survived: Sequence[float], weights: Sequence[float]
    ) -> None:
        self.tried = len(tried)  # number of settings
        self._space = space
        self._x_ND = feature_rows(space, tried)
        k_NN = _kernel(self._x_ND, self._x_ND)
        fits = [_fit(scale, k_NN, np.array(survived), np.array(weights)) for scale in SCALES]
        self._fit = max(fits, key=lambda fit: fit.log_evidence)

    def probability(self, values: Mapping[str, Any]) -> float:
        """Return the survival probability of a setting."""
        return float(self.probabilities(feature_rows(self._space, [values]))[0])

    def probabilities(self, x_MD: Array) -> Array:
        """Return the survival probabilities of M settings, given by their features.

        They are averaged over the model's uncertainty, so that they are cautious far from all tried settings.
        """
        fit = self._fit
        k_NM = fit.scale * _kernel(self._x_ND, x_MD)
        known_NM = solve_triangular(fit.lower_NN, fit.root_N[:, None] * k_NM, lower=True)
        variance_M = fit.scale * _own(x_MD) - (known_NM**2).sum(axis=0)
        return expit(fit.slope_N @ k_NM / np.sqrt(1 + np.pi * np.maximum(0.0, variance_M) / 8))


@dataclass(frozen=True)
class _Fit:
    """The mode of the posterior: the slope of the log-likelihood, and the factor that the predictive variance needs."""

    scale: float
    slope_N: Array
    root_N: Array
    lower_NN: Array
    log_evidence: float


def _fit(scale: float, k_NN: Array, survived_N: Array, weight_N: Array) -> _Fit:
    k_NN = scale * k_NN
    f_N = np.zeros(len(k_NN))
    for _ in range(30):  # Newton's method; it converges in a few steps
        p_N = expit(f_N)
        root_N = np.sqrt(weight_N * p_N * (1 - p_N))
        lower_NN = cholesky(np.eye(len(k_NN)) + root_N[:, None] * k_NN * root_N, lower=True)
        b_N = root_N**2 * f_N + weight_N * (survived_N - p_N)
        a_N = b_N - root_N * cho_solve((lower_NN, True), root_N * (k_NN @ b_N))
        moved, f_N = np.abs(k_NN @ a_N - f_N).max(), k_NN @ a_N
        if moved < 1e-3:
            break
    log_likelihood = -weight_N @ np.logaddexp(0.0, np.where(survived_N == 1, -f_N, f_N))
    log_evidence = float(log_likelihood - a_N @ f_N / 2 - np.log(np.diag(lower_NN)).sum())
    return _Fit(scale, weight_N * (survived_N - expit(f_N)), root_N, lower_NN, log_evidence)


def learn(space: Space, trials: Sequence[FrozenTrial]) -> Survival | None:
    """Return the survival model of a study's ended trials; None while these do not tell survivors from others.

    A trial that the scheduler stopped has survived the epochs that it ran, and counts as that part of an observation.
    """
    told = remembered([item for item in trials if tells(item)], lambda item: not SURVIVED[item.user_attrs["status"]])
    ended = [item.user_attrs for item in told]
    survived = [SURVIVED[item["status"]] for item in ended]
    if not space.parameters or len(ended) < MAPPED or len(set(survived)) < 2:
        return None
    longest = length_of(space, told)
    weights = [min(1.0, item["epochs"] / longest) if item["status"] == "stopped" else 1.0 for item in ended]
    return Survival(space, [item["values"] for item in ended], survived, weights)


def remembered(ended: Sequence[FrozenTrial], dear: Callable[[FrozenTrial], bool]) -> list[FrozenTrial]:
    """Return the latest `LATEST` trials, of which up to a quarter may be older ones that are `dear` to the model."""
    dear_ones = {item.number for item in ended if dear(item)}
    kept = set(sorted(dear_ones)[-(LATEST // 4) :])
    left = [item.number for item in ended if item.number not in kept]
    kept |= set(left[-(LATEST - len(kept)) :])
    return [item for item in ended if item.number in kept]


def tells(trial: FrozenTrial) -> bool:
    """Return whether a trial shows what becomes of its setting; one stopped before its first report does not."""
    attrs = trial.user_attrs
    return attrs.get("status") in SURVIVED and (attrs["status"] != "stopped" or attrs["epochs"] > 0)


def _kernel(a_ND: Array, b_MD: Array) -> Array:
    squares_NM = ((a_ND[:, None] - b_MD[None]) ** 2).sum(axis=2)
    return BIAS + SLOPE * a_ND @ b_MD.T + BEND * np.exp(-squares_NM / (2 * BEND_LENGTH**2))


def _own(a_ND: Array) -> Array:
    """Return the kernel of each row with itself."""
    return BIAS + SLOPE * (a_ND**2).sum(axis=1) + BEND


def demanded(tried: int, parameters: int) -> float:
    """Return the survival probability that is demanded of a candidate after `tried` settings.

    At first it need only be more likely than not: a strict limit keeps a model that knows little away from the edge,
    and the best settings often lie close to it. Once the edge is known, one more diverged trial teaches nothing.
    """
    odds: float = 2.0 ** (tried / (KNOWN * parameters))
    return odds / (1 + odds)
