"""What is written down of a trial's end, without Ray: the recorder is called as Tune calls it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledgers import ask, open_journal
from spaces import space_of

from search.folder import TrialFolder
from search.record import Record
from search.recorder import Recorder
from search.trial import EPOCH, METRICS, REASON, STATUS


def ended(folder: Path, reports: list[dict[str, Any]], constraints: dict[str, Any]) -> Record:
    """The record of a trial that ran to its end with these reports."""
    space = space_of(folder, {"lr": {"log": [1e-4, 1.0]}}, constraints=constraints)
    ledger = open_journal(space, folder / "run")
    opened = ask(ledger)
    told: list[Record] = []
    recorder = Recorder(ledger, folder / "run", told.append, lambda: None)
    end = {STATUS: "finished", REASON: "ran to its end", EPOCH: len(reports)}
    trial = SimpleNamespace(trial_id="slot", config={"number": opened.number, "values": opened.values}, last_result=end)
    for epoch, metrics in enumerate(reports, start=1):
        recorder.on_trial_result(0, [], trial, {EPOCH: epoch, METRICS: metrics})
    recorder.on_trial_complete(0, [], trial)
    return told[0]


@pytest.mark.parametrize(("reports", "status"), [(2, "stopped"), (3, "finished")])
def test_when_the_time_is_over_a_trial_of_which_nothing_is_left_has_finished(
    reports: int, status: str, tmp_path: Path
) -> None:
    """Tune may not have asked it for more yet; and a checkpoint of which no report came is not kept."""
    space = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}, "epochs": 3})
    ledger = open_journal(space, tmp_path / "run")
    opened = ask(ledger)
    told: list[Record] = []
    recorder = Recorder(ledger, tmp_path / "run", told.append, lambda: None)
    folder = TrialFolder(tmp_path / "run", opened.number)
    trial = SimpleNamespace(trial_id="slot", config={"number": opened.number, "values": opened.values})
    for epoch in range(1, reports + 1):
        folder.write_checkpoint(epoch, b"state")
        recorder.on_trial_result(0, [], trial, {EPOCH: epoch, METRICS: {"loss": 0.5}})
    folder.write_checkpoint(reports + 1, b"its report was on the way")
    recorder.close("the time budget was over")
    assert (told[0].status, told[0].epochs) == (status, reports)
    assert [path.name for path in folder.path.glob("checkpoint*")] == [f"checkpoint-{reports:04d}.pt"]


def test_a_copy_that_diverges_before_its_first_report_has_its_own_values_and_checkpoint(tmp_path: Path) -> None:
    """Under population-based training: trial 0 takes over the weights of another, six epochs old, after its fourth."""
    space = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}, "epochs": 8})
    ledger = open_journal(space, tmp_path / "run")
    opened = ask(ledger)
    told: list[Record] = []
    recorder = Recorder(ledger, tmp_path / "run", told.append, lambda: None)
    trial = SimpleNamespace(trial_id="slot", config={"number": opened.number, "values": opened.values})
    for epoch in range(1, 5):
        recorder.on_trial_result(0, [], trial, {EPOCH: epoch, METRICS: {"loss": 0.5}})
    trial.config = {"number": opened.number, "values": {"lr": 0.75}}
    TrialFolder(tmp_path / "run", opened.number).write_checkpoint(6, b"the other's")
    trial.last_result = {STATUS: "diverged", REASON: "loss is not finite", EPOCH: 6}
    recorder.on_trial_complete(0, [], trial)
    assert (told[0].values, told[0].epochs) == ({"lr": 0.75}, 6)
    assert json.loads((tmp_path / "run/trials/0000/config.json").read_text()) == {"lr": 0.75, "epochs": 8}
    saved = TrialFolder(tmp_path / "run", opened.number).checkpoint()
    assert saved is not None
    assert saved.path.read_bytes() == b"the other's"


def test_a_search_that_is_killed_goes_on_with_the_values_that_a_copy_was_given(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}, "epochs": 8})
    ledger = open_journal(space, tmp_path / "run")
    opened = ask(ledger)
    recorder = Recorder(ledger, tmp_path / "run", lambda record: None, lambda: None)
    trial = SimpleNamespace(trial_id="slot", config={"number": opened.number, "values": {"lr": 0.75}})
    recorder.on_trial_result(0, [], trial, {EPOCH: 4, METRICS: {"loss": 0.5}})
    assert ask(open_journal(space, tmp_path / "run")).values == {"lr": 0.75}


def test_the_time_that_a_trial_is_paused_for_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}, "epochs": 2})
    ledger = open_journal(space, tmp_path / "run")
    opened = ask(ledger)
    told: list[Record] = []
    recorder = Recorder(ledger, tmp_path / "run", told.append, lambda: None)
    trial = SimpleNamespace(trial_id="slot", config={"number": opened.number, "values": opened.values})
    for epoch, (start, report) in enumerate([(100.0, 110.0), (500.0, 530.0)], start=1):
        monkeypatch.setattr(time, "monotonic", lambda at=start: at)
        recorder.on_trial_start(0, [], trial)
        monkeypatch.setattr(time, "monotonic", lambda at=report: at)
        recorder.on_trial_result(0, [], trial, {EPOCH: epoch, METRICS: {"loss": 0.5}})
    assert [row["seconds"] for row in TrialFolder(tmp_path / "run", 0).read_metrics()] == [10.0, 40.0]


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
    assert record.reason == "the last report has no metric `ful`, a constraint; it has loss, full"
