"""YAML is read as a person meant it, and written so that it is read back equal."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search.yaml_file import dump, dump_line, parse, read, write
from trainables.contract import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-5", r"file: line 1: YAML reads 1e-5 as text; write 1\.0e-5"),
        ("a: 1\nlr: 3e4", r"file: line 2: YAML reads 3e4 as text; write 3\.0e\+4"),
        ("lr: 2.5e3", r"write 2\.5e\+3"),
        ("lr: [1.0e-4, -1E2]", r"YAML reads -1E2 as text; write -1\.0e\+2"),
        ("lr: -.5", r"YAML reads -\.5 as text; write -0\.5"),
        ("lr: .5e3", r"YAML reads \.5e3 as text; write 0\.5e\+3"),
        ("ids: [031]", 'YAML reads 031 as 25; write that, or "031" for the text'),
        ("at: 1:30", 'YAML reads 1:30 as 90; write that, or "1:30" for the text'),
        ("at: 1:30.5", r'YAML reads 1:30\.5 as 90\.5; write that, or "1:30\.5" for the text'),
        ("ids: [08]", 'YAML reads 08 as text; write 8, or "08" for the text'),
        ("mode: -0o17", 'YAML reads -0o17 as text; write -15, or "-0o17" for the text'),
        ("amp: on", r'YAML reads on as a truth value; write true or false, or "on" for the text'),
        ("amp: No", "YAML reads No as a truth value"),
        ("on: 1", "YAML reads on as a truth value"),
        ("lr: 1\nseed: 2\nlr: 3", "line 3: the key `lr` appears twice; keep one of them"),
        ("config: {optim: {lr: 1, lr: 2}}", "the key `lr` appears twice"),
        ("a: [1, 2", "file: line 1: "),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("a: 1\n---\nb: 2", "another document"),
        ("day: 2024-13-01", 'line 1: 2024-13-01 is no timestamp: month must be in 1..12; write "2024-13-01" for the'),
        ("a: 1\nb: !!bool maybe", 'file: line 2: maybe is no bool; write "maybe" for the text'),
        ("a: !!timestamp abc", 'file: line 1: abc is no timestamp; write "abc" for the text'),
        ("a: !!int ''", "file: line 1:  is no int; "),
        ('a: "\\UFFFFFFFF"', "file: not YAML: Python int too large"),
        ("{a: " * 3000, "file: is nested too deeply to be read"),
        ("[" * 3000 + "]" * 3000, "file: is nested too deeply to be read"),
        ("a: &a {b: *a}", "an alias refers to something that contains it"),
    ],
)
def test_a_trap_of_yaml_is_an_error_of_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(text, "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.0e-5", 1e-5),
        ("'1e-5'", "1e-5"),
        ("true", True),
        ("[0, 10, 1_000, 0x1F, .5, -0.5]", [0, 10, 1000, 31, 0.5, -0.5]),
        ('"on"', "on"),
        ("null", None),
        ("e5", "e5"),
        ("[08:30, 2024-08, 0o9, 00.5]", ["08:30", "2024-08", "0o9", 0.5]),
        ("1e5x", "1e5x"),
        ("{a: {x: 1}, b: {x: 2}}", {"a": {"x": 1}, "b": {"x": 2}}),
    ],
)
def test_what_is_meant_is_read(text: str, value: Any) -> None:
    assert parse(text, "file") == value


def test_an_anchor_may_be_merged_and_its_keys_replaced() -> None:
    text = "base: &base {lr: 1, seed: 2}\nmore: {over: &over {<<: *base, lr: 3}}\nlast: {<<: *over, lr: 4}"
    document = parse(text, "file")
    assert document["more"]["over"] == {"lr": 3, "seed": 2}
    assert document["last"] == {"lr": 4, "seed": 2}


def test_what_an_alias_repeats_is_a_copy() -> None:
    document = parse("a: &a {optim: {lr: 1}, sizes: [1]}\nb: *a\nc: {<<: *a}", "file")
    document["a"]["optim"]["lr"] = 2
    document["a"]["sizes"].append(2)
    assert document["b"] == document["c"] == {"optim": {"lr": 1}, "sizes": [1]}


@pytest.mark.parametrize(
    "value",
    [
        *(1e-5, 1e16, 0.1, -2.0, float("inf"), 3, True, None, "1e-5", "3e4", "on", "yes", "1.5", "null", "", "a: b"),
        *("é", "08", "0o17", "1:30.5"),
    ],
)
def test_a_written_value_is_read_back_equal_and_of_its_type(value: Any, tmp_path: Path) -> None:
    document = {"plain": value, "listed": [value, [value]], "nested": {"again": [{"deep": value}]}}
    write(tmp_path / "file.yaml", document)
    found = read(tmp_path / "file.yaml")
    assert found == document
    assert type(found["plain"]) is type(value)


def test_a_value_that_stands_twice_is_written_out_twice() -> None:
    shared = [1, 2]
    assert "&" not in dump({"a": shared, "b": shared})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(UserError, match=r"latin\.yaml: is not UTF-8 text"):
        read(tmp_path / "latin.yaml")


def test_a_file_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"name": "größer"})
    code = "import pathlib, sys, search.yaml_file as y; print(ascii(y.read(pathlib.Path(sys.argv[1]))))"
    ascii_locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = subprocess.check_output([sys.executable, "-c", code, tmp_path / "a.yaml"], env=ascii_locale, text=True)
    assert told == "{'name': 'gr\\xf6\\xdfer'}\n"


@pytest.mark.parametrize(
    "value",
    [
        *(1e-5, -3e22, math.inf, 0.1, 7, True, None, "1e-5", "-.5", "031", "on", "a: b", "", [[1e-5, 2], [3.0]], {}),
        {"log": [1e-5, 1e-2]},
        {"choice": [[8, 16], {"name": "x", "betas": [0.9, 1e-8]}]},
        "x" * 300,
        [[i] * 40 for i in range(9)],
    ],
    ids=str,
)
def test_a_value_on_one_line_is_read_back(value: Any) -> None:
    text = dump_line(value)
    assert "\n" not in text
    assert parse(text, "line") == value
