"""Run a search: from a space and a plan to a results folder, by means of Ray Tune."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler

from search.copies import Copies
from search.interruption import Interruption, OwnHandler
from search.ledger import Ledger
from search.lookout import Lookout
from search.plan import Plan
from search.recorder import Recorder
from search.records.folder import SCRATCH, STUDY, TrialFolder
from search.records.health import compared
from search.records.mirror import Mirror, Overtaken
from search.records.record import INTERRUPTED, Record, best_of
from search.results import trial_line, write_results
from search.sampler import sampler_maker
from search.scheduler import PAUSING, Past, make_scheduler
from search.searcher import StudySearcher
from search.space import Space
from search.study import mark_ended, open_study, records
from search.trial import Job, Slot
from search.workers.messages import GroupSpec
from trainables.contract import UserError

LAST_FILES_S = 30.0  # at most, for which Ray's processes may write into their folder after a search


@dataclass(frozen=True)
class Outcome:
    """How a search ended.

    interrupted: by Ctrl-C or for `reason`; unfinished trials continue with `--resume`. hopeless: the most recent trials
    all failed and are worth retrying. overtaken: another process has gone on with the search.
    """

    records: tuple[Record, ...]
    best: tuple[Record, ...]
    interrupted: bool
    reason: str | None = None
    hopeless: bool = False
    overtaken: bool = False


class _Stop(tune.Stopper):
    """Ends the whole search on an interruption or when the time budget is used up."""

    def __init__(self, interruption: Interruption, budget_s: float | None) -> None:
        self._interruption = interruption
        self._deadline = None if budget_s is None else time.monotonic() + budget_s

    @property
    def out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._interruption.came or self.out_of_time


def run(
    space: Space,
    plan: Plan,
    results: Path,
    cold: bool = False,
    mirror: Mirror | None = None,
    interruption: Interruption | None = None,
) -> Outcome:
    """Run the remaining trials of the search in `results`, whose study must exist, and write its tables.

    Ray must be running, unless `interruption` has come. Prints a line for each trial that ends and keeps the mirror up
    to date. interruption: its signals are handled by the caller; None: nothing interrupts.
    """
    results = results.resolve()
    interruption = interruption or Interruption()

    def tell(record: Record) -> None:
        print(trial_line(record, space), flush=True)
        if mirror is not None:
            mirror.push()

    def keep() -> None:
        if mirror is not None:
            mirror.push_if_due()

    study = open_study(results / STUDY, space, create=False)
    try:
        ledger = Ledger(space, study, sampler_maker(space), results)
    except OSError as error:
        raise UserError(f"{results}: cannot be written to: {error.strerror}") from None
    recorder = Recorder(ledger, tell, keep, interruption)
    stop = _Stop(interruption, space.search.time_budget_s)
    try:
        if ledger.left and not interruption.came:
            scheduler = _scheduler(space, past_of(study, space, results))
            following = contextlib.nullcontext() if mirror is None else mirror.following()
            with interruption.kept(), following:
                _tuner(_job(space, plan, results, cold), plan.slots, ledger, recorder, scheduler, stop).fit()
            if not (stop.out_of_time or interruption.came) and (ledger.left or ledger.open):
                interruption.pressed = True  # by SIGUSR1, to Tune's own handler before `OwnHandler` replaced it
    finally:  # each of these steps is attempted, even if an earlier one failed
        over = stop.out_of_time and not interruption.came
        ending = f"the time budget of {space.search.time_budget} ran out" if over else None
        recorder.close(ending)
        _remove(results / SCRATCH)
        with contextlib.suppress(OSError):  # Tune makes the folder anew if it has gone, and leaves it empty
            results.rmdir()
        found: list[Record] = []
        with interruption.kept():
            found = records(study, space)
            if ending and not found:
                print(f"{ending} before any trial began", flush=True)
            write_results(results, space, found)
        if mirror is not None:
            with interruption.kept():
                mirror.push_last()
    if not interruption.came:
        with interruption.kept():
            mark_ended(study, space.search.trials)
    best = tuple(best_of(found, space))
    overtaken = isinstance(interruption.cause, Overtaken)
    return Outcome(tuple(found), best, interruption.came, interruption.reason, interruption.hopeless, overtaken)


def _remove(folder: Path) -> None:
    """Remove Ray's files, again while a slot that has just been killed still writes some."""
    until = time.monotonic() + LAST_FILES_S
    shutil.rmtree(folder, ignore_errors=True)
    while os.path.exists(folder) and time.monotonic() < until:
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


def _scheduler(space: Space, past: Sequence[Past]) -> TrialScheduler:
    """Return the space's scheduler; one that cannot recall the past says so."""
    if past and space.scheduler.name in PAUSING:
        told = f"{space.scheduler.name} starts its comparisons over: it does not know the earlier reports"
        print(told, flush=True)
    return make_scheduler(space, past)


def past_of(study: optuna.Study, space: Space, results: Path) -> list[Past]:
    """Return the reports of all trials begun before a resume, by trial number, for the scheduler to recall.

    A failed trial that was retried is represented only by its last attempt, which contains the same reports.
    """
    found = records(study, space)
    again = {record.again for record in found}
    return [
        Past(
            record.number,
            tuple(
                (row["epoch"], value)
                for row in TrialFolder(results, record.number).read_metrics()
                if (value := compared(row["metrics"], space.objectives[0])) is not None
            ),
            over=record.status != INTERRUPTED,
        )
        for record in found
        if record.number not in again
    ]


def _job(space: Space, plan: Plan, results: Path, cold: bool) -> Job:
    spec = GroupSpec(
        trainable=space.trainable,
        paths=space.paths,
        required=tuple(item.metric for item in space.objectives),
        workers=plan.workers,
        cpus_per_worker=plan.cpus_per_worker,
        gpus_per_worker=plan.gpus_per_worker,
        memory_limit_mb=plan.memory_limit_mb,
        report_timeout_s=space.search.report_timeout_s,
        scratch=str(results / SCRATCH),
    )
    return Job(space, spec, str(results), cold)


def _tuner(
    job: Job, slots: int, ledger: Ledger, recorder: Recorder, scheduler: TrialScheduler, stop: _Stop
) -> tune.Tuner:
    space = job.space
    slot = tune.with_parameters(Slot, job=job)
    pausing = space.scheduler.name in PAUSING
    # Pausing schedulers compare whole brackets or populations, so all settings are drawn before any trial has run.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(ledger.left) if pausing else "auto"
    return tune.Tuner(
        tune.with_resources(slot, tune.PlacementGroupFactory([_share_of_this_node(slots)])),
        param_space={},
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(ledger),
            scheduler=scheduler,
            num_samples=ledger.left,
            max_concurrent_trials=None if pausing else slots,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=job.spec.scratch,
            callbacks=[OwnHandler(), recorder, Lookout(), Copies()],
            # The slot has already written each epoch's checkpoint; Tune would request another at the end.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=space.search.retries),
            stop=stop,
            verbose=0,
        ),
    )


def _share_of_this_node(slots: int) -> dict[str, float]:
    """Return a resource request of which exactly `slots` (up to a hundred) fit on the driver's machine.

    Ray Train reserves the workers' CPUs and GPUs, so a slot itself needs none. But pausing schedulers begin more trials
    than there are slots, and only a resource request keeps them from all running at once. Every Ray node has a resource
    named after itself, of size 1 and granularity 1/10,000; about half a share of it stays free.
    """
    share = round(10_000 / (slots + 0.5)) / 10_000
    return {"CPU": 0, f"node:{ray.util.get_node_ip_address()}": share}
