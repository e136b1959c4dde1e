"""What a slot does when its group dies, without Ray: the group is one of this file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spaces import space_of

from search import trial as trial_module
from search.group import GroupDied, GroupSpec
from search.trial import EPOCH, LOSSES, Job, Slot, TrialFailed
from search.workers.messages import Advance, Answer, Begin, Command, Leave, Reported

SPEC = GroupSpec("toys:descend", (), ("loss",), 1, 1, 0.0, None, None, "no scratch")
STATE = b"the state after an epoch"


class Scripted:
    """A group that does what comes next in a script: `r` reports, `m` dies with its machine, `d` dies alone."""

    def __init__(self, script: Iterator[str]) -> None:
        self.script, self.begun, self.stopped = script, list[bool](), 0

    def __call__(self, spec: GroupSpec) -> Scripted:
        return self

    def ask(self, command: Command) -> Answer:
        assert isinstance(command, (Begin, Advance, Leave))
        if isinstance(command, Begin):
            self.begun.append(command.resume is not None)
        does = next(self.script)
        if does == "r":
            return Reported(metrics={"loss": 0.5}, state=STATE)
        raise GroupDied("the worker group died", with_machine=does == "m")

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    space = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}, "epochs": 9})
    slot = Slot.__new__(Slot)
    slot.setup({"number": 0, "values": {"lr": 0.1}}, Job(space, SPEC, str(tmp_path), cold=False))
    return slot


def play(slot: Slot, script: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Scripted]:
    """The epochs of the steps up to one that fails, with its reason, and the group. All are put on record."""
    group, epochs = Scripted(iter(script)), list[Any]()
    monkeypatch.setattr(trial_module, "Group", group)
    try:
        while True:
            epochs.append(slot.step()[EPOCH])
            slot._folder.append_metrics({"epoch": epochs[-1], "metrics": {"loss": 0.5}})
    except TrialFailed as failed:
        epochs.append(str(failed))
    return epochs, group


def test_a_trial_whose_machine_goes_goes_on_from_its_last_checkpoint_in_the_same_step(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, group = play(slot, "rrmrrd", monkeypatch)
    assert epochs == [1, 2, 3, 4, "the worker group died"]
    assert group.begun == [False, True]
    assert group.stopped == 2


def test_a_trial_that_gets_further_each_time_may_lose_any_number_of_machines(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, _ = play(slot, "mr" * 4 * LOSSES + "d", monkeypatch)
    assert epochs == [*range(1, 4 * LOSSES + 1), "the worker group died"]


@pytest.mark.parametrize("reports", [0, 3])
def test_a_trial_that_takes_machines_down_with_it_fails(
    reports: int, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, group = play(slot, "r" * reports + "m" * (LOSSES + 1) + "r", monkeypatch)
    assert epochs == [*range(1, reports + 1), "the worker group died"]
    assert group.stopped == LOSSES + 1


def test_a_copy_of_a_trial_that_was_ahead_keeps_its_checkpoint_when_the_search_is_interrupted(
    slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(slot, "rrrd", monkeypatch)
    (tmp_path / "handed on").mkdir()
    slot.save_checkpoint(str(tmp_path / "handed on"))
    slot.reset_config({"number": 1, "values": {"lr": 0.2}})
    play(slot, "rd", monkeypatch)
    slot.load_checkpoint(str(tmp_path / "handed on"))
    folder = slot._folder
    assert [row["epoch"] for row in folder.read_metrics()] == [1, 3]
    folder.keep_checkpoint(folder.recorded())
    saved = folder.checkpoint()
    assert saved is not None
    assert saved.epoch == 3


def test_a_trial_that_was_paused_has_each_of_its_reports_once(
    slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(slot, "rrd", monkeypatch)
    before = (slot._folder.path / "metrics.jsonl").read_bytes()
    (tmp_path / "handed on").mkdir()
    slot.save_checkpoint(str(tmp_path / "handed on"))
    slot.load_checkpoint(str(tmp_path / "handed on"))
    assert (slot._folder.path / "metrics.jsonl").read_bytes() == before
