"""The copy of a results folder at a URI: on pyarrow's local filesystem, and in a bucket."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from ledgers import ask, open_journal
from pyarrow import fs
from s3 import Store
from spaces import space_of

from search.interruption import Interruption
from search.recorder import Recorder
from search.records.folder import SCRATCH, TrialFolder, running
from search.records.mirror import Mirror, above, below, fetch, local, pause_s
from search.trial import EPOCH, METRICS
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
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def test_what_is_pushed_comes_back_whole(results: Path, disk: Path, tmp_path: Path) -> None:
    Mirror(results, f"file://{disk}/run").push()
    assert tree(disk / "run") == tree(results)
    assert tree(fetch(f"file://{disk}/run", tmp_path / "elsewhere")) == tree(results)


@pytest.mark.parametrize("place", ["my searches/run 1", "50%/r+n"])
def test_a_folder_may_have_any_name(place: str, results: Path, disk: Path, tmp_path: Path) -> None:
    uri = f"file://{quote(str(disk / place))}"
    Mirror(results, uri).begin()
    assert tree(disk / place) == tree(results)
    assert local(uri) == disk / place
    assert fetch(uri, tmp_path / "elsewhere") == tmp_path / "elsewhere" / place.rpartition("/")[2]


@pytest.mark.parametrize("uri", ["s3://bucket/runs", "s3://bucket/runs/", "s3://bucket"])
@pytest.mark.parametrize("options", ["", "?region=eu-west-1", "?scheme=http&endpoint_override=localhost:9000"])
def test_options_for_the_store_stay_behind_the_name_of_a_search(uri: str, options: str) -> None:
    folder = below(uri + options, "my search")
    assert folder == f"{uri.rstrip('/')}/my%20search{options}"
    assert above(folder) == uri.rstrip("/") + options


def test_a_file_uri_is_of_this_machine() -> None:
    assert local("file://localhost/data/runs") == local("file:///data/runs") == local("/data/runs")
    with pytest.raises(UserError, match=r"^file://results/x is no folder here: 'results' is read as a host; write fi"):
        local("file://results/x")


def test_only_what_changed_is_sent_again_and_no_scratch(results: Path, disk: Path) -> None:
    mirror = Mirror(results, f"file://{disk}/run")
    (results / SCRATCH).mkdir()
    (results / SCRATCH / "large").write_bytes(b"working files")
    mirror.push()
    assert not (disk / "run" / SCRATCH).exists()
    (disk / "run/trials/0000/checkpoint-0001.pt").unlink()  # it would come back if everything were sent
    (results / "study.journal").write_bytes(b"one two")
    os.utime(results / "study.journal", (1, 1))
    mirror.push()
    assert (disk / "run/study.journal").read_bytes() == b"one two"
    assert not (disk / "run/trials/0000/checkpoint-0001.pt").exists()


def test_a_local_copy_is_newer_than_its_mirror(results: Path, disk: Path) -> None:
    Mirror(results, f"file://{disk}/run").push()
    (results / "study.journal").write_bytes(b"one, and more since")
    assert fetch(f"file://{disk}/run", results.parent) == results
    assert (results / "study.journal").read_bytes() == b"one, and more since"


@pytest.mark.parametrize("study", [b"two", b"another", b"x"], ids=["as long", "longer", "shorter"])
def test_a_local_folder_of_another_search_is_neither_taken_for_it_nor_overwritten(
    study: bytes, results: Path, disk: Path
) -> None:
    Mirror(results, f"file://{disk}/run").push()
    (results / "study.journal").write_bytes(study)
    before = tree(results)
    with pytest.raises(UserError, match=r"results/run holds a different search from file://"):
        fetch(f"file://{disk}/run", results.parent)
    assert tree(results) == before


def test_a_search_that_is_there_is_not_overwritten(results: Path, disk: Path, tmp_path: Path) -> None:
    """By another of the same name, from a machine that has not heard of it."""
    Mirror(results, f"file://{disk}/run").begin()
    before = tree(disk / "run")
    for study in (b"", b"two"):
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new/study.journal").write_bytes(study)
        with pytest.raises(
            UserError, match=r"/run holds a search already; go on with it by --resume, or choose anothe"
        ):
            Mirror(tmp_path / "new", f"file://{disk}/run").check()
        assert tree(disk / "run") == before
    (tmp_path / "new/study.journal").write_bytes(b"on")
    with pytest.raises(
        UserError, match=r"/run has more of this search than .*/new; go on from there, with --resume fi"
    ):
        Mirror(tmp_path / "new", f"file://{disk}/run").check()
    assert tree(disk / "run") == before
    (results / "study.journal").write_bytes(b"one more")
    resumed = Mirror(results, f"file://{disk}/run")
    resumed.check()
    resumed.begin()
    assert (disk / "run/study.journal").read_bytes() == b"one more"


def test_a_store_that_fails_is_tried_again(results: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = Mirror(results, f"file://{disk}/run")
    disk.write_text("a file where the folder should be")
    mirror.push()
    assert "will try again after the next trial" in capsys.readouterr().out
    disk.unlink()
    mirror.push()
    assert tree(disk / "run") == tree(results)


@pytest.mark.parametrize("follows", [False, True])
def test_a_search_that_another_process_goes_on_with_ends(follows: bool, results: Path, disk: Path) -> None:
    """As where its machine is taken for dead, and it is resumed elsewhere."""
    uri, elsewhere = f"file://{disk}/run", results.parent / "elsewhere/run"
    first, second = Mirror(results, uri, every_s=0.0), Mirror(elsewhere, uri, every_s=0.0)
    first.begin()
    shutil.copytree(results, elsewhere)
    second.check()
    (elsewhere / "study.journal").write_bytes(b"one, and then two")
    second.begin()
    (results / "trials/0000/checkpoint-0001.pt").write_bytes(b"of another setting")  # its study need not have changed

    def push_for_long() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            first.push()
            time.sleep(0.01)

    with first.following() if follows else contextlib.nullcontext(), pytest.raises(UserError, match="another process"):
        push_for_long()
    with pytest.raises(UserError, match=r"run is written to by another process, which has gone on with this search"):
        first.push_last()
    assert tree(disk / "run") == tree(elsewhere)


def test_what_a_search_writes_is_not_fetched_into(results: Path, disk: Path) -> None:
    uri = f"file://{disk}/run"
    Mirror(results, uri).begin()
    (disk / "run/study.journal").write_bytes(b"one two")
    with running(results), pytest.raises(UserError, match="another process is running this search, or fetching it"):
        fetch(uri, results.parent)
    assert (results / "study.journal").read_bytes() == b"one"


def test_a_mirror_that_has_heard_more_is_newer(results: Path, disk: Path) -> None:
    """As where the search goes on elsewhere, and somebody looks at it twice."""
    Mirror(results, f"file://{disk}/run").push()
    (disk / "run/study.journal").write_bytes(b"one two")
    (disk / "run/trials/0000/checkpoint-0001.pt").write_bytes(b"later")
    fetch(f"file://{disk}/run", results.parent)
    assert tree(results) == tree(disk / "run")


@pytest.mark.parametrize("before", [None, b"on"], ids=["nothing here", "an older copy here"])
def test_a_copy_that_broke_off_is_fetched_again(
    before: bytes | None, results: Path, disk: Path, tmp_path: Path
) -> None:
    """The study says that all is there: it comes last."""
    uri, copy = f"file://{disk}/run", tmp_path / "elsewhere/run"
    Mirror(results, uri).push()
    in_the_way = copy / "trials/0000/checkpoint-0001.pt"
    in_the_way.mkdir(parents=True)
    if before is not None:
        (copy / "study.journal").write_bytes(before)
    with pytest.raises(UserError, match=r"run: cannot be read: "):
        fetch(uri, copy.parent)
    study = copy / "study.journal"
    assert (study.read_bytes() if study.exists() else None) == before
    in_the_way.rmdir()
    assert tree(fetch(uri, copy.parent)) == tree(results)


def test_a_copy_of_a_search_under_way_has_no_study_that_is_ahead_of_its_files(
    results: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, copy_files = f"file://{disk}/run", fs.copy_files
    Mirror(results, uri).push()

    def meanwhile(*arguments: Any, **named: Any) -> None:
        copy_files(*arguments, **named)
        (disk / "run/study.journal").write_bytes(b"one two")

    monkeypatch.setattr(fs, "copy_files", meanwhile)
    assert tree(fetch(uri, tmp_path / "elsewhere")) == tree(results)


def test_parts_come_without_the_rest(results: Path, disk: Path, tmp_path: Path) -> None:
    Mirror(results, f"file://{disk}/run").push()
    fetched = fetch(f"file://{disk}/run", tmp_path / "elsewhere", ["study.journal", "trials/0000", "trials/0007"])
    assert set(tree(fetched)) == {"study.journal", "trials/0000/checkpoint-0001.pt"}


def test_what_the_study_calls_finished_is_there_before_the_study(results: Path, disk: Path) -> None:
    (disk / "run").mkdir(parents=True)
    (disk / "run/trials").write_text("where no checkpoint can be kept")
    Mirror(results, f"file://{disk}/run").push()
    assert (disk / "run/space.yaml").exists()
    assert not (disk / "run/study.journal").exists()


def test_a_checkpoint_goes_when_a_newer_one_has_come(results: Path, disk: Path) -> None:
    mirror = Mirror(results, f"file://{disk}/run")
    mirror.push()
    folder = TrialFolder(results, 0)
    folder.write_checkpoint(2, b"newer")
    folder.keep_checkpoint(2)
    mirror.push()
    assert tree(disk / "run/trials") == {"0000/checkpoint-0002.pt": b"newer"}
    (folder.path / "checkpoint-0002.pt").unlink()  # lost here, and not replaced
    mirror.push()
    assert tree(disk / "run/trials") == {"0000/checkpoint-0002.pt": b"newer"}


def test_a_superseded_checkpoint_has_gone_when_the_study_comes_that_ended_its_trial(
    results: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that dies in between would leave it there for ever."""
    mirror = Mirror(results, f"file://{disk}/run")
    mirror.push()
    TrialFolder(results, 0).write_checkpoint(2, b"newer")
    TrialFolder(results, 0).keep_checkpoint(2)
    (results / "study.journal").write_bytes(b"one, ended")
    send, there = mirror._send, list[set[str]]()

    def seen(name: str, *arguments: Any) -> None:
        if name == "study.journal":
            there.append(set(tree(disk / "run/trials")))
        send(name, *arguments)

    monkeypatch.setattr(mirror, "_send", seen)
    mirror.push()
    assert there == [{"0000/checkpoint-0002.pt"}]
    assert tree(disk / "run") == tree(results)


