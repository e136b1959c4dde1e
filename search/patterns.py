"""Where in the space trials blow up: what the values of those that did have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import fisher_exact

from search.domain import Choice, Parameter
from search.record import Record
from search.space import Space

FAILURES = {"diverged": "diverged", "out_of_memory": "ran out of memory"}
TRIED = ("finished", "stopped", *FAILURES)  # a failed trial says nothing of its setting
CHANCE = 0.05  # a pattern that is likelier than this by chance is not told
MOST = 3  # patterns told of each failure


@dataclass(frozen=True)
class Pattern:
    """Trials inside a part of the space and outside of it, and how many of them failed."""

    where: str
    inside: int
    failed_inside: int
    outside: int
    failed_outside: int
    chance: float  # that a split into such parts is at least as uneven, with all cuts of a range counted

    def told(self, failure: str) -> str:
        inside = f"{self.failed_inside} of {self.inside} {failure} with {self.where}"
        return f"{inside}, {self.failed_outside} of {self.outside} elsewhere"


def patterns(space: Space, found: Sequence[Record]) -> list[str]:
    """A line for each part of the space, described by one parameter, in which clearly more trials failed."""
    tried = [record for record in found if record.status in TRIED]
    lines = []
    for status, failure in FAILURES.items():
        seen = [
            max(uneven, key=lambda item: -item.chance)
            for parameter in space.parameters
            if (uneven := [item for item in _splits(parameter, tried, status) if item.chance < CHANCE])
        ]
        lines += [item.told(failure) for item in sorted(seen, key=lambda item: item.chance)[:MOST]]
    return lines


def _splits(parameter: Parameter, tried: Sequence[Record], status: str) -> Iterator[Pattern]:
    """By each value of a choice, and by each cut between two tried values of a range."""
    name = parameter.name
    having = [record for record in tried if name in record.values]
    values = [record.values[name] for record in having]
    parts: dict[str, list[bool]] = {}
    if isinstance(parameter.domain, Choice):
        for chosen in parameter.domain.values:
            parts[f"{name} = {chosen}"] = [value == chosen for value in values]
    else:
        for low, high in itertools.pairwise(sorted(set(values))):
            cut = (low + high) / 2
            parts[f"{name} above {cut:.3g}"] = [value > cut for value in values]
            parts[f"{name} below {cut:.3g}"] = [value < cut for value in values]
    for where, inside in parts.items():
        yield _pattern(where, having, inside, status, len(parts))


def _pattern(where: str, having: Sequence[Record], inside: Sequence[bool], status: str, looks: int) -> Pattern:
    failed_in = sum(at and record.status == status for at, record in zip(inside, having, strict=True))
    failed_out = sum(record.status == status for record in having) - failed_in
    count_in = sum(inside)
    count_out = len(having) - count_in
    table = [[failed_in, count_in - failed_in], [failed_out, count_out - failed_out]]
    chance = float(fisher_exact(table, alternative="greater").pvalue) * looks
    return Pattern(where, count_in, failed_in, count_out, failed_out, chance)
