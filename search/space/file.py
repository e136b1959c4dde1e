"""Builds a validated `Space` from a space file, a profile and overrides."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from search import yaml_file
from search.space import KnownSetting, Space
from search.space import tree as trees
from search.space.decode import did_you_mean
from search.space.domain import (
    Choice,
    Domain,
    Integer,
    Parameter,
    Real,
    is_domain,
    nearly_domain,
    parse_domain,
    resembles_domain,
)
from search.space.loading import Trainable, check_not_hidden, load, search_paths
from search.space.overrides import SECTIONS, apply, check_spelling, leave_out
from search.space.sections import (
    OWN_CONSTRAINTS,
    Limit,
    Objective,
    Ran,
    Resources,
    Scheduler,
    Search,
    check_names,
    section,
    tables_in,
)
from trainables.contract import UserError

DRAWS = 200  # random settings that are built before anything starts
NO_CLASH = "narrow the domains, or search what cannot clash, as a factor between the two"
_PROFILED = (*SECTIONS, "tables")
_KEYS = (*_PROFILED, "profiles")
_NO_TEXT = "a key is a word without dots; write it in quotes"


def load_space(
    file: Path, overrides: Sequence[str] = (), profile: str | None = None, has_gpu: bool = True
) -> tuple[Space, Trainable]:
    """Load a space file with a profile and `KEY=VALUE` overrides; returns the validated space and its trainable.

    profile: None selects the profile `laptop` if there is one and `has_gpu` is false.
    Builds the trainable's Config for 200 random draws, so that a bad corner shows here and not in trial 37, and checks
    the other profiles, so that a mistake there does not first show on the cluster; and the space without one unless
    `profile` names one: a space may be whole only with a profile.
    Raises UserError: one line with the file, the key, the value and the remedy.
    """
    whole = yaml_file.read(file)
    try:
        document, chosen = profiled(copy.deepcopy(whole), profile, has_gpu)
        written = trees.leaves(document)
        for override in overrides:
            apply(document, override)
        left_out = leave_out(document, overrides)
        space = _build(document, file, chosen, left_out)
        tables_in(document.get("tables"))
        check_not_hidden()
        trainable = load(space.trainable, space.paths)
        if trainable.config_class is None:
            check_spelling(written, overrides)
            _check_whole(space)
            _check_kinds(space.tree)
            left_out += tuple(_resembling(space.tree))
        space = _with_epochs(space, trainable)
        _check_conditions(space)
        space = replace(space, left_out=(*left_out, *_never_searched(space)))
        _check_draws(space, trainable)
        others = [*(whole.get("profiles") or {}), *([None] if profile is None else [])]
        for other in others:
            if other != chosen:
                _check_other(whole, file, other)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return space, trainable


def profiled(document: Any, profile: str | None, has_gpu: bool) -> tuple[dict[str, Any], str | None]:
    """Return a space file's content with a profile applied, and the profile's name; see `load_space`."""
    document = _mapping(document)
    _check_keys([key for key in document if key != "ran"], _KEYS)  # ran: how it ran, which a results folder says
    profiles = document.get("profiles") or {}
    chosen = _choose_profile(profiles, profile, has_gpu)
    left = {key: node for key, node in document.items() if key != "profiles"}
    if chosen is None:
        return left, None
    said = {key: node for key, node in profiles[chosen].items() if node is not None}  # a section without lines
    return trees.merge(left, said), chosen


def _mapping(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise UserError("a space file is a mapping with the keys trainable, objective, config, ...")
    return document


def read_space(file: Path) -> Space:
    """Read the resolved space of a results folder, even if its trainable cannot be imported; raises UserError."""
    document = yaml_file.read(file)
    try:
        return _build(_mapping(document), file, None, ())
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _check_keys(keys: Iterable[Any], known: Sequence[str], prefix: str = "") -> None:
    for key in keys:
        if key not in known:
            raise UserError(f"{prefix}{key}: no such key; {did_you_mean(str(key), known)}")


def _choose_profile(profiles: Any, wanted: str | None, has_gpu: bool) -> str | None:
    if not isinstance(profiles, dict):
        raise UserError(f"profiles: expected a mapping of names, got {profiles!r}")
    check_names(profiles, "profiles")
    for name, profile in profiles.items():
        if not isinstance(profile, dict):
            raise UserError(f"profiles.{name}: expected a mapping, got {profile!r}")
        _check_keys(profile, _PROFILED, f"profiles.{name}.")
    if wanted is None:
        return "laptop" if not has_gpu and "laptop" in profiles else None
    if wanted not in profiles:
        raise UserError(f"profile {wanted!r} is unknown; {did_you_mean(wanted, profiles)}")
    return wanted


def _check_kinds(tree: Mapping[str, Any], prefix: str = "config") -> None:
    """Reject misspelt domains: without a Config class they would be fixed values, which no trial could use."""
    for key, node in tree.items():
        if kind := nearly_domain(node):
            raise UserError(
                f"{prefix}.{key}: {node} is not a domain; write {{{kind}: [...]}}, or rename the key of a fixed value"
            )
        if isinstance(node, dict) and not is_domain(node):
            _check_kinds(node, f"{prefix}.{key}")


def _resembling(tree: Mapping[str, Any], prefix: str = "config") -> list[str]:
    """Return a line on each fixed mapping that would be searched by another library."""
    lines = []
    for key, node in tree.items():
        if resembles_domain(node):
            lines.append(
                f"not searched: {prefix}.{key}, as {node} is not a domain; {{float: [low, high]}} would be one"
            )
        elif isinstance(node, dict) and not is_domain(node):
            lines += _resembling(node, f"{prefix}.{key}")
    return lines


def _epochs(tree: Mapping[str, Any], parameters: Iterable[Parameter]) -> list[Any]:
    """Return the fixed `epochs` of a config, all values of a choice of it, or the ends of a range of it."""
    domain = next((item.domain for item in parameters if item.name == "epochs"), None)
    if isinstance(domain, Choice):
        return list(domain.values)
    return [domain.low, domain.high] if isinstance(domain, (Integer, Real)) else [tree.get("epochs")]


def _check_whole(space: Space) -> None:
    """Reject what would not count as the length of a trial, where no Config class says what it is."""
    whole = "a trial has a whole number of epochs"
    node: Any = space.tree.get("epochs")
    if is_domain(node) and not ("int" in node or "choice" in node):
        raise UserError(f"config.epochs: {node}: {whole}; write {{int: [low, high]}}")
    for value in _epochs(space.tree, space.parameters):
        if isinstance(value, (bool, float)) or (is_domain(node) and not isinstance(value, int)):
            raise UserError(f"config.epochs: {value}: {whole}; write 1 or more")


def _with_epochs(space: Space, trainable: Trainable) -> Space:
    """Return the space with the default `epochs` of its trainable's Config, if it says nothing of them itself."""
    fields = () if trainable.config_class is None else dataclasses.fields(trainable.config_class)
    default = next((item.default for item in fields if item.name == "epochs" and item.init), None)
    if "epochs" in space.tree or not isinstance(default, int) or isinstance(default, bool) or default < 1:
        return space
    return replace(space, tree={**space.tree, "epochs": default})


