"""Splits the windows into training and validation, and adds changed and mirrored copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainables.beam.config import Data
from trainables.beam.table import Table
from trainables.contract import UserError

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BLOCK = 50  # frames that stay together if passes are not known


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
    border is on neither side, so that no frame is on both. The adaptation set is only validated on. Copies are made
    only of training windows.
    legacy: holds out random samples, although neighbours are near duplicates; copies are made of the adaptation set
    before, so that a window may be on both sides. Only for comparison with published numbers.

    Raises `UserError` if a side would be empty.
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
        held_NK = _held_out(table, data.holdout, rng)
        train_N, val_N = ~held_NK.any(axis=1) & ~table.adaptation_N, held_NK.all(axis=1) | table.adaptation_N
        train, val = _with_copies(np.flatnonzero(train_N), train_N, data), _as_measured(np.flatnonzero(val_N))
    scored = int((~scored_apart(table, data)[val.window_S]).sum())
    if not len(train) or not scored:
        raise UserError(
            f"{table.csvs[0]}: a {data.split} split with data.holdout = {data.holdout} trains on {len(train)} windows "
            f"and validates on {scored}; it needs two passes, or {2 * BLOCK} frames, of one scenario"
        )
    return train, val


def on_neither_side(train: Side, val: Side, windows: int) -> int:
    """Return how many of the data set's windows are on neither side, because they straddle a border of the split."""
    return windows - int((train.holds(windows) | val.holds(windows)).sum())


def scored_apart(table: Table, data: Data) -> Bools:
    """Return which windows only count in scores of their own: the adaptation set, in the honest split.

    Its scores show how training generalises.
    """
    return table.adaptation_N & (data.split == "honest")


def _as_measured(windows: Ints) -> Side:
    return Side(windows, np.zeros_like(windows), np.zeros(len(windows), dtype=bool))


def _with_copies(windows: Ints, copied_N: Bools, data: Data) -> Side:
    """Return these windows, `data.augment` changed copies of those in `copied_N`, and with `data.flip` all mirrored."""
    copied = windows[copied_N[windows]]
    window_S = np.concatenate([windows, np.repeat(copied, data.augment)])
    copy_S = np.concatenate([np.zeros_like(windows), np.tile(np.arange(1, data.augment + 1), len(copied))])
    sides = 2 if data.flip else 1
    return Side(np.tile(window_S, sides), np.tile(copy_S, sides), np.repeat([False, True][:sides], len(window_S)))


def _held_out(table: Table, holdout: float, rng: np.random.Generator) -> Bools:
    """Return for every window whether each frame's block (or its pass) is held out, (N, K or 1).

    A share of each scenario's passes or blocks is held out, at least one if there are two.
    """
    if table.passes_N is not None:
        unit_NK = np.unique(np.array(table.passes_N), return_inverse=True)[1][:, None]
    else:
        unit_NK = table.frame_NK // BLOCK
    held_NK = np.zeros(unit_NK.shape, dtype=bool)
    for number in range(len(table.scenarios)):
        here = (table.scenario_N == number) & ~table.adaptation_N
        units = np.unique(unit_NK[here])
        count = min(max(1, round(holdout * len(units))), len(units) - 1)  # never all of them
        if count > 0:
            held_NK[here] = np.isin(unit_NK[here], rng.permutation(units)[:count])
    return held_NK
