"""A copy of a results folder at a URI, for a machine that may be taken away.

The search always works on a local folder (the study is a file that is locked and appended to). If `--results` is a URI,
new content is uploaded after a trial, and every few minutes during a long one, through pyarrow's filesystems: s3://,
gs://, hdfs://. While trials run, a separate thread uploads it, so that no slot waits; trials that end soon after an
upload share the next one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyarrow import fs

from search.files import replace_bytes
from search.records.folder import CHECKPOINT_PATTERN, PRINTED, SCRATCH, SPACE, STUDY, running
from trainables.contract import UserError

LAST_TRIES = 3  # attempts at the last push of a search
PAUSE_S = 5.0  # between two of them
SELDOM = 10  # ratio of the pause between uploads to an upload's duration: each looks at all files, and sends the study
NOT_SENT = (".", f"{STUDY}.")  # beginnings of names: files being written, and the study's lock
# Files of a trial whose content their size tells: they only grow, or their name says the epoch. Others are replaced.
SIZE_TELLS = (CHECKPOINT_PATTERN, "events.out.tfevents.*", "metrics.jsonl", PRINTED)
CLOCKS_S = 60  # by which the clock here may be behind the store's

Version = tuple[int, int]  # of a file: the time of its last change in ns, and its size


def local(text: str) -> Path | None:
    """Return the local folder that `text` names; None for a URI elsewhere.

    Raises UserError for a file:// URI that names another machine.
    """
    if is_uri(text):
        return None
    if not text.startswith("file://"):
        return Path(text)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{text} is no folder here: {parts.netloc!r} is read as a host; write file:///ABSOLUTE/PATH")
    return Path(unquote(parts.path))


def is_uri(text: str) -> bool:
    """Return whether `text` is a URI that has to be mirrored."""
    return "://" in text and not text.startswith("file://")


def below(uri: str, name: str) -> str:
    """Return the URI of `name` in the folder at `uri`, keeping options of the store such as ?region=..."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def above(uri: str) -> str:
    """Return the URI of the folder that contains `uri`, keeping options of the store."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


class Overtaken(UserError):
    """Another process has gone on with a search, from its mirror."""


@dataclass
class Mirror:
    """The folder at `uri`, a copy of the local folder `results`.

    every_s: seconds between uploads in a trial. again: what a person is told to do if the last upload fails.
    """

    results: Path
    uri: str
    every_s: float = 300.0
    again: str = "--resume"

    def __post_init__(self) -> None:
        self._filesystem, self._root = _open(self.uri)
        self._sent: dict[str, Version] = {}  # by relative path: the version sent last
        self._made: set[str] = set()  # folders that the store has
        self._stored: dict[str, int] = {}  # by study: the longest that was in the store at `check`, or was sent
        self._overtaken: Overtaken | None = None
        self._tried = time.monotonic()
        self._wanted, self._follows = threading.Event(), False

    def __reduce__(self) -> tuple[type[Mirror], tuple[Path, str, float, str]]:
        """Pickle the arguments: Tune keeps a copy of its callbacks, which hold this mirror, and never uses it."""
        return Mirror, (self.results, self.uri, self.every_s, self.again)

    def check(self) -> None:
        """Raise UserError if the URI cannot be written to, or a push would overwrite what is there."""
        try:
            self._make(self._root)
            self._recognise()
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be written to: {error}") from None

    def begin(self) -> None:
        """Push for the first time, after `check`; raises UserError if it fails, before a trial has run in vain."""
        try:
            self._push()
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be written to: {error}") from None

    def _recognise(self) -> None:
        """Mark as sent what trials stored before an interruption, if it has not changed here since.

        Raises UserError if the store has another search, or more of this one, which a push would overwrite.
        """
        here = dict(self._files())
        for found in self._filesystem.get_file_info(fs.FileSelector(self._root, allow_not_found=True, recursive=True)):
            name = found.path.removeprefix(f"{self._root}/")
            if found.type == fs.FileType.Directory:
                self._made.add(found.path)
            elif found.base_name == STUDY:
                self._check_study(found, self.results / name)
                self._stored[name] = found.size
            elif name in here and _is_sent(name, here[name], found):
                self._sent[name] = here[name]

    def _check_study(self, found: fs.FileInfo, path: Path) -> None:
        """Raise UserError if a stored study is not the beginning of the one at `path`."""
        here = _length(fs.LocalFileSystem(), str(path))
        if found.size > here > 0 and _same_begin(self._filesystem, found.path, path, here):
            raise UserError(
                f"{self.uri} has more of this search than {self.results}; go on from there, with --resume {self.uri}"
            )
        if found.size > here or not _same_begin(self._filesystem, found.path, path, found.size):
            raise UserError(f"{self.uri} holds a search already; go on with it by --resume, or choose another --name")

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Make `push` return at once in this context, while another thread uploads; the thread has ended on exit.

        That may be before the last of what was pushed has been sent.
        """
        over = threading.Event()

        def follow() -> None:
            while self._wanted.wait() and not over.is_set():
                self._wanted.clear()
                began = time.monotonic()
                try:
                    self._send_new()
                except Overtaken as error:
                    self._overtaken = error  # for the next call of `push` to raise
                over.wait(pause_s(time.monotonic() - began, self.every_s))

        sender = threading.Thread(target=follow, daemon=True, name="mirror")
        sender.start()
        self._follows = True
        try:
            yield
        finally:
            self._follows = False
            over.set()
            self._wanted.set()
            sender.join()
            self._wanted.clear()

    def push(self) -> None:
        """Upload every file that has changed since it was sent. A store that is unreachable does not end the search.

        Raises Overtaken if the store has more of the search than this process has sent; so does `push_last`.
        """
        if self._overtaken is not None:
            raise self._overtaken
        if self._follows:
            self._wanted.set()
        else:
            self._send_new()

    def push_last(self) -> None:
        """Push at the end of a search; tried `LAST_TRIES` times, as no other push follows."""
        for _ in range(LAST_TRIES - 1):
            if self._send_new(f"will try again in {PAUSE_S:g} s"):
                return
            time.sleep(PAUSE_S)
        self._send_new(f"{self.again} sends the rest")

    def _send_new(self, then: str = "will try again after the next trial") -> bool:
        """Push; returns whether that worked, and prints why not and what happens then."""
        try:
            self._push()
        except OSError as error:
            self._made.clear()  # the store may have lost some
            print(f"{self.uri}: not up to date, {error}; {then}", flush=True)
            return False
        return True

    def push_if_due(self) -> None:
        """Push, unless the last attempt was less than `every_s` seconds ago."""
        if time.monotonic() - self._tried >= self.every_s:
            self.push()

    def _push(self) -> None:
        self._tried = time.monotonic()
        # The study is read first and sent last, as it was then: if the machine dies in between, every trial that the
        # stored study calls finished is complete, and none of its superseded checkpoints is left there.
        here, studies = dict[str, Version](), dict[str, tuple[Version, bytes]]()
        unchanged: list[str] = []  # studies
        for name, version in self._files():
            if _base(name) != STUDY:
                here[name] = version
            elif self._sent.get(name) == version:
                unchanged.append(name)
            else:
                studies[name] = version, (self.results / name).read_bytes()
        new = sorted(name for name, version in here.items() if self._sent.get(name) != version)
        has_more = (name for name in unchanged if any(file.startswith(name.removesuffix(STUDY)) for file in new))
        for name in [*studies, *has_more]:
            self._check_alone(name)
        for name in new:
            try:
                self._send(name, here[name])
            except FileNotFoundError:
                if (self.results / name).exists():
                    raise
                continue  # a slot has replaced it with a newer checkpoint
        try:
            self._drop_superseded(here)
        finally:  # a store may refuse to delete anything
            for name, (version, content) in studies.items():
                self._send(name, version, content)

    def _check_alone(self, name: str) -> None:
        """Raise Overtaken if a stored study is longer than any that this process has found or tried to send."""
        if _length(self._filesystem, f"{self._root}/{name}") > self._stored.get(name, -1):
            raise Overtaken(f"{self.uri} is written to by another process, which has gone on with this search")

    def _files(self) -> Iterator[tuple[str, Version]]:
        """Yield all files by their relative paths, except Ray's, whose folders come and go, and `NOT_SENT`.

        A folder's files come before its folders are looked into: a study before its trials.
        """
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self.results / folder) as found:
                    entries = list(found)
            except FileNotFoundError:
                continue
            for entry in entries:
                if entry.is_dir():
                    if entry.name != SCRATCH and not entry.is_symlink():
                        folders.append(f"{folder}{entry.name}/")
                elif not entry.name.startswith(NOT_SENT):
                    try:
                        now = entry.stat()
                    except FileNotFoundError:
                        continue
                    yield f"{folder}{entry.name}", (now.st_mtime_ns, now.st_size)

    def _send(self, name: str, version: Version, content: bytes | None = None) -> None:
        """Send a file. version: of the file, or an earlier one; content: what to send in its place."""
        target = f"{self._root}/{name}"
        self._make(target.rpartition("/")[0])
        if content is None:
            fs.copy_files(str(self.results / name), target, destination_filesystem=self._filesystem)
        else:
            self._stored[name] = max(len(content), self._stored.get(name, -1))  # even if only a part gets there
            with self._filesystem.open_output_stream(target) as there:
                there.write(content)
        self._sent[name] = version

    def _make(self, folder: str) -> None:
        """Make a folder in the store, once: a bucket takes a request for each folder above it, too."""
        if folder not in self._made:
            self._filesystem.create_dir(folder, recursive=True)
            self._made.add(folder)

    def _drop_superseded(self, here: Container[str]) -> None:
        """Delete from the store the sent checkpoints that are not `here`, except the last one sent of each trial.

        here: the files as listed before the metrics were sent, which therefore tell of what superseded the others.
        """
        sent = [name for name in self._sent if fnmatchcase(_base(name), CHECKPOINT_PATTERN)]
        of_trial = Counter(name.rpartition("/")[0] for name in sent)
        for name in sent:
            trial = name.rpartition("/")[0]
            if of_trial[trial] > 1 and name not in here:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.delete_file(f"{self._root}/{name}")
                del self._sent[name]
                of_trial[trial] -= 1


