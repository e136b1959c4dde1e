"""A space file, with its overrides applied, as one validated and immutable `Space`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna

from search.space import tree as trees
from search.space.domain import Parameter
from search.space.sections import Limit, Objective, Resources, Scheduler, Search

Values = dict[str, Any]  # values of the searched parameters, by dotted path


@dataclass(frozen=True)
class KnownSetting:
    """A setting to run before the sampler proposes any; parameters that it leaves out are sampled."""

    name: str | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """What is searched, what is fixed, and how trials run.

    tree: the config with its domains as written. parameters: the searched ones, each after those that its `when` names.
    left_out: a line on each known setting that an override ruled out, and on what is never searched but looks like it.
    paths: folders to search for the trainable.
    data: the description of the data, such as their split, that the trainable's `prepare` returned, or None.
    """

    name: str
    trainable: str
    objectives: tuple[Objective, ...]
    constraints: Mapping[str, Limit]
    tree: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    try_first: tuple[KnownSetting, ...]
    search: Search
    scheduler: Scheduler
    resources: Resources
    left_out: tuple[str, ...]
    profile: str | None
    paths: tuple[str, ...]
    data: str | None = None

    @property
    def epochs(self) -> int | None:
        """`config.epochs` if it is fixed, else None."""
        return self.epochs_of({})

    def epochs_of(self, values: Mapping[str, Any]) -> int | None:
        """Return `config.epochs` of a setting; None if the length of its trial is unknown."""
        epochs = values.get("epochs", self.tree.get("epochs"))
        return epochs if isinstance(epochs, int) and not isinstance(epochs, bool) else None

    def with_trials(self, trials: int) -> Space:
        """Return a copy with another `search.trials`."""
        return replace(self, search=self.search.model_copy(update={"trials": trials}))

    def is_active(self, parameter: Parameter, values: Mapping[str, Any]) -> bool:
        """Return whether the conditions of a parameter hold, given the values of those before it."""
        # One that is not active has its domain in the tree, and no condition allows that.
        return all(values.get(name, trees.get(self.tree, name)) in allowed for name, allowed in parameter.when.items())

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Return whether these values are a complete setting: one for every active parameter, inside its domain."""
        active = {item.name: item.domain for item in self.parameters if self.is_active(item, values)}
        return values.keys() == active.keys() and all(active[name].contains(values[name]) for name in values)

    def setting(self, choose: Callable[[Parameter], Any]) -> Values:
        """Return a value for every active parameter, each chosen after those that its conditions name."""
        values: Values = {}
        for parameter in self.parameters:
            if self.is_active(parameter, values):
                values[parameter.name] = choose(parameter)
        return values

    def suggest(self, trial: optuna.trial.Trial) -> Values:
        """Ask the sampler for a value of every active parameter."""
        return self.setting(lambda parameter: parameter.suggest(trial))

    def draw(self, rng: random.Random, known: Mapping[str, Any] | None = None) -> Values:
        """Return a value for every active parameter: from `known` if it has one, else drawn at random."""
        given = known or {}
        return self.setting(lambda parameter: given.get(parameter.name, parameter.domain.sample(rng)))

    def config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config tree with searched values inserted and inactive parameters left out (see `Parameter`)."""
        tree = copy.deepcopy(dict(self.tree))
        for parameter in self.parameters:
            if parameter.name in values:
                trees.put(tree, parameter.name, copy.deepcopy(values[parameter.name]))
            else:
                trees.drop(tree, parameter.name)
        return tree

    def document(self) -> dict[str, Any]:
        """Return the resolved space as a YAML document that loads back to this space."""
        objectives = [item.model_dump() for item in self.objectives]
        return {
            "trainable": self.trainable,
            "objective": objectives[0] if len(objectives) == 1 else objectives,
            "constraints": {name: limit.model_dump(exclude_none=True) for name, limit in self.constraints.items()},
            "config": copy.deepcopy(dict(self.tree)),
            "try_first": [{**({"name": known.name} if known.name else {}), **known.values} for known in self.try_first],
            "search": self.search.model_dump(),
            "scheduler": self.scheduler.model_dump(),
            "resources": self.resources.model_dump(),
        }
