"""A search without Ray: a ledger, and a toy that trains, diverges, is stopped or fails at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from search.ledger import Ledger, OpenTrial
from search.records.folder import STUDY
from search.records.record import Record
from search.sampler import sampler_maker
from search.space import Space
from search.study import new_study, open_study

ENDINGS = ("finished", "stopped", "diverged", "out_of_memory", "failed")


def open_ledger(space: Space, storage: BaseStorage) -> Ledger:
    """The ledger of the search in a storage, which is begun where there is none yet."""
    begun = storage.get_all_studies()
    study = optuna.load_study(study_name=None, storage=storage) if begun else new_study(storage, space)
    return Ledger(space, study, sampler_maker(space), Path("no results"))


def open_journal(space: Space, folder: Path) -> Ledger:
    """The same on disk, as a search keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STUDY
    return Ledger(space, open_study(file, space, create=not file.exists()), sampler_maker(space), folder)


def ask(ledger: Ledger, key: str = "slot") -> OpenTrial:
    opened = ledger.ask(key)
    assert opened is not None
    return opened


def toy_ending(opened: OpenTrial) -> str:
    """Large learning rates diverge; the others end by turns in every other way."""
    if opened.values["lr"] > 0.2:
        return "diverged"
    by_turns = ("finished", "stopped", "finished", "finished", "finished", "out_of_memory", "finished", "failed")
    return by_turns[opened.number % len(by_turns)]


def end_toy(ledger: Ledger, opened: OpenTrial, status: str, key: str = "slot") -> Record:
    """Report two epochs and end the trial; one that diverged or ran out of memory has reported nothing."""
    if status not in ("diverged", "out_of_memory"):
        for epoch in (1, 2):
            loss = abs(math.log10(opened.values["lr"]) + 2) / epoch
            metrics = dict.fromkeys((item.metric for item in ledger.space.objectives), loss)
            ledger.report(key, epoch, {**metrics, **({"size": -loss} if "size" in metrics else {})})
    return ledger.end(key, status, "as the toy would have it")


def play(ledger: Ledger, trials: int) -> list[dict[str, Any]]:
    """Run so many trials one after another; returns their values."""
    played = []
    for _ in range(trials):
        opened = ask(ledger)
        played.append(dict(opened.values))
        end_toy(ledger, opened, toy_ending(opened))
    return played


def told(ledger: Ledger) -> list[optuna.trial.FrozenTrial]:
    """The trials as Optuna has them."""
    return ledger.study.get_trials(deepcopy=False)
