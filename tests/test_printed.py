"""What a rank prints is passed on as it is, and kept as a terminal would show it."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO, cast

import pytest
from tqdm import tqdm

from search.records.folder import TrialFolder
from search.workers import printed as module
from search.workers.printed import Printed, Tee


@contextmanager
def listening() -> Iterator[tuple[Printed, io.StringIO]]:
    """Both streams of this process are one, and listened to."""
    out, printed = io.StringIO(), Printed()
    with redirect_stdout(out), redirect_stderr(out):
        printed.listen()
        yield printed, out


def shown(*texts: str) -> str:
    printed = Printed()
    for text in texts:
        printed.keep(text)
    return printed.take(ends=False)


def test_both_streams_are_kept_in_order_and_passed_on() -> None:
    with listening() as (printed, out):
        handler = logging.StreamHandler()  # as a module makes one when it is imported
        print("one", 2)
        handler.emit(logging.LogRecord("own", logging.WARNING, "x.py", 1, "three", (), None))
        sys.stdout.writelines(["four\n", "five\n"])
        assert printed.take(ends=False) == out.getvalue() == "one 2\nthree\nfour\nfive\n"
        assert printed.take(ends=True) == "", "it is taken once"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\r 10%\r 50%\r100%\n", "100%\n"),
        ("step 1\rstep 2\rstep 3\r\nnext\n", "step 3\nnext\n"),
        ("a longer one\rshort\n", "shortger one\n"),
        ("a bar\r     \rdone\n", "done \n"),
        ("before\na bar\r     \r", "before\n"),
        ("\r     \r", ""),
        ("outer 1/2\n\rinner 1/9\x1b[A\n\rinner 9/9\x1b[A\router 2/2", "outer 2/2\ninner 9/9\n"),
        ("one\r\ntwo\r\n", "one\ntwo\n"),
        ("one\x1b[A\ntwo\n", "one\ntwo\n"),
        ("one\nlonger\x1b[A!\n", "one   !\nlonger\n"),
    ],
    ids=["bar", "ends", "shorter", "wiped_and_on", "wiped", "nothing", "two_bars", "windows", "above", "beyond"],
)
def test_a_line_that_is_written_over_is_kept_as_it_stands_at_last(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(*text) == expected, "in whatever parts it is written"


@pytest.mark.parametrize(("leave", "expected"), [(False, ["outer"]), (True, ["inner", "inner", "outer"])])
def test_the_bars_of_tqdm_stand_where_they_end(leave: bool, expected: list[str]) -> None:
    with listening() as (printed, _):
        for _ in tqdm(range(2), desc="outer", mininterval=0):
            for _ in tqdm(range(50), desc="inner", mininterval=0, leave=leave):
                pass
        lines = printed.take(ends=True).splitlines()
        assert [line.split("|")[0] for line in lines] == [f"{name}: 100%" for name in expected]


def test_a_line_goes_on_after_it_was_taken_unless_it_is_written_over() -> None:
    with listening() as (printed, _):
        texts = []
        for text in ("epoch 1:", " done\n", "\r10%", "\r20%", " of it", "30%\r", "40%\r", "end"):
            print(text, end="")
            texts.append(printed.take(ends=False))
        assert "".join(texts) == "epoch 1: done\n10%\n20% of it30%\n40%\nend"
        assert printed.take(ends=True) == "\n", "the next trial begins on a line of its own"
        assert printed.take(ends=True) == ""


def test_of_too_much_the_end_is_kept_and_what_is_left_out_is_counted() -> None:
    with listening() as (printed, _):
        lines = [f"line {number}\n" for number in range(50_000)]
        for line in lines:
            sys.stdout.write(line)
            assert printed._new_length <= module.LONGEST
        told, _, kept = printed.take(ends=False).partition("\n")
        everything = "".join(lines)
        assert everything.endswith(kept)
        assert len(kept) == module.LONGEST
        assert told == f"[{len(everything) - len(kept)} characters are left out here]"
        print("more")
        assert printed.take(ends=False) == "more\n"


def test_a_bar_makes_nothing_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 100)
    steps = [f"step {number:>4}\r" for number in range(1000)]
    assert shown("before\n", *steps) == "before\nstep  999\n"


def test_threads_lose_nothing() -> None:
    with listening() as (printed, _):

        def work(name: int) -> None:
            for number in range(500):
                sys.stdout.write(f"{name} {number}\n")

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        text = ""
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            text += printed.take(ends=False)
        text += printed.take(ends=False)
        assert sorted(text.splitlines()) == sorted(f"{name} {number}" for name in range(8) for number in range(500))


def test_nobody_who_prints_waits() -> None:
    """As when a destructor prints while what was printed is taken, in the same thread."""
    with listening() as (printed, _):
        with printed._lock:
            print("x" * 2 * module.LONGEST)
            print("end")
        assert printed.take(ends=False).endswith("x\nend\n")


def test_half_a_character_is_told() -> None:
    with listening() as (printed, out):
        print("caf\udce9.png")
        assert out.getvalue() == "caf\udce9.png\n", "the original decides what becomes of it"
        assert printed.take(ends=False) == "caf\\udce9.png\n"


def test_what_the_original_refuses_is_refused_and_not_kept() -> None:
    with listening() as (printed, _):
        with pytest.raises(TypeError):
            sys.stdout.write(b"bytes")  # type: ignore[arg-type]
        assert printed.take(ends=True) == ""


def test_the_stream_is_the_original_in_all_else(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w", encoding="latin-1", errors="replace") as file:
        kept: list[str] = []
        tee = cast(TextIO, Tee(file, kept.append))
        assert (tee.encoding, tee.errors, tee.name) == (file.encoding, file.errors, file.name)
        assert (tee.fileno(), tee.isatty(), tee.writable()) == (file.fileno(), False, True)
        assert tee.write("four") == 4
        tee.flush()
        assert (tmp_path / "file").read_text() == "four"


class TestInTheFolder:
    def test_it_is_added_to_and_there_is_no_file_without_it(self, tmp_path: Path) -> None:
        folder = TrialFolder(tmp_path, 3)
        folder.append_printed("")
        assert not folder.path.exists()
        assert folder.last_printed(10) == []
        for number in range(20):
            folder.append_printed(f"caf\u00e9 {number}\n")
        assert folder.last_printed(2) == ["caf\u00e9 18", "caf\u00e9 19"]
        assert len((folder.path / "output.txt").read_bytes().splitlines()) == 20
        folder.append_printed("x" * 100_000)
        assert len(folder.last_printed(2)[0]) == 8192, "a line without an end is not read whole"

    def test_a_full_disk_fails_no_trial(self, tmp_path: Path) -> None:
        folder = TrialFolder(tmp_path, 3)
        folder.path.mkdir(parents=True)
        (folder.path / "output.txt").symlink_to("/dev/full")
        folder.append_printed("lost\n")
        (folder.path / "output.txt").unlink()
        folder.append_printed("there is room again\n")
        assert folder.last_printed(2) == ["there is room again"]
