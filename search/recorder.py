"""Tune callback that records events in the study, the trial's folder, TensorBoard and the terminal."""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from search.interruption import Hopeless, Interruption
from search.ledger import Ledger, OpenTrial
from search.records.health import remarks
from search.records.record import RAN_TO_END, Record, unmeasured
from search.text import short_line
from search.trial import EPOCH, METRICS, REASON, STATUS

HOPELESS = 10  # consecutive failures (or two per open trial, if more) that point to a bug rather than to the settings


def _kept(callback: Callable[..., None]) -> Callable[..., None]:
    """End the search at the first exception of `callback`, and record nothing after it.

    Otherwise Tune would treat some exceptions as failures of the trial, and rerun trials that have ended.
    """

    @functools.wraps(callback)
    def called(self: Recorder, *args: Any, **info: Any) -> None:
        if self._interruption.cause is None:
            with self._interruption.kept():
                callback(self, *args, **info)

    return called


class Recorder(tune.Callback):
    """Records every trial from its start to its end.

    `tell` is called with the record of each trial that ends; `keep` is called after each epoch.
    """

    def __init__(
        self,
        ledger: Ledger,
        tell: Callable[[Record], None],
        keep: Callable[[], None],
        interruption: Interruption,
    ) -> None:
        self._interruption = interruption
        self._ledger = ledger
        self._tell = tell
        self._keep = keep
        self._writers: dict[str, SummaryWriter] = {}
        self._reported = False
        self._failed_in_a_row = 0
        self._told_of_length = False

    @_kept
    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Stop the clock of paused trials; their time has been counted up to the last report."""
        for trial in trials:
            if trial.status == Trial.PAUSED and trial.trial_id in self._ledger.open:
                self._ledger.open[trial.trial_id].started = 0.0

    @_kept
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        opened = self._ledger.open[trial.trial_id]
        if not opened.started:
            opened.folder.write_config(self._ledger.space.config(opened.values))
        opened.started = time.monotonic()  # neither a pause nor the wait for another attempt counts
        self._follow(trial)

    @_kept
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if STATUS in result:  # the end of the trial; contains no measurements
            return
        epoch, metrics = result[EPOCH], result[METRICS]
        self._look_at_first(metrics)
        opened = self._ledger.open[trial.trial_id]
        self._look_at_length(opened, epoch)
        opened.lap()
        self._ledger.report(trial.trial_id, epoch, metrics)
        row = {"epoch": epoch, "time": time.time(), "seconds": round(opened.seconds_before, 3), "metrics": metrics}
        opened.folder.append_metrics(row)
        writer = self._writer(trial.trial_id)
        for name, value in metrics.items():
            if value is not None:
                writer.add_scalar(name, value, epoch)
        writer.flush()
        self._keep()

    def _look_at_first(self, metrics: Mapping[str, Any]) -> None:
        """Report constraints whose metric the first report lacks: it may come with the last report, or be misspelt."""
        lacking = [] if self._reported else unmeasured(self._ledger.space.constraints, metrics)
        self._reported = True
        for lack in lacking:
            told = "a trial fails if its last report lacks it too; --resume can change constraints"
            print(f"the first report has {lack} ({told})", flush=True)

    def _look_at_length(self, opened: OpenTrial, epoch: int) -> None:
        """Warn, once, of a trainable that reports more often than its space says: schedulers stop it too early."""
        epochs = self._ledger.space.epochs_of(opened.values)
        if epochs is not None and epoch > epochs and not self._told_of_length:
            self._told_of_length = True
            print(
                f"trial {opened.number} has given report {epoch}, and config.epochs is {epochs}, which schedulers take "
                "as the length of a trial; a trainable yields once per epoch",
                flush=True,
            )

    def _look_at_single_report(self, record: Record) -> None:
        """Warn, once, of a trainable that reports only at its end: no scheduler can stop it, and it never resumes."""
        epochs = self._ledger.space.epochs_of(record.values)
        if record.status == "finished" and record.epochs == 1 and (epochs or 0) > 1 and not self._told_of_length:
            self._told_of_length = True
            print(
                f"trial {record.number} has finished after one report, and config.epochs is {epochs}: a trial can be "
                "stopped early, or resumed, only after a report; a trainable yields once per epoch",
                flush=True,
            )

    @_kept
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.trial_id not in self._ledger.open:
            return
        result = trial.last_result or {}
        if STATUS in result:
            self._ledger.open[trial.trial_id].catch_up(result[EPOCH])
            self._end(trial.trial_id, result[STATUS], result[REASON])
        else:
            self._ledger.open[trial.trial_id].started = 0.0  # it may have been paused since its last report
            self._end(trial.trial_id, *self._stopped(trial.trial_id, self._scheduler_verdict(trial.trial_id)))

    @_kept
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report a failed attempt that is to be retried, unless its slot cannot write, and count the time it took."""
        _check_written(trial)
        opened = self._ledger.open[trial.trial_id]
        if opened.started:  # else its slot failed to start
            opened.lap()
        why = short_line(_reason_of_attempt(trial, opened), "")
        print(f"trial {opened.number:>3}  is retried: an attempt failed after epoch {opened.epochs}: {why}", flush=True)

    @_kept
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _check_written(trial)
        if trial.trial_id in self._ledger.open:
            opened = self._ledger.open[trial.trial_id]
            self._end(trial.trial_id, "failed", _reason_of_attempt(trial, opened))

    def close(self, ending: str | None) -> None:
        """End all open trials: as stopped for the reason `ending`, or as interrupted if it is None.

        Those that have not begun return to the study: schedulers that pause trials have all of them drawn first.
        """
        for key, opened in list(self._ledger.open.items()):
            with self._interruption.kept():
                opened.catch_up()  # it may have become a copy of another trial since its last report
                if not (opened.started or opened.epochs):
                    self._ledger.give_back(key)
                elif ending is None:
                    opened.folder.keep_checkpoint(opened.folder.recorded())
                    self._ledger.interrupt(key)
                else:
                    self._end(key, *self._stopped(key, f"{ending} after epoch {opened.epochs}"))
        for writer in self._writers.values():
            with self._interruption.kept():
                writer.close()

    def _stopped(self, key: str, why: str) -> tuple[str, str]:
        """Return status and reason of a trial that was not continued: finished if no epochs were left to run."""
        opened = self._ledger.open[key]
        epochs = self._ledger.space.epochs_of(opened.values)
        if opened.epochs == epochs:
            return "finished", RAN_TO_END
        return "stopped", why

    def _scheduler_verdict(self, key: str) -> str:
        space, opened = self._ledger.space, self._ledger.open[key]
        metric = space.objectives[0].metric
        value = opened.metrics.get(metric)
        measured = f"{metric} = {value:.4g}" if value is not None else "nothing measured"
        return f"{space.scheduler.name} stopped it after epoch {opened.epochs} with {measured}"

    def _end(self, key: str, status: str, reason: str) -> None:
        space, opened = self._ledger.space, self._ledger.open[key]
        opened.folder.keep_checkpoint(opened.epochs)
        lacking = unmeasured(space.constraints, opened.metrics)
        if status == "finished" and lacking:
            status, reason = "failed", f"the last report has {lacking[0]}"
        if status in ("finished", "stopped"):
            epochs = [row["metrics"] for row in opened.folder.read_metrics()]
            reason = "; ".join([reason, *remarks(epochs, space.objectives[0])])
        record = self._ledger.end(key, status, reason)
        writer = self._writers.pop(key, None)
        if writer is not None:
            _write_hparams(writer, record)
            writer.close()
        self._tell(record)
        self._look_at_single_report(record)
        self._look_for_hope(record)

    def _look_for_hope(self, record: Record) -> None:
        """Raise Hopeless if the latest trials all failed: a bug or a bad machine would use up a night's settings."""
        self._failed_in_a_row = self._failed_in_a_row + 1 if record.status == "failed" else 0
        under_way = len(self._ledger.open)  # all of these may fail in one incident
        if self._failed_in_a_row >= max(HOPELESS, 2 * under_way) and (self._ledger.left or under_way):
            told = f"the last {self._failed_in_a_row} trials all failed; trial {record.number}: {record.reason}"
            raise Hopeless(told)

    def _follow(self, trial: Any) -> None:
        """Record new values of a trial that starts: population-based training may have made it a copy of another.

        The scheduler changes them before that, while the trial's folder still has what it has trained itself.
        """
        values = dict(trial.config["values"])
        opened = self._ledger.open[trial.trial_id]
        if values != opened.values:
            self._ledger.change(trial.trial_id, values)
            opened.folder.write_config(self._ledger.space.config(values))

    def _writer(self, key: str) -> SummaryWriter:
        if key not in self._writers:
            self._writers[key] = SummaryWriter(str(self._ledger.open[key].folder.path))
        return self._writers[key]


