"""The sampler `gp`: Bayesian optimisation that accounts for divergence, stopped trials and its own blind spots.

It proposes, among settings likely enough to survive, the one with the largest expected improvement of the score of a
whole trial (in logarithms: Ament et al., Unexpected Improvements to Expected Improvement, 2023). A smooth model that is
wrong is sure of itself, and would propose the same place again and again; so every other proposal is TPE's.

Shapes: N scored trials, K settings under way, M candidates, D features.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from scipy.special import log_ndtr, ndtr

from search.learning.features import Array, feature_rows
from search.learning.ladder import Ladder, scores_of
from search.learning.proposals import WholeSampler, proposal_seed, propose, surviving
from search.learning.regression import FAR, Regression
from search.learning.survival import MAPPED, SURVIVED, Survival, demanded, learn, remembered, tells
from search.records.record import length_of, read_record
from search.space import Space, Values
from search.space.domain import Choice, Domain, Integer, Parameter, Real, at, part
from search.space.sections import OWN_CONSTRAINTS

ANYWHERE, NEARBY, NEARER = 500, 500, 150  # candidates: anywhere; near the best settings; twice, near the best so far
FIRST = 5  # scored trials before it proposes
BEST = 5  # settings, or candidates, around which others are drawn
STEP = (0.01, 0.5)  # step sizes to a nearby candidate, as fractions of a range; log-uniform
FINER = (0.05, 0.015)  # step sizes of the first and the second refinement
TAIL = -30.0  # standard deviations below which the improvement is computed by its asymptote


class SurrogateSampler(WholeSampler):
    """Every other setting is TPE's; the rest are random until `FIRST` trials have a score.

    If fewer have one when `MAPPED` have ended, one is enough.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space)
        self._seed, self._rng = seed, random.Random(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        stored = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        given = {
            item.name: item.domain.decode(stored[item.name]) for item in self._space.parameters if item.name in stored
        }
        if given:  # a known setting, perhaps in part: the rest is drawn
            self._chosen = self._space.draw(self._rng, given)
        else:
            super().before_trial(study, trial)

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

        return propose(self._space, surviving(self._space, survival, tpe), study, trial)

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
    """Ranks candidates by what they are worth.

    scored: settings whose scores `ladder` predicts. limits: models of the excess over each limit. survival: None if
        unknown.
    best: the best of the scored settings, those predicted to break the fewest limits first.
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
        order, self._least = self._order(x_ND)
        self.best = [scored[i] for i in order[:BEST]]
        self._x_ND = x_ND
        self._excluded: set[bytes] = set()

    def _order(self, x_MD: Array) -> tuple[NDArray[np.intp], float]:
        """Return the order, by limits broken and then by predicted score, and the predicted score of the first."""
        mean_M, _ = self._ladder.predict(x_MD)
        broken_M = sum((limit.predict(x_MD)[0] > 0 for limit in self._limits), np.zeros(len(x_MD)))
        order = np.lexsort((mean_M, broken_M))
        return order, float(mean_M[order[0]])

    def expect(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Assume that settings which are being measured score as predicted."""
        if settings:
            x_KD = feature_rows(self._space, settings)
            self._ladder.believe(x_KD)
            _, self._least = self._order(np.concatenate([self._x_ND, x_KD]))

    def exclude(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Exclude settings from being proposed again, whatever became of them."""
        self._excluded |= {_key(row) for row in feature_rows(self._space, settings)}

    def ranked(self, candidates: Sequence[Values]) -> list[Values]:
        """Return the candidates, best first, without excluded ones unless there are no others."""
        x_MD = feature_rows(self._space, candidates)
        new = [i for i in range(len(candidates)) if _key(x_MD[i]) not in self._excluded] or list(range(len(candidates)))
        likely_M, worth_M = self._worth(x_MD[new])
        return [candidates[new[i]] for i in np.lexsort((-worth_M, ~likely_M))]

    def _worth(self, x_MD: Array) -> tuple[NDArray[np.bool_], Array]:
        """Return whether candidates are likely enough to survive, and their worth or, if not, how likely they are."""
        mean_M, deviation_M = self._ladder.predict(x_MD)
        worth_M = log_expected_improvement(self._least - mean_M, deviation_M)
        for limit in self._limits:
            excess_M, doubt_M = limit.predict(x_MD)
            worth_M += log_ndtr(-excess_M / doubt_M)
        if self._survival is None:
            return np.ones(len(x_MD), dtype=bool), worth_M
        survival_M = self._survival.probabilities(x_MD)
        likely_M = survival_M >= demanded(self._survival.tried, len(self._space.parameters))
        return likely_M, np.where(likely_M, worth_M, survival_M)


def _key(row_D: Array) -> bytes:
    """Return a key that is equal for settings that differ only in rounding errors of added steps."""
    return (np.round(row_D, 9) + 0.0).tobytes()  # no -0.0


def judge(space: Space, others: Sequence[FrozenTrial], survival: Survival | None, rng: random.Random) -> Worth | None:
    """Return the `Worth` learned from all trials but the one to be begun; None while they tell too little."""
    tried = [item for item in others if item.state.is_finished()]
    best = _incumbents(space, tried)
    ended = remembered([item for item in tried if tells(item)], lambda item: item.number in best)
    measured = [item for item in ended if SURVIVED[item.user_attrs["status"]]]
    longest = length_of(space, ended)
    scored = list(scores_of(space, measured, longest, rng))
    if len(scored) < (FIRST if len(tried) < MAPPED else 1) or not space.parameters:
        return None
    settings = [values for values, _ in scored]
    ladder = Ladder(feature_rows(space, settings), [scores for _, scores in scored], space.scheduler.rungs(longest))
    worth = Worth(space, settings, ladder, _limits(space, ended, measured), survival)
    running = [item for item in others if item.state == TrialState.RUNNING]
    worth.expect(_settings(space, running))
    worth.exclude(_settings(space, [*running, *tried]))
    return worth


def _incumbents(space: Space, tried: Sequence[FrozenTrial]) -> set[int]:
    """Return the numbers of the `BEST` best finished trials in each objective."""
    found: set[int] = set()
    whole = [item for item in tried if item.user_attrs.get("status") == "finished"]
    for k, objective in enumerate(space.objectives):
        whole.sort(key=lambda item: item.values[k], reverse=objective.mode == "max")
        found |= {item.number for item in whole[:BEST]}
    return found


def _settings(space: Space, trials: Sequence[FrozenTrial]) -> list[Mapping[str, Any]]:
    """Return the trials' settings that are complete settings of this space."""
    return [values for item in trials if space.holds(values := read_record(item, space).values)]


def _limits(space: Space, ended: Sequence[FrozenTrial], measured: Sequence[FrozenTrial]) -> list[Regression]:
    """Return a model of the excess over each limit that some trial broke.

    Limits of metrics are learned from whole trials, as they hold at the end; failures only without a survival model.
    Excess is clipped at `FAR` times the median violation, on both sides: a few trials a thousandfold within a limit
    would hide all differences near it.
    """
    failures = () if space.search.survival else OWN_CONSTRAINTS
    told_of = {name: [item for item in ended if name in item.constraints] for name in failures}
    for name in space.constraints:
        told_of[name] = [item for item in measured if item.user_attrs["status"] == "finished"]
    found = []
    for name, told in told_of.items():
        excess = np.array([item.constraints[name] for item in told])
        if (excess > 0).any():
            far = FAR * np.median(excess[excess > 0])
            rows = feature_rows(space, [item.user_attrs["values"] for item in told])
            found.append(Regression(rows, np.clip(excess, -far, far)))
    return found


def log_expected_improvement(gain_M: Array, deviation_M: Array) -> Array:
    """Return the logarithm of the expected improvement on the best. gain: how much better than the best the mean is."""
    z_M = gain_M / deviation_M
    near_M, far_M = np.maximum(z_M, TAIL), np.minimum(z_M, TAIL)
    density_M = np.exp(-0.5 * near_M**2) / math.sqrt(2 * math.pi)
    asymptote_M = -0.5 * far_M**2 - 0.5 * math.log(2 * math.pi) - 2 * np.log(-far_M)
    return np.where(z_M > TAIL, np.log(density_M + near_M * ndtr(near_M)), asymptote_M) + np.log(deviation_M)


def nearby(space: Space, centre: Mapping[str, Any], step: float, rng: random.Random) -> Values:
    """Return a setting near another: numbers move by a normal step, relative to their range; choices may be redrawn."""

    def beside(parameter: Parameter) -> Any:
        name, domain = parameter.name, parameter.domain
        return _moved(domain, centre[name], step, rng) if name in centre else domain.sample(rng)

    return space.setting(beside)


def _moved(domain: Domain, value: Any, step: float, rng: random.Random) -> Any:
    if isinstance(domain, Choice):
        return domain.sample(rng) if rng.random() < step else value
    assert isinstance(domain, (Real, Integer))
    place = abs(part(domain, value) + rng.gauss(0.0, step)) % 2.0
    return at(
        domain, min(place, 2.0 - place)
    )  # reflected at the ends of the range, which clipping would draw most often
