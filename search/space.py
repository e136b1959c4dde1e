"""A space file, its overrides applied, as one validated and immutable `Space`."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from search import tree as trees
from search import yaml_file
from search.decode import did_you_mean
from search.domain import Parameter, is_domain, parse_domain
from search.loading import Trainable, load, search_paths
from search.sections import Limit, Objective, Resources, Scheduler, Search, section
from trainables.contract import UserError

DRAWS = 200  # settings that are built before anything starts
_SECTIONS = (
    "trainable",
    "objective",
    "constraints",
    "config",
    "try_first",
    "search",
    "scheduler",
    "resources",
)
_KEYS = (*_SECTIONS, "profiles", "ran")  # ran: on what and how; stands in a results folder's space.yaml
Values = dict[str, Any]  # of the searched parameters, by dotted path


@dataclass(frozen=True)
class KnownSetting:
    """A setting to run before the sampler proposes; parameters it leaves out are sampled."""

    name: str | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """What is searched, what is fixed, and how trials run.

    tree: the config with its domains as written. parameters: the searched ones, each after those its `when` names.
    paths: where the trainable is looked for.
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
    profile: str | None
    paths: tuple[str, ...]

    @property
    def epochs(self) -> int | None:
        """`config.epochs`, where it is fixed."""
        epochs = self.tree.get("epochs")
        return epochs if isinstance(epochs, int) else None

    def with_trials(self, trials: int) -> Space:
        """The same search with so many trials."""
        return replace(self, search=self.search.model_copy(update={"trials": trials}))

    def is_active(self, parameter: Parameter, values: Mapping[str, Any]) -> bool:
        """Whether the conditions of a parameter hold, given the values of those before it."""
        searched = {item.name for item in self.parameters}
        for name, allowed in parameter.when.items():
            if name in searched:
                if name not in values or values[name] not in allowed:
                    return False
            elif trees.get(self.tree, name) not in allowed:
                return False
        return True

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether these are a whole setting of this space: a value for every active parameter, inside its domain."""
        active = {item.name: item.domain for item in self.parameters if self.is_active(item, values)}
        return values.keys() == active.keys() and all(active[name].contains(values[name]) for name in values)

    def suggest(self, trial: optuna.trial.Trial) -> Values:
        """Values for every active parameter, asked of the sampler."""
        values: Values = {}
        for parameter in self.parameters:
            if self.is_active(parameter, values):
                values[parameter.name] = parameter.suggest(trial)
        return values

    def draw(self, rng: random.Random, known: Mapping[str, Any] | None = None) -> Values:
        """Values for every active parameter: those of `known`, the others at random."""
        values: Values = {}
        for parameter in self.parameters:
            if self.is_active(parameter, values):
                drawn = parameter.domain.sample(rng)
                values[parameter.name] = drawn if known is None else known.get(parameter.name, drawn)
        return values

    def config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The config tree with the searched values put in; inactive parameters are left out."""
        tree = copy.deepcopy(dict(self.tree))
        for parameter in self.parameters:
            if parameter.name in values:
                trees.put(tree, parameter.name, values[parameter.name])
            else:
                trees.drop(tree, parameter.name)
        return tree

    def document(self) -> dict[str, Any]:
        """The resolved space as a YAML document that loads back to this space."""
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


def load_space(
    file: Path, overrides: Sequence[str] = (), profile: str | None = None, has_gpu: bool = True
) -> tuple[Space, Trainable]:
    """Read a space file, apply a profile and `KEY=VALUE` overrides, and check the whole.

    profile: None takes the profile `laptop` where there is one and `has_gpu` is false.
    Builds the trainable's Config for 200 random draws, so that a bad corner shows here and not in trial 37.
    Raises UserError: one line with the file, the key, the value and the remedy.
    """
    document = yaml_file.read(file)
    try:
        if not isinstance(document, dict):
            raise UserError("a space file is a mapping with the keys trainable, objective, config, ...")
        _check_keys(document, _KEYS)
        profiles = document.pop("profiles", None) or {}
        chosen = _choose_profile(profiles, profile, has_gpu)
        if chosen is not None:
            document = trees.merge(document, profiles[chosen])
        written = trees.leaves(document)
        for override in overrides:
            _override(document, override)
        space = _build(document, file, chosen)
        trainable = load(space.trainable, space.paths)
        if trainable.config_class is None:
            _check_overrides(written, overrides)
        _check_conditions(space)
        _check_draws(space, trainable)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return space, trainable


