"""A cache folder in which nothing can be made or locked is a mistake that is named; what is there is whole."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from trainables.cache import make_once, write_whole
from trainables.contract import UserError

REMEDY = "set data.prepared to a folder elsewhere$"


def test_a_cache_folder_that_is_a_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    for target in (tmp_path / "cache" / "made.txt", tmp_path / "cache" / "mabe" / "made.txt"):
        with pytest.raises(UserError, match=rf"made.txt.lock cannot be made and locked: .*; {REMEDY}"):
            make_once(target, Path.mkdir)


def test_a_file_system_without_locks_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=rf"made.txt.lock cannot be made and locked: No locks available; {REMEDY}"):
        make_once(tmp_path / "made.txt", Path.mkdir)


def test_a_write_that_is_interrupted_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    write_whole(target, lambda path: path.write_text("whole"))

    def interrupted(path: Path) -> None:
        path.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, interrupted)
    assert target.read_text() == "whole"
