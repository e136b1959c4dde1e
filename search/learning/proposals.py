"""Samplers that choose whole settings, among them one that prefers proposals likely to survive."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from search.learning.survival import Survival, demanded
from search.space import Space, Values
from search.space.domain import Parameter

# Samplers that can be asked for several settings in one trial's place. Of the others, gp applies the model by itself,
# and the rest follow a sequence or a generation.
ASKED_AGAIN = ("tpe", "nsga2", "random")
CANDIDATES = 16


class WholeSampler(BaseSampler):
    """A sampler that chooses a whole setting at once, although Optuna asks for it value by value."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._chosen: Values = {}

    @abstractmethod
    def choose(self, study: optuna.Study, trial: FrozenTrial) -> Values:
        """Return a value for every active parameter."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._chosen = self.choose(study, trial)

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


class SurvivingSampler(WholeSampler):
    """Proposes the first candidate that is likely enough to survive, from one sampler with different seeds.

    If none is, it proposes the likeliest. The candidates leave no trace among the trials of the study.
    """

    def __init__(self, space: Space, model: Survival, candidates: Callable[[int], BaseSampler]) -> None:
        super().__init__(space)
        self._model, self._candidates = model, candidates

    def choose(self, study: optuna.Study, trial: FrozenTrial) -> Values:
        best, chosen, limit = -1.0, Values(), demanded(self._model.tried, len(self._space.parameters))
        for i in range(CANDIDATES):
            values = propose(self._space, self._candidates(i), study, trial)
            survival = self._model.probability(values)
            if survival > best:
                best, chosen = survival, values
            if survival >= limit:
                break
        return chosen


def surviving(space: Space, model: Survival | None, sampler: Callable[[int], BaseSampler]) -> BaseSampler:
    """Return a sampler whose proposals are likely to survive, if there is a model. sampler: for the i-th candidate."""
    return sampler(0) if model is None else SurvivingSampler(space, model, sampler)


def propose(space: Space, sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial) -> Values:
    """Return a sampler's setting for a trial, without storing it in the trial."""
    sampler.before_trial(study, trial)
    together = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))

    def proposed(parameter: Parameter) -> Any:
        name, distribution = parameter.name, parameter.domain.distribution()
        alone = name not in together
        stored = sampler.sample_independent(study, trial, name, distribution) if alone else together[name]
        return parameter.domain.decode(stored)

    return space.setting(proposed)


def proposal_seed(seed: int, place: int, candidate: int = 0) -> int:
    """Return a seed for the proposal at `place`, different for each place and each candidate."""
    text = f"{seed}/{place}/{candidate}" if candidate else f"{seed}/{place}"
    return random.Random(text).getrandbits(32)
