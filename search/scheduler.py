"""The schedulers by name: Ray Tune's own, kept from ever seeing a trial that ended without an objective."""

from __future__ import annotations

import math
import random
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

from search.domain import Choice, Integer, Parameter, Real
from search.space import Space
from search.trial import EPOCH, OBJECTIVE
from trainables.contract import UserError

UNKNOWN_EPOCHS = 10_000  # rungs are laid out up to here when a space does not say how long a trial is
PAUSING = ("hyperband", "pbt")  # these pause trials, so that more may be begun than there are slots


class _Median(MedianStoppingRule):
    """Keeps of a trial what was measured; the result that says how it ended holds no objective, and is no report."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self.metric in result:
            super().on_trial_complete(tune_controller, trial, result)


class _Pbt(PopulationBasedTraining):
    """Explores within the domains of the space; Ray's own exploration walks out of them."""

    def __init__(self, space: Space, seed: int, **arguments: Any) -> None:
        self._space = space
        self._rng = random.Random(seed)
        super().__init__(custom_explore_fn=lambda config: config, log_config=False, **arguments)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Ray refuses PBT beside a searcher, since a searcher is not told that a trial's setting has changed. The
        # recorder tells the ledger.
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # Whoever has trained to the end has nothing left to train another setting with, and keeps its own.
        if self._space.epochs is not None and result[EPOCH] >= self._space.epochs:
            decision: str = TrialScheduler.CONTINUE
        else:
            decision = super().on_trial_result(tune_controller, trial, result)
        return decision

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values = perturb(self._space, trial_to_clone.config["values"], self._rng)
        return {**trial.config, "values": values}, {}


def perturb(space: Space, values: dict[str, Any], rng: random.Random, resample: float = 0.25) -> dict[str, Any]:
    """PBT's exploration: each value is drawn anew with probability `resample`, else moved to 0.8 or 1.2 of itself."""
    moved: dict[str, Any] = {}
    for parameter in space.parameters:
        if space.is_active(parameter, moved):
            old = values.get(parameter.name)
            again = old is None or rng.random() < resample
            moved[parameter.name] = parameter.domain.sample(rng) if again else _step(parameter, old, rng)
    return moved


def _step(parameter: Parameter, value: Any, rng: random.Random) -> Any:
    domain, factor = parameter.domain, rng.choice((0.8, 1.2))
    if isinstance(domain, (Real, Integer)):
        moved = domain.nearest(value * factor)
        if moved == value and domain.step is not None:  # too small a change to reach the next value of the grid
            moved = domain.nearest(value + rng.choice((-1, 1)) * domain.step)
        return moved
    assert isinstance(domain, Choice)
    place = domain.values.index(value) + rng.choice((-1, 1))
    return domain.values[min(max(place, 0), len(domain.values) - 1)]


def make_scheduler(space: Space) -> TrialScheduler:
    """The space's scheduler; raises UserError where it cannot serve the space."""
    wanted = space.scheduler
    if wanted.name == "none":
        return FIFOScheduler()
    if len(space.objectives) > 1:
        raise UserError(f"scheduler.name: {wanted.name} compares one objective, this space has several; use none")
    common = {"time_attr": EPOCH, "metric": OBJECTIVE, "mode": space.objectives[0].mode}
    longest = space.epochs or UNKNOWN_EPOCHS
    if wanted.name == "asha":
        return AsyncHyperBandScheduler(
            **common,
            max_t=max(longest, wanted.grace_epochs),
            grace_period=wanted.grace_epochs,
            reduction_factor=wanted.reduction,
            stop_last_trials=False,
        )
    if wanted.name == "hyperband":
        if space.epochs is None:
            raise UserError("scheduler.name: hyperband shares out a known number of epochs; fix config.epochs")
        return HyperBandScheduler(**common, max_t=longest, reduction_factor=wanted.reduction, stop_last_trials=False)
    if wanted.name == "median":
        # Left alone, Ray's rule pauses a trial while another waits for its start, and not every trainable can resume.
        return _Median(**common, grace_period=wanted.grace_epochs, min_time_slice=math.inf)
    return _Pbt(space, space.search.seed, perturbation_interval=wanted.grace_epochs, **common)
