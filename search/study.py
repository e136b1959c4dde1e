"""The ledger of a search: asks Optuna for settings and tells it, in its terms, how each trial ended.

Optuna's study is the one source of truth. What failure tells the sampler follows one rule: a setting under which
training blows up is a bad setting, not a missing one. So a diverged trial is told COMPLETE, with a finite penalty and a
violated constraint; only a trial lost to a bug or to the machine is told FAIL, which every sampler ignores.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.folder import TrialFolder, is_there
from search.journal import StudyJournal
from search.proposals import ASKED_AGAIN, surviving
from search.record import Record, longest_of, read_record
from search.sections import OWN_CONSTRAINTS
from search.space import Space
from search.survival import learn
from trainables.contract import UserError

MakeSampler = Callable[[int], BaseSampler]  # from a seed
_NAME = "search"  # of the one study in a journal
_ENDED = "ended"
_CONSTRAINT = "constraints:"  # before its name, where Optuna keeps what a trial was told of it
_CHANGED = "changed"  # of a trial: not the values that Optuna proposed, but others have been trained
FEASIBLE = -1.0  # the constraint of a trial that neither diverged nor ran out of memory


def open_study(file: Path, space: Space, create: bool) -> optuna.Study:
    """The study of a results folder; with `create`, a new one."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not create and not is_there(file):
        raise UserError(f"{file}: there is no study here; name a results folder of an earlier search")
    try:
        storage = JournalStorage(StudyJournal(str(file)))
        return new_study(storage, space) if create else optuna.load_study(storage=storage, study_name=_NAME)
    except KeyError:
        raise UserError(f"{file}: there is no search in it; name a results folder of an earlier search") from None
    except ValueError as error:  # in the middle of it; a torn end is passed over
        raise UserError(f"{file}: cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be opened: {error.strerror}") from None


def new_study(storage: BaseStorage, space: Space) -> optuna.Study:
    """A study of the space's objectives, which knows them by name and direction."""
    study = optuna.create_study(storage=storage, study_name=_NAME, directions=directions_of(space))
    with _quiet_optuna():
        study.set_metric_names([item.metric for item in space.objectives])
    return study


def mark_ended(study: optuna.Study, trials: int) -> None:
    """A search of so many trials has come to its end, by itself or because its time was over."""
    study.set_user_attr(_ENDED, trials)


def ended_after(study: optuna.Study) -> int | None:
    """How many trials the search was to have when it ended; None where it has not, or was interrupted."""
    ended: int | None = study.user_attrs.get(_ENDED)
    return ended


def records(study: optuna.Study, space: Space) -> list[Record]:
    """Every trial of this search that was begun, by number; without those taken over by a warm start."""
    return [
        read_record(trial, space)
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING and "from" not in trial.user_attrs
    ]


@dataclass
class OpenTrial:
    """A trial that has been asked for and not ended."""

    trial: optuna.Trial
    values: dict[str, Any]
    name: str | None
    metrics: dict[str, Any] = field(default_factory=dict)
    epochs: int = 0
    seconds_before: float = 0.0  # up to its last report, over all attempts, without what it was paused for
    started: float = 0.0  # or went on, or reported last

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def seconds(self) -> float:
        return self.seconds_before + (time.monotonic() - self.started if self.started else 0.0)

    def lap(self) -> None:
        """Count the time up to here."""
        self.seconds_before = self.seconds
        self.started = time.monotonic()

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over what is on record in the trial's folder: an earlier attempt, or a trial that it is a copy of."""
        if rows:
            self.epochs, self.metrics = rows[-1]["epoch"], rows[-1]["metrics"]
            self.seconds_before = max(self.seconds_before, rows[-1].get("seconds", 0.0))


