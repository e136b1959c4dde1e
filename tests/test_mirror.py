"""The copy of a results folder at a URI, on pyarrow's local filesystem."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from search.folder import SCRATCH
from search.mirror import Mirror, fetch
from trainables.contract import UserError


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    results = tmp_path / "results/run"
    (results / "trials/0000").mkdir(parents=True)
    (results / "space.yaml").write_text("trainable: toys:descend")
    (results / "study.journal").write_bytes(b"one")
    (results / "trials/0000/checkpoint-0001.pt").write_bytes(bytes(range(256)))
    return results


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_what_is_pushed_comes_back_whole(results: Path, store: Path, tmp_path: Path) -> None:
    Mirror(results, f"file://{store}/run").push()
    assert tree(store / "run") == tree(results)
    assert tree(fetch(f"file://{store}/run", tmp_path / "elsewhere")) == tree(results)


def test_only_what_changed_is_sent_again_and_no_scratch(results: Path, store: Path) -> None:
    mirror = Mirror(results, f"file://{store}/run")
    (results / SCRATCH).mkdir()
    (results / SCRATCH / "large").write_bytes(b"working files")
    mirror.push()
    assert not (store / "run" / SCRATCH).exists()
    (store / "run/trials/0000/checkpoint-0001.pt").unlink()  # it would come back if everything were sent
    (results / "study.journal").write_bytes(b"one two")
    os.utime(results / "study.journal", (1, 1))
    mirror.push()
    assert (store / "run/study.journal").read_bytes() == b"one two"
    assert not (store / "run/trials/0000/checkpoint-0001.pt").exists()


def test_a_local_copy_is_newer_than_its_mirror(results: Path, store: Path) -> None:
    Mirror(results, f"file://{store}/run").push()
    (results / "study.journal").write_bytes(b"more since")
    assert fetch(f"file://{store}/run", results.parent) == results
    assert (results / "study.journal").read_bytes() == b"more since"


def test_a_store_that_fails_is_tried_again(results: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = Mirror(results, f"file://{store}/run")
    store.write_text("a file where the folder should be")
    mirror.push()
    assert "tried again after the next trial" in capsys.readouterr().out
    store.unlink()
    mirror.push()
    assert tree(store / "run") == tree(results)


def test_nothing_there_and_no_such_kind_of_store_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no space.yaml here"):
        fetch(f"file://{tmp_path}/nothing", tmp_path)
    with pytest.raises(UserError, match=r"gopher://x/y: cannot be opened"):
        Mirror(tmp_path, "gopher://x/y")