def test_a_checkpoint_stays_until_the_report_of_the_newer_one_has_been_sent(
    results: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which comes while the others are sent: without it, the newer checkpoint would not count."""
    mirror, copy_files, folder = Mirror(results, f"file://{disk}/run"), fs.copy_files, TrialFolder(results, 0)
    folder.append_metrics({"epoch": 1})
    mirror.push()
    folder.write_checkpoint(2, b"newer")

    def meanwhile(*arguments: Any, **named: Any) -> None:
        copy_files(*arguments, **named)
        folder.append_metrics({"epoch": 2})
        folder.keep_checkpoint(2)

    with monkeypatch.context() as patched:
        patched.setattr(fs, "copy_files", meanwhile)
        mirror.push()
    assert (disk / "run/trials/0000/checkpoint-0001.pt").exists()
    mirror.push()
    assert tree(disk / "run") == tree(results)


def test_a_store_that_deletes_nothing_gets_the_study(
    results: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror, superseded = Mirror(results, f"file://{disk}/run"), disk / "run/trials/0000/checkpoint-0001.pt"
    mirror.push()
    superseded.unlink()
    superseded.mkdir()  # no file that could be deleted
    TrialFolder(results, 0).write_checkpoint(2, b"newer")
    TrialFolder(results, 0).keep_checkpoint(2)
    (results / "study.journal").write_bytes(b"one, ended")
    mirror.push()
    assert "not up to date" in capsys.readouterr().out
    assert (disk / "run/study.journal").read_bytes() == b"one, ended"


def test_the_last_push_is_tried_again(
    results: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = Mirror(results, f"file://{disk}/run")
    disk.write_text("a file where the folder should be")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    mirror.push_last()
    assert [line.rpartition("; ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "will try again in 5 s",
        "will try again in 5 s",
        "--resume sends the rest",
    ]
    monkeypatch.setattr(time, "sleep", lambda _: disk.unlink())
    mirror.push_last()
    assert tree(disk / "run") == tree(results)


def test_a_resumed_search_does_not_send_its_checkpoints_again(results: Path, disk: Path) -> None:
    uri, sent = f"file://{disk}/run", disk / "run/trials/0000/checkpoint-0001.pt"
    Mirror(results, uri).begin()
    sent.write_bytes(bytes(256))  # as long as the one here: it would be replaced if it were sent
    mirror = resumed(results, uri)
    assert sent.read_bytes() == bytes(256)
    sent.write_bytes(b"cut off in the middle")
    resumed(results, uri)
    assert sent.read_bytes() == bytes(range(256))
    TrialFolder(results, 0).write_checkpoint(2, b"newer")
    TrialFolder(results, 0).keep_checkpoint(2)
    mirror.push()
    assert not sent.exists()


OF_A_TRIAL = ("checkpoint-0001.pt", "config.json", "error.txt", "events.out.tfevents.1.host", "metrics.jsonl")


def resumed(results: Path, uri: str) -> Mirror:
    mirror = Mirror(results, uri)
    mirror.check()
    mirror.begin()
    return mirror


def run_trial(results: Path, number: int, age_s: float = 3600.0) -> None:
    """Write what a trial leaves, `age_s` seconds ago."""
    folder = results / f"trials/{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in OF_A_TRIAL:
        (folder / name).write_bytes(b"content")
        os.utime(folder / name, (time.time() - age_s,) * 2)


def written(store: Store) -> set[str]:
    """The objects and folders written since the last call, below the search's folder."""
    asked = {path.removeprefix("bucket/searches/run/") for method, path in store.asked if method == "PUT"}
    store.asked.clear()
    return asked


def test_what_has_not_changed_while_the_search_was_down_is_not_sent_again(results: Path, store: Store) -> None:
    for number in range(12):
        run_trial(results, number)
    resumed(results, "s3://bucket/searches/run")
    written(store)
    resumed(results, "s3://bucket/searches/run")
    assert len(store.asked) <= 16
    assert written(store) == {"bucket/searches/", "", "space.yaml", "study.journal"}


@pytest.mark.parametrize("name", OF_A_TRIAL)
def test_what_has_changed_while_the_search_was_down_is_sent(name: str, results: Path, store: Store) -> None:
    """Though it is as long as before."""
    for number in range(2):
        run_trial(results, number)
    resumed(results, "s3://bucket/searches/run")
    written(store)
    (results / "trials/0001" / name).write_bytes(b"changed")
    os.utime(results / "trials/0001" / name, (time.time() + 1,) * 2)  # the store tells whole seconds
    resumed(results, "s3://bucket/searches/run")
    assert {path for path in written(store) if path.startswith("trials/")} == {f"trials/0001/{name}"}
    assert (store.folder / "bucket/searches/run/trials/0001" / name).read_bytes() == b"changed"


def test_what_the_store_has_lost_or_half_of_is_sent(results: Path, disk: Path) -> None:
    run_trial(results, 0)
    resumed(results, f"file://{disk}/run")
    (disk / "run/trials/0000/config.json").unlink()
    (disk / "run/trials/0000/metrics.jsonl").write_bytes(b"half")
    resumed(results, f"file://{disk}/run")
    assert tree(disk / "run") == tree(results)


@pytest.mark.parametrize("name", ["config.json", "error.txt"])
def test_a_file_that_is_replaced_is_sent_even_where_the_clock_here_is_behind(
    name: str, results: Path, disk: Path
) -> None:
    """Population-based training changes a setting by a digit, and the search dies before it is sent."""
    run_trial(results, 0)
    resumed(results, f"file://{disk}/run")
    (results / "trials/0000" / name).write_bytes(b"changed")
    os.utime(results / "trials/0000" / name, (time.time() - 20,) * 2)
    resumed(results, f"file://{disk}/run")
    assert (disk / "run/trials/0000" / name).read_bytes() == b"changed"


def test_what_was_fetched_is_not_sent_again_unless_it_changes(results: Path, tmp_path: Path, store: Store) -> None:
    uri = "s3://bucket/searches/run"
    for number in range(3):
        run_trial(results, number)
    resumed(results, uri)
    fetched = fetch(uri, tmp_path / "elsewhere")
    assert tree(fetched) == tree(results)
    written(store)
    resumed(fetched, uri)
    assert not any(path.startswith("trials/") for path in written(store))
    (fetched / "trials/0001/config.json").write_bytes(b"changed")
    resumed(fetched, uri)
    assert {path for path in written(store) if path.startswith("trials/")} == {"trials/0001/config.json"}


def test_of_tables_what_has_not_changed_is_not_sent_again(results: Path, store: Store) -> None:
    """Their folder holds a search in each of its folders."""
    run_trial(results, 0)
    resumed(results.parent, "s3://bucket/searches")
    written(store)
    resumed(results.parent, "s3://bucket/searches")
    assert not any(path.startswith("trials/") for path in written(store))


def test_a_folder_is_made_once(results: Path, store: Store) -> None:
    mirror = resumed(results, "s3://bucket/searches/run")
    written(store)
    run_trial(results, 7)
    mirror.push()
    assert (
        sum(method == "PUT" and path.endswith("/") for method, path in store.asked) == 4
    )  # the trial's and those above
    assert {path for path in written(store) if path[-1:] != "/"} - {""} == {
        f"trials/0007/{name}" for name in OF_A_TRIAL
    }
    (results / "trials/0007/metrics.jsonl").write_bytes(b"content, and more")
    mirror.push()
    assert written(store) == {"trials/0007/metrics.jsonl"}


def test_a_folder_that_the_store_has_lost_is_made_again(
    results: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = resumed(results, f"file://{disk}/run")
    shutil.rmtree(disk / "run/trials/0000")
    run_trial(results, 0)
    mirror.push()
    assert "will try again after the next trial" in capsys.readouterr().out
    mirror.push()
    assert tree(disk / "run") == tree(results)


def test_a_study_is_read_before_its_trials_are_looked_for(
    results: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it might call a trial finished that ended after its files had been listed."""
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        content = read_bytes(path)
        if path == results / "study.journal":
            run_trial(results, 1)
        return content

    monkeypatch.setattr(Path, "read_bytes", read)
    Mirror(results, f"file://{disk}/run").push()
    assert set(OF_A_TRIAL) == set(tree(disk / "run/trials/0001"))


def test_the_study_s_lock_is_not_sent(results: Path, disk: Path) -> None:
    """A search that is fetched with it would wait for whoever holds it."""
    (results / "study.journal.lock").symlink_to(results / "study.journal")
    Mirror(results, f"file://{disk}/run").push()
    assert not (disk / "run/study.journal.lock").exists()


def test_a_folder_linked_to_is_not_sent(results: Path, disk: Path, tmp_path: Path) -> None:
    (results / "data").symlink_to(tmp_path)
    resumed(results, f"file://{disk}/run")
    assert not (disk / "run/data").exists()


def test_a_long_trial_is_sent_now_and_then(results: Path, disk: Path) -> None:
    patient, eager = (Mirror(results, f"file://{disk}/{every_s}", every_s) for every_s in (300.0, 0.0))
    for mirror in (patient, eager):
        mirror.begin()
    TrialFolder(results, 0).write_checkpoint(2, b"newer")
    for mirror in (patient, eager):
        mirror.push_if_due()
    assert (disk / "0.0/trials/0000/checkpoint-0002.pt").exists()
    assert not (disk / "300.0/trials/0000/checkpoint-0002.pt").exists()


def test_while_trials_run_nobody_waits_for_an_upload(
    results: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, copy_files, open_for_business = Mirror(results, f"file://{disk}/run"), fs.copy_files, threading.Event()

    def slowly(*arguments: Any, **named: Any) -> None:
        assert open_for_business.wait(300)
        copy_files(*arguments, **named)

    monkeypatch.setattr(fs, "copy_files", slowly)
    with mirror.following():
        mirror.push()
        assert not tree(disk)
        open_for_business.set()
    mirror.push()
    assert tree(disk / "run") == tree(results)


@pytest.mark.parametrize(
    ("took_s", "every_s", "pause"),
    [(0.0, 300.0, 0.0), (2.0, 300.0, 20.0), (60.0, 300.0, 240.0), (400.0, 300.0, 0.0), (2.0, 0.0, 0.0)],
)
def test_the_pause_after_an_upload_is_ten_times_as_long_but_lets_a_long_trial_be_sent_in_time(
    took_s: float, every_s: float, pause: float
) -> None:
    assert pause_s(took_s, every_s) == pause


def test_trials_that_end_soon_after_an_upload_share_the_next_one(
    results: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, waits, asked = Mirror(results, f"file://{disk}/run", 200.0), threading.Event(), list[tuple[float, float]]()

    def pause_s(took_s: float, every_s: float) -> float:
        asked.append((took_s, every_s))
        waits.set()
        return 100.0

    monkeypatch.setattr("search.records.mirror.pause_s", pause_s)
    with mirror.following():
        mirror.push()
        assert waits.wait(300)
        for number in range(1, 4):
            (results / "study.journal").write_bytes(b"one" * (number + 1))
            mirror.push()
        time.sleep(0.2)
        over = time.monotonic()
    assert time.monotonic() - over < 50.0, "the pause, of a hundred seconds, ends with the search"
    assert (disk / "run/study.journal").read_bytes() == b"one"
    [(took_s, every_s)] = asked
    assert took_s < every_s == 200.0
    mirror.push_last()
    assert tree(disk / "run") == tree(results)


def test_what_was_pushed_during_an_upload_follows_it(results: Path, disk: Path) -> None:
    mirror, until = Mirror(results, f"file://{disk}/run", every_s=0.0), time.monotonic() + 300
    with mirror.following():
        mirror.push()
        TrialFolder(results, 1).write_checkpoint(1, b"of a long trial")
        mirror.push_if_due()
        while not (disk / "run/trials/0001/checkpoint-0001.pt").exists():
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_copy_of_a_mirror_that_follows_is_one_that_does_not(results: Path, disk: Path) -> None:
    """Tune pickles its callbacks, and what they hold."""
    mirror = Mirror(results, f"file://{disk}/run")
    with mirror.following():
        copied = pickle.loads(pickle.dumps(mirror))
        copied.push()
        assert tree(disk / "run") == tree(results)


def test_a_study_is_sent_as_it_was_when_the_files_it_speaks_of_were_looked_for(
    results: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, copy_files = Mirror(results, f"file://{disk}/run"), fs.copy_files

    def meanwhile(*arguments: Any, **named: Any) -> None:
        copy_files(*arguments, **named)
        TrialFolder(results, 1).write_checkpoint(1, b"of a trial that ended meanwhile")
        (results / "study.journal").write_bytes(b"one two")
        os.utime(results / "study.journal", (1, 1))

    with monkeypatch.context() as patched:
        patched.setattr(fs, "copy_files", meanwhile)
        mirror.push()
    assert (disk / "run/study.journal").read_bytes() == b"one"
    mirror.push()
    assert tree(disk / "run") == tree(results)


def test_a_checkpoint_stays_until_a_newer_one_has_been_sent(results: Path, disk: Path) -> None:
    mirror = Mirror(results, f"file://{disk}/run")
    mirror.push()
    folder = TrialFolder(results, 0)
    folder.keep_checkpoint(0)
    (folder.path / "checkpoint-0002.pt").mkdir()  # there, and not to be sent
    mirror.push()
    assert (disk / "run/trials/0000/checkpoint-0001.pt").exists()


def test_each_epoch_gives_the_mirror_its_turn(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}})
    ledger = open_journal(space, tmp_path / "run")
    opened = ask(ledger)
    trial = SimpleNamespace(trial_id="slot", config={"number": opened.number, "values": opened.values})
    kept: list[list[dict[str, Any]]] = []
    folder = TrialFolder(tmp_path / "run", opened.number)
    recorder = Recorder(ledger, lambda record: None, lambda: kept.append(folder.read_metrics()), Interruption())
    for epoch in (1, 2):
        recorder.on_trial_result(0, [], trial, {EPOCH: epoch, METRICS: {"loss": 0.5}})
    recorder.close("time")
    assert [len(rows) for rows in kept] == [1, 2], "the epoch is on the disk when its turn comes"


@pytest.mark.slow
def test_a_bucket_is_a_mirror_too(results: Path, tmp_path: Path, store: Store) -> None:
    """The checkpoint is larger than what pyarrow sends in one piece."""
    (results / "trials/0000/checkpoint-0001.pt").write_bytes(bytes(range(256)) * 50_000)
    mirror = Mirror(results, "s3://bucket/searches/run")
    mirror.begin()
    TrialFolder(results, 0).write_checkpoint(2, bytes(range(256)) * 50_000)
    TrialFolder(results, 0).keep_checkpoint(2)
    mirror.push()
    again = Mirror(results, "s3://bucket/searches/run")
    again.check()
    again.begin()
    assert tree(tmp_path / "store/bucket/searches/run") == tree(results)
    assert tree(fetch("s3://bucket/searches/run", tmp_path / "elsewhere")) == tree(results)


def test_a_bucket_that_cannot_be_used_is_a_mistake_at_once(results: Path, tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match=r"s3://nowhere/run: cannot be written to: .*nowhere"):
        Mirror(results, "s3://nowhere/run").begin()
    with pytest.raises(UserError, match=r"s3://nowhere/run: there is no space.yaml here"):
        fetch("s3://nowhere/run", tmp_path)


def test_nothing_there_and_no_such_kind_of_store_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no space.yaml here"):
        fetch(f"file://{tmp_path}/nothing", tmp_path)
    with pytest.raises(UserError, match=r"gopher://x/y: cannot be opened"):
        Mirror(tmp_path, "gopher://x/y")