class Ledger:
    """Ask, report and end trials, each under a key of the caller's."""

    def __init__(self, space: Space, study: optuna.Study, make_sampler: MakeSampler, results: Path) -> None:
        self._results = results
        self.space = space
        self.study = study
        self.open: dict[str, OpenTrial] = {}
        self._make_sampler = make_sampler
        own = [item for item in study.get_trials(deepcopy=False) if "from" not in item.user_attrs]
        self._unfinished = [item for item in own if item.state == TrialState.RUNNING]
        if not own:
            for known in space.try_first:
                self._enqueue(known.values, known.name)

    @property
    def left(self) -> int:
        """How many trials are still to be run, those that were interrupted included; other attempts are on top."""
        begun = [
            item
            for item in self.study.get_trials(deepcopy=False)
            if item.state != TrialState.WAITING and not {"from", "again"} & item.user_attrs.keys()
        ]
        return max(0, self.space.search.trials - len(begun)) + len(self._unfinished)

    def ask(self, key: str) -> OpenTrial | None:
        """The next trial: one that was interrupted, a known setting, or the sampler's proposal; None at the end.

        The sampler is made anew for each proposal, with a seed from the search's seed and the trial's place. So a
        proposal depends on the history alone, and a resumed search proposes what an uninterrupted one would.
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
        self.study.sampler = self._sampler(place, given)
        with _quiet_optuna():
            study = _AsKnown(self.study, self.space)
            trial = study.ask() if unfinished is None else optuna.Trial(study, unfinished._trial_id)
            attrs = trial.user_attrs
            values = attrs.get("values") or self.space.suggest(trial)
        opened = OpenTrial(trial, values, attrs.get("name"), seconds_before=attrs.get("seconds", 0.0))
        if unfinished is None:  # a machine that went, or a mirror of it, may have kept more than the study
            TrialFolder(self._results, opened.number).clear()
        else:
            self._take_up(opened)
        self.open[key] = opened
        return opened

    def _take_up(self, opened: OpenTrial) -> None:
        """What is on record of an earlier attempt, which may have given its last report already."""
        folder = TrialFolder(self._results, opened.number)
        opened.catch_up(folder.read_metrics())
        torn = folder.set_torn_aside()
        # A slot may have been ahead of the record: from its checkpoint on, an epoch's report would be missing.
        folder.keep_checkpoint(opened.epochs)
        if torn:
            saved = folder.checkpoint()
            how = "begins anew" if saved is None else f"goes on from epoch {saved.epoch}"
            print(f"trial {opened.number}: {', '.join(torn)} cannot be read; it {how}", flush=True)

    def _sampler(self, place: int, given: bool) -> BaseSampler:
        """What proposes at a place. given: values are known already, some or all; these are not judged."""
        search = self.space.search
        model = None
        if search.survival and search.sampler in ASKED_AGAIN and not given:
            model = learn(self.space, self.study.get_trials(deepcopy=False))
        return surviving(self.space, model, lambda i: self._make_sampler(proposal_seed(search.seed, place, i)))

    def report(self, key: str, epoch: int, metrics: Mapping[str, Any]) -> None:
        """An epoch is over. Only finite objectives get here."""
        opened = self.open[key]
        opened.epochs = epoch
        opened.metrics = dict(metrics)
        if len(self.space.objectives) == 1:
            value = metrics[self.space.objectives[0].metric]
            assert math.isfinite(value), "a non-finite objective ends its trial before it is reported"
            with _quiet_optuna():  # an epoch that is run again after an interruption is reported twice
                opened.trial.report(value, epoch)

    def change(self, key: str, values: Mapping[str, Any]) -> None:
        """The trial goes on with other values, also where the search is killed now and resumed."""
        opened = self.open[key]
        opened.values = dict(values)
        opened.trial.set_user_attr("values", opened.values)
        opened.trial.set_user_attr(_CHANGED, True)

    def interrupt(self, key: str) -> None:
        """The search stops here; the trial stays open in the study, and a resumed search goes on with it."""
        self._write(self.open.pop(key))

    def end(self, key: str, status: str, reason: str) -> Record:
        """Tell the study how a trial ended; returns its record."""
        opened = self.open.pop(key)
        self._write(opened, status=status, reason=reason)
        state, values = self._verdict(opened, status)
        if state != TrialState.FAIL:
            longest = self.space.epochs or longest_of(self.study.get_trials(deepcopy=False))
            for name, excess in constraints_told(self.space, status, opened.epochs, longest, opened.metrics).items():
                opened.trial.set_constraint(name, excess)
        with _quiet_optuna():
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


def proposal_seed(seed: int, place: int, candidate: int = 0) -> int:
    """A seed for the proposal at `place`, unlike those beside it; for each candidate there another."""
    text = f"{seed}/{place}/{candidate}" if candidate else f"{seed}/{place}"
    return random.Random(text).getrandbits(32)


def constraints_told(
    space: Space, status: str, epochs: int, longest: int, metrics: Mapping[str, Any]
) -> dict[str, float]:
    """Every constraint of a trial by name; it is feasible when none is above 0. All trials have the same names."""
    return {
        "diverged": severity(epochs, longest) if status == "diverged" else FEASIBLE,
        "out_of_memory": 1.0 if status == "out_of_memory" else FEASIBLE,
        **_limits_told(space, status, metrics),
    }


def _limits_told(space: Space, status: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The limits of metrics among them. What a stopped trial has not come to report, it has not violated."""
    unknown = {name: FEASIBLE if status == "stopped" and name not in metrics else 1.0 for name in space.constraints}
    return {
        name: unknown[name] if (value := metrics.get(name)) is None else limit.excess(value)
        for name, limit in space.constraints.items()
    }


