"""The scores of a search's trials that ran to the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.learning.features import Array
from search.records.folder import TrialFolder
from search.records.health import compared
from search.results import read_results
from search.space import Space


def whole_trials(results: Sequence[Path]) -> tuple[Space, list[Mapping[str, Any]], Array]:
    """Return the space, settings and scores of all trials, in folders of one space, that ran to the end.

    scores: (trials, epochs), what schedulers compare; lower is better.
    """
    found: list[tuple[Mapping[str, Any], list[float]]] = []
    for folder in results:
        space, records = read_results(folder)
        objective = space.objectives[0]
        sign = 1.0 if objective.mode == "min" else -1.0
        for record in records:
            if record.status == "finished":
                rows = TrialFolder(folder, record.number).read_metrics()
                told = [sign * value for row in rows if (value := compared(row["metrics"], objective)) is not None]
                found.append((record.values, told))
    longest = max((len(scores) for _, scores in found), default=0)
    whole = [(setting, scores) for setting, scores in found if len(scores) == longest]
    return space, [setting for setting, _ in whole], np.array([scores for _, scores in whole])
