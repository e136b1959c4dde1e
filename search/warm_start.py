"""What a changed search learns from an earlier one: `--warm-start`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from search.files import is_there
from search.learning.lessons import constraints_told
from search.records.folder import SPACE, STUDY
from search.records.record import length_of
from search.sampler import OWN_COURSE
from search.space import Space, Values
from search.space import tree as trees
from search.space.file import read_space
from search.study import distributions_of, open_study, params_of
from trainables.contract import UserError


@dataclass(frozen=True)
class Earlier:
    """An earlier search. source: the name of its folder."""

    source: str
    space: Space
    study: optuna.Study


def read_earlier(folder: Path) -> Earlier:
    if not is_there(folder / SPACE):
        raise UserError(f"--warm-start {folder}: there is no {SPACE} here; name the folder of a finished search")
    space = read_space(folder / SPACE)
    return Earlier(str(folder), space, open_study(folder / STUDY, space, create=False))


def check_comparable(earlier: Earlier, space: Space) -> None:
    """Raise UserError if the objectives of an earlier study differ from those of the space."""
    before, now = ([f"{item.mode} {item.metric}" for item in each.objectives] for each in (earlier.space, space))
    if before != now:
        raise UserError(
            f"{earlier.source}: its objective was {', '.join(before)}, and here it is {', '.join(now)}; its scores "
            "cannot be used here"
        )


def take_over(study: optuna.Study, space: Space, earlier: Earlier) -> str:
    """Copy an earlier study's ended trials that are settings of this space; returns how many, in words.

    They teach the sampler, and count as trials of the earlier search, not of this one. What was searched then may be
    fixed now, or the reverse; what is fixed in both is not compared. Raises UserError if the objectives differ.
    """
    check_comparable(earlier, space)
    longest = length_of(space, earlier.study.get_trials(deepcopy=False))
    taken, outside = 0, Counter[str]()
    for trial in earlier.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        attrs = trial.user_attrs
        # What was fixed for a trial that was itself taken over is not known.
        config = _tree(attrs["values"]) if "from" in attrs else earlier.space.config(attrs["values"])
        values = place(config, attrs["values"], space)
        if isinstance(values, str):
            outside[values] += 1
            continue
        copied = create_trial(
            state=trial.state,
            params=params_of(space, values),
            distributions=distributions_of(space, values),
            values=trial.values,
            intermediate_values=trial.intermediate_values,
            user_attrs={**attrs, "values": values, "from": earlier.source},
            system_attrs={optuna.samplers.NSGAIISampler._get_generation_key(): 0},  # nsga2 learns from these alone
            constraints=constraints_told(space, attrs["status"], attrs["epochs"], longest, attrs["metrics"]),
        )
        study.add_trial(copied)
        taken += 1
    others = ", ".join(f"{count} by {name}" for name, count in outside.most_common())
    left = f"; outside it lie {others}" if outside else "" if taken else "; none has ended there in a way to learn from"
    in_vain = f"; {space.search.sampler} learns nothing from them" if space.search.sampler in OWN_COURSE else ""
    return f"{taken} trials of {earlier.source} lie within this space{left}{in_vain if taken else ''}"


def place(config: Mapping[str, Any], searched: Mapping[str, Any], space: Space) -> Values | str:
    """Return a trial's setting in terms of a space or, if it lies outside, the name of an entry that shows so.

    config: what the trial was trained with, as far as known. searched: the values of it that were searched.
    """
    values = space.setting(lambda parameter: trees.get(config, parameter.name))
    for parameter in space.parameters:
        if parameter.name in values and not parameter.domain.contains(values[parameter.name]):
            return parameter.name
    now = space.config(values)
    return next((name for name, value in searched.items() if trees.get(now, name) != value), values)


def _tree(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        trees.put(tree, name, value)
    return tree