def _check_inside(node: Any, where: str) -> None:
    """Reject, in a list or a choice's value, a key that JSON cannot hold, and a domain, as it is searched elsewhere."""
    for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict) and not isinstance(key, str):
            raise UserError(f"{where}.{key}: {_NO_TEXT}")
        if is_domain(item):
            raise UserError(
                f"{where}: {item} would not be searched here; give it a key of its own, with `when` perhaps"
            )
        _check_inside(item, where)


def _build(document: dict[str, Any], file: Path, profile: str | None, left_out: tuple[str, ...]) -> Space:
    for key in ("trainable", "objective"):
        if not document.get(key):
            raise UserError(f"{key}: a value is needed")
    if not isinstance(document["trainable"], str):
        raise UserError(f"trainable: {document['trainable']!r} is not an import path; write package.module:function")
    tree, ran = document.get("config") or {}, section(Ran, document.get("ran"), "ran")
    if not isinstance(tree, dict):
        raise UserError(f"config: expected a mapping, got {tree!r}")
    parameters = _ordered(_parameters(tree))
    for epochs in _epochs(tree, parameters):
        if isinstance(epochs, int) and epochs < 1:
            raise UserError(f"config.epochs: {epochs}: a trial has at least one epoch; write 1 or more")
    return Space(
        name=ran.space or file.stem,
        trainable=document["trainable"],
        objectives=_objectives(document["objective"]),
        constraints=_constraints(document.get("constraints")),
        tree=tree,
        parameters=parameters,
        try_first=_try_first(document.get("try_first"), tree, parameters),
        search=section(Search, document.get("search"), "search"),
        scheduler=section(Scheduler, document.get("scheduler"), "scheduler"),
        resources=section(Resources, document.get("resources"), "resources"),
        left_out=left_out,
        profile=profile or ran.profile,
        paths=search_paths(file, ran.paths),
        data=ran.data,
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
    for name in node or {}:
        if not isinstance(name, str) or not name:
            raise UserError(f"constraints.{name}: {name!r} is not a metric's name; write it as in the reports")
        if name in OWN_CONSTRAINTS:
            raise UserError(
                f"constraints.{name}: every search already has a constraint of this name; rename the metric"
            )
    return {name: section(Limit, limit, f"constraints.{name}") for name, limit in (node or {}).items()}


def _parameters(tree: Mapping[str, Any], prefix: str = "") -> list[Parameter]:
    found = []
    for key, node in tree.items():
        if not isinstance(key, str):
            raise UserError(f"config.{prefix}{key}: {_NO_TEXT}")
        if "." in key:
            raise UserError(f"config.{prefix}{key}: a key is a word without dots; nest mappings instead")
        if isinstance(node, list) or is_domain(node):
            _check_inside(node.get("choice") if isinstance(node, dict) else node, f"config.{prefix}{key}")
        if is_domain(node):
            try:
                found.append(parse_domain(f"{prefix}{key}", node))
            except UserError as error:
                raise UserError(f"config.{error}") from None
        elif isinstance(node, dict):
            found += _parameters(node, f"{prefix}{key}.")
    return found


def _ordered(parameters: list[Parameter]) -> tuple[Parameter, ...]:
    """Order parameters so that each follows those that its `when` names, otherwise as in the file."""
    names = {item.name for item in parameters}
    ordered: list[Parameter] = []
    left = list(parameters)
    while left:
        placed = {item.name for item in ordered}
        ready = [item for item in left if all(name in placed or name not in names for name in item.when)]
        if not ready:
            raise UserError(f"config: the `when` of {', '.join(item.name for item in left)} form a cycle")
        ordered += ready
        left = [item for item in left if item not in ready]
    return tuple(ordered)


def _try_first(node: Any, tree: Mapping[str, Any], parameters: tuple[Parameter, ...]) -> tuple[KnownSetting, ...]:
    if not isinstance(node or [], list):
        raise UserError(f"try_first: expected a list of settings, got {node!r}")
    by_name = {item.name: item for item in parameters}
    if node and "name" in by_name:
        raise UserError(
            "try_first: the key `name` says what a setting is called, and the config searches an entry of that name; "
            "nest that in a mapping, or rename it"
        )
    settings = []
    for i, entry in enumerate(node or []):
        if not isinstance(entry, dict):
            raise UserError(f"try_first.{i}: expected dotted paths and values, got {entry!r}")
        values = {str(key): value for key, value in entry.items() if key != "name"}
        for name, value in values.items():
            if name not in by_name and trees.get(tree, name) is trees.MISSING:
                raise UserError(f"try_first.{i}.{name}: no such parameter; {did_you_mean(name, by_name)}")
            _check_known(f"try_first.{i}.{name}", value, by_name.get(name), trees.get(tree, name))
        searched = {name: value for name, value in values.items() if name in by_name}
        called = entry.get("name")
        settings.append(KnownSetting(None if called is None else str(called), searched))
    return tuple(settings)


def _check_known(where: str, value: Any, parameter: Parameter | None, fixed: Any) -> None:
    if parameter is None and fixed != value and isinstance(fixed, Mapping) and isinstance(value, Mapping) and value:
        section = where.split(".", 2)[2]
        raise UserError(f"{where}: a section is not tried as a whole; write {section}.{trees.leaves(value)[0]}")
    if parameter is None and fixed != value:
        raise UserError(f"{where}: {value!r} cannot be tried, the config fixes it to {fixed!r}; leave it out")
    if parameter is None or parameter.domain.contains(value):
        return
    domain, number = parameter.domain, isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(domain, (Integer, Real)) or (number and not domain.low <= value <= domain.high):
        raise UserError(f"{where}: {value!r} lies outside {domain}; widen the range or change the value")
    kind = "whole numbers" if isinstance(domain, Integer) else "numbers"
    raise UserError(f"{where}: {value!r} is none of the {kind} {domain}; change the value")


def _check_conditions(space: Space) -> None:
    """Check that every `when` names an entry of the config, and that known settings state and meet their conditions."""
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


def _never_searched(space: Space) -> list[str]:
    """Return a line on each parameter whose `when` cannot hold, and one if all trials would be the same."""
    searched = {item.name: item.domain for item in space.parameters}
    lines = []
    if not searched and space.search.trials > 1:
        lines.append(f"nothing is searched: all {space.search.trials} trials would be the same")
    for parameter in space.parameters:
        for name, allowed in parameter.when.items():
            fixed = trees.get(space.tree, name)
            never = [value for value in allowed if name in searched and not _can_be(searched[name], value)]
            if len(never) == len(allowed) or (name not in searched and fixed not in allowed):
                lines.append(f"never searched: {parameter.name}, as {name} is never {' or '.join(map(str, allowed))}")
            elif never:
                lines.append(f"never searched: {parameter.name} at {name} = {' or '.join(map(str, never))}")
    return lines


def _can_be(domain: Domain, value: Any) -> bool:
    """Return whether a condition on this value can hold: it compares a choice as Python does, 1 with 1.0."""
    if isinstance(domain, Choice):
        return value in domain.values
    if isinstance(domain, Integer) and isinstance(value, float) and value.is_integer():
        value = int(value)
    return domain.contains(value)


def _check_other(document: Mapping[str, Any], file: Path, name: str | None) -> None:
    """Check another profile, or none, without overrides, and without trainables: they may need what the cluster has."""
    try:
        other, _ = profiled(document, name, has_gpu=True)
        _check_conditions(_build(other, file, name, ()))
        tables_in(other.get("tables"))
    except UserError as error:
        raise UserError(f"{'without a profile' if name is None else f'profiles.{name}'}: {error}") from None


def _check_draws(space: Space, trainable: Trainable) -> None:
    rng = random.Random(0)
    first, *others = drawn = [space.draw(rng) for _ in range(DRAWS if space.parameters else 1)]
    known = [(f"try_first.{i}", space.draw(rng, item.values)) for i, item in enumerate(space.try_first)]
    for origin, values in [("drawn", first), *known, *(("drawn", values) for values in others)]:
        if (refusal := _refusal(space, trainable, values)) is None:
            continue
        if values is first and all(_refusal(space, trainable, other) == refusal for other in others):
            raise UserError(refusal)  # it fails for every setting, not because of these values
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        refused = sum(_refusal(space, trainable, other) is not None for other in drawn)
        clash = f"; {refused} of {DRAWS} draws are refused, and none may be: {NO_CLASH}" if refused < DRAWS else ""
        raise UserError(f"{refusal} ({origin}: {told}){clash if origin == 'drawn' else ''}")


def _refusal(space: Space, trainable: Trainable, values: Mapping[str, Any]) -> str | None:
    """Return why the trainable rejects a setting; None if it accepts it."""
    try:
        trainable.config(space.config(values))
    except UserError as error:
        return str(error)
    return None
