"""What failed is run again, once its cause is mended: as trials of their own, on top of the search's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ledgers import ask, open_journal
from optuna.trial import TrialState
from spaces import space_of

from search import yaml_file
from search.records.folder import TrialFolder
from search.records.record import left_to_run, unmended
from search.results import read_results, summary, why
from search.retry import retry_failed
from search.run import past_of
from search.space import Space
from search.study import records
from search.workers.states import save_state

AFTER_THE_SECOND = save_state({"epoch": 1})
KNOWN = {"name": "from the paper", "lr": 0.125, "shape": [8, 16]}


@pytest.fixture
def space(tmp_path: Path) -> Space:
    config: dict[str, Any] = {"epochs": 4, "lr": {"log": [1e-4, 1.0]}, "shape": {"choice": [[8], [8, 16]]}}
    return space_of(tmp_path, config, search={"trials": 4, "sampler": "random"}, try_first=[KNOWN])


@pytest.fixture
def results(space: Space, tmp_path: Path) -> Path:
    """A search of which three trials are over. The known setting failed in its third epoch, another in its first."""
    results = tmp_path / "results" / "mine"
    ledger = open_journal(space, results)
    yaml_file.write(results / "space.yaml", space.document())
    for number, (status, epochs) in enumerate([("failed", 3), ("finished", 4), ("failed", 0)]):
        folder = TrialFolder(results, ask(ledger).number)
        for epoch in range(1, epochs + 1):
            metrics = {"loss": number + 1 / epoch}
            ledger.report("slot", epoch, metrics)
            folder.append_metrics({"epoch": epoch, "metrics": metrics, "seconds": 10.0 * epoch})
        if epochs:
            folder.write_checkpoint(2, AFTER_THE_SECOND)
        ledger.end("slot", status, "KeyError: 'w' (my.py:3)")
    return results


def test_each_is_run_with_its_own_setting_and_name_on_top_of_the_others(results: Path, space: Space) -> None:
    _, before = read_results(results)
    assert retry_failed(results, space) == "run again: trial 0 as 3, 2 as 4"
    ledger = open_journal(space, results)
    assert ledger.left == 3
    for failed, number in ((before[0], 3), (before[2], 4)):
        opened = ask(ledger)
        assert (opened.number, opened.values) == (number, dict(failed.values))
        ledger.report("slot", 4, {"loss": 0.5})
        ended = ledger.end("slot", "finished", "ran to its end")
        assert (ended.again, ended.values, ended.name) == (failed.number, failed.values, failed.name)
    assert (ask(ledger).number, ledger.left) == (5, 0), "and the one that was left"
    assert before == records(ledger.study, space)[:3]
    assert open_journal(space.with_trials(6), results).left == 3


def test_it_goes_on_from_the_last_checkpoint(results: Path, space: Space) -> None:
    TrialFolder(results, 4).append_metrics({"epoch": 4, "metrics": {"loss": 0.0}})  # of a trial that was never heard of
    retry_failed(results, space)
    ledger = open_journal(space, results)
    opened = ask(ledger)
    assert (opened.epochs, opened.metrics, opened.seconds_before) == (2, {"loss": 0.5}, 20.0)
    saved = TrialFolder(results, 3).checkpoint()
    assert saved is not None
    assert (saved.epoch, saved.path.read_bytes()) == (2, AFTER_THE_SECOND)
    assert ledger.study.trials[3].intermediate_values == {1: 1.0, 2: 0.5}, "the third epoch is to come"
    ledger.interrupt("slot")
    assert ask(open_journal(space, results)).number == 3, "as any other that was interrupted"
    afresh = ask(ledger)
    assert (afresh.number, afresh.epochs, TrialFolder(results, 4).read_metrics()) == (4, 0, [])


def test_one_that_had_not_begun_when_the_search_was_interrupted_is_left(results: Path, space: Space) -> None:
    retry_failed(results, space)
    ledger = open_journal(space, results)
    assert [ask(ledger, key).number for key in ("first", "second", "new")] == [3, 4, 5]
    for key in ("second", "new"):
        ledger.give_back(key)
    _, found = read_results(results)
    resumed = open_journal(space, results)
    assert left_to_run(found, space.search.trials) == resumed.left == 3
    assert [ask(resumed, key).number for key in ("first", "second", "new")] == [3, 4, 5]


def test_nothing_is_run_again_twice_but_an_attempt_that_failed_too(results: Path, space: Space) -> None:
    retry_failed(results, space)
    nothing = "--retry-failed: no failed trial is left"
    assert retry_failed(results, space) == nothing
    ledger = open_journal(space, results)
    for status in ("failed", "finished"):
        ask(ledger)
        ledger.report("slot", 4, {"loss": 0.5})
        ledger.end("slot", status, "")
    assert retry_failed(results, space) == "run again: trial 3 as 5"
    assert retry_failed(results, space) == nothing
    assert [trial.state for trial in open_journal(space, results).study.trials].count(TrialState.RUNNING) == 1


def test_what_is_left_is_counted_as_the_ledger_counts_it(results: Path, space: Space) -> None:
    for _ in range(2):
        _, found = read_results(results)
        assert left_to_run(found, space.search.trials) == open_journal(space, results).left
        retry_failed(results, space)
    assert not unmended(read_results(results)[1])


def test_schedulers_hear_of_its_reports_once(results: Path, space: Space) -> None:
    retry_failed(results, space)
    past = past_of(open_journal(space, results).study, space, results)
    assert [(item.number, len(item.reports), item.over) for item in past] == [
        (1, 4, True),
        (3, 2, False),
        (4, 0, False),
    ]


def test_a_person_is_told_of_it(results: Path, space: Space) -> None:
    hint = "once the cause is fixed, --resume with --retry-failed runs the failed trials again"
    assert hint in summary(results, *read_results(results))
    retry_failed(results, space)
    assert hint not in summary(results, *read_results(results))
    assert "\nrun again as trial 3\n" in why(results, "0")
    assert "\nanother attempt at trial 0\n" in why(results, "3")
    assert "attempt" not in why(results, "1")


def test_an_attempt_takes_no_cell_of_a_grid(tmp_path: Path) -> None:
    config: dict[str, Any] = {"epochs": 4, "lr": {"choice": [0.1, 0.2, 0.3, 0.4]}}
    grid, results = space_of(tmp_path, config, search={"trials": 4, "sampler": "grid"}), tmp_path / "results" / "grid"
    for status, trials in (("failed", 2), ("finished", 4)):
        ledger = open_journal(grid, results)
        for _ in range(trials):
            opened = ask(ledger)
            ledger.report("slot", 4, {"loss": opened.values["lr"]})
            ledger.end("slot", status, "")
        retry_failed(results, grid)
    finished = [item.values["lr"] for item in records(ledger.study, grid) if item.status == "finished"]
    assert sorted(finished) == [0.1, 0.2, 0.3, 0.4]
