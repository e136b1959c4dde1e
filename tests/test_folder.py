"""What is on disk is whole, whatever was interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from search.files import is_full, replace_bytes, replace_text, says_full
from search.records import folder as folder_module
from search.records.folder import LOCK, LONG_S, TrialFolder, is_running, last_checkpoint, running
from search.workers.states import save_state


@pytest.fixture
def folder(tmp_path: Path) -> TrialFolder:
    return TrialFolder(tmp_path, 7)


def test_a_trial_has_a_folder_by_its_number(tmp_path: Path) -> None:
    assert TrialFolder(tmp_path, 7).path == tmp_path / "trials" / "0007"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, content: bytes) -> None:
        with file.open("wb") as half:
            half.write(content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    replace_text(path, "caf\udce9")
    assert path.read_text() == r"caf\udce9", "half a character is told, and loses nothing else"
    replace_text(path, "old")
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            replace_bytes(path, b"half")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path], "a full disk is not filled further"
    replace_bytes(path, b"new")
    assert path.read_text() == "new"


def test_a_file_that_must_survive_a_loss_of_power_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, there = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: there.append(path.exists()))
    replace_text(path, "quick")
    replace_text(path, "slow", durable=True)
    path.unlink()
    replace_text(path, "slow", durable=True)
    assert there == [True, False]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_that_is_used_up_is_a_full_disk(code: int) -> None:
    error = OSError(code, os.strerror(code), "checkpoint-0001.pt")
    assert is_full(error)
    assert says_full(f"RuntimeError: {error}")


def test_the_newest_checkpoint_counts_and_the_one_before_stays_until_it_is_let_go(folder: TrialFolder) -> None:
    assert folder.checkpoint() is None
    for epoch in (1, 2, 9_999, 10_000):
        folder.write_checkpoint(epoch, b"%d" % epoch)
        saved = folder.checkpoint()
        assert saved is not None
        assert (saved.epoch, saved.path.read_bytes()) == (epoch, b"%d" % epoch)
        assert len(list(folder.path.iterdir())) == (1 if epoch == 1 else 2)
        folder.keep_checkpoint(epoch)
        assert [path.name for path in folder.path.iterdir()] == [saved.path.name]


def test_what_takes_a_checkpoint_s_place_is_on_the_disk_before_that_goes(
    folder: TrialFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new checkpoint, its report and their names: after a power loss there is one to go on from."""
    forced, fsync, replace, unlink = set[int](), os.fsync, os.replace, Path.unlink
    removed: list[str] = []

    def forcing(opened: int) -> None:
        forced.add(os.fstat(opened).st_ino)
        fsync(opened)

    def renaming(source: Path, target: Path) -> None:
        replace(source, target)
        forced.discard(target.parent.stat().st_ino)

    def removing(path: Path, missing_ok: bool = False) -> None:
        stay = [item for item in (folder.path, *folder.path.iterdir()) if item != path]
        assert [item.name for item in stay if item.stat().st_ino not in forced] == []
        removed.append(path.name)
        unlink(path, missing_ok)

    folder.write_checkpoint(1, b"state")
    monkeypatch.setattr(os, "fsync", forcing)
    monkeypatch.setattr(os, "replace", renaming)
    monkeypatch.setattr(Path, "unlink", removing)
    folder.write_checkpoint(2, b"state")
    folder.append_metrics({"epoch": 2, "seconds": LONG_S + 1})
    folder.keep_checkpoint(2)
    assert removed == ["checkpoint-0001.pt"]


