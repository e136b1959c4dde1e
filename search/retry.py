"""Retries failed trials once the cause has been fixed: `--resume DIR --retry-failed`."""

from __future__ import annotations

from pathlib import Path

from optuna.trial import TrialState, create_trial

from search.records.folder import STUDY, TrialFolder
from search.records.record import unmended
from search.space import Space
from search.study import distributions_of, open_study, params_of, records


def retry_failed(results: Path, space: Space) -> str:
    """Begin a new attempt at each failed trial of a results folder that has none yet; returns which, in words.

    Optuna cannot reopen an ended trial. So each attempt is a further trial, on top of the search's, stored in the study
    as an interrupted one: with the failed trial's setting and name, after its last checkpoint.
    """
    study, attempts = open_study(results / STUDY, space, create=False), []
    for record in unmended(records(study, space)):
        trials = study.get_trials(deepcopy=False)
        epochs = TrialFolder(results, len(trials)).begin_from(TrialFolder(results, record.number))
        reported = trials[record.number].intermediate_values
        params = params_of(space, record.values)
        attempt = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=distributions_of(space, record.values),
            intermediate_values={epoch: value for epoch, value in reported.items() if epoch <= epochs},
            user_attrs={"name": record.name, "values": dict(record.values), "again": record.number},
            system_attrs={"fixed_params": params},  # how Optuna marks a given setting, which is not a cell of a grid
        )
        study.add_trial(attempt)
        attempts.append(f"{record.number} as {len(trials)}")
    return f"run again: trial {', '.join(attempts)}" if attempts else "--retry-failed: no failed trial is left"
