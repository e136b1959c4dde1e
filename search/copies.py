"""Deletes the copies of checkpoints that Tune keeps for schedulers that pause trials, or let one go on from another.

Tune would keep every copy until the end of the search, or a number of the latest of each trial (`num_to_keep`), which
may not include the one from which another trial, waiting for its turn, is to go on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ray import tune

LATEST = 2  # of each trial: population-based training may copy the one from before a pause


class Copies(tune.Callback):
    """Keeps the `LATEST` copies of each trial that goes on, and whatever a trial will go on from."""

    def __init__(self) -> None:
        self._made: dict[str, list[Path]] = {}  # by trial, the latest last

    def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
        self._made.setdefault(trial.trial_id, []).append(Path(checkpoint.path))
        going_on = [each for each in trials if not each.is_finished()]
        wanted = {Path(each.checkpoint.path) for each in going_on if each.checkpoint is not None}
        for each in trials:
            made = self._made.get(each.trial_id, [])
            latest = made[-LATEST:] if each in going_on else []
            for path in made.copy():
                if path not in wanted and path not in latest:
                    shutil.rmtree(path, ignore_errors=True)
                    made.remove(path)
