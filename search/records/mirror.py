"""A copy of a results folder at a URI, for a machine that may be taken away.

The search always works on a local folder (the study is a file that is locked and appended to). If `--results` is a URI,
new content is uploaded after every trial, and every few minutes during a long one, through pyarrow's filesystems:
s3://, gs://, hdfs://. While trials run, a separate thread uploads it, so that no slot waits.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyarrow import fs

from search.files import replace_bytes
from search.records.folder import CHECKPOINT_PATTERN, SCRATCH, SPACE, STUDY
from trainables.contract import UserError

LAST_TRIES = 3  # attempts at the last push of a search
PAUSE_S = 5.0  # between two of them


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


@dataclass
class Mirror:
    """The folder at `uri`, a copy of the local folder `results`; `every_s`: seconds between uploads in a trial."""

    results: Path
    uri: str
    every_s: float = 300.0

    def __post_init__(self) -> None:
        self._filesystem, self._root = _open(self.uri)
        self._sent: dict[str, tuple[int, int]] = {}  # by relative path: `_changed` of the version sent last
        self._tried = time.monotonic()
        self._wanted, self._follows = threading.Event(), False

    def __reduce__(self) -> tuple[type[Mirror], tuple[Path, str, float]]:
        """Pickle the arguments: Tune keeps a copy of its callbacks, which hold this mirror, and never uses it."""
        return Mirror, (self.results, self.uri, self.every_s)

    def check(self) -> None:
        """Raise UserError if the URI cannot be written to, or a push would overwrite what is there."""
        try:
            self._filesystem.create_dir(self._root, recursive=True)
            self._recognise()
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be written to: {error}") from None

    def begin(self) -> None:
        """Push for the first time; raises UserError if that fails, before any trial has run in vain."""
        self.check()
        try:
            self._push()
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be written to: {error}") from None

    def _recognise(self) -> None:
        """Mark checkpoints stored before an interruption as sent, since they are most of the bytes.

        Raises UserError if the store has another search, or more of this one, which a push would overwrite.
        """
        for found in self._filesystem.get_file_info(fs.FileSelector(self._root, allow_not_found=True, recursive=True)):
            path = self.results / found.path.removeprefix(f"{self._root}/")
            if path.name == STUDY:
                here = _length(fs.LocalFileSystem(), str(path))
                if found.size > here > 0 and _same_begin(self._filesystem, found.path, path, here):
                    raise UserError(
                        f"{self.uri} has more of this search than {self.results}; go on from there, with --resume "
                        f"{self.uri}"
                    )
                if found.size > here or not _same_begin(self._filesystem, found.path, path, found.size):
                    raise UserError(
                        f"{self.uri} holds a search already; go on with it by --resume, or choose another --name"
                    )
            if path.match(CHECKPOINT_PATTERN) and path.exists() and path.stat().st_size == found.size:
                self._sent[path.relative_to(self.results).as_posix()] = _changed(path)

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Make `push` return at once in this context, while another thread uploads; the thread has ended on exit."""
        over = threading.Event()

        def follow() -> None:
            while self._wanted.wait() and not over.is_set():
                self._wanted.clear()
                self._send_new()

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
        """Upload every file that has changed since it was sent. A store that is unreachable does not end the search."""
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
        self._send_new("--resume sends the rest")

    def _send_new(self, then: str = "will try again after the next trial") -> bool:
        """Push; returns whether that worked, and prints why not and what happens then."""
        try:
            self._push()
        except OSError as error:
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
        studies = {path: (_changed(path), path.read_bytes()) for path in self._files() if path.name == STUDY}
        here = {path for path in self._files() if path not in studies}
        for path in sorted(here):
            try:
                self._send(path, _changed(path))
            except FileNotFoundError:
                if path.exists():
                    raise
                continue  # a slot has replaced it with a newer checkpoint
        try:
            self._drop_superseded(here)
        finally:  # a store may refuse to delete anything
            for path, (changed, content) in studies.items():
                self._send(path, changed, content)

    def _files(self) -> Iterator[Path]:
        """Yield all files except Ray's, whose folders come and go, and those being written."""
        for folder, inside, names in os.walk(self.results):
            inside[:] = [name for name in inside if name != SCRATCH]
            yield from (Path(folder, name) for name in names if not name.startswith("."))

    def _send(self, path: Path, changed: tuple[int, int], content: bytes | None = None) -> None:
        """Send a file unless its version `changed` was sent already. content: what to send in its place."""
        name = path.relative_to(self.results).as_posix()
        if self._sent.get(name) == changed:
            return
        target = f"{self._root}/{name}"
        self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        if content is None:
            fs.copy_files(str(path), target, destination_filesystem=self._filesystem)
        else:
            with self._filesystem.open_output_stream(target) as there:
                there.write(content)
        self._sent[name] = changed

    def _drop_superseded(self, here: Set[Path]) -> None:
        """Delete from the store the sent checkpoints that are not `here`, except the last one sent of each trial.

        here: the files as listed before the metrics were sent, which therefore tell of what superseded the others.
        """
        sent = [name for name in self._sent if Path(name).match(CHECKPOINT_PATTERN)]
        of_trial = Counter(Path(name).parent for name in sent)
        for name in sent:
            trial = Path(name).parent
            if of_trial[trial] > 1 and self.results / name not in here:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.delete_file(f"{self._root}/{name}")
                del self._sent[name]
                of_trial[trial] -= 1


def _changed(path: Path) -> tuple[int, int]:
    """Return what differs between two versions of a file: the time of its last change, and its size."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


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
        return bool(filesystem.get_file_info(f"{root}/{SPACE}").type != fs.FileType.NotFound)
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None


def fetch(uri: str, into: Path, parts: Sequence[str] = ()) -> Path:
    """Copy a results folder mirrored to `uri`, or only `parts` of it (files or folders), into `into`; returns its path.

    An existing copy of the whole stays as it is, unless the store has more of the search. Raises UserError if there is
    no results folder at `uri`, the store cannot be reached, or the local folder holds another search.
    """
    filesystem, root = _open(uri)
    results = into / root.rpartition("/")[2]
    if not holds_search(uri):
        raise UserError(f"{uri}: there is no {SPACE} here; name the folder of an earlier search")
    try:
        if parts:
            for part in parts:
                _copy(filesystem, f"{root}/{part}", results / part)
        else:
            there, here = _length(filesystem, f"{root}/{STUDY}"), _length(fs.LocalFileSystem(), str(results / STUDY))
            if here > 0 and not _same_begin(filesystem, f"{root}/{STUDY}", results / STUDY, min(there, here)):
                raise UserError(
                    f"{results} holds a different search from {uri}; move it away, or work in another folder"
                )
            if there > here:
                _copy_all(filesystem, root, results)
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None
    return results


def _copy_all(filesystem: fs.FileSystem, root: str, results: Path) -> None:
    """Copy a results folder. Its study is read first and written last, so that all it mentions is there when it is."""
    with filesystem.open_input_stream(f"{root}/{STUDY}") as there:
        study = there.read()
    for found in filesystem.get_file_info(fs.FileSelector(root)):
        if found.base_name != STUDY:
            _copy(filesystem, found.path, results / found.base_name)
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
        return bool(there.read(length) == here.read(length))


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, root = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be opened: {error}") from None
    return filesystem, root.rstrip("/")