def test_nothing_is_forced_of_a_trial_that_has_just_begun(folder: TrialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    for epoch, seconds in ((1, 0.5), (2, 1.0), (3, LONG_S - 9), (4, LONG_S + 9)):
        folder.write_checkpoint(epoch, b"state")
        folder.append_metrics({"epoch": epoch, "seconds": seconds})
        assert not forced
        folder.keep_checkpoint(epoch)
    assert len(forced) == 3, "the checkpoint, the report, their names"


WHOLE = save_state({"w": torch.arange(9000.0)})


@pytest.mark.parametrize(
    "torn",
    [
        b"",
        WHOLE[:-1],
        WHOLE[:9000],
        bytes(len(WHOLE)),
        bytes(4096) + WHOLE[4096:],
        WHOLE[:8192] + bytes(len(WHOLE[8192:])),
    ],
    ids=["empty", "all but the end", "half", "zeros", "zeros first", "zeros last"],
)
def test_a_torn_checkpoint_is_set_aside_and_an_earlier_one_counts(torn: bytes, folder: TrialFolder) -> None:
    folder.write_checkpoint(1, WHOLE)
    assert folder.set_torn_aside() == []
    folder.write_checkpoint(2, torn)
    assert folder.set_torn_aside() == ["checkpoint-0002.pt"]
    folder.keep_checkpoint(2)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == {
        "checkpoint-0001.pt": WHOLE,
        "checkpoint-0002.torn": torn,
    }


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_torn(folder: TrialFolder) -> None:
    folder.write_checkpoint(1, WHOLE)
    (folder.path / "checkpoint-0002.pt").mkdir()  # as good as a file system that is away
    with pytest.raises(IsADirectoryError):
        folder.set_torn_aside()


def test_the_last_epoch_on_record_is_that_of_the_last_whole_line(folder: TrialFolder) -> None:
    assert folder.recorded() == 0
    for epoch in (1, 2, 3, 2):  # the last was run again
        folder.append_metrics({"epoch": epoch, "metrics": {}})
        assert folder.recorded() == epoch
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "metr')
    assert folder.recorded() == 2


def test_a_long_row_is_found_too(folder: TrialFolder) -> None:
    for epoch in (1, 2):
        folder.append_metrics({"epoch": epoch, "metrics": {f"class {number}": 0.5 for number in range(1000)}})
    assert folder.recorded() == 2


def test_the_end_of_a_number_is_no_row(folder: TrialFolder) -> None:
    """Where only the end of the file is read: of a torn line, that may be the end of a number."""
    folder.append_metrics({"epoch": 1})
    end = b'12345\n{"epoch": 3, "metrics": {"'
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"epoch": 2, "seconds": 9.8' + end.ljust(folder_module._TAIL_BYTES, b"a"))
    assert folder.recorded() == 1


def test_the_last_epoch_is_found_without_the_whole_file(folder: TrialFolder) -> None:
    """It is looked for after each epoch, and there may be many."""
    folder.append_metrics({"epoch": 1})
    os.truncate(folder.path / "metrics.jsonl", 2**40)  # takes no room on the disk, and no memory holds it
    folder.append_metrics({"epoch": 2})
    assert folder.recorded() == 2


def test_a_search_waits_for_somebody_who_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).touch()
    with ExitStack() as looking:
        looking.enter_context(running(tmp_path, only_look=True))
        monkeypatch.setattr(time, "sleep", lambda _: looking.close())
        with running(tmp_path):
            assert is_running(tmp_path)


def test_those_who_look_whether_a_search_runs_are_not_in_each_others_way(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with running(tmp_path, only_look=True) as locked:
        assert locked
        assert not is_running(tmp_path)
    with running(tmp_path):
        assert is_running(tmp_path)


@pytest.mark.parametrize(("epochs", "kept"), [(5, 4), (4, 4), (3, 2), (1, None)])
def test_of_what_was_written_the_newest_on_record_is_kept(epochs: int, kept: int | None, folder: TrialFolder) -> None:
    for epoch in (2, 4):  # the trainable gives no state after the others
        folder.write_checkpoint(epoch, b"state")
    torn = folder.path / ".checkpoint-0005.pt.123"  # a slot was killed as it wrote
    torn.write_bytes(b"half")
    folder.keep_checkpoint(epochs)
    assert not torn.exists()
    saved = folder.checkpoint()
    assert (saved and saved.epoch) == kept


def test_the_newest_of_two_counts_by_epoch_and_not_by_name(tmp_path: Path) -> None:
    for epoch in ("9999", "10000"):  # the old one was about to be removed
        (tmp_path / f"checkpoint-{epoch}.pt").write_bytes(b"")
    (tmp_path / ".checkpoint-20000.pt.123").write_bytes(b"half")
    saved = last_checkpoint(tmp_path)
    assert saved is not None
    assert saved.epoch == 10_000


def test_of_epochs_that_were_run_again_the_later_attempt_counts_alone(folder: TrialFolder) -> None:
    assert folder.read_metrics() == []
    for epoch, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (2, 0.35)):
        folder.append_metrics({"epoch": epoch, "metrics": {"loss": loss}})
    assert [row["metrics"]["loss"] for row in folder.read_metrics()] == [0.5, 0.35]
    folder.append_metrics({"epoch": 1, "metrics": {"loss": 0.6}})
    assert folder.read_metrics() == [folder.row(1)] == [{"epoch": 1, "metrics": {"loss": 0.6}}]