def pause_s(took_s: float, every_s: float) -> float:
    """Return the seconds to wait after an upload; the next can begin `every_s` seconds after this one began."""
    return max(0.0, min(SELDOM * took_s, every_s - took_s))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _is_sent(name: str, here: Version, there: fs.FileInfo) -> bool:
    """Return whether a file of a trial is in the store as it is here, judged by size and time; if in doubt, False.

    A file that is replaced may keep its size, as config.json does in population-based training: it must have been sent
    `CLOCKS_S` after its last change. For the others whole seconds suffice, since stores tell no more. `fetch` makes the
    times equal.
    """
    parts, (changed_ns, size) = name.split("/"), here
    if parts[-3:-2] != ["trials"] or size != there.size or there.mtime_ns is None:
        return False
    after_s = 0 if any(fnmatchcase(parts[-1], pattern) for pattern in SIZE_TELLS) else CLOCKS_S
    return changed_ns == there.mtime_ns or changed_ns // 10**9 + after_s <= there.mtime_ns // 10**9


def folders_at(uri: str) -> list[str]:
    """Return the names of the folders in `uri`; empty if it does not exist. Raises UserError if it cannot be read."""
    filesystem, root = _open(uri)
    try:
        found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None
    return [item.base_name for item in found if item.type == fs.FileType.Directory]


