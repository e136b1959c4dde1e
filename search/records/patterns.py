"""Where in the space trials fail: which values the failed ones have in common.

Shapes: P parts of the space.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.records.record import Record
from search.space import Space
from search.space.domain import Choice, Parameter

FAILURES = {"diverged": "diverged", "out_of_memory": "ran out of memory"}
TRIED = ("finished", "stopped", *FAILURES)  # a failed trial tells nothing about its setting
SIGNIFICANT = 0.05  # a pattern more likely than this to arise by chance is not reported
MOST = 3  # patterns reported for each failure


@dataclass(frozen=True)
class Pattern:
    """The trials inside and outside a part of the space, and how many of each failed.

    outside: of the trials that have the parameter. chance: the probability of at least so uneven a split by chance,
        times the number of the parameter's splits (Bonferroni).
    """

    where: str
    elsewhere: str
    inside: int
    failed_inside: int
    outside: int
    failed_outside: int
    chance: float

    def told(self, failure: str) -> str:
        inside = f"{self.failed_inside} of {self.inside} {failure} with {self.where}"
        return f"{inside}, {self.failed_outside} of {self.outside} {self.elsewhere}"


def patterns(space: Space, found: Sequence[Record]) -> list[str]:
    """Return a line for each part of the space, described by one parameter, in which clearly more trials failed."""
    tried = [record for record in found if record.status in TRIED]
    lines = []
    for status, failure in FAILURES.items():
        failures = sum(record.status == status for record in tried)
        if not failures:
            continue
        seen = [
            min(uneven, key=lambda item: item.chance)
            for parameter in space.parameters
            if (uneven := [item for item in _splits(parameter, tried, status) if item.chance < SIGNIFICANT])
        ]
        # Samplers leave the failing part, and whatever else changed meanwhile seems to have mattered, too.
        seen = [item for item in seen if item.failed_inside == item.inside == failures] or seen
        lines += [item.told(failure) for item in sorted(seen, key=lambda item: item.chance)[:MOST]]
    return lines


def _splits(parameter: Parameter, tried: Sequence[Record], status: str) -> list[Pattern]:
    """Return a pattern for each value of a choice, or both sides of each cut between two tried values of a range."""
    name = parameter.name
    having = [record for record in tried if name in record.values]
    values = [record.values[name] for record in having]
    failed = [record.values[name] for record in having if record.status == status]
    if isinstance(parameter.domain, Choice):
        told = [f"{name} = {chosen}" for chosen in parameter.domain.values]
        count_P, failed_P = ([these.count(chosen) for chosen in parameter.domain.values] for these in (values, failed))
    else:
        cuts = [_cut(low, high) for low, high in itertools.pairwise(sorted(set(values)))]
        told = [f"{name} {side} {cut}" for side in ("above", "below") for cut in cuts]
        count_P, failed_P = (_above_and_below(these, cuts) for these in (values, failed))
    if not told or not values:
        return []
    from scipy.stats import hypergeom  # takes most of a second, and only a report of failures needs it

    elsewhere = "elsewhere" if len(having) == len(tried) else f"with another {name}"
    # Fisher's exact test, one-sided.
    chance_P = hypergeom.sf(np.array(failed_P) - 1, len(values), len(failed), count_P) * len(told)
    return [
        Pattern(where, elsewhere, count, failed_inside, len(values) - count, len(failed) - failed_inside, float(chance))
        for where, count, failed_inside, chance in zip(told, count_P, failed_P, chance_P, strict=True)
    ]


def _above_and_below(values: Sequence[float], cuts: Sequence[str]) -> list[int]:
    """Return how many values lie above each cut, then how many below."""
    below: list[int] = np.searchsorted(sorted(values), [float(cut) for cut in cuts], side="right").tolist()
    return [*(len(values) - count for count in below), *below]


def _cut(low: float, high: float) -> str:
    """Return a number between two others, in as few digits as possible (three or more)."""
    texts = (f"{(low + high) / 2:.{digits}g}" for digits in range(3, 18))
    return next((text for text in texts if low < float(text) < high), repr(low))
