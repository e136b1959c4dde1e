"""Splits the windows into training and validation, and adds changed and mirrored copies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainables.beam.config import Data
from trainables.beam.table import Table
from trainables.contract import UserError

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Side:
    """The samples of one side of the split, S of them."""

    window_S: Ints  # window numbers in the data set
    copy_S: Ints  # 0: as measured; from 1: number of the changed copy
    mirrored_S: Bools

    def __len__(self) -> int:
        return len(self.window_S)

    def holds(self, windows: int) -> Bools:
        """Return which of the data set's windows are on this side, (windows,)."""
        return np.bincount(self.window_S, minlength=windows) > 0

    def take(self, chosen: Bools) -> Side:
        return Side(self.window_S[chosen], self.copy_S[chosen], self.mirrored_S[chosen])


def split(table: Table, data: Data) -> tuple[Side, Side]:
    """Return the training and the validation side, the same for the same settings.

    honest: holds out whole passes or, if the CSV does not name them, whole blocks of frames; a window that straddles a
    border is on neither side, so that no frame is on both. The adaptation set is only validated on, or is split by
    itself in the same way (`data.adaptation`). Copies are made only of training windows.
    legacy: holds out random samples, although neighbours are near duplicates; copies are made of the adaptation set
    before, so that a window may be on both sides. Only for comparison with published numbers.

    Raises `UserError` if a side would be empty, or if there is no adaptation set and `data` asks for one.
    """
    rng = np.random.default_rng(data.split_seed)
    if data.split == "legacy":
        if data.augment and not table.adaptation_N.any():
            raise UserError(
                f"data.augment = {data.augment}: a legacy split copies the adaptation set alone, and {table.root} has "
                "none that can be used; set data.augment to 0"
            )
        everything = _with_copies(np.arange(len(table.beam_NP)), table.adaptation_N, data)
        order = rng.permutation(len(everything))
        to_train = np.isin(np.arange(len(everything)), order[: int((1 - data.holdout) * len(everything))])
        train, val = everything.take(to_train), everything.take(~to_train)
    else:
        if data.adaptation == "train" and not table.adaptation_N.any():
            raise UserError(
                f"data.adaptation = train: {table.left_out or f'{table.root} has no adaptation set'}; set it to score"
            )
        held_NK, apart_N = _held_out(table, data, rng), scored_apart(table, data)
        train_N, val_N = ~held_NK.any(axis=1) & ~apart_N, held_NK.all(axis=1) | apart_N
        train, val = _with_copies(np.flatnonzero(train_N), train_N, data), _as_measured(np.flatnonzero(val_N))
    scored = int((~scored_apart(table, data)[val.window_S]).sum())
    if not len(train) or not scored:
        raise UserError(
            f"{table.csvs[0]}: the {data.split} split with data.holdout = {data.holdout} trains on {len(train)} "
            f"windows and validates on {scored}; it needs two passes, or two blocks of {data.block_files} files "
            "(data.block) that hold whole windows, of one scenario"
        )
    return train, val


def on_neither_side(train: Side, val: Side, windows: int) -> int:
    """Return how many of the data set's windows are on neither side, because they straddle a border of the split."""
    return windows - int((train.holds(windows) | val.holds(windows)).sum())


def scored_apart(table: Table, data: Data) -> Bools:
    """Return which windows only count in scores of their own: the adaptation set, if the honest split only scores it.

    Its scores show how training generalises.
    """
    return table.adaptation_N & (data.split == "honest" and data.adaptation == "score")


def _as_measured(windows: Ints) -> Side:
    return Side(windows, np.zeros_like(windows), np.zeros(len(windows), dtype=bool))


def _with_copies(windows: Ints, copied_N: Bools, data: Data) -> Side:
    """Return these windows, `data.augment` changed copies of those in `copied_N`, and with `data.flip` all mirrored."""
    copied = windows[copied_N[windows]]
    window_S = np.concatenate([windows, np.repeat(copied, data.augment)])
    copy_S = np.concatenate([np.zeros_like(windows), np.tile(np.arange(1, data.augment + 1), len(copied))])
    sides = 2 if data.flip else 1
    return Side(np.tile(window_S, sides), np.tile(copy_S, sides), np.repeat([False, True][:sides], len(window_S)))


def _held_out(table: Table, data: Data, rng: np.random.Generator) -> Bools:
    """Return for every window whether each frame's block (or its pass) is held out, (N, K).

    A share of each scenario's passes or blocks is held out, at least one if there are two. Those of the adaptation set
    are drawn last, so that the development set is split alike with and without them.
    """
    held_NK = np.zeros(table.frame_NK.shape, dtype=bool)
    sets = [~table.adaptation_N, *([table.adaptation_N] if data.adaptation == "train" else [])]
    for set_N in sets:
        for number in np.unique(table.scenario_N[set_N]):
            here = (table.scenario_N == number) & set_N
            unit_NK = _units(table, here, data)
            units = np.unique(unit_NK)
            count = min(max(1, round(data.holdout * len(units))), len(units) - 1)  # never all of them
            if count > 0:
                held_NK[here] = np.isin(unit_NK, rng.permutation(units)[:count])
    return held_NK


def _units(table: Table, here: Bools, data: Data) -> Ints:
    """Return the passes of some windows, (N, 1), or if none is named, their frames' blocks, (N, K).

    here: the windows of one set in one scenario. The adaptation set may have too few frames of a scenario for blocks of
    the usual length: one might be nearly all of them.
    """
    passes = [table.passes_N[n] for n in np.flatnonzero(here)] if table.passes_N is not None else []
    if any(passes):
        return np.unique(passes, return_inverse=True)[1][:, None]
    frame_NK = table.frame_NK[here]
    if not table.adaptation_N[here].all():
        return frame_NK // data.block_files
    from_first_NK = frame_NK - frame_NK.min()
    return from_first_NK // min(data.block_files, math.ceil(data.holdout * (from_first_NK.max() + 1)))