def holds_search(uri: str) -> bool:
    """Return whether there is a results folder at `uri`; raises UserError if the store cannot be reached."""
    filesystem, root = _open(uri)
    try:
        return filesystem.get_file_info(f"{root}/{SPACE}").type != fs.FileType.NotFound
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None


def fetch(uri: str, into: Path, parts: Sequence[str] = ()) -> Path:
    """Copy a results folder mirrored to `uri`, or only `parts` of it (files or folders), into `into`; returns its path.

    An existing copy of the whole stays as it is, unless the store has more of the search. Raises UserError if there is
    no results folder at `uri`, the store cannot be reached, or the local folder holds another search or is in use.
    """
    filesystem, root = _open(uri)
    results = into / root.rpartition("/")[2]
    if not holds_search(uri):
        raise UserError(f"{uri}: there is no {SPACE} here; name the folder of an earlier search")
    try:
        if parts:
            for part in parts:
                _copy(filesystem, f"{root}/{part}", results / part)
        elif _has_more(filesystem, root, results, uri):
            results.mkdir(parents=True, exist_ok=True)
            with running(results):  # else two commands might fetch it, and one of them replace what the other writes
                if _has_more(filesystem, root, results, uri):
                    _copy_all(filesystem, root, results)
    except BlockingIOError:
        raise UserError(f"{results}: another process is running this search, or fetching it; wait for it") from None
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None
    return results


