"""Proposals that are likely to survive: a model of divergence and out-of-memory, and a sampler that heeds it.

The model is Gaussian-process classification with the Laplace approximation (Rasmussen and Williams, Gaussian Processes
for Machine Learning, 2006, algorithms 3.1 and 3.2). Its kernel is a linear one, which carries a learned edge on into
what was never tried, and a squared exponential, which lets the edge bend.

Shapes: N tried settings, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import expit

from search.domain import Choice, Integer, Parameter, Real
from search.space import Space, Values

Array = NDArray[np.float64]

# How many settings a sampler may be asked for in one trial's place. Those that are not named here are asked once:
# gp has such a model of its own, which takes long to fit, and the others follow a sequence or a generation.
CANDIDATES = {"tpe": 16, "nsga2": 16, "random": 16}
MAPPED = 10  # ended trials before the model speaks: the first settings map the space, its edge included
KNOWN = 20  # ended trials for each parameter, after which the odds of survival must be two to one
LATEST = 200  # ended trials that the model learns from: its cost grows with their cube
BIAS, SLOPE, BEND, BEND_LENGTH = 1.0, 4.0, 1.0, 2.0  # of the kernel; a parameter's range is 2 wide
SCALES = (1.0, 10.0, 100.0, 1000.0)  # prior variances of the log-odds
SURVIVED = {"finished": 1.0, "stopped": 1.0, "diverged": 0.0, "out_of_memory": 0.0}  # a failed trial says nothing


class Survival:
    """The probability that a setting neither diverges nor runs out of memory, learned from tried ones.

    weights: how much of an observation each tried setting is. The steepness of the edge is the likeliest of `SCALES`.
    """

    def __init__(
        self, space: Space, tried: Sequence[Mapping[str, Any]], survived: Sequence[float], weights: Sequence[float]
    ) -> None:
        self.tried = len(tried)  # settings
        self._space = space
        self._x_ND = np.array([features(space, values) for values in tried])
        k_NN = _kernel(self._x_ND, self._x_ND)
        fits = [_fit(scale, k_NN, np.array(survived), np.array(weights)) for scale in SCALES]
        self._fit = max(fits, key=lambda fit: fit.log_evidence)

    def probability(self, values: Mapping[str, Any]) -> float:
        """Of a setting; averaged over what the model does not know, so that far from all that was tried it is timid."""
        fit, x_1D = self._fit, features(self._space, values)[None]
        k_N = fit.scale * _kernel(self._x_ND, x_1D)[:, 0]
        known_N = solve_triangular(fit.lower_NN, fit.root_N * k_N, lower=True)
        variance = max(0.0, fit.scale * float(_kernel(x_1D, x_1D)[0, 0]) - float(known_N @ known_N))
        return float(expit(k_N @ fit.slope_N / np.sqrt(1 + np.pi * variance / 8)))


@dataclass(frozen=True)
class _Fit:
    """The posterior's mode: the slope of the log-likelihood, and the factor that its variance needs."""

    scale: float
    slope_N: Array
    root_N: Array
    lower_NN: Array
    log_evidence: float


def _fit(scale: float, k_NN: Array, survived_N: Array, weight_N: Array) -> _Fit:
    k_NN = scale * k_NN
    f_N = np.zeros(len(k_NN))
    for _ in range(30):  # Newton's method; it converges in a handful of steps
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
    """The model of a study's ended trials; None where they do not yet tell what survives from what does not.

    A trial that the scheduler stopped has survived the epochs it ran, and counts as that part of an observation.
    """
    ended = [item.user_attrs for item in trials if _tells(item.user_attrs)][-LATEST:]
    survived = [SURVIVED[item["status"]] for item in ended]
    if not space.parameters or len(ended) < MAPPED or len(set(survived)) < 2:
        return None
    longest = space.epochs or max(1, *(item["epochs"] for item in ended))
    weights = [min(1.0, item["epochs"] / longest) if item["status"] == "stopped" else 1.0 for item in ended]
    return Survival(space, [item["values"] for item in ended], survived, weights)


def _tells(attrs: Mapping[str, Any]) -> bool:
    """Whether a trial has shown what becomes of its setting; one that the end of the time kept from running has not."""
    return attrs.get("status") in SURVIVED and (attrs["status"] != "stopped" or attrs["epochs"] > 0)


def features(space: Space, values: Mapping[str, Any]) -> Array:
    """A setting as numbers of one scale: ranges from -1 to 1, a choice as one indicator for each of its values.

    A parameter that is not active has zeros throughout, and one that has conditions an indicator of being active.
    """
    found: list[float] = []
    for parameter in space.parameters:
        found += _features(parameter, values)
    return np.array(found)


def _features(parameter: Parameter, values: Mapping[str, Any]) -> list[float]:
    domain, active = parameter.domain, parameter.name in values
    flag = [float(active)] if parameter.when else []
    if isinstance(domain, Choice):
        return flag + [float(active and domain.encode(values[parameter.name]) == item) for item in domain.grid() or []]
    assert isinstance(domain, (Real, Integer))
    if not active or domain.low == domain.high:
        return [*flag, 0.0]
    low, high, value = float(domain.low), float(domain.high), float(values[parameter.name])
    if domain.log:
        low, high, value = np.log([low, high, value])
    return [*flag, 2 * (value - low) / (high - low) - 1]


def _kernel(a_ND: Array, b_MD: Array) -> Array:
    squares_NM = ((a_ND[:, None] - b_MD[None]) ** 2).sum(axis=2)
    kernel: Array = BIAS + SLOPE * a_ND @ b_MD.T + BEND * np.exp(-squares_NM / (2 * BEND_LENGTH**2))
    return kernel


def demanded(tried: int, parameters: int) -> float:
    """The probability of survival from which a candidate is taken, after so many tried settings.

    At first it need only be more likely than not: a strict limit keeps a model that knows little away from the edge,
    and the best settings often lie close to it. Once the edge is known, one more diverged trial teaches nothing.
    """
    return 1 - 1 / (2 + tried / (KNOWN * parameters))


class SurvivingSampler(BaseSampler):
    """The first proposal that is likely enough to survive, of those that one sampler makes with different seeds.

    Where none of the candidates is, it is the likeliest. They leave no trace among the trials of the study.
    """

    def __init__(self, space: Space, model: Survival, candidates: Callable[[int], BaseSampler]) -> None:
        self._space, self._model, self._candidates = space, model, candidates
        self._chosen: Values = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        best, limit = -1.0, demanded(self._model.tried, len(self._space.parameters))
        for i in range(CANDIDATES[self._space.search.sampler]):
            values = propose(self._space, self._candidates(i), study, trial)
            survival = self._model.probability(values)
            if survival > best:
                best, self._chosen = survival, values
            if survival >= limit:
                return

    # The setting is a whole; Optuna asks for it value by value.

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        domain = next(item.domain for item in self._space.parameters if item.name == param_name)
        return domain.encode(self._chosen[param_name])


def propose(space: Space, sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial) -> Values:
    """A sampler's setting for a trial, without telling the trial."""
    sampler.before_trial(study, trial)
    together = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
    values: Values = {}
    for parameter in space.parameters:
        if space.is_active(parameter, values):
            name, distribution = parameter.name, parameter.domain.distribution()
            alone = name not in together
            stored = sampler.sample_independent(study, trial, name, distribution) if alone else together[name]
            values[name] = parameter.domain.decode(stored)
    return values