def _check_keys(document: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    for key in document:
        if key not in known:
            raise UserError(f"{prefix}{key}: no such key; {did_you_mean(str(key), known)}")


def _choose_profile(profiles: Any, wanted: str | None, has_gpu: bool) -> str | None:
    if not isinstance(profiles, dict):
        raise UserError(f"profiles: expected a mapping of names, got {profiles!r}")
    for name, profile in profiles.items():
        if not isinstance(profile, dict):
            raise UserError(f"profiles.{name}: expected a mapping, got {profile!r}")
        _check_keys(profile, _SECTIONS, f"profiles.{name}.")
    if wanted is None:
        return "laptop" if not has_gpu and "laptop" in profiles else None
    if wanted not in profiles:
        raise UserError(f"profile {wanted!r} is unknown; {did_you_mean(wanted, profiles)}")
    return wanted


def _override(document: dict[str, Any], text: str) -> None:
    """Apply one `dotted.key=value`; the value is YAML."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {text}: write KEY=VALUE, such as config.optim.lr=1.0e-4")
    if key.split(".")[0] not in _SECTIONS:
        raise UserError(f"--set {key}: no such key; {did_you_mean(key, trees.leaves(document))}")
    trees.put(document, key, yaml_file.parse(value_text, f"--set {key}"))


def _check_overrides(written: Sequence[str], overrides: Sequence[str]) -> None:
    """Without a Config class nothing else would notice a misspelt key of the config tree."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.startswith("config.") and not any(leaf == key or leaf.startswith(f"{key}.") for leaf in written):
            raise UserError(f"--set {key}: no such key; {did_you_mean(key, written)}")


def _build(document: dict[str, Any], file: Path, profile: str | None) -> Space:
    for key in ("trainable", "objective"):
        if not document.get(key):
            raise UserError(f"{key}: a value is needed")
    if not isinstance(document["trainable"], str):
        raise UserError(f"trainable: {document['trainable']!r} is no import path; write package.module:function")
    tree, ran = document.get("config") or {}, document.get("ran") or {}
    if not isinstance(tree, dict):
        raise UserError(f"config: expected a mapping, got {tree!r}")
    parameters = _ordered(_parameters(tree))
    ran = document.get("ran") or {}
    return Space(
        name=ran.get("space", file.stem),
        trainable=document["trainable"],
        objectives=_objectives(document["objective"]),
        constraints=_constraints(document.get("constraints")),
        tree=tree,
        parameters=parameters,
        try_first=_try_first(document.get("try_first"), tree, parameters),
        search=section(Search, document.get("search"), "search"),
        scheduler=section(Scheduler, document.get("scheduler"), "scheduler"),
        resources=section(Resources, document.get("resources"), "resources"),
        profile=profile or ran.get("profile"),
        paths=tuple(dict.fromkeys([*search_paths(file), *ran.get("paths", [])])),
    )


def _objectives(node: Any) -> tuple[Objective, ...]:
    nodes = node if isinstance(node, list) else [node]
    objectives = tuple(
        section(Objective, item, "objective" if len(nodes) == 1 else f"objective.{i}") for i, item in enumerate(nodes)
    )
    if len({item.metric for item in objectives}) != len(objectives):
        raise UserError(f"objective: names a metric twice: {[item.metric for item in objectives]}")
    return objectives


def _constraints(node: Any) -> dict[str, Limit]:
    if not isinstance(node or {}, dict):
        raise UserError(f"constraints: expected metric: {{min: ..., max: ...}}, got {node!r}")
    return {name: section(Limit, limit, f"constraints.{name}") for name, limit in (node or {}).items()}


def _parameters(tree: Mapping[str, Any], prefix: str = "") -> list[Parameter]:
    found = []
    for key, node in tree.items():
        if not isinstance(key, str) or "." in key:
            raise UserError(f"config.{prefix}{key}: a key is a word without dots; nest mappings instead")
        if is_domain(node):
            try:
                found.append(parse_domain(f"{prefix}{key}", node))
            except UserError as error:
                raise UserError(f"config.{error}") from None
        elif isinstance(node, dict):
            found += _parameters(node, f"{prefix}{key}.")
    return found


def _ordered(parameters: list[Parameter]) -> tuple[Parameter, ...]:
    """Each after those that its `when` names, else as in the file."""
    names = {item.name for item in parameters}
    ordered: list[Parameter] = []
    left = list(parameters)
    while left:
        placed = {item.name for item in ordered}
        ready = [item for item in left if all(name in placed or name not in names for name in item.when)]
        if not ready:
            raise UserError(f"config: the `when` of {', '.join(item.name for item in left)} go round in a circle")
        ordered += ready
        left = [item for item in left if item not in ready]
    return tuple(ordered)


def _try_first(node: Any, tree: Mapping[str, Any], parameters: tuple[Parameter, ...]) -> tuple[KnownSetting, ...]:
    if not isinstance(node or [], list):
        raise UserError(f"try_first: expected a list of settings, got {node!r}")
    by_name = {item.name: item for item in parameters}
    settings = []
    for i, entry in enumerate(node or []):
        if not isinstance(entry, dict):
            raise UserError(f"try_first.{i}: expected dotted paths and values, got {entry!r}")
        values = {key: value for key, value in entry.items() if key != "name"}
        for name, value in values.items():
            if name not in by_name and trees.get(tree, name) is trees.MISSING:
                raise UserError(f"try_first.{i}.{name}: no such parameter; {did_you_mean(name, by_name)}")
            _check_known(f"try_first.{i}.{name}", value, by_name.get(name), trees.get(tree, name))
        searched = {name: value for name, value in values.items() if name in by_name}
        settings.append(KnownSetting(entry.get("name"), searched))
    return tuple(settings)


def _check_known(where: str, value: Any, parameter: Parameter | None, fixed: Any) -> None:
    if parameter is None and fixed != value:
        raise UserError(f"{where}: {value!r} cannot be tried, the config fixes it to {fixed!r}; leave it out")
    if parameter is not None and not parameter.domain.contains(value):
        raise UserError(f"{where}: {value!r} lies outside {parameter.domain}; widen the range or change the value")


def _check_conditions(space: Space) -> None:
    """Every `when` names an entry of the config, and a known setting says under which conditions it stands."""
    searched = {item.name: item for item in space.parameters}
    for parameter in space.parameters:
        for name in parameter.when:
            if trees.get(space.tree, name) is trees.MISSING:
                known = [leaf.removeprefix("config.") for leaf in trees.leaves({"config": space.tree})]
                raise UserError(f"config.{parameter.name}: `when` names {name}; {did_you_mean(name, known)}")
    for i, setting in enumerate(space.try_first):
        for name in setting.values:
            for other in searched[name].when:
                if other in searched and other not in setting.values:
                    raise UserError(f"try_first.{i}.{name}: depends on {other}; give {other} a value there too")
            if not space.is_active(searched[name], setting.values):
                raise UserError(f"try_first.{i}.{name}: is not searched there, its `when` does not hold; leave it out")


def _check_draws(space: Space, trainable: Trainable) -> None:
    rng = random.Random(0)
    settings = [("", space.draw(rng))]  # what fails here fails everywhere, and not for its values
    settings += [(f"try_first.{i}", space.draw(rng, known.values)) for i, known in enumerate(space.try_first)]
    settings += [("drawn", space.draw(rng)) for _ in range(DRAWS if space.parameters else 0)]
    for origin, values in settings:
        try:
            trainable.config(space.config(values))
        except UserError as error:
            told = ", ".join(f"{name}={value}" for name, value in values.items())
            raise UserError(f"{error} ({origin}: {told})" if origin else str(error)) from None
