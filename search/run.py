"""Run a search: from a space and a plan to a results folder, with Ray Tune in between."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
import ray
import torch
from ray import tune
from ray.exceptions import AuthenticationError
from ray.tune.schedulers import TrialScheduler

from search.folder import SCRATCH, STUDY, TrialFolder
from search.group import GroupSpec
from search.health import compared
from search.interruption import Interruption
from search.lookout import Lookout
from search.mirror import Mirror
from search.plain import one_line
from search.plan import Node, Plan
from search.record import INTERRUPTED, Record, best_of
from search.recorder import Recorder
from search.results import trial_line, write_results
from search.sampler import StudySearcher, sampler_maker
from search.scheduler import PAUSING, Past, make_scheduler
from search.space import Space
from search.study import Ledger, mark_ended, open_study, records
from search.trial import Job, Slot
from trainables.contract import UserError

# What Ray's processes must find in their environment. Ray has no other way to be told.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # a slot without a machine waits for one
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # `print` would log each line as well, and it would be kept twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the driver's working directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_maximum_startup_concurrency": "16",  # a group is half a dozen processes, most of them asleep
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints nothing of its own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the recorder writes our own files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the end of a trial carries no objective
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see Interruption
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # after Ctrl-C: a slot in the middle of an epoch is not waited for
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


ANSWER_S = 10.0  # for the head of a cluster to take a connection
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, "QUOTA PERIOD" in microseconds; QUOTA may be max


@dataclass(frozen=True)
class Outcome:
    """How a search ended.

    interrupted: by Ctrl-C, or for `reason`; what was running goes on with `--resume`. hopeless: all that was tried last
    has failed, and is worth another attempt.
    """

    records: tuple[Record, ...]
    best: tuple[Record, ...]
    interrupted: bool
    reason: str | None = None
    hopeless: bool = False


class _Stop(tune.Stopper):
    """Ends the whole search when it was interrupted or the time is over."""

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


def this_machine() -> tuple[Node, ...]:
    """What a Ray of its own would have here; raises UserError for GPUs that PyTorch cannot use."""
    gpus = torch.cuda.device_count()
    if gpus and not torch.cuda.is_available():  # the former asks the driver alone
        raise UserError(
            f"there are {gpus} GPUs here, and PyTorch {torch.__version__} cannot use them: {_why_no_cuda()}; install "
            "the driver that it wants, or search on the CPU with CUDA_VISIBLE_DEVICES= in the environment"
        )
    return (Node(cpus=cpus_here(), gpus=gpus),)


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(str(error), type(error).__name__)
    return "no reason given"


def cpus_here() -> int:
    """The cores that this process may run on, and no more than its container's share of their time is worth."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def start_ray(address: str | None) -> tuple[Node, ...]:
    """Join the cluster at `address`, or start a local one, unless that has been done; returns its nodes."""
    os.environ.update(RAY_ENVIRONMENT)
    # Tune complains of log files that we do not let it write, and of trials that the tables explain better.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    arguments: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
    if address is None:
        # And not one that somebody else has started here; with as many CPUs as the plan counts on.
        arguments |= {"address": "local", "num_cpus": cpus_here()}
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a machine of one's own is not taken away
    else:
        arguments |= {"address": address, "runtime_env": {"env_vars": RAY_ENVIRONMENT}}
    if not ray.is_initialized():
        heeding = signal.getsignal(signal.SIGTERM)
        # Ray's processes ignore for good what is ignored while they are started: Slurm may send it to all of a job.
        heeding_usr1 = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            if address is not None:
                _knock(address)
            context = ray.init(**arguments)
        except (OSError, ValueError) as error:
            if address is None:
                raise
            raise UserError(f"--address {address}: no Ray cluster answers there: {error}") from None
        except AuthenticationError as error:
            raise UserError(
                f"the Ray cluster wants its token, and got none or another: {one_line(str(error), '')}; put it into "
                "~/.ray/auth_token and set RAY_AUTH_MODE=token, or unset that where the cluster has no token"
            ) from None
        finally:
            signal.signal(signal.SIGUSR1, heeding_usr1)
        signal.signal(signal.SIGTERM, heeding)  # Ray has put its own in its place, under which the process aborts
        if context.dashboard_url:
            asks = os.environ.get("RAY_AUTH_MODE") == "token"
            token = " (it asks for a token: `ray get-auth-token` prints it)" if asks else ""
            print(f"dashboard: http://{context.dashboard_url}{token}", flush=True)
    return tuple(_node(entry["Resources"]) for entry in ray.nodes() if entry["Alive"])