def _write_hparams(writer: SummaryWriter, record: Record) -> None:
    """Write the trial as one row of TensorBoard's HParams tab, into its own event file."""
    plain = (bool, int, float, str)
    values = {name: value if isinstance(value, plain) else str(value) for name, value in record.values.items()}
    measured = {name: value for name, value in record.metrics.items() if value is not None}
    for summary in hparams({**values, "status": record.status}, measured):
        writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]


def _check_written(trial: Any) -> None:
    """Raise the error of the trial's last attempt if its slot could not write the results, as the next could not."""
    error = _last_error(trial)
    if isinstance(error, RayTaskError) and isinstance(error.cause, OSError):
        raise error.cause


def _last_error(trial: Any) -> BaseException | None:
    """Return the error of the trial's last attempt; Tune's `get_pickled_error` reads a copy that is made later."""
    file = trial.pickled_error_file
    return None if file is None else pickle.loads(Path(file).read_bytes())


def _reason_of_attempt(trial: Any, opened: OpenTrial) -> str:
    """Return why the last attempt failed; the slot saves that in the trial's folder, unless it died itself."""
    error, told = _last_error(trial), opened.folder.read_error()
    if told is None or isinstance(error, RayActorError):
        told = "the slot died" if error is None else _reason(error)
    return told.split("\n", 1)[0]


def _reason(error: BaseException) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__