@pytest.mark.parametrize("kept", range(1, len('{"epoch": 2}')))
def test_a_torn_line_is_lost_and_nothing_else(folder: TrialFolder, kept: int) -> None:
    folder.append_metrics({"epoch": 1})
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2}'[:kept])
    assert folder.read_metrics() == [{"epoch": 1}]
    folder.append_metrics({"epoch": 2, "again": True})
    folder.append_metrics({"epoch": 3})
    assert folder.read_metrics() == [{"epoch": 1}, {"epoch": 2, "again": True}, {"epoch": 3}]


def test_a_line_that_is_no_text_is_lost_and_nothing_else(folder: TrialFolder) -> None:
    folder.append_metrics({"epoch": 1})
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\0\n")
    folder.append_metrics({"epoch": 2})
    assert folder.read_metrics() == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("left", [b"", b'{"step": 3, "los', b"\0\0\0\xff"], ids=["nothing", "half", "no text"])
def test_a_post_mortem_that_a_power_loss_tore_is_as_none(left: bytes, folder: TrialFolder) -> None:
    folder.write_divergence({"step": 3, "loss": 1.0})
    (folder.path / "divergence.json").write_bytes(left)
    assert folder.read_divergence() is None


def test_a_config_is_written_as_json(folder: TrialFolder) -> None:
    folder.write_config({"optim": {"lr": 1e-5}, "root": None})
    assert json.loads((folder.path / "config.json").read_text()) == {"optim": {"lr": 1e-5}, "root": None}


def test_the_reason_of_a_failure_is_read_back(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path, 3)
    assert folder.read_error() is None
    folder.write_error("KeyError: 'a' (toys.py:3)", "Traceback ...\n  KeyError: 'a'\n")
    assert folder.read_error() == "KeyError: 'a' (toys.py:3)\n\nTraceback ...\n  KeyError: 'a'\n"
    folder.write_error("the worker group died")
    assert folder.read_error() == "the worker group died\n\n"


def test_a_folder_is_running_as_long_as_somebody_runs_its_search(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with running(tmp_path):
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not is_running(tmp_path / "nowhere")


def test_what_is_locked_is_a_file_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS tells other machines of no other lock."""
    flock, locked = fcntl.flock, list[str]()

    def as_over_nfs(opened: int, kind: int) -> None:
        path = os.readlink(f"/proc/self/fd/{opened}")
        writes = fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert os.path.isfile(path)
        assert writes or kind & fcntl.LOCK_SH
        locked.append(os.path.basename(path))
        flock(opened, kind)

    monkeypatch.setattr(fcntl, "flock", as_over_nfs)
    with running(tmp_path) as alone:
        assert alone
        assert is_running(tmp_path)
    assert locked == [LOCK, LOCK]


def test_of_processes_that_start_at_the_same_moment_one_runs_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads here: a lock belongs to the file that was opened, not to the process."""
    monkeypatch.setattr(folder_module, "LOOK_S", 0.0)
    begun, refused = list[bool](), list[bool]()
    ready, over = threading.Barrier(8), threading.Barrier(8)

    def start() -> None:
        ready.wait()
        try:
            with running(tmp_path) as alone:
                begun.append(alone)
                over.wait()
        except BlockingIOError:
            refused.append(True)
            over.wait()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (begun, len(refused)) == ([True], 7)


def test_who_waited_for_a_lock_that_was_removed_keeps_others_out(tmp_path: Path) -> None:
    """The file that it had opened is gone, and a lock on it would keep nobody out."""
    waiting, told = threading.Event(), list[bool]()

    def wait() -> None:
        waiting.set()
        with running(tmp_path) as alone:
            told.append(alone and is_running(tmp_path))

    thread = threading.Thread(target=wait)
    with running(tmp_path):
        thread.start()
        waiting.wait()
        time.sleep(0.2)
    thread.join()
    assert told == [True]


def test_a_copy_of_a_folder_is_not_running(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with running(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert is_running(tmp_path / "run")
        assert not is_running(tmp_path / "copy")
        with running(tmp_path / "copy") as alone:
            assert alone


def test_in_a_folder_that_cannot_be_written_to_one_can_look_and_no_process_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opening(path, flags, mode)

    def elsewhere() -> ExitStack:
        with monkeypatch.context() as own, ExitStack() as held:
            own.setattr(os, "open", opening)
            held.enter_context(running(tmp_path))
            return held.pop_all()

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(folder_module, "LOOK_S", 0.0)
    with running(tmp_path) as alone:
        assert not alone
        assert not is_running(tmp_path)
    with elsewhere():
        assert is_running(tmp_path)
        with pytest.raises(BlockingIOError), running(tmp_path):
            pass
    assert not is_running(tmp_path)
