"""What a slot makes of what its group says, and of its death, without Ray: the group is one of this file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from spaces import space_of

from search import trial as trial_module
from search.group import GroupDied
from search.records.folder import PRINTED, Saved, TrialFolder
from search.trial import EPOCH, LOSSES, METRICS, REASON, STATUS, Job, Slot, TrialFailed
from search.workers.messages import (
    Advance,
    Answer,
    Begin,
    Blew,
    Broke,
    Command,
    Ended,
    GroupSpec,
    Leave,
    RanOut,
    Reported,
)

SPEC = GroupSpec("toys:descend", (), ("loss",), 1, 1, 0.0, None, None, "no scratch")
STATE = b"the state after an epoch"


class Scripted:
    """A group that does what comes next in a script: `r` reports, `m` dies with its machine, `d` dies alone.

    It gives any other answer that stands there.
    """

    def __init__(self, script: Iterator[str | Answer]) -> None:
        self.script, self.begun, self.numbers, self.stopped = script, list[bool](), list[int | None](), 0

    def __call__(self, spec: GroupSpec) -> Scripted:
        return self

    def ask(self, command: Command) -> Answer:
        assert isinstance(command, (Begin, Advance, Leave))
        if isinstance(command, Begin):
            self.begun.append(command.resume is not None)
            self.numbers.append(command.number)
        does = next(self.script)
        if isinstance(does, Answer):
            return does
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


BLEW = Blew(reason="loss is nan", step=7, details={"reason": "its own", "step": 99, "epochs": 99, "lr": 0.1})
NO_REPORT = "ended without a report; a trainable yields one after every epoch"


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        (["r", Ended()], "finished", "ran to its end"),
        ([Ended()], "failed", NO_REPORT),
        (["r", BLEW], "diverged", "loss is nan at step 7"),
        (["r", RanOut(reason="2 GiB")], "out_of_memory", "2 GiB"),
        ([Broke(reason="no such file", final=True)], "failed", "no such file"),
    ],
)
def test_a_trial_ends_with_what_its_group_says_last(
    script: list[str | Answer], status: str, reason: str, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module, "Group", group := Scripted(iter(script)))
    *_, last = [slot.step() for _ in script]
    assert last == {"done": True, EPOCH: len(script) - 1, STATUS: status, REASON: reason}
    assert group.stopped == 0, "it can take another trial"
    told = {"reason": "loss is nan", "step": 7, "epochs": 1, "lr": 0.1}
    assert slot._folder.read_divergence() == (told if status == "diverged" else None)


def test_a_group_that_is_not_clean_takes_no_other_trial(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = Broke(clean=False, reason="KeyError: 'w' (my.py:3)", trace="Traceback ...")
    monkeypatch.setattr(trial_module, "Group", group := Scripted(iter([bug, Ended(clean=False)])))
    with pytest.raises(TrialFailed, match="KeyError: 'w'"):
        slot.step()
    assert slot._folder.read_error() == "KeyError: 'w' (my.py:3)\n\nTraceback ..."
    assign(slot, 1)
    slot.step()
    assert group.stopped == 2


def test_a_cold_slot_has_a_group_for_every_trial(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    slot._job = replace(slot._job, cold=True)
    script: list[str | Answer] = [
        "r",
        Ended(printed="closed\n"),
        "r",
        Ended(),
    ]  # it leaves each trial, as a warm one does
    monkeypatch.setattr(trial_module, "Group", group := Scripted(iter(script)))
    for number in (0, 1):
        assign(slot, number)
        slot.step()
        assert group.stopped == number
    assert group.numbers == [0, 1]
    assert (TrialFolder(Path(slot._job.results), 0).path / PRINTED).read_text() == "closed\n"


def test_a_slot_that_ends_leaves_its_last_trial(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "Group", group := Scripted(iter(["r", Ended(printed="closed\n")])))
    slot.step()
    slot.cleanup()
    assert group.stopped == 1
    assert (slot._folder.path / PRINTED).read_text() == "closed\n"


def test_a_checkpoint_stays_until_a_newer_report_is_on_record(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the search is about to end, and its slots go on until then."""
    monkeypatch.setattr(trial_module, "Group", Scripted(iter("rrr")))
    slot.step()
    slot._folder.append_metrics({"epoch": 1, "metrics": {"loss": 0.5}})
    for _ in range(2):
        slot.step()
    assert [saved.epoch for saved in kept(slot._folder)] == [1, 3]


