"""What somebody's code says, as JSON and a table can hold it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from search.text import LONGEST_TEXT, one_line, plain, short_line


class Own:
    def __str__(self) -> str:
        return "a thing\nof mine"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({np.int64(3): 1.0, ("t", 1): 2}, {"3": 1.0, "('t', 1)": 2}),
        ([np.float32(0.5), np.int64(7), np.bool_(True), np.str_("a")], [0.5, 7, True, "a"]),
        ([torch.tensor(4), torch.tensor([1.0, float("nan")])], [4, [1.0, "nan"]]),
        ({"norms": (1.0, float("inf"), -float("inf"))}, {"norms": [1.0, "inf", "-inf"]}),
        ({"who": Own(), "none": Own}, {"who": "a thing of mine", "none": str(Own)}),
        ({"caf\udce9": "\udce9"}, {r"caf\udce9": r"\udce9"}),
        (None, None),
    ],
)
def test_anything_becomes_what_json_knows(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected


def test_what_holds_itself_has_an_end() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    assert json.dumps(plain(loop))


def test_a_reason_is_one_line_and_never_empty() -> None:
    assert one_line("plain words\n  second line", "") == "plain words second line"
    assert one_line(" \n", "MemoryError") == "MemoryError"
    assert one_line("\x1b[1;31mred\x1b[0m and\tzero\x00\x07", "") == "red and zero"
    assert len(one_line("w" * 1000, "")) == 1000, "the remedy often stands at the end"
    assert len(short_line("w" * 1000, "")) <= LONGEST_TEXT
