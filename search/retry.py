"""Another attempt at what failed, once its cause has been mended: `--resume DIR --retry-failed`."""

from __future__ import annotations

from pathlib import Path

from optuna.trial import TrialState, create_trial

from search.records.folder import STUDY, TrialFolder
from search.records.record import unmended
from search.space import Space
from search.study import distributions_of, open_study, params_of, records


def retry_failed(results: Path, space: Space) -> str:
    """Begin each failed trial of a results folder anew, unless that has been done; returns which, in words.

    Optuna reopens no trial that has ended. So each attempt is a trial of its own, on top of the search's, and stands in
    the study as one that was interrupted: at the failed one's setting, with its name, after its last checkpoint.
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
            system_attrs={"fixed_params": params},  # Optuna's word for a setting that is given: it is no cell of a grid
        )
        study.add_trial(attempt)
        attempts.append(f"{record.number} as {len(trials)}")
    return f"run again: trial {', '.join(attempts)}" if attempts else "--retry-failed: no trial is left that failed"
