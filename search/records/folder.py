"""The files of a search: where each one lies, and how it is written so that an interruption leaves none torn.

In a long trial, a checkpoint is deleted only after the next one and its report have been forced to disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.files import replace_bytes, replace_text
from trainables.contract import UserError

SPACE, STUDY, TRIALS_CSV, BEST, REPORT = "space.yaml", "study.journal", "trials.csv", "best.yaml", "report.html"
ERROR, PRINTED = "error.txt", "output.txt"  # in a trial's folder
_COPIED = ".copied"  # there, too
LOCK = ".lock"  # there, and locked, while a process runs the search; one that was killed leaves it there
SCRATCH = ".ray"  # Ray's own files; removed when the search ends
_CHECKPOINT = "checkpoint-{:04d}.pt"  # numbered by epochs completed; torch.load returns the trainable's own state
CHECKPOINT_PATTERN = "checkpoint-*.pt"
_TAIL_BYTES = 8192
LOOK_S = 2.0  # at most, for which somebody who only looks may hold the lock that a search wants
LONG_S = 60.0  # trials longer than this force checkpoints to disk, which takes about 10 ms for a small one


@dataclass(frozen=True)
class Saved:
    """A checkpoint file and the number of epochs completed by then."""

    epoch: int
    path: Path


class TrialFolder:
    """The folder `trials/<number>` of a results folder."""

    def __init__(self, results: Path, number: int) -> None:
        self.path = results / "trials" / f"{number:04d}"

    def _made(self) -> Path:
        """Return the folder, made if need be; if the results folder is missing it has gone, and is not made again."""
        for folder in (self.path.parent, self.path):
            folder.mkdir(exist_ok=True)
        return self.path

    def write_config(self, config: Mapping[str, Any]) -> None:
        replace_text(self._made() / "config.json", json.dumps(config, indent=2, default=str) + "\n")

    def write_error(self, reason: str, trace: str = "") -> None:
        """Record why an attempt at the trial failed: a line, then the traceback."""
        replace_text(self._made() / ERROR, f"{reason}\n\n{trace}")

    def read_error(self) -> str | None:
        """Return the reason and the traceback of the last failed attempt; None if none failed."""
        return self._read(ERROR)

    def _read(self, name: str) -> str | None:
        """Return the text of a file; None if there is none."""
        try:
            return (self.path / name).read_text("utf-8")
        except FileNotFoundError:
            return None

    def append_printed(self, text: str) -> None:
        """Append what the trial printed, if anything; ignores OSError: a full disk should not fail the trial here."""
        if text:
            with contextlib.suppress(OSError), open(self._made() / PRINTED, "ab") as file:
                file.write(text.encode())

    def last_printed(self, lines: int) -> list[str]:
        """Return the last `lines` lines that the trial printed; fewer if they are long, none if it printed nothing."""
        return self._end_of(PRINTED, _TAIL_BYTES).decode("utf-8", "replace").splitlines()[-lines:]

    def _end_of(self, name: str, most_bytes: int) -> bytes:
        """Return the end of a file; nothing if there is none."""
        with contextlib.suppress(FileNotFoundError), open(self.path / name, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most_bytes))
            return file.read()
        return b""

    def write_divergence(self, found: Mapping[str, Any]) -> None:
        """Write the post-mortem of a diverged trial, which must be JSON-compatible."""
        replace_text(self._made() / "divergence.json", json.dumps(found, indent=2, allow_nan=False) + "\n")

    def read_divergence(self) -> dict[str, Any] | None:
        """Return the post-mortem of a diverged trial; None for any other, or if the machine died as it was written."""
        with contextlib.suppress(ValueError):
            return json.loads(self._read("divergence.json") or "null")
        return None

    def drop_divergence(self) -> None:
        """Remove the post-mortem of an end that is not on record: the trial goes on, and may end otherwise."""
        (self.path / "divergence.json").unlink(missing_ok=True)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with open(self._made() / "metrics.jsonl", "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read() not in (b"", b"\n")  # the machine lost power while the last line was being written
            file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return one row per epoch; if epochs were rerun after an interruption, only those of the later attempt.

        Raises UserError if the file cannot be opened.
        """
        file = self.path / "metrics.jsonl"
        try:
            lines = file.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{file}: cannot be opened: {error.strerror}") from None
        rows: list[dict[str, Any]] = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # a torn line
                continue
            while rows and rows[-1]["epoch"] >= row["epoch"]:
                rows.pop()
            rows.append(row)
        return rows

    def row(self, epoch: int) -> dict[str, Any] | None:
        """Return the row of that epoch, or None."""
        return next((row for row in self.read_metrics() if row["epoch"] == epoch), None)

    def write_checkpoint(self, epoch: int, state: bytes) -> None:
        """Write a checkpoint beside the previous one, which is needed until the report of this one is on record."""
        replace_bytes(self._made() / _CHECKPOINT.format(epoch), state)

    def recorded(self) -> int:
        """Return the last reported epoch that is on record; 0 before the first."""
        return int(self._last_row().get("epoch", 0))

    def _last_row(self) -> dict[str, Any]:
        """Return the last row; empty before the first. It is asked for after each epoch, and most rows are short."""
        for most_bytes in (_TAIL_BYTES, sys.maxsize):
            end = self._end_of("metrics.jsonl", most_bytes)
            lines = end if len(end) < most_bytes else end.partition(b"\n")[2]  # what is left of a line may be JSON, too
            for line in reversed(lines.splitlines()):
                with contextlib.suppress(ValueError):  # torn
                    return json.loads(line)
        return {}

    def keep_checkpoint(self, epochs: int) -> None:
        """Delete all checkpoints except the newest that has completed at most `epochs` epochs."""
        for torn in self.path.glob(f".{CHECKPOINT_PATTERN}.*"):  # a slot was killed while writing
            torn.unlink(missing_ok=True)
        saved = _checkpoints(self.path)
        kept = max((item.epoch for item in saved if item.epoch <= epochs), default=None)
        superseded = [item.path for item in saved if item.epoch != kept]
        if superseded and self._is_long():  # their replacement and its report must be on disk before they go
            with contextlib.suppress(FileNotFoundError):
                _force(self.path / "metrics.jsonl")
            if kept is not None:
                _force(self.path / _CHECKPOINT.format(kept))
            with contextlib.suppress(OSError):  # some network file systems cannot force a folder to disk
                _force(self.path)
        for path in superseded:
            path.unlink(missing_ok=True)

    def _is_long(self) -> bool:
        """Return whether the trial has run so long that a power loss would cost more than forcing each checkpoint."""
        return self._last_row().get("seconds", 0.0) > LONG_S

    def checkpoint(self) -> Saved | None:
        return last_checkpoint(self.path)

    def write_copied(self, what: str) -> None:
        """Note which checkpoint of another trial was last copied into this folder."""
        replace_text(self._made() / _COPIED, what)

    def read_copied(self) -> str | None:
        """Return what was last noted of a copied checkpoint, or None."""
        return self._read(_COPIED)

    def set_torn_aside(self) -> list[str]:
        """Rename checkpoints that cannot be read, so that an earlier one is used; returns their former names."""
        torn = [item.path for item in _checkpoints(self.path) if not is_whole(item.path)]
        for path in torn:
            path.rename(path.with_suffix(".torn"))
        return [path.name for path in torn]

    def begin_from(self, other: TrialFolder) -> int:
        """Copy another trial's last checkpoint and its metrics up to there; returns its number of epochs, or 0."""
        self.clear()
        saved = other.checkpoint()
        if saved is None:
            return 0
        self.write_checkpoint(saved.epoch, saved.path.read_bytes())
        for row in other.read_metrics():
            if row["epoch"] <= saved.epoch:
                self.append_metrics(row)
        return saved.epoch

    def clear(self) -> None:
        """Remove leftovers of a trial that the study has no record of."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def running(results: Path, only_look: bool = False) -> Iterator[bool]:
    """Lock a folder for the process that runs its search; raises BlockingIOError if another process keeps the lock.

    The lock ends with the process. Yields False if no process is kept out: there is no file to lock and none can be
    made, or the file system has no locks. only_look: take a shared lock, which does not conflict with others that only
    look, and make no file.
    """
    path, kind, wait_s = results / LOCK, *((fcntl.LOCK_SH, 0.0) if only_look else (fcntl.LOCK_EX, LOOK_S))
    with contextlib.ExitStack() as held:
        alone = again = True
        while again:
            opened = _open_lock(path, create=not only_look)
            if opened is None:
                yield False
                return
            held.callback(os.close, opened)
            alone = _lock(opened, kind, wait_s)
            again = alone and not only_look and not _is_at(path, opened)  # who held it before has removed it since
        if alone and not only_look:
            held.callback(_remove, path)
        yield alone


def _open_lock(path: Path, create: bool) -> int | None:
    """Open the file to lock; None if there is none, or it cannot be read.

    NFS tells no other machine of a lock on a folder, and locks a file exclusively only if it is open for writing.
    """
    if create:
        with contextlib.suppress(OSError):  # in a folder that cannot be written to, the search says so itself
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY)
    return None


def _is_at(path: Path, opened: int) -> bool:
    """Return whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(opened), path.stat())
    except OSError:
        return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _lock(opened: int, kind: int, wait_s: float) -> bool:
    """Lock an open file; returns False on a file system without locks.

    Raises BlockingIOError if somebody else holds the lock for longer than `wait_s` seconds.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(opened, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.05)
        except OSError:
            return False


def is_running(results: Path) -> bool:
    """Return whether a process, perhaps this one, runs the search of a folder; False if that cannot be determined."""
    try:
        with running(results, only_look=True):
            return False
    except BlockingIOError:
        return True


def last_checkpoint(folder: Path) -> Saved | None:
    """Return the newest checkpoint in a folder, or None."""
    return max(_checkpoints(folder), key=lambda item: item.epoch, default=None)


def _checkpoints(folder: Path) -> list[Saved]:
    return [Saved(int(path.stem.rpartition("-")[2]), path) for path in folder.glob(CHECKPOINT_PATTERN)]


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint is intact: torch.save writes an archive with a checksum for each part."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a torn archive may point before the beginning of the file
            raise
        return False
    except MemoryError:
        raise
    except Exception:  # what zipfile raises depends on where the archive is torn
        return False


def _force(path: Path) -> None:
    """Force the content of a file, or the names in a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
