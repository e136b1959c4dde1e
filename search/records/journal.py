"""The study's journal file: Optuna's, forced to disk when a trial ends and not at every entry."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import LOCK_FILE_SUFFIX
from optuna.trial import TrialState


class StudyJournal(JournalFileBackend):
    """Optuna's journal backend, changed to force only entries that end a trial to disk.

    Forcing every entry, as Optuna does, takes a few milliseconds each, some twenty times a trial. A written entry
    survives the death of this process. Only the death of the machine requires more, and then it suffices that no ended
    trial is lost.
    """

    def __init__(self, file_path: str) -> None:
        self._journal_path = file_path
        self._journal_lock = JournalFileSymlinkLock(file_path)
        super().__init__(file_path, lock_obj=self._journal_lock)
        self._has_appended = False

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        if not os.path.exists(self._journal_path):  # a new file would be a journal without a beginning
            raise FileNotFoundError(errno.ENOENT, "Deleted, moved or unmounted meanwhile", self._journal_path)
        self._journal_lock.acquire()
        try:
            with open(self._journal_path, "ab+") as file:
                _cut_torn_line(file, whole=self._has_appended)
                self._has_appended = True
                file.write(lines.encode())
                if any(_ends_a_trial(log) for log in logs):
                    file.flush()
                    os.fsync(file.fileno())
        finally:
            self._journal_lock.release()


def drop_lock(file: Path) -> None:
    """Remove the lock left by a process that was killed while writing; for the only process that may write now.

    Optuna waits half a minute for such a lock. It is a symlink to the journal's former path: if the folder has been
    moved since, Optuna finds no age there and waits forever.
    """
    with contextlib.suppress(OSError):  # if nothing can be written here, the next write says so
        file.with_name(file.name + LOCK_FILE_SUFFIX).unlink()


def _cut_torn_line(file: BinaryIO, whole: bool) -> None:
    """Remove an entry that is incomplete because the machine died, or its disk was full, while it was written.

    whole: only look for half a line; of a line that a dead machine wrote, the middle may be what is missing. The
    lock must be held, so that nobody else writes. An entry appended after a torn one could never be read.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if end and (not whole or file.read() != b"\n"):
        file.seek(0)
        content = file.read()
        begin = content.rfind(b"\n", 0, -1) + 1
        if not _is_entry(content[begin:]):
            file.truncate(begin)


def _is_entry(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def damaged_line(file: Path) -> int:
    """Return the number of the first line, from 1, that is no entry; 0 if all are."""
    with open(file, "rb") as lines:
        return next((number for number, line in enumerate(lines, 1) if not _is_entry(line)), 0)


def _ends_a_trial(log: dict[str, Any]) -> bool:
    return "state" in log and TrialState(log["state"]).is_finished()
