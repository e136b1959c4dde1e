"""What is said of where trials blow up: a clear pattern is named, and chance is not."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import fisher_exact
from spaces import space_of

from search.records.patterns import _splits, patterns
from search.records.record import Record
from search.space import Space

CONFIG = {
    "block": {"choice": ["uni", "bi", "cs_bi"]},
    "lr": {"log": [1.0e-4, 1.0e-1]},
    "depth": {"int": [1, 8], "when": {"block": ["bi", "cs_bi"]}},
}


def record(number: int, status: str, values: Mapping[str, Any]) -> Record:
    return Record(number, status, "", None, values, {}, 3, 1.0)


def searched(space: Space, count: int, blows_up: Any, seed: int = 0) -> list[Record]:
    rng = random.Random(seed)
    drawn = [space.draw(rng) for _ in range(count)]
    return [record(i, "diverged" if blows_up(values) else "stopped", values) for i, values in enumerate(drawn)]


def test_the_value_that_blows_up_is_named_with_its_counts(tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG)
    found = searched(space, 20, lambda values: values["block"] == "uni")
    uni = sum(item.values["block"] == "uni" for item in found)
    assert patterns(space, found) == [f"{uni} of {uni} diverged with block = uni, 0 of {20 - uni} elsewhere"]


def test_a_range_is_cut_between_what_blew_up_and_what_did_not(tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG)
    found = searched(space, 20, lambda values: values["lr"] > 1e-2)
    (line,) = patterns(space, found)
    failed = sum(item.status == "diverged" for item in found)
    assert line.startswith(f"{failed} of {failed} diverged with lr above ")
    cut = float(line.split("above ")[1].split(",")[0])
    stable = max(item.values["lr"] for item in found if item.status == "stopped")
    assert stable <= cut <= min(item.values["lr"] for item in found if item.status == "diverged")


def test_chance_is_no_pattern(tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG)
    told = 0
    for seed in range(100):
        coin = random.Random(seed)
        told += bool(patterns(space, searched(space, 20, lambda values, coin=coin: coin.random() < 0.3, seed)))
    assert told <= 15  # three parameters, each with a chance of at most 0.05


@pytest.mark.parametrize(("each", "told"), [(3, 0), (4, 1)])
def test_a_split_that_chance_makes_in_one_search_of_ten_is_no_pattern(each: int, told: int, tmp_path: Path) -> None:
    """Three of three against none of three is one of twenty splits, and so is the reverse."""
    space = space_of(tmp_path, {"block": {"choice": ["uni", "bi"]}})
    found = [record(i, "diverged", {"block": "uni"}) for i in range(each)]
    found += [record(each + i, "finished", {"block": "bi"}) for i in range(each)]
    assert len(patterns(space, found)) == told


def test_of_many_patterns_the_three_clearest_are_told(tmp_path: Path) -> None:
    space = space_of(tmp_path, {name: {"float": [0.0, 9.0]} for name in "abcde"})
    found = [record(i, "diverged" if i < 8 else "finished", dict.fromkeys("acde", i / 2)) for i in range(16)]
    found = [replace(item, values={**item.values, "b": (i + 2) % 16 / 2}) for i, item in enumerate(found)]
    assert [line.split()[5] for line in patterns(space, found)] == ["a", "c", "d"]


def test_beside_what_explains_every_failure_nothing_else_is_told(tmp_path: Path) -> None:
    """A sampler that has learnt to avoid large rates has found a better block, too."""
    space = space_of(tmp_path, CONFIG)
    early: list[dict[str, Any]] = [{"block": "uni", "lr": 0.05 if i < 6 else 0.001} for i in range(10)]
    found = [
        record(i, "diverged" if values["lr"] > 0.01 else "finished", values)
        for i, values in enumerate([*early, *([{"block": "bi", "lr": 0.001, "depth": 2}] * 20)])
    ]
    assert patterns(space, found) == ["6 of 6 diverged with lr above 0.0255, 0 of 24 elsewhere"]
    found[0] = replace(found[0], status="finished")
    assert len(patterns(space, found)) == 2


def test_what_explains_the_failures_of_one_branch_does_not_explain_all(tmp_path: Path) -> None:
    """Trials without the parameter are neither inside nor outside, and the line says so."""
    space = space_of(tmp_path, CONFIG)
    drawn: list[dict[str, Any]] = [{"block": "bi", "lr": 0.001, "depth": 8 if i < 5 else 1} for i in range(10)]
    drawn += [{"block": "uni", "lr": 0.05 if i < 15 else 0.001} for i in range(30)]
    failing = [values.get("depth") == 8 or values["lr"] == 0.05 for values in drawn]
    found = [record(i, "diverged" if failing[i] else "finished", values) for i, values in enumerate(drawn)]
    assert sorted(patterns(space, found)) == [
        "15 of 15 diverged with lr above 0.0255, 5 of 25 elsewhere",
        "5 of 5 diverged with depth above 4.5, 0 of 5 with another depth",
    ]


def test_a_failed_trial_says_nothing_and_memory_is_told_apart(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"batch": {"int": [1, 48]}})
    sizes = range(4, 44, 2)
    found = [record(i, "out_of_memory" if size > 32 else "finished", {"batch": size}) for i, size in enumerate(sizes)]
    assert patterns(space, found) == ["5 of 5 ran out of memory with batch above 33, 0 of 15 elsewhere"]
    assert patterns(space, [record(i, "failed", item.values) for i, item in enumerate(found)]) == []
    assert patterns(space, []) == []


def test_a_cut_has_the_digits_that_it_needs(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"momentum": {"float": [0.9, 0.9999]}})
    stable = [record(i, "finished", {"momentum": 0.9990 + 0.0001 * i / 2}) for i in range(9)]
    blown = [record(9 + i, "diverged", {"momentum": 0.99960 + 0.00003 * i}) for i in range(7)]
    assert patterns(space, [*stable, *blown]) == ["7 of 7 diverged with momentum above 0.9995, 0 of 9 elsewhere"]


def test_text_and_numbers_of_a_choice_are_told_apart(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"size": {"choice": ["1", 1]}})
    found = [record(i, "diverged" if i % 2 else "finished", {"size": 1 if i % 2 else "1"}) for i in range(16)]
    assert patterns(space, found) == ["8 of 8 diverged with size = 1, 0 of 8 elsewhere"]


def test_a_pattern_is_as_likely_as_fishers_test_says(tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG)
    tried = searched(space, 30, lambda values: values["lr"] > 0.02 or values["block"] == "bi")
    for parameter in space.parameters:
        parts = _splits(parameter, tried, "diverged")
        for item in parts:
            counts = [item.failed_inside, item.inside - item.failed_inside]
            others = [item.failed_outside, item.outside - item.failed_outside]
            expected = fisher_exact([counts, others], alternative="greater").pvalue * len(parts)
            assert item.chance == pytest.approx(expected)


def test_of_a_single_trial_nothing_is_said(tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG)
    assert patterns(space, searched(space, 1, lambda values: True)) == []
    assert patterns(space, [record(i, "diverged", {"block": "uni", "lr": 0.01}) for i in range(3)]) == []
