"""The sampler `gp`: Bayesian optimisation that knows of divergence, of stopped trials and of its own blindness.

Proposed is the setting, likely enough to survive, of the largest expected improvement of the score of a whole trial
(in logarithms: Ament et al., Unexpected Improvements to Expected Improvement, 2023). A smooth model that is wrong is
sure of itself, and would ask for the same place again and again; so every other proposal is TPE's.

Shapes: N scored trials, M candidates, D features.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.special import log_ndtr, ndtr

from search.domain import Choice, Integer, Parameter, Real
from search.features import Array, feature_rows
from search.ladder import Ladder, rungs, scores_of
from search.proposals import SurvivingSampler, WholeSampler, propose
from search.record import read_record
from search.regression import Regression
from search.space import Space, Values
from search.study import longest_of, proposal_seed
from search.survival import LATEST, MAPPED, Survival, demanded, learn

ANYWHERE, NEARBY, NEARER = 500, 500, 150  # candidates: in all the space; around the best settings; twice, around theirs
BEST = 5  # settings, or candidates, around which others are drawn
STEP = (0.01, 0.5)  # parts of a range, to a candidate nearby; every order of magnitude alike
FINER = (0.05, 0.015)  # to one nearer, the first and the second time
DOOMED = -1e9  # the logarithm of what a candidate is worth that is not likely enough to survive
TAIL = -6.0  # standard deviations below which an improvement is reckoned by its asymptote


class SurrogateSampler(WholeSampler):
    """Draws at random until ten trials have ended and one of them has a score."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space)
        self._seed, self._rng = seed, random.Random(seed)

    def choose(self, study: optuna.Study, trial: FrozenTrial) -> Values:
        others = [item for item in study.get_trials(deepcopy=False) if item.number != trial.number]
        survival = learn(self._space, others) if self._space.search.survival else None
        if trial.number % 2:
            return self._of_tpe(survival, study, trial)
        worth = judge(self._space, others, survival, self._rng)
        return self._space.draw(self._rng) if worth is None else self._best(worth)

    def _of_tpe(self, survival: Survival | None, study: optuna.Study, trial: FrozenTrial) -> Values:
        def tpe(candidate: int) -> optuna.samplers.TPESampler:
            return optuna.samplers.TPESampler(seed=proposal_seed(self._seed, candidate))

        if survival is None:
            return propose(self._space, tpe(0), study, trial)
        return SurvivingSampler(self._space, survival, tpe).choose(study, trial)

    def _best(self, worth: Worth) -> Values:
        anywhere = [self._space.draw(self._rng) for _ in range(ANYWHERE)]
        ranked = worth.ranked([*anywhere, *self._around(worth.best, NEARBY, STEP)])
        for step in FINER:
            ranked = worth.ranked([*ranked, *self._around(ranked[:BEST], NEARER, (step, step))])
        return ranked[0]

    def _around(self, centres: Sequence[Mapping[str, Any]], number: int, step: tuple[float, float]) -> list[Values]:
        low, high = map(math.log, step)
        steps = [math.exp(self._rng.uniform(low, high)) for _ in range(number)]
        return [nearby(self._space, centres[i % len(centres)], steps[i], self._rng) for i in range(number)]