def _has_more(filesystem: fs.FileSystem, root: str, results: Path, uri: str) -> bool:
    """Return whether the store has more of a search than `results`; raises UserError if that is another search."""
    there, here = _length(filesystem, f"{root}/{STUDY}"), _length(fs.LocalFileSystem(), str(results / STUDY))
    if here > 0 and not _same_begin(filesystem, f"{root}/{STUDY}", results / STUDY, min(there, here)):
        raise UserError(f"{results} holds a different search from {uri}; move it away, or work in another folder")
    return there > here


def _copy_all(filesystem: fs.FileSystem, root: str, results: Path) -> None:
    """Copy a results folder. Its study is read first and written last, so that all it mentions is there when it is.

    The copies get the times of what is in the store, by which a mirror recognises them.
    """
    with filesystem.open_input_stream(f"{root}/{STUDY}") as there:
        study = there.read()
    stored = {
        found.path.removeprefix(f"{root}/"): found
        for found in filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    }
    for name, found in stored.items():
        if "/" not in name and name != STUDY:
            _copy(filesystem, found.path, results / name)
    for name, found in stored.items():
        if found.type == fs.FileType.File and found.mtime_ns is not None:
            with contextlib.suppress(OSError):
                os.utime(results / name, ns=(found.mtime_ns, found.mtime_ns))
    replace_bytes(results / STUDY, study)


def _copy(filesystem: fs.FileSystem, source: str, target: Path) -> None:
    """Copy a file or a folder; does nothing if there is none."""
    kind = filesystem.get_file_info(source).type
    if kind != fs.FileType.NotFound:
        (target if kind == fs.FileType.Directory else target.parent).mkdir(parents=True, exist_ok=True)
        fs.copy_files(source, str(target), source_filesystem=filesystem)


def _length(filesystem: fs.FileSystem, path: str) -> int:
    """Return the size of a study, -1 if there is none. A study only grows, so the longer one is the newer."""
    found = filesystem.get_file_info(path)
    return found.size if found.type == fs.FileType.File else -1


def _same_begin(filesystem: fs.FileSystem, study: str, copy: Path, length: int) -> bool:
    """Return whether a study and its copy agree in their first `length` bytes."""
    if length <= 0:
        return True
    with filesystem.open_input_stream(study) as there, copy.open("rb") as here:
        return there.read(length) == here.read(length)


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, root = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be opened: {error}") from None
    return filesystem, root.rstrip("/")
