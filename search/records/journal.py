"""The study's journal file: Optuna's, forced to the disk when a trial ends and not at every word."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import LOCK_FILE_SUFFIX
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
            with open(self._journal_path, "ab+") as file:
                _cut_torn_line(file)
                file.write(lines.encode())
                if any(_ends_a_trial(log) for log in logs):
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            self._journal_lock.release()


def drop_lock(file: Path) -> None:
    """Remove what a process that was killed as it wrote has left; for the only one that may write to the journal now.

    Optuna waits half a minute for such a lock. It is a link to the journal as that was called: where the folder has
    been moved since, Optuna finds no age there and waits for ever.
    """
    with contextlib.suppress(OSError):  # where nothing can be written, what writes next says so
        file.with_name(file.name + LOCK_FILE_SUFFIX).unlink()


def _cut_torn_line(file: BinaryIO) -> None:
    """Take away what is left of an entry that was being written when its machine died, or its disk was full.

    Whoever holds the lock is the only one that writes. What is appended to half a line could never be read again.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if end and file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _ends_a_trial(log: dict[str, Any]) -> bool:
    return "state" in log and TrialState(log["state"]).is_finished()