def severity(epochs: int, longest: int) -> float:
    """How bad a divergence is: 2 in the first epoch, towards 1 at the end. Above 0: violated."""
    return 2.0 - min(1.0, epochs / longest)


def penalties(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[float]:
    """For each objective a finite value that is worse than any measured: the worst and a tenth of the span beyond it.

    What a diverged trial reported on its way counts for nothing: a loss of 1e30 before the NaN would leave a sampler
    that models values no difference to see among the others.
    """
    found = []
    measured = [trial for trial in trials if not is_penalised(trial)]
    for i, direction in enumerate(directions):
        sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        seen = [sign * trial.values[i] for trial in measured if trial.values]
        if len(directions) == 1:
            seen += [sign * value for trial in measured for value in trial.intermediate_values.values()]
        worst, best = (max(seen), min(seen)) if seen else (0.0, 0.0)
        beyond = worst + max(0.1 * (worst - best), 1e-3 * max(1.0, abs(worst)))
        found.append(sign * min(beyond, sys.float_info.max))
    return found


def is_penalised(trial: FrozenTrial) -> bool:
    """Whether the values of a trial are penalties and not measurements."""
    return trial.user_attrs.get("status") in ("diverged", "out_of_memory")


def directions_of(space: Space) -> list[StudyDirection]:
    better = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    return [better[item.mode] for item in space.objectives]


def params_of(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as Optuna keeps it."""
    return {item.name: item.domain.encode(values[item.name]) for item in space.parameters if item.name in values}


def distributions_of(space: Space, values: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    return {item.name: item.domain.distribution() for item in space.parameters if item.name in values}


class _AsKnown(optuna.Study):
    """A study as a sampler should see it, where Optuna keeps what it was told or had proposed at the time.

    Its penalties are those that all measurements to this day ask for: one is told when its trial ends, perhaps before
    anything was measured. Its settings are those that were trained: population-based training changes some on the way.
    Its limits are those of the space: a search may have gone on with others.
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
    """Of an ended trial, with the limits of the space; none where it was told none, as it failed or runs still."""
    own = {name: excess for name, excess in trial.constraints.items() if name in OWN_CONSTRAINTS}
    attrs = trial.user_attrs
    return {**own, **_limits_told(space, attrs["status"], attrs["metrics"])} if own else own


class _quiet_optuna:
    """Optuna announces with warnings what is meant here; they would reach the user's terminal."""

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        self._catch.__exit__(*error)  # type: ignore[arg-type]
