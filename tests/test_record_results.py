"""Which trials solve the search, which is the best, and what the tables say of them."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledgers import ask, open_journal
from spaces import LOSS, space_of
from timing import thread_s

from search import yaml_file
from search.records.folder import TrialFolder, running
from search.records.record import Record, best_of
from search.results import as_of_now, read_results, report_page, summary, trial_line, trials_table, why, write_results
from search.space import Space
from search.space.file import load_space
from search.space.sections import Limit
from search.study import open_study
from search.warm_start import Earlier, take_over
from trainables.contract import UserError

CONFIG: dict[str, Any] = {
    "epochs": 4,
    "optim": {"lr": {"log": [1e-4, 1.0]}},
    "loss": {"choice": ["l1", "l2"]},  # a parameter with the name of a metric
    "shape": {"choice": [[8], [8, 16]]},
}
VALUES = {"optim.lr": 0.001, "loss": "l1", "shape": [8, 16]}


def record(number: int = 0, status: str = "finished", **metrics: float | None) -> Record:
    return Record(number, status, "ran to its end", None, VALUES, metrics, epochs=4, seconds=1.25)


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return space_of(tmp_path, CONFIG, constraints={"acc": {"min": 0.5}})


class TestSolves:
    @pytest.mark.parametrize("status", ["stopped", "diverged", "out_of_memory", "failed", "interrupted"])
    def test_only_what_finished(self, status: str) -> None:
        assert record(loss=1.0).solves({})
        assert not record(status=status, loss=1.0).solves({})

    @pytest.mark.parametrize(
        ("limit", "value", "kept"),
        [
            (Limit(min=0.5), 0.5, True),
            (Limit(min=0.5), 0.4999, False),
            (Limit(max=2.0), 2.0, True),
            (Limit(max=2.0), 2.1, False),
            (Limit(min=0.5, max=2.0), 1.0, True),
            (Limit(min=0.5, max=2.0), 0.1, False),
            (Limit(min=0.5, max=2.0), 9.0, False),
            (Limit(min=0.5), None, False),
        ],
        ids=str,
    )
    def test_only_within_every_limit(self, limit: Limit, value: float | None, kept: bool) -> None:
        assert record(acc=value).solves({"acc": limit}) == kept
        if value is not None:
            assert (limit.excess(value) <= 0) == kept

    @pytest.mark.parametrize("value", [-1.7e308, 1.7e308])
    def test_what_a_sampler_is_told_of_a_limit_is_finite(self, value: float) -> None:
        for limit in (Limit(min=-1e308), Limit(max=1e308), Limit(min=1e308), Limit(max=-1e308)):
            assert math.isfinite(limit.excess(value))
            assert (limit.excess(value) <= 0) == record(acc=value).solves({"acc": limit})

    def test_a_limit_has_all_its_digits_when_it_is_told(self) -> None:
        told = [str(limit) for limit in (Limit(max=1048576), Limit(min=0.85), Limit(min=0.8500001, max=1e9))]
        assert told == ["max 1048576.0", "min 0.85", "min 0.8500001, max 1e+09"]

    def test_a_limit_on_what_was_not_measured_is_broken(self) -> None:
        assert not record(loss=1.0).solves({"acc": Limit(min=0.0)})


class TestBest:
    def test_it_is_the_least_loss_within_the_limits(self, space: Space) -> None:
        found = [
            record(0, loss=0.5, acc=0.9),
            record(1, loss=0.1, acc=0.4),
            record(2, loss=0.3, acc=0.6),
            record(3, "diverged", loss=0.0, acc=0.9),
            record(4, loss=0.3, acc=0.9),
        ]
        assert best_of(found, space) == [found[2]]  # the first of two equals
        assert best_of(found[1:2], space) == []
        assert best_of([], space) == []

    def test_more_is_better_where_the_space_says_so(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG, objective={"metric": "acc", "mode": "max"})
        found = [record(0, acc=0.5), record(1, acc=0.75), record(2, acc=None)]
        assert best_of(found, space) == [found[1]]

    def test_several_objectives_have_a_front(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG, objective=[LOSS, {"metric": "size", "mode": "max"}])
        found = [
            record(0, loss=3.0, size=9.0),
            record(1, loss=1.0, size=1.0),
            record(2, loss=2.0, size=5.0),
            record(3, loss=2.0, size=4.0),  # beaten by 2
            record(4, loss=3.0, size=9.0),  # equal to 0
            record(5, "stopped", loss=0.0, size=99.0),
        ]
        assert [item.number for item in best_of(found, space)] == [1, 2, 0, 4]

    def test_a_front_of_a_thousand_trials_is_scored_once_each(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG, objective=[LOSS, {"metric": "size", "mode": "max"}])
        found = [record(number, loss=float(number), size=float(number)) for number in range(1000)]
        assert best_of(found, space) == found
        numbers = [float(number) for number in range(1000)]
        compared = thread_s(lambda: [one <= other for one in numbers for other in numbers])
        assert thread_s(lambda: best_of(found, space)) < 30 * compared


class TestTable:
    def rows(self, space: Space, found: list[Record]) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(trials_table(space, found))))

    def test_a_row_has_everything(self, space: Space) -> None:
        found = [replace(record(7, loss=0.5, acc=None), name='the "notes", 4')]
        assert self.rows(space, found) == [
            {
                "trial": "7",
                "status": "finished",
                "reason": "ran to its end; constraint broken: acc was not finite, or missing, in the last report",
                "name": 'the "notes", 4',
                "optim.lr": "0.001",
                "loss": "l1",
                "shape": "[8, 16]",
                "acc": "",
                "loss (metric)": "0.5",
                "epochs": "4",
                "seconds": "1.25",
            }
        ]

    def test_no_two_columns_have_one_name(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, {"epochs": {"int": [1, 3]}, "name": {"choice": ["a", "b"]}})
        found = [replace(record(seconds=1.0, trial=2.0, loss=0.5), values={"epochs": 2, "name": "a"})]
        header = next(csv.reader(io.StringIO(trials_table(space, found))))
        assert len(set(header)) == len(header)

    def test_what_a_trial_does_not_have_is_empty(self, space: Space) -> None:
        found = [record(0, loss=0.5), replace(record(1, "diverged"), values={"optim.lr": 0.5})]
        _, row = self.rows(space, found)
        assert (row["loss (metric)"], row["shape"], row["optim.lr"]) == ("", "", "0.5")

    def test_text_that_would_read_as_something_else_is_quoted(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, {"suffix": {"choice": ["", "null", "_v2", None]}})
        found = [
            replace(record(i, loss=0.5), values={"suffix": text}) for i, text in enumerate(("", "null", "_v2", None))
        ]
        assert [row["suffix"] for row in self.rows(space, found)] == ['""', '"null"', "_v2", "null"]


class TestFolder:
    """A results folder with a trial of every kind."""

    @pytest.fixture
    def results(self, space: Space, tmp_path: Path) -> Path:
        results = tmp_path / "results" / "a search"
        ledger = open_journal(space, results)
        yaml_file.write(results / "space.yaml", space.document())
        for number, (status, reason) in enumerate(
            [
                ("finished", "ran to its end"),
                ("diverged", "loss <b>trans</b> is not finite at step 812"),
                ("stopped", "asha stopped it after epoch 1 with loss = 0.75"),
                ("finished", "ran to its end"),
            ]
        ):
            opened = ask(ledger)
            metrics = {"loss": 0.75 - number / 10, "acc": 0.25 if number == 3 else 0.9, "extra": None}
            ledger.report("slot", 1, metrics)
            folder = TrialFolder(results, opened.number)
            folder.append_metrics({"epoch": 1, "metrics": metrics})
            folder.write_checkpoint(1, b"state")
            ledger.end("slot", status, reason)
        ask(ledger)
        ledger.interrupt("slot")
        return results

    def test_the_best_file_holds_all_that_is_needed_to_train_it_again(self, results: Path) -> None:
        space, found = read_results(results)
        write_results(results, space, found)
        best = yaml.safe_load((results / "best.yaml").read_text())
        assert (best["trial"], best["objective"]) == (0, {"loss": 0.75})
        assert best["config"] == space.config(found[0].values)
        assert best["metrics"] == {"loss": 0.75, "acc": 0.9, "extra": None}
        assert (results / best["checkpoint"]).read_bytes() == b"state"

    def test_there_is_no_best_file_when_nothing_solves(self, results: Path) -> None:
        space, found = read_results(results)
        write_results(results, space, found)
        write_results(results, space, found[1:])
        assert not (results / "best.yaml").exists()

    def test_several_objectives_leave_their_front(self, results: Path, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG, objective=[LOSS, {"metric": "acc", "mode": "max"}])
        found = [record(0, loss=0.5, acc=0.9), record(1, loss=0.25, acc=0.5)]
        write_results(results, space, found)
        best = yaml.safe_load((results / "best.yaml").read_text())
        assert [item["trial"] for item in best["front"]] == [1, 0]
        assert "2 trials that no other beats" in summary(results, space, found)

    def test_the_report_needs_nothing_beside_it_and_escapes_what_it_quotes(self, results: Path) -> None:
        page = report_page(results, *read_results(results))
        assert "http" not in page
        assert "src=" not in page
        assert "<b>trans</b>" not in page
        assert "loss &lt;b&gt;trans&lt;/b&gt; is not finite at step 812" in page
        for number in range(5):
            assert f"<td>{number}</td>" in page

    def test_the_report_shows_the_best_first_and_what_is_sought_beside_its_status(
        self, results: Path, tmp_path: Path
    ) -> None:
        space = space_of(tmp_path, CONFIG, constraints={"acc": {"min": 0.5}})
        long = "a word " * 500
        found = [
            replace(record(0, "failed"), reason=long),
            record(1, loss=0.1, acc=0.4),
            record(2, loss=0.5, acc=0.9),
            replace(record(3, loss=0.3, acc=0.9), name="notes"),
        ]
        page = report_page(results, space, found)
        assert "min loss over optim.lr, loss, shape" in page
        heading, *rows = re.findall("<tr.*</tr>", page)
        cells = [re.findall("<t[hd].*?>(.*?)</t[hd]>", row) for row in (heading, *rows)]
        assert cells[0][:5] == ["trial", "status", "loss (metric)", "reason", "optim.lr"]
        assert [row[0] for row in cells[1:]] == ["3", "2", "0", "1"]
        assert [row.startswith('<tr class="best">') for row in rows] == [True, False, False, False]
        assert cells[1][-1] == "notes"
        assert cells[3][3] == long[:396].rstrip() + " ..."

    def test_every_solution_that_no_other_beats_is_marked(self, results: Path, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG, objective=[LOSS, {"metric": "acc", "mode": "max"}])
        found = [record(0, loss=0.3, acc=0.4), record(1, loss=0.5, acc=0.9), record(2, loss=0.25, acc=0.5)]
        page = report_page(results, space, found)
        assert re.findall('<tr class="best"><td>(.)</td>', page) == ["2", "1"]
        assert "<th>name</th>" not in page

    def test_the_summary_counts_every_ending_and_names_the_best(self, results: Path) -> None:
        text = summary(results, *read_results(results))
        assert "5 trials: 2 finished, 1 stopped, 1 diverged, 1 interrupted" in text
        assert "best: trial 0" in text
        assert str(results) in text

    def test_the_summary_says_when_nothing_solves(self, results: Path) -> None:
        space, found = read_results(results)
        told = summary(results, space, found[1:])
        assert f"no trial finished within the constraints; {results / 'trials.csv'} says why each one ended" in told
        interrupted = [record for record in found if record.status == "interrupted"]
        assert "says why" not in summary(results, space, interrupted)
        assert "no trial was run" in summary(results, space, [])

    @pytest.mark.parametrize(
        ("number", "told"),
        [
            ("1", ["trial 1: diverged", "reason: loss <b>trans</b> is not finite at step 812", "epoch 1: loss 0.65"]),
            ("0001", ["trial 1: diverged"]),
            ("2", ["asha stopped it after epoch 1"]),
            ("3", ["trial 3: finished", "constraint broken: acc = 0.25, limit min 0.5"]),
            ("4", ["trial 4: interrupted", "it has not ended; if no process runs", "--resume continues it"]),
            ("0", ["trial 0: finished", "after 1 epochs"]),
        ],
    )
    def test_why_says_what_is_known(self, number: str, told: list[str], results: Path) -> None:
        text = why(results, number)
        for words in told:
            assert words in text

    def test_what_has_not_ended_is_running_while_a_process_runs_the_search(self, results: Path) -> None:
        space, found = read_results(results)
        with running(results):
            now = as_of_now(results, found)
            told = summary(results, space, now)
            assert "5 trials: 2 finished, 1 stopped, 1 diverged, 1 running\n" in told
            assert "says why" not in summary(results, space, now[4:])
            assert why(results, "4").startswith("trial 4: running\nreason: it has not ended\n")
            write_results(results, *read_results(results))
        assert as_of_now(results, found) == found
        assert "\n4,interrupted," in (results / "trials.csv").read_text()

    def test_of_what_has_not_ended_the_last_report_counts(self, results: Path) -> None:
        """The study hears of it at the end."""
        row = {"epoch": 3, "seconds": 7.5, "metrics": {"loss": 0.25, "acc": None}}
        TrialFolder(results, 4).append_metrics(row)
        _, found = read_results(results)
        assert (found[4].status, found[4].epochs, found[4].seconds) == ("interrupted", 3, 7.5)
        assert "after 3 epochs and 7.5 s" in why(results, "4")
        assert "constraint broken: acc was not finite, or missing, in the last report" in why(results, "4")

    def test_why_of_a_failure_shows_where_it_was_raised(self, results: Path, space: Space) -> None:
        ledger = open_journal(space, results)
        folder = TrialFolder(results, ask(ledger).number)
        folder.write_error("KeyError: 'w' (my.py:3)", "\n".join(["Traceback", *map(str, range(20)), "KeyError: 'w'\n"]))
        ledger.end("slot", "failed", "KeyError: 'w' (my.py:3)")
        told = why(results, "4").splitlines()
        place = told.index(f"{folder.path / 'error.txt'} ends:")
        assert [line.strip() for line in told[place + 1 : place + 9]] == [*map(str, range(13, 20)), "KeyError: 'w'"]

    def test_why_shows_the_last_lines_that_were_printed(self, results: Path) -> None:
        assert "output.txt" not in why(results, "2")
        folder = TrialFolder(results, 2)
        folder.append_printed("".join(f"line {number}\n" for number in range(20)))
        told = why(results, "2").splitlines()
        place = told.index(f"{folder.path / 'output.txt'} ends:")
        assert told[place + 1 : place + 11] == [f"  line {number}" for number in range(10, 20)]

    def test_why_of_a_failure_says_if_only_an_earlier_attempt_was_traced(self, results: Path, space: Space) -> None:
        ledger = open_journal(space, results)
        folder = TrialFolder(results, ask(ledger).number)
        folder.write_error("KeyError: 'w' (my.py:3)", "Traceback")
        ledger.end("slot", "failed", "the slot died")
        told = why(results, "4")
        assert "reason: the slot died\n" in told
        assert f"{folder.path / 'error.txt'}, of an earlier attempt, ends:\n  KeyError: 'w' (my.py:3)\n" in told

    @pytest.mark.parametrize("number", ["0", "000"])
    def test_zeros_are_trial_0(self, number: str, results: Path) -> None:
        assert why(results, number).startswith("trial 0: ")

    @pytest.mark.parametrize("number", ["9", "-1", "one", "", "00one"])
    def test_why_of_an_unknown_trial_is_a_mistake(self, number: str, results: Path) -> None:
        with pytest.raises(UserError, match=r"there is none in .*; "):
            why(results, number)

    def test_why_of_trial_0_after_a_warm_start_is_a_mistake(self, results: Path, tmp_path: Path) -> None:
        """What was taken over has the first numbers."""
        space, _ = load_space(results / "space.yaml")
        earlier = open_study(results / "study.journal", space, create=False)
        later = tmp_path / "results" / "later"
        ledger = open_journal(space, later)
        yaml_file.write(later / "space.yaml", space.document())
        take_over(ledger.study, space, Earlier("earlier", space, earlier))
        ask(ledger)
        with pytest.raises(UserError, match=r"trial 0: there is none in "):
            why(later, "0")

    def test_a_folder_without_a_search_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"there is no space\.yaml here; name a results folder of an earlier search"
        ):
            read_results(tmp_path)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (record(3, loss=0.12345), ["trial   3", "finished", "loss 0.1235", "4 epochs", "1.2 s", "lr=0.001"]),
        (record(3, "diverged"), ["diverged", "loss -", "ran to its end"]),
        (replace(record(3, loss=0.5), name="notes"), ["[notes]"]),
        (record(3, loss=0.5, acc=0.25), ["ran to its end; constraint broken: acc = 0.25, limit min 0.5"]),
    ],
    ids=["finished", "diverged", "named", "a limit broken"],
)
def test_a_trial_is_told_in_a_line(told: Record, words: list[str], space: Space) -> None:
    line = trial_line(told, space)
    for word in words:
        assert word in line


def test_parameters_that_end_alike_are_told_by_their_whole_names(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"head": {"lr": {"log": [1e-4, 1.0]}}, "body": {"lr": {"log": [1e-4, 1.0]}, "wd": 0.1}})
    line = trial_line(replace(record(loss=0.5), values={"head.lr": 0.5, "body.lr": 0.25}), space)
    assert line.endswith("head.lr=0.5 body.lr=0.25")


def test_a_searched_null_is_told_as_a_space_file_has_it(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"schedule": {"choice": ["cosine", None]}})
    found = replace(record(loss=0.5), values={"schedule": None})
    assert trial_line(found, space).endswith("schedule=null")
    assert "  schedule                 null\n" in summary(tmp_path, space, [found])
