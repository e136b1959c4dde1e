"""What is written down of a trial's end, without Ray: the recorder is called as Tune calls it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pickle
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledgers import ask, open_journal
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.tune.experiment import Trial
from spaces import space_of

from search.interruption import Interruption
from search.ledger import Ledger
from search.recorder import HOPELESS, Recorder
from search.records.folder import STUDY, TrialFolder
from search.records.record import Record
from search.study import records
from search.trial import EPOCH, METRICS, REASON, STATUS
from search.workers.states import save_state


@dataclass
class Watched:
    """A trial under way in `folder`, and the recorder that follows it; `told`: the records of what has ended."""

    folder: Path
    ledger: Ledger
    recorder: Recorder
    trial: SimpleNamespace  # as Tune has it
    told: list[Record]
    interruption: Interruption

    def report(self, epoch: int, metrics: dict[str, Any] | None = None) -> None:
        self.recorder.on_trial_result(0, [], self.trial, {EPOCH: epoch, METRICS: metrics or {"loss": 0.5}})

    def end(self, status: str, epoch: int) -> Record:
        self.trial.last_result = {STATUS: status, REASON: "as the test says", EPOCH: epoch}
        self.recorder.on_trial_complete(0, [], self.trial)
        return self.told[0]

    def change(self, **values: Any) -> None:
        """As population-based training does."""
        self.trial.config = {**self.trial.config, "values": values}

    @property
    def files(self) -> TrialFolder:
        return TrialFolder(self.folder / "run", self.trial.config["number"])


def watched(folder: Path, epochs: Any = 3, **space: Any) -> Watched:
    ledger = open_journal(space_of(folder, {"lr": {"log": [1e-4, 1.0]}, "epochs": epochs}, **space), folder / "run")
    opened, told, interruption = ask(ledger), list[Record](), Interruption()
    recorder = Recorder(ledger, told.append, lambda: None, interruption)
    config = {"number": opened.number, "values": opened.values}
    trial = SimpleNamespace(trial_id="slot", config=config, pickled_error_file=None)
    return Watched(folder, ledger, recorder, trial, told, interruption)


def fail(run: Watched, times: int) -> None:
    """So many further trials fail, one after another."""
    for _ in range(times):
        opened = ask(run.ledger)
        run.trial.config = {"number": opened.number, "values": opened.values}
        run.files.write_error("KeyError: 'no such batch' (loop.py:3)")
        run.recorder.on_trial_error(0, [], run.trial)


def ended(folder: Path, reports: list[dict[str, Any]], constraints: dict[str, Any]) -> Record:
    """The record of a trial that ran to its end with these reports."""
    run = watched(folder, constraints=constraints)
    for epoch, metrics in enumerate(reports, start=1):
        run.report(epoch, metrics)
    return run.end("finished", len(reports))


@pytest.mark.parametrize("epochs", [3, {"int": [3, 3]}], ids=["fixed", "searched"])
@pytest.mark.parametrize(("reports", "status"), [(2, "stopped"), (3, "finished")])
def test_when_the_time_is_over_a_trial_of_which_nothing_is_left_has_finished(
    reports: int, status: str, epochs: Any, tmp_path: Path
) -> None:
    """Tune may not have asked it for more yet; and a checkpoint of which no report came is not kept."""
    run = watched(tmp_path, epochs)
    for epoch in range(1, reports + 1):
        run.files.write_checkpoint(epoch, b"state")
        run.report(epoch)
    run.files.write_checkpoint(reports + 1, b"its report was on the way")
    run.recorder.close("the time budget ran out")
    assert (run.told[0].status, run.told[0].epochs) == (status, reports)
    assert [path.name for path in run.files.path.glob("checkpoint*")] == [f"checkpoint-{reports:04d}.pt"]


def test_a_trial_that_has_begun_and_not_reported_when_the_time_is_over_is_stopped(tmp_path: Path) -> None:
    run = watched(tmp_path)
    run.recorder.on_trial_start(0, [], run.trial)
    run.recorder.close("the time budget ran out")
    assert (run.told[0].status, run.told[0].reason) == ("stopped", "the time budget ran out after epoch 0")


@pytest.mark.parametrize("ending", ["the time budget ran out", None], ids=["out of time", "interrupted"])
def test_what_was_drawn_and_has_not_begun_is_begun_by_a_resume(ending: str | None, tmp_path: Path) -> None:
    """Schedulers that pause trials have all of them drawn before the first begins."""
    run = watched(tmp_path)
    run.report(1)
    waiting = [ask(run.ledger, f"slot {number}").values for number in (1, 2)]
    run.recorder.close(ending)
    begun = [record.status for record in records(run.ledger.study, run.ledger.space)]
    assert begun == ["interrupted" if ending is None else "stopped"]
    resumed = open_journal(run.ledger.space, run.folder / "run")
    assert resumed.left == run.ledger.space.search.trials - (ending is not None)
    again = [ask(resumed, f"slot {number}") for number in range(2 if ending else 3)]
    assert [opened.values for opened in again][-2:] == waiting
    assert [opened.number for opened in again][-2:] == [1, 2]


def test_a_copy_that_diverges_before_its_first_report_has_its_own_values_and_checkpoint(tmp_path: Path) -> None:
    """Under population-based training: a trial takes over the weights of another, two epochs old, after its first."""
    run = watched(tmp_path)
    run.report(1)
    run.change(lr=0.75)
    run.recorder.on_trial_start(0, [], run.trial)
    run.files.write_checkpoint(2, b"the other's")
    record = run.end("diverged", 2)
    assert (record.values, record.epochs) == ({"lr": 0.75}, 2)
    assert json.loads((run.files.path / "config.json").read_text()) == {"lr": 0.75, "epochs": 3}
    saved = run.files.checkpoint()
    assert saved is not None
    assert saved.path.read_bytes() == b"the other's"


@pytest.mark.parametrize("ending", ["diverged", "out of time"])
@pytest.mark.parametrize("epoch", [1, 2, 3], ids=["behind", "level", "ahead"])
def test_a_copy_has_the_last_report_of_the_other_trial_and_not_its_own(epoch: int, ending: str, tmp_path: Path) -> None:
    """Under population-based training, where it ends before its next report. epoch: of the other trial."""
    run = watched(tmp_path)
    for own in (1, 2):
        run.report(own, {"loss": 0.5})
    run.change(lr=0.75)
    run.files.append_metrics({"epoch": epoch, "metrics": {"loss": 0.25}, "seconds": 0.0})
    if ending == "diverged":
        run.end("diverged", epoch)
    else:
        run.recorder.close("the time budget ran out")
    assert (run.told[0].epochs, run.told[0].metrics) == (epoch, {"loss": 0.25})


def test_a_trial_that_starts_over_and_ends_before_its_first_report_has_measured_nothing(tmp_path: Path) -> None:
    run = watched(tmp_path)
    run.report(1)  # its slot dies, and there is no checkpoint
    record = run.end("diverged", 0)
    assert (record.epochs, record.metrics) == (0, {})


def test_an_attempt_that_went_back_and_diverged_has_the_report_that_it_went_on_from(tmp_path: Path) -> None:
    run = watched(tmp_path, epochs=5)
    for epoch in (1, 2, 3, 4):
        run.report(epoch, {"loss": 1.0 / epoch})  # its slot dies, and the last checkpoint is of epoch 2
    record = run.end("diverged", 2)
    assert (record.epochs, record.metrics) == (2, {"loss": 0.5})


def test_a_search_that_is_killed_goes_on_with_the_values_that_a_copy_was_given(tmp_path: Path) -> None:
    run = watched(tmp_path)
    run.report(1)
    run.change(lr=0.75)
    run.recorder.on_trial_start(0, [], run.trial)
    run.report(2)
    assert ask(open_journal(run.ledger.space, tmp_path / "run")).values == {"lr": 0.75}


@pytest.mark.parametrize("ending", ["the time budget ran out", None], ids=["out of time", "interrupted"])
def test_a_copy_that_has_not_begun_has_the_setting_that_it_was_trained_with(ending: str | None, tmp_path: Path) -> None:
    """Under population-based training: it waits for a slot, and its folder has its own weights until then."""
    run = watched(tmp_path)
    own = run.ledger.open["slot"].values
    run.files.write_checkpoint(1, b"its own")
    run.change(lr=0.75)  # Tune asks the scheduler before it tells the recorder
    run.report(1)
    run.recorder.close(ending)
    (record,) = records(run.ledger.study, run.ledger.space)
    assert (record.values, record.metrics) == (own, {"loss": 0.5})
    if ending is None:
        opened = ask(open_journal(run.ledger.space, tmp_path / "run"))
        assert (opened.values, opened.metrics) == (own, {"loss": 0.5})


def test_the_time_that_a_trial_is_paused_for_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, epochs = watched(tmp_path), itertools.count(1)
    for start, reports in ((100.0, (110.0, 125.0)), (500.0, (530.0,))):
        monkeypatch.setattr(time, "monotonic", lambda at=start: at)
        run.recorder.on_trial_start(0, [], run.trial)
        for report in reports:
            monkeypatch.setattr(time, "monotonic", lambda at=report: at)
            run.report(next(epochs))
    assert [row["seconds"] for row in run.files.read_metrics()] == [10.0, 25.0, 55.0]


def test_a_trial_that_is_paused_when_the_search_ends_has_run_up_to_its_last_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched(tmp_path)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    run.recorder.on_trial_start(0, [], run.trial)
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    run.report(1)
    run.trial.status = Trial.PAUSED
    run.recorder.on_step_end(0, [run.trial])
    monkeypatch.setattr(time, "monotonic", lambda: 500.0)
    run.recorder.close(None)
    assert [record.seconds for record in records(run.ledger.study, run.ledger.space)] == [10.0]


def test_the_time_of_an_attempt_that_failed_counts_and_the_wait_for_the_next_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = watched(tmp_path), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    run.recorder.on_trial_start(0, [], run.trial)
    now = 130.0
    run.recorder.on_trial_recover(0, [], run.trial)
    now = 500.0
    run.recorder.on_trial_start(0, [], run.trial)
    now = 510.0
    run.report(1)
    assert [row["seconds"] for row in run.files.read_metrics()] == [40.0]


@pytest.mark.parametrize(
    ("full", "solves"), [(0.9, True), (0.8, False), (None, False)], ids=["kept", "broken", "not finite"]
)
def test_a_constraint_holds_for_the_last_report_alone(full: float | None, solves: bool, tmp_path: Path) -> None:
    limits = {"full": {"min": 0.85}}
    record = ended(tmp_path, [{"loss": 0.5}, {"loss": 0.4, "full": full}], limits)
    assert record.status == "finished"
    assert record.solves(space_of(tmp_path, {}, constraints=limits).constraints) == solves


def test_a_constraint_that_is_never_measured_is_a_mistake_and_no_bad_setting(tmp_path: Path) -> None:
    record = ended(tmp_path, [{"loss": 0.5, "full": 0.9}], {"ful": {"min": 0.85}})
    assert record.status == "failed"
    assert record.reason == "the last report has no metric `ful`, a constraint; it has loss, full; did you mean `full`?"


@pytest.mark.parametrize("status", ["diverged", "out_of_memory", "stopped"])
def test_a_trial_that_has_not_finished_does_not_fail_for_want_of_a_constraint_s_metric(
    status: str, tmp_path: Path
) -> None:
    assert watched(tmp_path, constraints={"full": {"min": 0.85}}).end(status, 0).status == status


def test_the_first_report_tells_of_a_constraint_that_it_knows_no_metric_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = watched(tmp_path, constraints={"ful": {"min": 0.85}, "seconds": {"max": 1.0}, "loss": {"max": 1.0}})
    run.report(1, {"loss": 0.5, "full": None})
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in told] == [
        "the first report has no metric `ful`, a constraint; it has loss, full; did you mean `full`?",
        "the first report has no metric `seconds`, a constraint; it has loss, full",
    ]
    run.report(2, {"loss": 0.5})
    assert capsys.readouterr().out == ""


def test_a_trainable_that_reports_more_often_than_its_space_says_is_told_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, told = watched(tmp_path), list[str]()
    for epoch in range(1, 6):
        run.report(epoch)
        told.append(capsys.readouterr().out.partition(", which")[0])
    assert told == ["", "", "", "trial 0 has given report 4, and config.epochs is 3", ""]


@pytest.mark.parametrize(
    ("reports", "status", "is_told"), [(1, "finished", True), (2, "finished", False), (1, "stopped", False)]
)
def test_a_trainable_that_reports_only_at_its_end_is_told_of(
    reports: int, status: str, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = watched(tmp_path)
    for epoch in range(1, reports + 1):
        run.report(epoch)
    run.end(status, reports)
    told = "trial 0 has finished after one report, and config.epochs is 3: " in capsys.readouterr().out
    assert told == is_told


def test_a_metric_that_comes_with_the_last_report_alone_is_told_of_and_is_no_mistake(tmp_path: Path) -> None:
    record = ended(tmp_path, [{"loss": 0.5}, {"loss": 0.4, "full": 0.9}], {"full": {"min": 0.85}})
    assert record.status == "finished"


def test_a_report_that_finds_no_room_costs_the_trial_no_more_than_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched(tmp_path)
    run.files.write_checkpoint(1, b"on record")
    run.report(1)
    run.files.write_checkpoint(2, b"not on record")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TrialFolder, "append_metrics", full)
    run.report(2)
    run.recorder.close(None)
    saved = run.files.checkpoint()
    assert saved is not None
    assert saved.path.read_bytes() == b"on record"


def test_an_attempt_that_failed_is_told_as_the_next_one_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a rank that is killed, Ray alone tells, and not which trial it was of nor that this goes on."""
    run = watched(tmp_path)
    run.recorder.on_trial_start(0, [], run.trial)
    run.report(1)
    run.files.write_error("the worker group died: WorkerGroupError: pid: 7", "Traceback ...")
    run.recorder.on_trial_recover(0, [], run.trial)
    told = "is retried: an attempt failed after epoch 1: the worker group died: WorkerGroupError: pid: 7"
    assert capsys.readouterr().out == f"trial   0  {told}\n"