def _knock(address: str) -> None:
    """Raises OSError or ValueError where nobody listens; Ray would go on trying for minutes."""
    there = urlsplit(address if "://" in address else f"//{address}")
    if there.port is not None:
        socket.create_connection((there.hostname or "", there.port), timeout=ANSWER_S).close()


def _node(resources: Mapping[str, float]) -> Node:
    return Node(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))


def run(
    space: Space,
    plan: Plan,
    results: Path,
    cold: bool = False,
    mirror: Mirror | None = None,
    interruption: Interruption | None = None,
) -> Outcome:
    """Run the trials that are left of the search in `results` (its study exists), and write its tables.

    Ray is started. Prints a line for each trial that ends, and brings the mirror up to date. interruption: heeded by
    the caller; None: nothing interrupts.
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
    ledger = Ledger(space, study, sampler_maker(space), results)
    recorder = Recorder(ledger, results, tell, keep, interruption)
    stop = _Stop(interruption, space.search.time_budget_s)
    try:
        if ledger.left and not interruption.pressed:
            past = past_of(study, space, results)
            if past and space.scheduler.name in PAUSING:
                print(f"{space.scheduler.name} compares anew: it knows nothing of what was reported before", flush=True)
            scheduler = make_scheduler(space, past)
            following = contextlib.nullcontext() if mirror is None else mirror.following()
            with interruption.kept(), following:
                _tuner(_job(space, plan, results, cold), plan.slots, ledger, recorder, scheduler, stop).fit()
            if (ledger.left or ledger.open) and not stop.out_of_time:
                interruption.pressed = True  # Tune has a handler of its own for SIGUSR1
    finally:  # each of these is tried, whatever became of those before
        over = stop.out_of_time and not interruption.came
        recorder.close(f"the time budget of {space.search.time_budget} was over" if over else None)
        shutil.rmtree(results / SCRATCH, ignore_errors=True)
        found: list[Record] = []
        with interruption.kept():
            found = records(study, space)
            write_results(results, space, found)
        if mirror is not None:
            with interruption.kept():
                mirror.push()
    if not interruption.came:
        with interruption.kept():
            mark_ended(study, space.search.trials)
    best = tuple(best_of(found, space))
    return Outcome(tuple(found), best, interruption.came, interruption.reason, interruption.hopeless)


def past_of(study: optuna.Study, space: Space, results: Path) -> list[Past]:
    """What schedulers know already of a search that goes on: the trials that were begun, by number.

    Of one that failed and is run again, the later attempt alone, which has the same reports.
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
    # These compare whole brackets or populations: all their settings are drawn before any of them has run.
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
            callbacks=[recorder, Lookout()],
            # The group has written each epoch's checkpoint already; Tune would ask for one more at the end.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=space.search.retries),
            stop=stop,
            verbose=0,
        ),
    )


def _share_of_this_node(slots: int) -> dict[str, float]:
    """Resources that `slots` actors can hold, exactly so many up to a hundred, on the driver's own machine.

    Ray Train reserves the workers' CPUs and GPUs, so a slot itself needs none. But schedulers that pause trials begin
    more of them than there are slots, and only a resource keeps them from all running at once. Every Ray node has a
    resource of its own name and size 1, counted in ten-thousandths; about half a share of it stays free.
    """
    share = round(10_000 / (slots + 0.5)) / 10_000
    return {"CPU": 0, f"node:{ray.util.get_node_ip_address()}": share}
