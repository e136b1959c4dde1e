"""A copy of a results folder at a URI, for a machine that may be taken away.

The search always works on a local folder (the study is a file that is locked and appended to). Where `--results` is a
URI, what is new goes there after every trial, by pyarrow's filesystems: s3://, gs://, hdfs://, file://.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from search.folder import SCRATCH, SPACE
from trainables.contract import UserError


def is_uri(text: str) -> bool:
    return "://" in text


@dataclass
class Mirror:
    """The folder at `uri` that follows the local folder `results`."""

    results: Path
    uri: str

    def __post_init__(self) -> None:
        self._filesystem, self._root = _open(self.uri)
        self._sent: dict[str, float] = {}  # by relative path: when the file was changed that was sent last

    def push(self) -> None:
        """Send every file that has changed since it was sent. A store that cannot be reached does not end a search."""
        try:
            self._push()
        except OSError as error:
            print(f"{self.uri}: not up to date, {error}; tried again after the next trial", flush=True)

    def _push(self) -> None:
        for path in sorted(self.results.rglob("*")):
            relative = path.relative_to(self.results)
            if path.is_dir() or relative.parts[0] == SCRATCH or path.name.startswith("."):
                continue
            changed = path.stat().st_mtime
            if self._sent.get(str(relative)) == changed:
                continue
            target = f"{self._root}/{relative.as_posix()}"
            self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            fs.copy_files(str(path), target, destination_filesystem=self._filesystem)
            self._sent[str(relative)] = changed


def fetch(uri: str, into: Path) -> Path:
    """A local copy of a results folder that was mirrored to `uri`; raises UserError when there is none."""
    filesystem, root = _open(uri)
    if filesystem.get_file_info(f"{root}/{SPACE}").type == fs.FileType.NotFound:
        raise UserError(f"{uri}: there is no {SPACE} here; name the folder of an earlier search")
    results = into / root.rstrip("/").rpartition("/")[2]
    if not (results / SPACE).exists():  # a local copy that is there already is the newer one
        results.mkdir(parents=True, exist_ok=True)
        fs.copy_files(root, str(results), source_filesystem=filesystem)
    return results


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        filesystem, root = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be opened: {error}") from None
    return filesystem, root.rstrip("/")
