"""The Optuna study of a search, its single source of truth: how it is opened and read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from search.files import is_there
from search.records.journal import StudyJournal, damaged_line
from search.records.record import Record, read_record
from search.space import Space
from trainables.contract import UserError

_NAME = "search"  # name of the only study in a journal
_ENDED = "ended"


def is_begun(file: Path) -> bool:
    """Return whether there is a study in the file: it has no entry if a process was killed as it began a search.

    Raises UserError if the file's folder cannot be accessed.
    """
    if not is_there(file):
        return False
    try:
        with open(file, "rb") as lines:
            return lines.readline().endswith(b"\n")
    except OSError:  # what opens the study says why it cannot be read
        return True


def open_study(file: Path, space: Space, create: bool) -> optuna.Study:
    """Open the study of a results folder, or create it; raises UserError if it is missing or unreadable.

    create: call it only for a file that has not begun (`is_begun`).
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not create and not is_there(file):
        raise UserError(f"{file}: there is no study here; name a results folder of an earlier search")
    try:
        storage = JournalStorage(StudyJournal(str(file)))
        return new_study(storage, space) if create else optuna.load_study(storage=storage, study_name=_NAME)
    except KeyError:
        raise UserError(f"{file}: there is no search in it; name a results folder of an earlier search") from None
    except ValueError as error:  # corrupt in the middle; a torn last line is skipped
        if not (line := damaged_line(file)):
            raise UserError(f"{file}: cannot be read: {error}; was it written by another version of Optuna?") from None
        raise UserError(
            f"{file}: line {line} cannot be read: {error}; without that line and those after it, the search goes on "
            "from what was recorded before (keep a copy)"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be opened: {error.strerror}") from None


def new_study(storage: BaseStorage, space: Space) -> optuna.Study:
    """Create a study with the directions and metric names of the space's objectives."""
    study = optuna.create_study(storage=storage, study_name=_NAME, directions=directions_of(space))
    with quiet_optuna():
        study.set_metric_names([item.metric for item in space.objectives])
    return study


def mark_ended(study: optuna.Study, trials: int) -> None:
    """Mark a search of `trials` trials as ended, whether complete or out of time."""
    study.set_user_attr(_ENDED, trials)


def ended_after(study: optuna.Study) -> int | None:
    """Return how many trials an ended search was to have; None if it has not ended or was interrupted."""
    return study.user_attrs.get(_ENDED)


def records(study: optuna.Study, space: Space) -> list[Record]:
    """Return the records of all trials begun in this search, by number, excluding those taken over by a warm start."""
    return [
        read_record(trial, space)
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING and "from" not in trial.user_attrs
    ]


def directions_of(space: Space) -> list[StudyDirection]:
    better = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    return [better[item.mode] for item in space.objectives]


def params_of(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a setting encoded as Optuna stores it."""
    return {item.name: item.domain.encode(values[item.name]) for item in space.parameters if item.name in values}


def distributions_of(space: Space, values: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    return {item.name: item.domain.distribution() for item in space.parameters if item.name in values}


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Suppress Optuna's warnings about intended behaviour, which would reach the user's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