class Worth:
    """What a candidate is worth.

    scored: settings and what they are expected to score. limits: the excess of each constraint. survival: None where
    nothing is known of it. taken: settings that run, or ran.
    best: the best of the scored settings, as far as known within all limits.
    """

    def __init__(
        self,
        space: Space,
        scored: Sequence[Mapping[str, Any]],
        ladder: Ladder,
        limits: Sequence[Regression],
        survival: Survival | None,
    ) -> None:
        self._space, self._ladder, self._limits, self._survival = space, ladder, limits, survival
        x_ND = feature_rows(space, scored)
        mean_N, _ = ladder.predict(x_ND)
        broken_N = sum((limit.predict(x_ND)[0] > 0 for limit in limits), np.zeros(len(scored)))
        order = np.lexsort((mean_N, broken_N))
        self.best = [scored[i] for i in order[:BEST]]
        self._least = mean_N[order[0]]
        self._taken = {str(dict(values)) for values in scored}

    def take(self, running: Sequence[Mapping[str, Any]]) -> None:
        """These are being measured; until they are, they are believed to score as expected."""
        if running:
            x_KD = feature_rows(self._space, running)
            self._ladder.believe(x_KD)
            self._least = min(self._least, self._ladder.predict(x_KD)[0].min())
            self._taken |= {str(dict(values)) for values in running}

    def ranked(self, candidates: Sequence[Values]) -> list[Values]:
        """The best first, and nothing that was tried already where there is anything else."""
        new = [values for values in candidates if str(values) not in self._taken] or list(candidates)
        x_MD = feature_rows(self._space, new)
        mean_M, deviation_M = self._ladder.predict(x_MD)
        worth_M = log_expected_improvement(self._least - mean_M, deviation_M)
        for limit in self._limits:
            excess_M, doubt_M = limit.predict(x_MD)
            worth_M += log_ndtr(-excess_M / doubt_M)
        if self._survival is not None:
            survival_M = self._survival.probabilities(x_MD)
            enough_M = survival_M >= demanded(self._survival.tried, len(self._space.parameters))
            worth_M = np.where(enough_M, worth_M, DOOMED * (1 - survival_M))
        return [new[i] for i in np.argsort(-worth_M, kind="stable")]


def judge(space: Space, others: Sequence[FrozenTrial], survival: Survival | None, rng: random.Random) -> Worth | None:
    """By all trials but the one to be begun; None where they do not tell enough."""
    ended = [item for item in others if item.state.is_finished()][-LATEST:]
    measured = [item for item in ended if item.user_attrs.get("status") in ("finished", "stopped")]
    longest = space.epochs or longest_of(ended)
    scored = list(scores_of(space, measured, longest, rng))
    if len(ended) < MAPPED or not scored or not space.parameters:
        return None
    settings = [values for values, _ in scored]
    ladder = Ladder(feature_rows(space, settings), [scores for _, scores in scored], rungs(space, longest))
    worth = Worth(space, settings, ladder, _limits(space, ended, measured), survival)
    running = [read_record(item, space).values for item in others if item.state == TrialState.RUNNING]
    worth.take([values for values in running if space.holds(values)])
    return worth


def _limits(space: Space, ended: Sequence[FrozenTrial], measured: Sequence[FrozenTrial]) -> list[Regression]:
    """Of metrics, by the trials that measured them; of failures, where no model of survival knows of them."""
    failures = () if space.search.survival else ("diverged", "out_of_memory")
    found = []
    for name, trials in [*((name, measured) for name in space.constraints), *((name, ended) for name in failures)]:
        told = [item for item in trials if name in item.constraints]
        excess = np.array([item.constraints[name] for item in told])
        if (excess > 0).any():
            found.append(Regression(feature_rows(space, [item.user_attrs["values"] for item in told]), excess))
    return found


def log_expected_improvement(gain_M: Array, deviation_M: Array) -> Array:
    """The logarithm of how much better than the best a score is expected to be. gain: by which its mean is."""
    z_M = gain_M / deviation_M
    near_M, far_M = np.maximum(z_M, TAIL), np.minimum(z_M, TAIL)
    density_M = np.exp(-0.5 * near_M**2) / math.sqrt(2 * math.pi)
    asymptote_M = -0.5 * far_M**2 - 0.5 * math.log(2 * math.pi) - 2 * np.log(-far_M)
    found: Array = np.where(z_M > TAIL, np.log(density_M + near_M * ndtr(near_M)), asymptote_M) + np.log(deviation_M)
    return found


def nearby(space: Space, centre: Mapping[str, Any], step: float, rng: random.Random) -> Values:
    """A setting around another: numbers a normal step away, in parts of their range, choices now and then anew."""
    values: Values = {}
    for parameter in space.parameters:
        if space.is_active(parameter, values):
            values[parameter.name] = _moved(parameter, centre.get(parameter.name), step, rng)
    return values


def _moved(parameter: Parameter, value: Any, step: float, rng: random.Random) -> Any:
    domain = parameter.domain
    if value is None:
        return domain.sample(rng)
    if isinstance(domain, Choice):
        return domain.sample(rng) if rng.random() < step else value
    assert isinstance(domain, (Real, Integer))
    part = abs(domain.part(value) + rng.gauss(0.0, step)) % 2.0
    return domain.at(min(part, 2.0 - part))  # thrown back at the ends of the range, or these would be drawn most
