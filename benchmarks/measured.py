"""Measurements of one search of the toy, and the figures computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SLOTS = 2


@dataclass(frozen=True)
class Measured:
    """When a search began and each trial ended (Unix time), and each report's latency; all in seconds."""

    began: float
    ends: Sequence[float]
    latencies: Sequence[float]

    @property
    def wall_s(self) -> float:
        return max(self.ends) - self.began

    @property
    def cost_per_trial_s(self) -> float:
        return cost_per_further_trial(self.ends, SLOTS)

    def latency_s(self, percent: int) -> float:
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


def cost_per_further_trial(ends: Sequence[float], slots: int) -> float:
    """Return slot-seconds per trial, over about the later half of the trials, in whole rounds of `slots` trials.

    Trials end in bunches of `slots`; a window that cut through a bunch would count a round's time for part of its
    trials. Raises ValueError for fewer than two rounds.
    """
    ends = sorted(ends)
    first = len(ends) // 2 // slots * slots
    if first == 0:
        raise ValueError(f"{len(ends)} trials on {slots} slots leave none to count from: take {2 * slots} or more")
    return (ends[-1] - ends[first - 1]) / (len(ends) - first) * slots
