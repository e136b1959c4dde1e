"""No frame trains and validates; the official windows are split as ever; long windows keep enough to validate on."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trainables.beam.config import Data
from trainables.beam.split import Side, scored_apart, split
from trainables.beam.table import Table
from trainables.contract import UserError

WINDOWS = (50, 3000, 4000, 4143)  # of scenarios 31 to 34; those of scenario 31 are the adaptation set
OFFICIAL = np.array([-8, -6, -4, -2, 0])  # files of a window, from its newest instant
TWENTY_TO_FIVE = np.array([*range(-38, 1, 2), 1, 2, 3, 4])


def table_of(files: NDArray[np.int64], passes: bool = False, adaptation_passes: bool = False) -> Table:
    """As many windows as are public, one for each file in turn, and, if asked for, a pass for every 300 of them."""
    order = (1, 2, 3, 0)  # the adaptation set comes last
    frames = [np.arange(WINDOWS[number])[:, None] - files.min() + files for number in order]
    names = [
        f"{31 + number}-{i // (300 if number else 10)}" if number or adaptation_passes else ""
        for number in order
        for i in range(WINDOWS[number])
    ]
    scenario_N = np.repeat(order, [WINDOWS[number] for number in order])
    return Table(
        root=Path("root"),
        csvs=(Path("a.csv"),),
        digest="",
        lines=(),
        scenarios=("scenario31", "scenario32", "scenario33", "scenario34"),
        scenario_N=scenario_N,
        beam_NP=np.zeros((len(scenario_N), 1), dtype=np.int64),
        groups={},
        frame_NK=np.concatenate(frames),
        passes_N=tuple(names) if passes else None,
        adaptation_N=scenario_N == 0,
        left_out="",
    )


def frames_of(table: Table, side: Side) -> set[tuple[int, int]]:
    """The frames that a side's windows have, each by its scenario and number."""
    windows = side.window_S
    scenario_SK = np.broadcast_to(table.scenario_N[windows, None], table.frame_NK[windows].shape)
    return set(zip(scenario_SK.flatten().tolist(), table.frame_NK[windows].flatten().tolist(), strict=True))


@pytest.mark.parametrize(
    ("passes", "data", "windows", "digests"),
    [
        (False, Data(root="r"), (8613, 2012), (2223747065, 2134606652)),
        (False, Data(root="r", split_seed=1, holdout=0.1), (9875, 982), (3814091859, 3888421558)),
        (False, Data(root="r", split="legacy"), (8954, 2239), (1599080007, 2401403053)),
        (True, Data(root="r"), (8943, 2250), (230525649, 4056365432)),
        (True, Data(root="r", split_seed=1, holdout=0.1), (10243, 950), (1404873244, 1775369857)),
    ],
)
def test_the_official_windows_are_split_as_they_always_were(
    passes: bool, data: Data, windows: tuple[int, int], digests: tuple[int, int]
) -> None:
    """The digests are of the split before its blocks could be of another length."""
    sides = split(table_of(OFFICIAL, passes), data)
    assert tuple(map(len, sides)) == windows
    assert tuple(zlib.crc32(side.window_S.tobytes()) for side in sides) == digests


def test_a_block_is_as_long_as_four_windows_and_50_files_at_least() -> None:
    assert Data().block_files == Data(history=1).block_files == 50
    assert Data(root="r", history=20, steps=5).block_files == 4 * 43
    assert Data(root="r", longest_history=20, steps=5).block_files == 4 * 43, "in a search, one for all histories"
    assert Data(root="r", history=20, steps=5, block=60).block_files == 60
    with pytest.raises(UserError, match=r"data\.block = 0 must be at least 1 file"):
        Data(block=0)


@pytest.mark.parametrize("seed", [290, 0, 1, 2])
def test_long_windows_without_passes_keep_enough_to_validate_on(seed: int) -> None:
    table, data = table_of(TWENTY_TO_FIVE), Data(root="r", history=20, steps=5, split_seed=seed)
    train, val = split(table, data)
    assert not frames_of(table, train) & frames_of(table, val)
    held_out = int((~table.adaptation_N[val.window_S]).sum())
    assert held_out / (held_out + len(train)) >= 0.15
    _, starved = split(table, replace(data, block=50))
    assert int((~table.adaptation_N[starved.window_S]).sum()) < held_out / 2


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("adaptation_passes", [False, True])
def test_the_adaptation_set_may_train_and_no_frame_of_it_is_on_both_sides(
    passes: bool, adaptation_passes: bool
) -> None:
    table, scored = table_of(OFFICIAL, passes, adaptation_passes), Data(root="r")
    trained = replace(scored, adaptation="train")
    sides = split(table, trained)
    adapted = [side.take(table.adaptation_N[side.window_S]) for side in sides]
    assert len(adapted[0]) > 20
    assert len(adapted[1]) >= 2
    assert not set(adapted[0].window_S) & set(adapted[1].window_S)
    if not passes:  # a pass may begin with frames of the one before, as it does here
        assert not frames_of(table, sides[0]) & frames_of(table, sides[1])
    assert scored_apart(table, scored).sum() == WINDOWS[0]
    assert not scored_apart(table, trained).any()
    for side, was in zip(sides, split(table, scored), strict=True):
        rest, before = (each.window_S[~table.adaptation_N[each.window_S]] for each in (side, was))
        np.testing.assert_array_equal(rest, before)


def test_an_adaptation_set_that_is_not_there_cannot_train() -> None:
    table, data = table_of(OFFICIAL), Data(root="r", adaptation="train")
    without = replace(table, adaptation_N=np.zeros_like(table.adaptation_N))
    with pytest.raises(UserError, match=r"data\.adaptation = train: root has no adaptation set; set it to score"):
        split(without, data)
    with pytest.raises(UserError, match=r"data\.adaptation = train: x is left out: too short; set it to score"):
        split(replace(without, left_out="x is left out: too short"), data)