def test_a_trial_failed_for_the_reason_of_its_last_attempt(tmp_path: Path) -> None:
    """Tune hands on the error of any of them."""
    run = watched(tmp_path)
    run.files.write_error("ValueError: the last (loop.py:3)", "Traceback ...")
    run.recorder.on_trial_error(0, [], run.trial)
    assert (run.told[0].status, run.told[0].reason) == ("failed", "ValueError: the last (loop.py:3)")


def test_a_slot_that_died_left_no_reason_of_its_own(tmp_path: Path) -> None:
    run = watched(tmp_path)
    run.files.write_error("ValueError: an earlier attempt")
    run.trial.pickled_error_file = str(tmp_path / "error.pkl")
    Path(run.trial.pickled_error_file).write_bytes(pickle.dumps(ActorUnavailableError("the node is gone", None)))
    run.recorder.on_trial_error(0, [], run.trial)
    assert "the node is gone" in run.told[0].reason


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full ([Errno 28] No space left on device)"),
        (
            OSError(errno.EROFS, "Read-only file system", "/results/run/trials/0000/error.txt"),
            "the results cannot be written ([Errno 30] Read-only file system: '/results/run/trials/0000/error.txt')",
        ),
    ],
    ids=["full", "read-only"],
)
@pytest.mark.parametrize("heard", ["on_trial_recover", "on_trial_error"])
def test_a_slot_that_cannot_write_ends_the_search_before_another_attempt(
    heard: str, error: OSError, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = watched(tmp_path)
    run.trial.pickled_error_file = str(tmp_path / "error.pkl")
    Path(run.trial.pickled_error_file).write_bytes(pickle.dumps(RayTaskError("step", "Traceback ...", error)))
    getattr(run.recorder, heard)(0, [], run.trial)
    assert run.interruption.reason == told
    assert not run.told
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("how", ["moved", "deleted", "only the study"])
def test_a_results_folder_that_goes_ends_the_search_and_is_not_begun_anew(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one that is no longer mounted; a study without its beginning could never be read."""
    run, results = watched(tmp_path), tmp_path / "run"
    run.report(1)
    if how == "moved":
        results.rename(tmp_path / "moved")
    elif how == "deleted":
        shutil.rmtree(results)
    else:
        (results / STUDY).unlink()
    with contextlib.nullcontext() if how == "only the study" else pytest.raises(FileNotFoundError):
        run.files.write_checkpoint(2, b"state")  # the slot's, which precedes the report
    run.report(2)
    run.recorder.close(None)
    gone = f"[Errno 2] Deleted, moved or unmounted meanwhile: '{results / STUDY}'"
    assert run.interruption.reason == f"the results cannot be written ({gone})"
    assert "Traceback" not in capfd.readouterr().err
    assert not (results / STUDY).exists()
    assert results.exists() == (how == "only the study")


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_a_reason_says_what_the_metrics_reveal(status: str, tmp_path: Path) -> None:
    run = watched(tmp_path)
    for epoch in (1, 2, 3):
        run.report(epoch, {"loss": 1.0, "loss_chance": 1.0})
    told = "as the test says; loss stayed at chance, 1 at best where guessing gives 1"
    assert run.end(status, 3).reason == told


def test_a_search_whose_trials_all_fail_ends_before_it_has_used_up_its_settings(tmp_path: Path) -> None:
    run = watched(tmp_path, search={"trials": 2 * HOPELESS + 1})
    run.recorder.on_trial_error(0, [], run.trial)
    fail(run, HOPELESS - 2)
    assert not run.interruption.came
    fail(run, 1)
    last = f"trial {HOPELESS - 1}: KeyError: 'no such batch' (loop.py:3)"
    assert run.interruption.reason == f"the last {HOPELESS} trials all failed; {last}"
    assert run.interruption.hopeless
    assert len(run.told) == HOPELESS, "each of them has ended, and has been told"


def test_as_many_failures_as_one_incident_brings_end_no_search(tmp_path: Path) -> None:
    run = watched(tmp_path, search={"trials": 5 * HOPELESS})
    for slot in range(HOPELESS):
        ask(run.ledger, f"slot {slot}")
    run.recorder.on_trial_error(0, [], run.trial)
    fail(run, 2 * HOPELESS - 2)
    assert not run.interruption.came
    fail(run, 1)
    assert run.interruption.came


def test_trials_that_fail_between_others_end_no_search(tmp_path: Path) -> None:
    run = watched(tmp_path, search={"trials": 3 * HOPELESS})
    run.recorder.on_trial_error(0, [], run.trial)
    fail(run, HOPELESS - 2)
    opened = ask(run.ledger)
    run.trial.config = {"number": opened.number, "values": opened.values}
    run.report(1)
    run.end("diverged", 1)
    fail(run, HOPELESS - 1)
    assert not run.interruption.came


def test_a_search_that_has_ended_is_not_ended_for_its_failures(tmp_path: Path) -> None:
    run = watched(tmp_path, search={"trials": HOPELESS})
    run.recorder.on_trial_error(0, [], run.trial)
    fail(run, HOPELESS - 1)
    assert not run.interruption.came


def test_an_interrupted_trial_keeps_the_checkpoint_of_its_last_report_alone(tmp_path: Path) -> None:
    run = watched(tmp_path)
    for epoch in (1, 2):
        run.files.write_checkpoint(epoch, b"state")
        run.report(epoch)
    run.files.write_checkpoint(3, b"a report that nobody has read")
    run.recorder.close(None)
    assert [path.name for path in run.files.path.glob("checkpoint-*.pt")] == ["checkpoint-0002.pt"]
    assert not run.told


def test_an_interrupted_copy_of_a_trial_that_was_ahead_goes_on_from_there(tmp_path: Path) -> None:
    """Under population-based training: its slot has taken over a checkpoint, and the report that goes with it."""
    run = watched(tmp_path)
    run.files.write_checkpoint(1, b"its own")
    run.report(1)
    run.files.append_metrics({"epoch": 2, "metrics": {"loss": 0.25}, "seconds": 0.0})
    run.files.write_checkpoint(2, save_state({"of": "the other"}))
    run.recorder.close(None)
    opened = ask(open_journal(run.ledger.space, tmp_path / "run"))
    assert (opened.number, opened.epochs, opened.metrics) == (0, 2, {"loss": 0.25})
    saved = run.files.checkpoint()
    assert saved is not None
    assert saved.epoch == 2


def test_what_cannot_be_recorded_interrupts_the_search_and_nothing_is_recorded_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune takes the trial for one that failed, and starts it again."""
    run = watched(tmp_path)

    def broken() -> None:
        raise RuntimeError("first")

    monkeypatch.setattr(run.recorder, "_keep", broken)
    run.report(1)
    run.recorder.on_trial_start(0, [], run.trial)
    run.report(2)
    run.trial.last_result = {STATUS: "finished", REASON: "as the test says", EPOCH: 2}
    run.recorder.on_trial_complete(0, [], run.trial)
    assert run.interruption.came
    assert (run.interruption.reason or "").startswith(f"RuntimeError: first ({__file__}:")
    assert [row["epoch"] for row in run.files.read_metrics()] == [1]
    assert not run.told


def test_of_several_exceptions_the_first_is_the_cause() -> None:
    interruption = Interruption()
    for words in ("first", "second"):
        with interruption.kept():
            raise RuntimeError(words)
    assert (interruption.reason or "").startswith("RuntimeError: first ")


def test_a_trial_whose_end_found_no_room_is_still_open(small_disk: Path) -> None:
    run = watched(small_disk)
    run.report(1)
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    run.trial.last_result = {STATUS: "diverged", REASON: "as the test says " * 500, EPOCH: 1}
    run.recorder.on_trial_complete(0, [], run.trial)
    run.recorder.close(None)
    assert run.interruption.reason == "the disk is full ([Errno 28] No space left on device)"
    (small_disk / "ballast").unlink()
    space = space_of(small_disk, {"lr": {"log": [1e-4, 1.0]}, "epochs": 3})
    again = ask(open_journal(space, small_disk / "run"))
    assert (again.number, again.epochs) == (run.trial.config["number"], 1)
