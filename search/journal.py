"""The study's journal file: Optuna's, forced to the disk when a trial ends and not at every word."""

from __future__ import annotations

import json
import os
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState


class StudyJournal(JournalFileBackend):
    """Optuna's own backend forces every entry to the disk, a few milliseconds each and some twenty a trial.

    An entry is safe from the death of this process as soon as it is written. Only the death of the machine asks for
    more, and there it suffices that what has ended is never lost.
    """

    def __init__(self, file_path: str) -> None:
        self._journal_path = file_path
        self._journal_lock = JournalFileSymlinkLock(file_path)
        super().__init__(file_path, lock_obj=self._journal_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._journal_lock.acquire()
        try:
            with open(self._journal_path, "ab") as file:
                file.write(lines.encode())
                if any(_ends_a_trial(log) for log in logs):
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            self._journal_lock.release()


def _ends_a_trial(log: dict[str, Any]) -> bool:
    return "state" in log and TrialState(log["state"]).is_finished()
