"""The Tune trainable: one slot of the search, which runs one trial after another.

Tune sees a class Trainable whose `step` is one epoch. The worker group behind it stays up between trials
(`reuse_actors`), so only the first trial of a slot pays for its start.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from search.files import is_full
from search.group import Group, GroupDied
from search.records.folder import TrialFolder, last_checkpoint
from search.records.health import compared
from search.records.record import RAN_TO_END
from search.space import Space
from search.text import short_line
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

LOSSES = 2  # machines a trial may lose after the same epoch; beyond that, the trial itself may be bringing them down
# Result keys. OBJECTIVE holds what schedulers compare (search.records.health); no metric can have the same name.
STATUS, REASON, EPOCH, OBJECTIVE, METRICS = "status", "reason", "epoch", "objective", "metrics"
ORIGIN = "origin.json"  # stored with a checkpoint handed to Tune: its trial, and the matching row of metrics.jsonl


class TrialFailed(RuntimeError):
    """A trial was lost to a bug or to the machine; Tune retries it while retries are left."""


@dataclass(frozen=True)
class Job:
    """What all trials of a search share."""

    space: Space
    spec: GroupSpec
    results: str
    cold: bool


class Slot(tune.Trainable):
    """Runs trial number `config["number"]` with the searched values `config["values"]`.

    After an epoch the result holds `epoch` (number of reports so far), `objective` and `metrics`. At the end of a trial
    it holds `done`, `epoch`, `status` and `reason`, but no objective, whatever the status.
    """

    def setup(self, config: dict[str, Any], job: Job) -> None:
        self._job = job
        self._group: Group | None = None
        self._assign(config)
        self._lent_to = self._folder

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._assign(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            return self._step()
        except TrialFailed:
            raise
        except Exception as error:  # an error of the slot itself
            if is_full(error):  # the recorder ends the search on a full disk
                raise
            raise self._failed(short_line(f"{type(error).__name__}: {error}", ""), traceback.format_exc()) from None

    def _step(self) -> dict[str, Any]:
        answer = self._next_answer()
        if not answer.clean:
            self._retire_group()
        if isinstance(answer, Reported):
            return self._report(answer)
        if isinstance(answer, Broke) and not answer.final:
            raise self._failed(answer.reason, answer.trace)
        return self._end(answer)

    def _next_answer(self) -> Answer:
        """Return the next answer. If the machine is lost, the trial resumes from its last checkpoint on another one."""
        begun = self._begun
        while True:
            try:
                return self._advance() if begun else self._begin()
            except GroupDied as died:
                self._retire_group()
                if not died.with_machine or self._lost_after.count(self._epoch) == LOSSES:
                    raise self._failed(short_line(str(died), type(died).__name__)) from None
            self._lost_after.append(self._epoch)
            begun = False

    def _failed(self, reason: str, trace: str = "") -> TrialFailed:
        """Return the error to raise, kept in the trial's folder: of several attempts Tune passes on the first one's."""
        self._folder.write_error(reason, trace)
        return TrialFailed(reason)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save the trial for a scheduler that pauses or copies it; raises TrialFailed if it has no checkpoint."""
        saved = self._folder.checkpoint()
        if saved is None:
            raise self._failed(
                "the scheduler pauses trials, and this trainable's reports have no state to resume from; use asha"
            )
        # Population-based training saves before the last report is on record.
        row = self._reported if self._reported.get(EPOCH) == saved.epoch else self._folder.row(saved.epoch)
        assert row is not None, "a trial begins from a checkpoint on record"
        shutil.copy2(saved.path, checkpoint_dir)
        Path(checkpoint_dir, ORIGIN).write_text(json.dumps({"trial": self._folder.path.name, "row": row}))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Copy another trial's checkpoint, and the report that goes with it, into the trial's own folder.

        Recorded there, both survive a retry and an interruption. After a pause and before each retry, Tune loads what
        the trial saved or copied last. Its folder still has that, or a newer one, and the trial goes on from there.
        """
        self._begun = False
        origin = json.loads(Path(checkpoint, ORIGIN).read_text())
        # The time in its row tells a report from all others. The same checkpoint may be copied again for a new setting.
        copied = json.dumps([origin, self._tree], default=str)
        if origin["trial"] == self._folder.path.name or copied == self._folder.read_copied():
            return
        saved = last_checkpoint(Path(checkpoint))
        assert saved is not None, "save_checkpoint wrote one"
        self._folder.write_checkpoint(saved.epoch, saved.path.read_bytes())
        own = self._folder.row(self._folder.recorded()) or {}
        self._folder.append_metrics({**origin["row"], "seconds": own.get("seconds", 0.0)})
        self._folder.keep_checkpoint(saved.epoch)
        self._folder.write_copied(copied)

    def cleanup(self) -> None:
        self._is_free()  # closes the last trial and keeps what it prints then; Tune allows ten seconds for all of this
        self._retire_group()

    def _assign(self, config: dict[str, Any]) -> None:
        self._tree = self._job.space.config(config["values"])
        self._number: int = config["number"]
        self._folder = TrialFolder(Path(self._job.results), self._number)
        self._begun = False
        self._epoch = 0
        self._reported = dict[str, Any]()  # the row of the last report since the trial was begun here, if any
        self._lost_after = list[int]()  # for each machine lost, the epoch after which it was lost

    def _begin(self) -> Answer:
        """Start the trial, from its own last checkpoint if an earlier attempt left one."""
        if not self._is_free() or self._job.cold:
            self._retire_group()
        if self._group is None:
            self._group = Group(self._job.spec)
        # A slot may have died between writing a checkpoint and giving its report, which has to be given again.
        self._folder.keep_checkpoint(self._folder.recorded())
        saved = self._folder.checkpoint()
        self._epoch, self._reported = 0 if saved is None else saved.epoch, {}
        self._begun, self._lent_to = True, self._folder
        resume = None if saved is None else saved.path.read_bytes()
        return self._ask(self._group, Begin(self._tree, self._job.space.search.seed, resume, self._number))

    def _ask(self, group: Group, command: Command) -> Answer:
        """Return the group's answer. What it printed belongs to its last trial: closing that may print, too."""
        answer = group.ask(command)
        self._lent_to.append_printed(answer.printed)
        return answer

    def _is_free(self) -> bool:
        """Make the group leave its last trial, perhaps stopped by the scheduler; returns whether that left no trace."""
        try:
            return self._group is None or self._ask(self._group, Leave()).clean
        except GroupDied:
            return False

    def _advance(self) -> Answer:
        assert self._group is not None
        # Tune has processed the last report, or there would be no next step; but on a full disk it is not on record.
        self._folder.keep_checkpoint(min(self._epoch, self._folder.recorded()))
        return self._ask(self._group, Advance())

    def _report(self, answer: Reported) -> dict[str, Any]:
        self._epoch += 1
        if answer.state is not None:
            self._folder.write_checkpoint(self._epoch, answer.state)
        metrics = {name: value if math.isfinite(value) else None for name, value in (answer.metrics or {}).items()}
        objective = compared(metrics, self._job.space.objectives[0])
        self._reported = {EPOCH: self._epoch, "time": time.time(), METRICS: metrics}
        return {EPOCH: self._epoch, OBJECTIVE: objective, METRICS: metrics}

    def _end(self, answer: Answer) -> dict[str, Any]:
        self._begun = False
        status, reason = verdict(answer)
        if isinstance(answer, Blew):
            told = {"reason": answer.reason, "step": answer.step, "epochs": self._epoch}
            self._folder.write_divergence({**told, **answer.details, **told})
        if status == "finished" and self._epoch == 0:
            status, reason = "failed", "ended without a report; a trainable yields one after every epoch"
        return {"done": True, EPOCH: self._epoch, STATUS: status, REASON: reason}

    def _retire_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.stop()


def verdict(answer: Answer) -> tuple[str, str]:
    """Return status and reason of a trial from its group's last answer."""
    if isinstance(answer, Ended):
        return "finished", RAN_TO_END
    if isinstance(answer, Blew):
        return "diverged", answer.reason + ("" if answer.step is None else f" at step {answer.step}")
    if isinstance(answer, RanOut):
        return "out_of_memory", answer.reason
    assert isinstance(answer, Broke)
    return "failed", answer.reason