def test_a_metric_that_is_no_number_is_reported_as_none(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = Reported(metrics={"loss": 0.5, "acc": math.nan, "far": -math.inf})
    monkeypatch.setattr(trial_module, "Group", Scripted(iter([reported])))
    assert slot.step()[METRICS] == {"loss": 0.5, "acc": None, "far": None}


def test_what_a_trial_prints_as_it_is_left_is_its_own(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Reported(metrics={"loss": 0.5}, printed="first\n")
    script = [report, Ended(printed="closed\n"), replace(report, printed="second\n")]
    monkeypatch.setattr(trial_module, "Group", Scripted(iter(script)))
    printed = []
    for number in (0, 1):
        assign(slot, number)
        slot.step()
        printed.append(slot._folder)
    assert [folder.last_printed(9) for folder in printed] == [["first", "closed"], ["second"]]


def test_a_trial_whose_machine_goes_goes_on_from_its_last_checkpoint_in_the_same_step(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, group = play(slot, "rrmrrd", monkeypatch)
    assert epochs == [1, 2, 3, 4, "the worker group died"]
    assert group.begun == [False, True]
    assert group.numbers == [0, 0]
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


def handed_on(slot: Slot, to: Path) -> str:
    """Return the folder of a checkpoint that the scheduler had the slot save."""
    to.mkdir()
    slot.save_checkpoint(str(to))
    return str(to)


def assign(slot: Slot, number: int, lr: float = 0.2) -> None:
    slot.reset_config({"number": number, "values": {"lr": lr}})


def kept(folder: TrialFolder) -> list[Saved]:
    return [Saved(int(path.stem[-4:]), path) for path in sorted(folder.path.glob("checkpoint-*.pt"))]


def test_a_retry_goes_on_from_the_trial_s_own_last_checkpoint_and_not_from_where_it_was_paused(
    slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(slot, "rrrd", monkeypatch)
    paused = handed_on(slot, tmp_path / "paused")
    for script, epochs in (("rrd", [4, 5]), ("rd", [6])):
        assign(slot, 0, 0.1)
        slot.load_checkpoint(paused)
        assert play(slot, script, monkeypatch)[0][:-1] == epochs
    assert [row[EPOCH] for row in slot._folder.read_metrics()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ahead", [0, 2, 3, 5])
def test_a_retry_of_a_copy_goes_on_from_its_own_last_checkpoint(
    ahead: int, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ahead: the epochs of the trial when it became a copy of one after its third."""
    play(slot, "rrrd", monkeypatch)
    source = handed_on(slot, tmp_path / "source")
    assign(slot, 1)
    play(slot, "r" * ahead + "d", monkeypatch)
    for script, epochs in (("rrd", [4, 5]), ("rd", [6])):
        assign(slot, 1, 0.3)
        slot.load_checkpoint(source)
        assert play(slot, script, monkeypatch)[0][:-1] == epochs
    assert [row[EPOCH] for row in slot._folder.read_metrics()][-4:] == [3, 4, 5, 6]


@pytest.mark.parametrize("again", ["later", "earlier", "the same"])
def test_a_second_copy_replaces_what_the_trial_has_whether_from_a_later_an_earlier_or_the_same_epoch(
    again: str, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(slot, "rrd", monkeypatch)
    sources = {"earlier": (2, handed_on(slot, tmp_path / "earlier"))}
    for epoch, name in ((3, "the same"), (4, "later")):
        assign(slot, 0, 0.1)
        play(slot, "rd", monkeypatch)
        sources[name] = (epoch, handed_on(slot, tmp_path / name))
    assign(slot, 1)
    slot.load_checkpoint(sources["the same"][1])
    play(slot, "rrrd", monkeypatch)
    epoch, source = sources[again]
    assign(slot, 1, 0.3)
    slot.load_checkpoint(source)
    assert [saved.epoch for saved in kept(slot._folder)] == [epoch] == [slot._folder.recorded()]
    assert play(slot, "rd", monkeypatch)[0][0] == epoch + 1


@pytest.mark.parametrize("own", [1, 2, 3], ids=["ahead", "level", "behind"])
def test_a_copy_has_the_report_of_the_checkpoint_that_it_takes_over(
    own: int, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """own: the epochs of the trial when it became a copy of one after its second."""
    play(slot, "rrd", monkeypatch)
    source = handed_on(slot, tmp_path / "source")
    assign(slot, 1)
    slot._folder.append_metrics({"epoch": own, "metrics": {"loss": 0.75}, "seconds": 9.0})
    slot.load_checkpoint(source)
    last = slot._folder.read_metrics()[-1]
    assert (last["epoch"], last["metrics"], last["seconds"]) == (2, {"loss": 0.5}, 9.0)


def test_a_trial_that_was_copied_and_then_paused_goes_on_from_its_pause(
    slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(slot, "rrd", monkeypatch)
    source = handed_on(slot, tmp_path / "source")
    assign(slot, 1)
    slot.load_checkpoint(source)
    play(slot, "rrd", monkeypatch)
    slot.load_checkpoint(handed_on(slot, tmp_path / "paused"))
    assert play(slot, "rd", monkeypatch)[0][0] == 5


def test_a_copy_has_the_report_of_its_checkpoint_although_that_was_saved_before_it_was_on_record(
    slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module, "Group", Scripted(iter(["r", "r", Ended()])))
    for _ in range(2):
        slot.step()
    source = handed_on(slot, tmp_path / "source")
    slot.cleanup()
    assign(slot, 1)
    slot.load_checkpoint(source)
    (row,) = slot._folder.read_metrics()
    assert (row[EPOCH], row[METRICS]) == (2, {"loss": 0.5})
    assert play(slot, "rd", monkeypatch)[0][0] == 3


def test_a_report_that_a_slot_died_before_giving_is_given_by_the_next_attempt(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(slot, "rrd", monkeypatch)
    slot._folder.write_checkpoint(3, STATE)  # and died
    assign(slot, 0, 0.1)
    epochs, group = play(slot, "rd", monkeypatch)
    assert (epochs[0], group.begun) == (3, [True])
