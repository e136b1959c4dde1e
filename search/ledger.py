"""The ledger of a search: asks Optuna for settings and tells it how each trial ended.

Failures reach the sampler by one rule (`search.learning.lessons`): a diverged trial is told as COMPLETE, with a finite
penalty and a violated constraint; only a trial lost to a bug or to the machine is told as FAIL, which samplers ignore.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import threadpool_limits

from search.learning.lessons import constraints_told, is_penalised, limits_told, penalties
from search.learning.proposals import ASKED_AGAIN, proposal_seed, surviving
from search.learning.survival import learn
from search.records.folder import TrialFolder
from search.records.record import Record, length_of, read_record
from search.space import Space
from search.space.sections import OWN_CONSTRAINTS
from search.study import distributions_of, params_of, quiet_optuna

MakeSampler = Callable[[int], BaseSampler]  # given a seed
_CONSTRAINT = "constraints:"  # prefix of the keys under which Optuna stores a trial's constraint values
_CHANGED = "changed"  # trial attribute: it was trained with other values than those Optuna proposed


@dataclass
class OpenTrial:
    """A trial that has been asked for and has not ended."""

    trial: optuna.Trial
    values: dict[str, Any]
    folder: TrialFolder
    metrics: dict[str, Any] = field(default_factory=dict)
    epochs: int = 0
    seconds_before: float = 0.0  # up to its last lap, over all attempts, excluding pauses
    started: float = 0.0  # `time.monotonic()` of its start, resumption or last lap; 0: not running

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def seconds(self) -> float:
        return self.seconds_before + (time.monotonic() - self.started if self.started else 0.0)

    def lap(self) -> None:
        """Add the time since the last lap to `seconds_before`: a lap ends with a report, or when an attempt fails."""
        self.seconds_before = self.seconds
        self.started = time.monotonic()

    def catch_up(self, epochs: int | None = None) -> None:
        """Take over the report in the trial's folder of what it went on from: an earlier attempt or a trial it copied.

        epochs: how many there are, fewer than were reported if an attempt went back; None: all of them.
        """
        rows = self.folder.read_metrics()
        if rows:
            self.seconds_before = max(self.seconds_before, rows[-1].get("seconds", 0.0))
        known = [row for row in rows if epochs in (None, row["epoch"])]
        if known:
            self.epochs, self.metrics = known[-1]["epoch"], known[-1]["metrics"]
        elif epochs not in (None, self.epochs):
            self.epochs, self.metrics = epochs, {}


class Ledger:
    """Asks for, reports and ends trials, each under a key that the caller chooses."""

    def __init__(self, space: Space, study: optuna.Study, make_sampler: MakeSampler, results: Path) -> None:
        self._results = results
        self.space = space
        self.study = study
        self.open: dict[str, OpenTrial] = {}
        self._make_sampler = make_sampler
        own = [item for item in study.get_trials(deepcopy=False) if "from" not in item.user_attrs]
        self._unfinished = [item for item in own if item.state == TrialState.RUNNING]
        for known in space.try_first[len(own) :]:  # all of them, unless a process was killed while it did this
            self._enqueue(known.values, known.name)

    @property
    def left(self) -> int:
        """Return how many trials are still to be run, interrupted ones included; retries do not use up the total."""
        begun = [
            item
            for item in self.study.get_trials(deepcopy=False)
            if item.state != TrialState.WAITING and not {"from", "again"} & item.user_attrs.keys()
        ]
        return max(0, self.space.search.trials - len(begun)) + len(self._unfinished)

    def ask(self, key: str) -> OpenTrial | None:
        """Return the next trial: an interrupted one, a known setting, or the sampler's proposal; None if none are left.

        Each proposal gets a new sampler, seeded from the search's seed and the trial's place. So it depends on the
        history alone, and a resumed search proposes what an uninterrupted one would.
        """
        if self.left == 0:
            return None
        unfinished = self._unfinished.pop(0) if self._unfinished else None
        trials = self.study.get_trials(deepcopy=False)
        if unfinished is None:
            place = sum(item.state != TrialState.WAITING for item in trials)
            given = place < len(trials)
        else:
            place = unfinished.number
            given = bool(unfinished.params) or "fixed_params" in unfinished.system_attrs
        stored = set() if unfinished is None else {*unfinished.params, *unfinished.user_attrs.get("values", {})}
        # Models of a few hundred trials need one thread; more would wait for cores that the trials keep busy.
        with quiet_optuna(), threadpool_limits(limits=1, user_api="blas"):
            self.study.sampler = self._sampler(place, given)
            study = _AsKnown(self.study, self.space)
            trial = study.ask() if unfinished is None else optuna.Trial(study, unfinished._trial_id)
            attrs = trial.user_attrs
            values = attrs.get("values") or self.space.suggest(trial)
        folder = TrialFolder(self._results, trial.number)
        opened = OpenTrial(trial, values, folder, seconds_before=attrs.get("seconds", 0.0))
        # From a lost machine or a mirror, its folder may hold what the study does not know of, or knows only in part:
        # then the rest of its setting has been drawn anew.
        if not values.keys() <= stored or unfinished is None:
            folder.clear()
        else:
            _take_up(opened)
        self.open[key] = opened
        return opened

    def _sampler(self, place: int, given: bool) -> BaseSampler:
        """Return the sampler for a place. given: some or all values are known, so the survival model is not applied."""
        search = self.space.search
        model = None
        if search.survival and search.sampler in ASKED_AGAIN and not given:
            model = learn(self.space, self.study.get_trials(deepcopy=False))
        return surviving(self.space, model, lambda i: self._make_sampler(proposal_seed(search.seed, place, i)))

    def report(self, key: str, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Record the report of an epoch; a single objective must be finite."""
        opened = self.open[key]
        opened.epochs = epoch
        opened.metrics = dict(metrics)
        if len(self.space.objectives) == 1:
            value = metrics[self.space.objectives[0].metric]
            assert math.isfinite(value), "a non-finite objective ends its trial before it is reported"
            with quiet_optuna():  # an epoch that is rerun after an interruption is reported twice
                opened.trial.report(value, epoch)

    def change(self, key: str, values: Mapping[str, Any]) -> None:
        """Continue the trial with other values; they are stored in the study, so they survive a kill and resume."""
        opened = self.open[key]
        opened.values = dict(values)
        opened.trial.set_user_attr("values", opened.values)
        opened.trial.set_user_attr(_CHANGED, True)

    def interrupt(self, key: str) -> None:
        """Leave the trial open in the study, so that a resumed search continues it."""
        self._write(self.open.pop(key))

    def give_back(self, key: str) -> None:
        """Let a trial that has not begun wait in the study with its setting, so that a resumed search begins it.

        A retry stays open instead: it is on top of the search's trials, and only those that are open count as left.
        """
        if "again" in self.open[key].trial.user_attrs:
            self.interrupt(key)
            return
        opened = self.open.pop(key)
        self.study._storage.set_trial_state_values(opened.trial._trial_id, TrialState.WAITING)

    def end(self, key: str, status: str, reason: str) -> Record:
        """Tell the study how a trial ended and return its record."""
        opened = self.open.pop(key)
        self._write(opened, status=status, reason=reason)
        state, values = self._verdict(opened, status)
        if state != TrialState.FAIL:
            longest = length_of(self.space, self.study.get_trials(deepcopy=False))
            for name, excess in constraints_told(self.space, status, opened.epochs, longest, opened.metrics).items():
                opened.trial.set_constraint(name, excess)
        with quiet_optuna():
            self.study.tell(opened.trial, values, state=state)
        return read_record(self.study.get_trials(deepcopy=False)[opened.number], self.space)

    def _write(self, opened: OpenTrial, **ending: str) -> None:
        measured = {"metrics": opened.metrics, "epochs": opened.epochs, "seconds": round(opened.seconds, 3)}
        for name, value in {**ending, **measured, "values": opened.values}.items():
            opened.trial.set_user_attr(name, value)

    def _verdict(self, opened: OpenTrial, status: str) -> tuple[TrialState, list[float] | None]:
        if status == "failed":
            return TrialState.FAIL, None
        if status == "stopped":
            return TrialState.PRUNED, None
        if status == "finished":
            return TrialState.COMPLETE, [opened.metrics[item.metric] for item in self.space.objectives]
        return TrialState.COMPLETE, penalties(self.study.get_trials(deepcopy=False), self.study.directions)

    def _enqueue(self, values: Mapping[str, Any], name: str | None) -> None:
        encoders = {item.name: item.domain.encode for item in self.space.parameters}
        stored = {key: encoders[key](value) for key, value in values.items()}
        self.study.enqueue_trial(stored, user_attrs={"name": name} if name else None)


