"""Tune's view of the ledger: a Searcher that asks it for settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from search.ledger import Ledger


class StudySearcher(Searcher):
    """Asks the ledger for a setting when Tune has room for a trial; `search.recorder` tells it how trials end."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def suggest(self, trial_id: str) -> Any:
        opened = self._ledger.ask(trial_id)
        if opened is None:
            return Searcher.FINISHED
        return {"number": opened.number, "values": dict(opened.values)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: the result alone does not say why a trial ended."""

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file, as Tune expects a snapshot of its searcher; the study is ours."""
        Path(checkpoint_path).touch()
