"""The samplers by name, and which spaces each can search."""

from __future__ import annotations

import warnings
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from search.learning.surrogate import SurrogateSampler
from search.ledger import MakeSampler
from search.space import Space
from trainables.contract import UserError

WHOLE_TRIALS = ("cmaes", "nsga2")  # learn only from trials that ran to their end
OWN_COURSE = ("cmaes", "qmc", "grid")  # learn nothing from a warm start: cmaes only from its own generations
STOPPING = ("asha", "hyperband", "median")
LARGEST_GRID = 100_000  # settings; Optuna lists all of them for each proposal


def sampler_maker(space: Space) -> MakeSampler:
    """Return the function from a seed to the space's sampler; raises UserError if that cannot search the space."""
    name, seed = space.search.sampler, space.search.seed
    conditional = [item.name for item in space.parameters if item.when]
    if name == "grid":
        grid = _grid(space)
        return lambda _: _Grid(grid, seed=seed % 2**32)  # numpy takes no larger seed
    if name == "qmc":
        # The study stores the position in the sequence. It is over the parameters of the first trial that ended; those
        # of another branch (`when`) are drawn with the proposal's own seed.
        return lambda s: _silent(
            optuna.samplers.QMCSampler,
            seed=seed,
            scramble=True,
            warn_independent_sampling=False,
            independent_sampler=optuna.samplers.RandomSampler(seed=s),
        )
    if name == "cmaes" and (conditional or len(space.objectives) > 1):
        why = "several objectives" if len(space.objectives) > 1 else f"`when` ({', '.join(conditional)})"
        raise UserError(f"search.sampler: cmaes does not support {why}; use tpe")
    makers: dict[str, MakeSampler] = {
        "tpe": lambda s: optuna.samplers.TPESampler(seed=s),
        "gp": lambda s: SurrogateSampler(space, s),
        "cmaes": lambda s: _silent(optuna.samplers.CmaEsSampler, seed=s, warn_independent_sampling=False),
        "nsga2": lambda s: NSGAIISampler(seed=s),
        "random": lambda s: optuna.samplers.RandomSampler(seed=s),
    }
    return makers[name]


def unlearned(space: Space) -> list[str]:
    """Return a warning line if the sampler may propose again and again what the scheduler has stopped."""
    sampler, scheduler = space.search.sampler, space.scheduler.name
    if sampler not in WHOLE_TRIALS or scheduler not in STOPPING:
        return []
    return [
        f"search.sampler: {sampler} learns nothing from the trials that {scheduler} stops, and may propose the same "
        "again; use tpe, or scheduler.name=none"
    ]


def grid_size(space: Space) -> int:
    """Return the number of settings in the space's grid; raises UserError if it has no grid, or too large a one."""
    settings = 1
    for parameter in space.parameters:
        if parameter.when:
            raise UserError(f"search.sampler: grid does not support `when` ({parameter.name}); use tpe or random")
        size = parameter.domain.size()
        if size is None:
            raise UserError(
                f"search.sampler: grid needs finitely many values of {parameter.name}; write a choice, an int or a step"
            )
        settings *= size
    if settings > LARGEST_GRID:
        raise UserError(
            f"search.sampler: a grid of {settings} settings exceeds the limit of {LARGEST_GRID}; give "
            "fewer values, or use qmc, which covers the space as evenly"
        )
    return settings


def _grid(space: Space) -> dict[str, list[Any]]:
    for i, known in enumerate(space.try_first):
        missing = [item.name for item in space.parameters if item.name not in known.values]
        if missing:
            raise UserError(
                f"try_first.{i}: grid does not fill in missing values; give {', '.join(missing)} a value there too"
            )
    grid_size(space)
    return {parameter.name: parameter.domain.grid() for parameter in space.parameters}


class _Grid(optuna.samplers.GridSampler):
    """Optuna's grid sampler, without its `Study.stop` after the last setting: the ledger counts the trials."""

    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        pass


class NSGAIISampler(optuna.samplers.NSGAIISampler):
    """Optuna's sampler, which learns from known settings too; it keeps Optuna's name, a part of what the study stores.

    Optuna gives a trial its generation when it first samples a value of it, which for a whole known setting is never.
    """

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        self.get_trial_generation(study, trial)


def _silent(kind: Any, **arguments: Any) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return kind(**arguments)
