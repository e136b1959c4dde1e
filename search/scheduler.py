"""The schedulers by name: Ray Tune's own. They never compare the end of a trial, which carries no objective."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from search.space import Space
from search.space.domain import Choice, Integer, Parameter, Real
from search.trial import EPOCH, OBJECTIVE
from trainables.contract import UserError

UNKNOWN_EPOCHS = 10_000  # rungs are laid out up to here if a space does not fix the length of a trial
PAUSING = ("hyperband", "pbt")  # these pause trials, so more trials may be begun than there are slots


@dataclass(frozen=True)
class Past:
    """A trial as known before a resume: its epochs, and the value that schedulers compare after each.

    over: the trial has ended; otherwise it continues.
    """

    number: int
    reports: tuple[tuple[int, float], ...]
    over: bool


@dataclass(frozen=True)
class _Earlier:
    """Stands in for a Tune trial of an earlier run, with the only attributes that these schedulers use."""

    trial_id: str
    config: Mapping[str, Any] = field(hash=False)


class _Lenient(TrialScheduler):
    """Judges no trial after its last epoch: it ends by itself, and the code after its loop runs, too."""

    def __init__(self, space: Space, **arguments: Any) -> None:
        self._space = space
        super().__init__(**arguments)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        epochs = self._space.epochs_of(trial.config["values"])
        if epochs is not None and result[EPOCH] >= epochs:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


class _Recalling(_Lenient):
    """Judges as if the search had never been interrupted, by recalling the reports of ended and unfinished trials."""

    def __init__(self, past: Sequence[Past], **arguments: Any) -> None:
        super().__init__(**arguments)
        reported = [item for item in past if item.reports]
        self._unfinished = {item.number: item for item in reported if not item.over}
        for item in reported:
            if item.over:
                earlier = _Earlier(f"earlier-{item.number}", {"values": {}})
                super().on_trial_add(None, earlier)
                self._tell(earlier, item)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        unfinished = self._unfinished.pop(trial.config.get("number"), None)
        if unfinished is not None:
            self._tell(trial, unfinished)

    def _tell(self, trial: Any, past: Past) -> None:
        for epoch, value in past.reports:
            self.on_trial_result(None, trial, {EPOCH: epoch, OBJECTIVE: value})  # it acted on this decision then


class _Asha(_Recalling, AsyncHyperBandScheduler):
    """Each rung records only the first report with which a trial reaches it."""


class _Median(_Recalling, MedianStoppingRule):
    """Counts each report once: at a trial's end Tune passes its last report again, or a result without an objective."""

    def _tell(self, trial: Any, past: Past) -> None:  # without a verdict: more is known now than then
        self._results[trial] += [{EPOCH: epoch, OBJECTIVE: value} for epoch, value in past.reports]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        pass


class _HyperBand(_Lenient, HyperBandScheduler):
    """Ray's HyperBand; a trial at its last epoch leaves its bracket when it has ended."""

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        """Compare the trials of a bracket, if all of them have come far enough.

        Ray sets `is_being_processed` at a bracket's first comparison and never resets it. It would then overlook a
        trial that ends by itself, and those that wait for it would wait forever.
        """
        try:
            action = super()._process_bracket(tune_controller, bracket)
            # A trial that was retried or resumed joins another bracket, and may be ahead of several comparisons there.
            while action == TrialScheduler.PAUSE and _is_due(bracket):
                action = super()._process_bracket(tune_controller, bracket)
            return action
        finally:
            bracket.is_being_processed = False


def _is_due(bracket: Any) -> bool:
    """Return whether all trials of a HyperBand bracket have come to its next comparison."""
    return bool(bracket._halves and bracket._live_trials and bracket.cur_iter_done())


class _Pbt(_Lenient, PopulationBasedTraining):
    """PBT that explores within the domains of the space; Ray's own exploration leaves them.

    After its last epoch a trial has none left to train another setting, so it keeps its own.
    """

    def __init__(self, space: Space, **arguments: Any) -> None:
        self._rng = random.Random(space.search.seed)
        super().__init__(space, custom_explore_fn=lambda config: config, log_config=False, **arguments)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if trial in self._trial_state:  # it is retried: it keeps its place among the exchanges
            return
        # Ray refuses PBT together with a searcher, which is not told that a trial's setting has changed. Here the
        # recorder tells the ledger.
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values = perturb(self._space, trial_to_clone.config["values"], self._rng)
        return {**trial.config, "values": values}, {}


def perturb(space: Space, values: dict[str, Any], rng: random.Random, resample: float = 0.25) -> dict[str, Any]:
    """Return PBT's next setting: each value is redrawn with probability `resample`, else moved to 0.8 or 1.2 of itself.

    Choices move to a neighbouring value instead, or stay at an end.
    """

    def moved(parameter: Parameter) -> Any:
        again = parameter.name not in values or rng.random() < resample
        return parameter.domain.sample(rng) if again else _step(parameter, values[parameter.name], rng)

    return space.setting(moved)


def _step(parameter: Parameter, value: Any, rng: random.Random) -> Any:
    domain, factor = parameter.domain, rng.choice((0.8, 1.2))
    if isinstance(domain, (Real, Integer)):
        moved = domain.nearest(value * factor)
        if moved == value and domain.step is not None:  # the factor was too small to reach the next grid value
            moved = domain.nearest(value + rng.choice((-1, 1)) * domain.step)
        return moved
    assert isinstance(domain, Choice)
    place = domain.values.index(value) + rng.choice((-1, 1))
    return domain.values[min(max(place, 0), len(domain.values) - 1)]


def unheeded(space: Space) -> list[str]:
    """Return a warning line if the scheduler ignores its `grace_epochs`, or if these leave it nothing to do."""
    name, grace, longest = space.scheduler.name, space.scheduler.grace_epochs, space.epochs
    if name == "hyperband" and grace != 1:
        return ["scheduler.grace_epochs: hyperband has its own brackets and ignores it; asha and median use it"]
    if name in ("asha", "median", "pbt") and longest is not None and grace >= longest:
        return [f"scheduler.grace_epochs: {grace}, and a trial has {longest} epochs: {name} will do nothing"]
    return []


def make_scheduler(space: Space, past: Sequence[Past] = ()) -> TrialScheduler:
    """Return the space's scheduler; raises UserError if it cannot serve the space.

    past: the trials of a resumed search, recalled by asha and median; the others compare anew.
    """
    wanted = space.scheduler
    if wanted.name == "none":
        return FIFOScheduler()
    if len(space.objectives) > 1:
        raise UserError(f"scheduler.name: {wanted.name} compares one objective, this space has several; use none")
    common = {"time_attr": EPOCH, "metric": OBJECTIVE, "mode": space.objectives[0].mode}
    longest = space.epochs or UNKNOWN_EPOCHS
    if wanted.name == "asha":
        return _Asha(
            past,
            space=space,
            **common,
            max_t=max(longest, wanted.grace_epochs),
            grace_period=wanted.grace_epochs,
            reduction_factor=wanted.reduction,
            stop_last_trials=False,
        )
    if wanted.name == "hyperband":
        if space.epochs is None:
            raise UserError("scheduler.name: hyperband needs a known number of epochs; fix config.epochs")
        return _HyperBand(space, **common, max_t=longest, reduction_factor=wanted.reduction, stop_last_trials=False)
    if wanted.name == "median":
        # By default, Ray's rule pauses a trial while another waits to start, and not every trainable can resume.
        return _Median(past, space=space, **common, grace_period=wanted.grace_epochs, min_time_slice=math.inf)
    return _Pbt(space, perturbation_interval=wanted.grace_epochs, **common)
