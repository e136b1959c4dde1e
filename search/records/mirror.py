"""A copy of a results folder at a URI, for a machine that may be taken away.

The search always works on a local folder (the study is a file that is locked and appended to). Where `--results` is a
URI, what is new goes there after every trial, and every few minutes of a long one, by pyarrow's filesystems: s3://,
gs://, hdfs://. While trials run, a thread of its own sends it, so that no slot waits for an upload.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyarrow import fs

from search.files import replace_bytes
from search.records.folder import CHECKPOINT_PATTERN, SCRATCH, SPACE, STUDY
from trainables.contract import UserError


def local(text: str) -> Path | None:
    """The folder on this machine that `text` names; None for a URI elsewhere."""
    if is_uri(text):
        return None
    if not text.startswith("file://"):
        return Path(text)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{text} names no folder: {parts.netloc!r} stands for a machine; write file:///ABSOLUTE/PATH")
    return Path(unquote(parts.path))


def is_uri(text: str) -> bool:
    """Whether `text` names a place that has to be mirrored."""
    return "://" in text and not text.startswith("file://")


def below(uri: str, name: str) -> str:
    """The URI of what is called `name` in the folder at `uri`, which may end in options for the store: ?region=..."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def above(uri: str) -> str:
    """The URI of the folder that holds what is at `uri`."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


@dataclass
class Mirror:
    """The folder at `uri` that follows the local folder `results`; `every_s`: while trials run."""

    results: Path
    uri: str
    every_s: float = 300.0

    def __post_init__(self) -> None:
        self._filesystem, self._root = _open(self.uri)
        self._sent: dict[str, float] = {}  # by relative path: when the file was changed that was sent last
        self._tried = time.monotonic()
        self._wanted, self._follows = threading.Event(), False

    def check(self) -> None:
        """Raises UserError where nothing can be kept, or where it would overwrite what is there."""
        try:
            self._filesystem.create_dir(self._root, recursive=True)
            self._recognise()
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be written to: {error}") from None

    def begin(self) -> None:
        """The first push; raises UserError where nothing can be kept, before anything has been computed for nothing."""
        self.check()
        try:
            self._push()
        except OSError as error:
            raise UserError(f"{self.uri}: cannot be written to: {error}") from None

    def _recognise(self) -> None:
        """Checkpoints that are there from before an interruption are not sent again: they are most of the bytes.

        Raises UserError where there is another search, or more of this one, which a push would overwrite.
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
                self._sent[path.relative_to(self.results).as_posix()] = path.stat().st_mtime

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """In here `push` returns at once, and another thread sends what is new; it has ended when this is left."""
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
        """Send every file that has changed since it was sent. A store that cannot be reached does not end a search."""
        if self._follows:
            self._wanted.set()
        else:
            self._send_new()

    def _send_new(self) -> None:
        try:
            self._push()
        except OSError as error:
            print(f"{self.uri}: not up to date, {error}; tried again after the next trial", flush=True)

    def push_if_due(self) -> None:
        """Push, unless that was tried less than `every_s` ago."""
        if time.monotonic() - self._tried >= self.every_s:
            self.push()

    def _push(self) -> None:
        self._tried = time.monotonic()
        # A study is read first and sent last, as it was then: should the machine go in between, all that it calls
        # finished is there.
        studies = {path: (_changed(path), path.read_bytes()) for path in self._files() if path.name == STUDY}
        for path in sorted(path for path in self._files() if path not in studies):
            try:
                self._send(path, _changed(path))
            except FileNotFoundError:
                if path.exists():
                    raise
                continue  # a slot has put a newer checkpoint in its place
        for path, (changed, content) in studies.items():
            self._send(path, changed, content)
        self._drop_superseded()

    def _files(self) -> Iterator[Path]:
        """All but Ray's, whose folders come and go, and what is being written."""
        for folder, inside, names in os.walk(self.results):
            inside[:] = [name for name in inside if name != SCRATCH]
            yield from (Path(folder, name) for name in names if not name.startswith("."))

    def _send(self, path: Path, changed: float, content: bytes | None = None) -> None:
        """A file, unless it was sent as it is since it `changed`. content: what to send in its place."""
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

    def _drop_superseded(self) -> None:
        """Checkpoints that were sent and have gone here go there too, but for the last that was sent of a trial."""
        sent = [name for name in self._sent if Path(name).match(CHECKPOINT_PATTERN)]
        of_trial = Counter(Path(name).parent for name in sent)
        for name in sent:
            trial = Path(name).parent
            if of_trial[trial] > 1 and not (self.results / name).exists():
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.delete_file(f"{self._root}/{name}")
                del self._sent[name]
                of_trial[trial] -= 1


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def folders_at(uri: str) -> list[str]:
    """Names of the folders in that at `uri`; none where there is no such. Raises UserError as `fetch` does."""
    filesystem, root = _open(uri)
    try:
        found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None
    return [item.base_name for item in found if item.type == fs.FileType.Directory]


def holds_search(uri: str) -> bool:
    """Whether there is a results folder at `uri`; raises UserError where the store cannot be reached."""
    filesystem, root = _open(uri)
    try:
        return bool(filesystem.get_file_info(f"{root}/{SPACE}").type != fs.FileType.NotFound)
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None


def fetch(uri: str, into: Path, parts: Sequence[str] = ()) -> Path:
    """A local copy of a results folder that was mirrored to `uri`, or of these parts of it: files, or folders.

    A copy of the whole that is there already stays as it is, unless the store has heard more of the search since.
    Raises UserError when there is none, the store cannot be reached, or the local folder is of another search.
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
                raise UserError(f"{results} holds another search than {uri}; move it away, or work in another folder")
            if there > here:
                _copy_all(filesystem, root, results)
    except OSError as error:
        raise UserError(f"{uri}: cannot be read: {error}") from None
    return results


def _copy_all(filesystem: fs.FileSystem, root: str, results: Path) -> None:
    """A results folder. Its study is read first and put in its place last: where it lies, so does all it speaks of."""
    with filesystem.open_input_stream(f"{root}/{STUDY}") as there:
        study = there.read()
    for found in filesystem.get_file_info(fs.FileSelector(root)):
        if found.base_name != STUDY:
            _copy(filesystem, found.path, results / found.base_name)
    replace_bytes(results / STUDY, study)


def _copy(filesystem: fs.FileSystem, source: str, target: Path) -> None:
    """A file or a folder; nothing where there is none."""
    kind = filesystem.get_file_info(source).type
    if kind != fs.FileType.NotFound:
        (target if kind == fs.FileType.Directory else target.parent).mkdir(parents=True, exist_ok=True)
        fs.copy_files(source, str(target), source_filesystem=filesystem)


def _length(filesystem: fs.FileSystem, path: str) -> int:
    """Of a study, which only ever grows: the longer is the newer. -1 where there is none."""
    found = filesystem.get_file_info(path)
    return found.size if found.type == fs.FileType.File else -1


def _same_begin(filesystem: fs.FileSystem, study: str, copy: Path, length: int) -> bool:
    """Whether a study and its copy agree as far as both go."""
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