def _take_up(opened: OpenTrial) -> None:
    """Restore an interrupted trial from its folder; an earlier attempt may already have given its last report."""
    opened.catch_up()
    opened.folder.drop_divergence()
    torn = opened.folder.set_torn_aside()
    # A slot may have been ahead of the record; resuming from its checkpoint would leave out an epoch's report.
    opened.folder.keep_checkpoint(opened.epochs)
    if torn:
        saved = opened.folder.checkpoint()
        how = "starts over" if saved is None else f"goes on from epoch {saved.epoch}"
        print(f"trial {opened.number}: {', '.join(torn)} cannot be read; it {how}", flush=True)


class _AsKnown(optuna.Study):
    """A study as the sampler should see it, correcting what Optuna stored as it was at the time.

    Penalties are recomputed from all measurements so far: each was told when its trial ended, perhaps before anything
    was measured. Settings are those that were trained: population-based training changes some during a trial.
    Constraint limits are those of the space: a resumed search may have changed them.
    """

    def __init__(self, study: optuna.Study, space: Space) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._space = space
        trials = study.get_trials(deepcopy=False)
        self._penalties = penalties(trials, study.directions)
        self._judged_anew = {
            item.number: anew for item in trials if (anew := _constraints(space, item)) != item.constraints
        }

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [self._renewed(trial) for trial in super()._get_trials(deepcopy, states, use_cache)]

    def _renewed(self, trial: FrozenTrial) -> FrozenTrial:
        penalised, changed = trial.values and is_penalised(trial), trial.user_attrs.get(_CHANGED)
        constraints = self._judged_anew.get(trial.number)
        if not (penalised or changed or constraints):
            return trial
        renewed = copy.copy(trial)
        if constraints:
            others = {key: item for key, item in trial.system_attrs.items() if not key.startswith(_CONSTRAINT)}
            renewed.system_attrs = {**others, **{_CONSTRAINT + name: excess for name, excess in constraints.items()}}
        if penalised:
            renewed.values = self._penalties
        if changed:
            values = trial.user_attrs["values"]
            renewed.params = params_of(self._space, values)
            renewed.distributions = distributions_of(self._space, values)
        return renewed


def _constraints(space: Space, trial: FrozenTrial) -> dict[str, float]:
    """Return an ended trial's constraints under the space's limits; empty if it was told none (failed, or running)."""
    own = {name: excess for name, excess in trial.constraints.items() if name in OWN_CONSTRAINTS}
    attrs = trial.user_attrs
    return {**own, **limits_told(space, attrs["status"], attrs["metrics"])} if own else own
