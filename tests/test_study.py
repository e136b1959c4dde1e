"""The ledger: what is kept in the journal, what failure teaches, and what a warm start takes over."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from ledgers import ask, end_toy, open_journal, open_ledger, play, told
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from spaces import LOSS, space_of
from threadpoolctl import threadpool_info

from search import ledger
from search.learning.lessons import penalties, severity
from search.learning.proposals import proposal_seed
from search.ledger import Ledger
from search.records.folder import TrialFolder
from search.space import Space
from search.study import distributions_of, is_begun, open_study, params_of, records
from search.warm_start import Earlier, take_over
from search.workers.states import save_state
from trainables.contract import UserError

CONFIG: dict[str, Any] = {"epochs": 4, "lr": {"log": [1e-4, 1.0]}, "shape": {"choice": [[8], [8, 16]]}}


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return space_of(tmp_path, CONFIG, search={"trials": 6}, constraints={"acc": {"min": 0.5}})


class TestJournal:
    def test_a_search_is_read_back_from_its_file(self, space: Space, tmp_path: Path) -> None:
        ledger = open_journal(space, tmp_path)
        opened = ask(ledger)
        ledger.report("slot", 1, {"loss": 0.5, "acc": 0.75, "extra": None})
        ended = ledger.end("slot", "finished", "ran to its end")
        left_open = ask(ledger)
        found = records(open_study(tmp_path / "study.journal", space, create=False), space)
        assert found[0] == ended
        assert (ended.values, ended.epochs, ended.reason) == (opened.values, 1, "ran to its end")
        assert ended.metrics == {"loss": 0.5, "acc": 0.75, "extra": None}
        assert (found[1].status, found[1].values) == ("interrupted", left_open.values)

    def test_an_interrupted_trial_keeps_what_it_had(self, space: Space, tmp_path: Path) -> None:
        ledger = open_journal(space, tmp_path)
        opened = ask(ledger)
        opened.seconds_before = 100.0  # of which 40 are of the epoch that was interrupted
        ledger.report("slot", 3, metrics := {"loss": 0.5, "acc": 0.75})
        TrialFolder(tmp_path, opened.number).append_metrics({"epoch": 3, "metrics": metrics, "seconds": 60.0})
        ledger.interrupt("slot")
        (record,) = records(ledger.study, space)
        assert (record.status, record.epochs, record.metrics["loss"]) == ("interrupted", 3, 0.5)
        again = ask(open_journal(space, tmp_path))
        assert (again.number, again.values) == (opened.number, opened.values)
        assert again.seconds >= 100.0

    def test_a_trial_that_was_lost_while_it_was_proposed_gets_the_same_values(self, space: Space) -> None:
        storage = InMemoryStorage()
        open_ledger(space, storage).study.ask()  # the driver dies before the sampler has said anything
        assert ask(open_ledger(space, storage)).values == ask(open_ledger(space, InMemoryStorage())).values

    def test_what_was_trained_with_a_setting_of_which_the_study_lost_a_part_is_not_gone_on_with(
        self, space: Space, tmp_path: Path
    ) -> None:
        """A mirror may have copied the study in the midst of a proposal, and the trial's folder after it."""
        opened = ask(open_journal(space, tmp_path))
        folder, study = TrialFolder(tmp_path, opened.number), tmp_path / "study.journal"
        folder.append_metrics({"epoch": 1, "metrics": {"loss": 0.25}})
        folder.write_checkpoint(1, save_state({"w": 1.0}))
        assert ask(open_journal(space, tmp_path)).epochs == 1
        *lines, last = study.read_bytes().splitlines(keepends=True)
        assert b"param_name" in last
        study.write_bytes(b"".join(lines))
        again = ask(open_journal(space, tmp_path))
        assert (again.number, again.epochs, folder.checkpoint()) == (opened.number, 0, None)

    def test_a_divergence_that_is_not_on_record_leaves_no_post_mortem_to_a_trial_that_goes_on(
        self, space: Space, tmp_path: Path
    ) -> None:
        folder = TrialFolder(tmp_path, ask(open_journal(space, tmp_path)).number)
        folder.write_divergence({"reason": "loss is nan"})  # the driver died before it heard of it
        ask(open_journal(space, tmp_path))
        assert folder.read_divergence() is None

    def test_metrics_of_an_earlier_attempt_count_when_nothing_follows(self, space: Space, tmp_path: Path) -> None:
        opened = ask(open_journal(space, tmp_path))
        row = {"epoch": 4, "metrics": {"loss": 0.25, "acc": 0.9}}  # the driver died after the last report
        TrialFolder(tmp_path, opened.number).append_metrics(row)
        ledger = open_journal(space, tmp_path)
        ask(ledger)
        record = ledger.end("slot", "finished", "ran to its end")
        assert (record.epochs, record.metrics) == (4, row["metrics"])

    def test_a_checkpoint_without_a_report_on_record_is_run_again(self, space: Space, tmp_path: Path) -> None:
        opened = ask(open_journal(space, tmp_path))
        folder = TrialFolder(tmp_path, opened.number)
        folder.write_checkpoint(4, save_state({"w": 4.0}))  # the driver died before it heard of the report
        ask(open_journal(space, tmp_path))
        assert folder.checkpoint() is None
        folder.append_metrics({"epoch": 3, "metrics": {"loss": 0.25}})
        for epoch in (3, 4):
            folder.write_checkpoint(epoch, save_state({"w": float(epoch)}))
        assert ask(open_journal(space, tmp_path)).epochs == 3
        saved = folder.checkpoint()
        assert saved is not None
        assert saved.epoch == 3, "from the last one on, the report of epoch 4 would never come"

    @pytest.mark.parametrize(("whole", "told"), [((), "it starts over"), ((1, 2), "it goes on from epoch 2")])
    def test_a_trial_whose_checkpoint_is_torn_goes_on_all_the_same(
        self, whole: tuple[int, ...], told: str, space: Space, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = TrialFolder(tmp_path, ask(open_journal(space, tmp_path)).number)
        folder.append_metrics({"epoch": 3, "metrics": {"loss": 0.25}})
        for epoch in whole:
            folder.write_checkpoint(epoch, save_state({"w": float(epoch)}))
        folder.write_checkpoint(3, b"")
        ask(open_journal(space, tmp_path))
        saved = folder.checkpoint()
        assert (saved and saved.epoch) == (2 if whole else None)
        assert capsys.readouterr().out == f"trial 0: checkpoint-0003.pt cannot be read; {told}\n"

    def test_a_study_whose_lines_are_whole_and_unknown_is_not_said_to_be_damaged(
        self, space: Space, tmp_path: Path
    ) -> None:
        ask(open_journal(space, tmp_path))
        study = tmp_path / "study.journal"
        study.write_text(study.read_text().replace("FloatDistribution", "Of2030"))
        with pytest.raises(UserError, match=r"journal: cannot be read: Unknown distribution class: Of2030; was it"):
            open_study(study, space, create=False)

    @pytest.mark.parametrize(
        "torn",
        [b'{"op_code": 8, "worker_id": "a machine tha', b'{"op_code": 8\0\0\0\0rst"}\n'],
        ids=["its end", "its middle"],
    )
    def test_an_entry_that_was_torn_is_cut_off_and_the_study_goes_on(
        self, torn: bytes, space: Space, tmp_path: Path
    ) -> None:
        ledger = open_journal(space, tmp_path)
        end_toy(ledger, ask(ledger), "finished")
        with next(tmp_path.rglob("study.journal")).open("ab") as file:
            file.write(torn)
        for _ in range(2):
            ledger = open_journal(space, tmp_path)
            end_toy(ledger, ask(ledger), "finished")
        assert [record.status for record in records(ledger.study, space)] == ["finished"] * 3

    def test_the_end_of_a_trial_is_forced_to_disk_and_nothing_before_it(
        self, space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes milliseconds, and an entry without it survives all but a power loss."""
        forced, ledger = list[int](), open_journal(space, tmp_path)
        monkeypatch.setattr(os, "fsync", lambda opened: forced.append(os.fstat(opened).st_size))
        ask(ledger)
        ledger.report("slot", 1, {"loss": 0.5, "acc": 0.75})
        assert not forced
        ledger.end("slot", "finished", "ran to its end")
        assert forced == [(tmp_path / "study.journal").stat().st_size]

    @pytest.mark.parametrize(
        "left", [b"", b'{"op_code": 0, "worker_id": "a machine tha'], ids=["nothing", "a torn entry"]
    )
    def test_a_file_without_an_entry_is_begun_as_a_new_one_is(self, left: bytes, space: Space, tmp_path: Path) -> None:
        file = tmp_path / "study.journal"
        assert not is_begun(file)
        file.write_bytes(left)
        assert not is_begun(file)
        with pytest.raises(UserError, match=r"study\.journal: there is no search in it; name a results folder"):
            open_study(file, space, create=False)
        open_study(file, space, create=True)
        assert is_begun(file)
        assert len(play(open_journal(space, tmp_path), 6)) == 6

    def test_what_cannot_be_read_is_taken_for_a_search(self, space: Space, tmp_path: Path) -> None:
        (tmp_path / "study.journal").mkdir()
        assert is_begun(tmp_path / "study.journal")

    @pytest.mark.parametrize("lost", range(4))
    def test_every_known_setting_is_tried_once_wherever_a_process_was_killed(self, lost: int, tmp_path: Path) -> None:
        known = [{"name": str(number), "lr": 0.125 * number} for number in (1, 2, 3)]
        space, file = space_of(tmp_path, CONFIG, try_first=known), tmp_path / "study.journal"
        open_journal(space, tmp_path)
        entries = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(entries[: len(entries) - lost]))
        for number in (1, 2, 3):
            ledger = open_journal(space, tmp_path)
            record = end_toy(ledger, ask(ledger), "finished")
            assert (record.name, record.values["lr"]) == (str(number), 0.125 * number)
        assert end_toy(ledger, ask(ledger), "finished").name is None

    def test_a_new_trial_takes_nothing_from_one_that_the_study_never_heard_of(
        self, space: Space, tmp_path: Path
    ) -> None:
        folder = TrialFolder(tmp_path, 0)
        folder.append_metrics({"epoch": 4, "metrics": {"loss": 0.25}})
        folder.write_checkpoint(4, b"another setting's")
        opened = ask(open_journal(space, tmp_path))
        assert (opened.number, opened.epochs, opened.metrics) == (0, 0, {})
        assert (folder.checkpoint(), folder.read_metrics()) == (None, [])

    def test_values_that_changed_on_the_way_are_the_ones_recorded(self, space: Space, tmp_path: Path) -> None:
        ledger = open_journal(space, tmp_path)
        opened = ask(ledger)
        opened.values = {"lr": 0.5, "shape": [8, 16]}
        end_toy(ledger, opened, "finished")
        assert records(ledger.study, space)[0].values == {"lr": 0.5, "shape": [8, 16]}

    def test_values_that_changed_on_the_way_are_the_ones_that_the_sampler_sees(
        self, space: Space, tmp_path: Path
    ) -> None:
        seen: list[dict[str, Any]] = []

        class Watch(optuna.samplers.RandomSampler):
            def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
                seen[:] = [item.params for item in study.get_trials() if item.state.is_finished()]

        study = open_ledger(space, InMemoryStorage()).study
        ledger = Ledger(space, study, lambda seed: Watch(seed=seed), tmp_path)
        first = dict(ask(ledger).values)
        ledger.change("slot", {**first, "lr": 0.5})
        ledger.end("slot", "diverged", "")
        ask(ledger)
        assert [params["lr"] for params in seen] == [0.5]
        assert first["lr"] != 0.5

    @pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2"])
    def test_optuna_s_own_samplers_see_them_too(self, sampler: str, tmp_path: Path) -> None:
        """They read the study in a way of their own, which is not public. gp has every other setting from TPE."""
        space = space_of(tmp_path, CONFIG, search={"trials": 100, "sampler": sampler})
        proposed = []
        for change in (False, True):
            study, rng = open_ledger(space, InMemoryStorage()).study, random.Random(0)
            for _ in range(60):
                values, stored = space.draw(rng), space.draw(rng)
                trial = create_trial(
                    values=[values["lr"]],
                    params=params_of(space, stored if change else values),
                    distributions=distributions_of(space, values),
                    user_attrs={"status": "finished", "metrics": {}, "epochs": 4, "values": values}
                    | ({ledger._CHANGED: True} if change else {}),
                    system_attrs={optuna.samplers.NSGAIISampler._get_generation_key(): 0},
                )
                study.add_trial(trial)
            asked = open_ledger(space, study._storage)
            proposed.append([ask(asked, key).values for key in ("one", "two")])
        assert proposed[0] == proposed[1]

    def test_an_extended_search_goes_on(self, space: Space, tmp_path: Path) -> None:
        play(open_journal(space, tmp_path), 6)
        assert open_journal(space, tmp_path).left == 0
        more = open_journal(space.with_trials(8), tmp_path)
        assert more.left == 2
        assert ask(more).number == 6

    def test_optuna_knows_objectives_by_name_and_direction(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG, objective=[LOSS, {"metric": "size", "mode": "max"}])
        study = open_journal(space, tmp_path).study
        assert study.metric_names == ["loss", "size"]
        assert study.directions == [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]

    def test_a_folder_without_a_study_is_refused(self, space: Space, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"study\.journal: there is no study here; name a results folder"):
            open_study(tmp_path / "study.journal", space, create=False)


class TestConstraints:
    """What the sampler is told beside the score."""

    def excess(
        self, space: Space, status: str, metrics: Mapping[str, float | None] | None, epochs: int = 1
    ) -> dict[str, float]:
        ledger = open_ledger(space, InMemoryStorage())
        ask(ledger)
        if metrics is not None:
            ledger.report("slot", epochs, metrics)
        ledger.end("slot", status, "")
        return told(ledger)[0].constraints

    def test_a_limit_is_told_by_how_far_it_is_missed(self, space: Space) -> None:
        assert self.excess(space, "finished", {"loss": 1.0, "acc": 0.375})["acc"] == 0.125
        assert self.excess(space, "finished", {"loss": 1.0, "acc": 0.75})["acc"] == -0.25

    def test_a_limit_that_was_not_measured_is_broken(self, space: Space) -> None:
        assert self.excess(space, "diverged", None)["acc"] == 1.0
        assert self.excess(space, "stopped", {"loss": 1.0, "acc": None})["acc"] == 1.0, "it was no number"

    def test_a_trial_that_was_stopped_before_it_reported_has_broken_no_limit(self, space: Space) -> None:
        assert max(self.excess(space, "stopped", None).values()) < 0

    def test_the_earlier_a_trial_diverges_the_worse_it_is(self, space: Space) -> None:
        measured = {"loss": 1.0, "acc": 0.75}
        told = [self.excess(space, "diverged", measured if epoch else None, epoch)["diverged"] for epoch in range(5)]
        assert told == sorted(told, reverse=True)
        assert told == [severity(epoch, 4) for epoch in range(5)]
        assert min(told) > 0

    def test_where_the_epochs_are_not_known_the_longest_trial_says_what_is_early(self, tmp_path: Path) -> None:
        ledger = open_ledger(space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}}), InMemoryStorage())
        for status, epochs in (("diverged", 0), ("finished", 8), ("diverged", 2), ("diverged", 6)):
            ask(ledger)
            if epochs:
                ledger.report("slot", epochs, {"loss": 1.0})
            ledger.end("slot", status, "")
        worst, _, *others = [trial.constraints["diverged"] for trial in told(ledger)]
        assert (worst, others) == (2.0, [severity(2, 8), severity(6, 8)])

    def test_a_search_that_goes_on_with_other_limits_tells_the_sampler_of_those(
        self, space: Space, tmp_path: Path
    ) -> None:
        seen: list[dict[str, float]] = []

        class Watch(optuna.samplers.RandomSampler):
            def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
                seen[:] = [item.constraints for item in study.get_trials() if item.state.is_finished()]

        ledger = open_ledger(space, InMemoryStorage())
        for status in ("finished", "failed", "diverged"):
            ask(ledger)
            ledger.report("slot", 1, {"loss": 1.0, "acc": 0.75, "size": 3.0})
            ledger.end("slot", status, "")
        other = space_of(tmp_path, CONFIG, constraints={"size": {"max": 1.0}})
        ask(Ledger(other, ledger.study, lambda seed: Watch(seed=seed), tmp_path))
        own = {"diverged": -1.0, "out_of_memory": -1.0}
        assert seen == [{**own, "size": 2.0}, {}, {**own, "diverged": severity(1, 4), "size": 2.0}]

    def test_gp_goes_on_with_other_limits(self, space: Space, tmp_path: Path) -> None:
        ledger = open_ledger(space.with_trials(11), InMemoryStorage())
        for number in range(11):
            ask(ledger)
            ledger.report("slot", 1, {"loss": 1.0, "size": float(number)})
            ledger.end("slot", "finished", "")
        gp = {"sampler": "gp", "trials": 13}
        other = space_of(tmp_path, CONFIG, constraints={"size": {"max": 1.0}}, search=gp)
        later = open_ledger(other, ledger.study._storage)
        for key in ("one", "two"):  # its own proposal, and that of TPE
            assert other.holds(ask(later, key).values)


class TestPenalty:
    def trial(self, *values: float, status: str = "finished", **reported: float) -> FrozenTrial:
        steps = dict(enumerate(reported.values()))
        return create_trial(values=values, intermediate_values=steps, user_attrs={"status": status})

    def test_it_lies_a_tenth_of_the_span_beyond_the_worst(self) -> None:
        seen = [self.trial(1.0), self.trial(3.0)]
        assert penalties(seen, [StudyDirection.MINIMIZE]) == pytest.approx([3.2])
        assert penalties(seen, [StudyDirection.MAXIMIZE]) == pytest.approx([0.8])

    def test_reports_on_the_way_count_and_other_penalties_do_not(self) -> None:
        seen = [
            self.trial(1.0, first=9.0),
            self.trial(99.0, status="diverged"),
            self.trial(98.0, status="out_of_memory"),
        ]
        assert penalties(seen, [StudyDirection.MINIMIZE]) == pytest.approx([9.8])

    def test_what_a_diverged_trial_reported_on_its_way_does_not_count(self) -> None:
        exploded = self.trial(0.0, status="diverged", first=1e30)
        seen = [self.trial(1.0), self.trial(3.0), exploded]
        assert penalties(seen, [StudyDirection.MINIMIZE]) == pytest.approx([3.2])

    def test_it_counts_while_nothing_else_was_measured(self) -> None:
        """Else the first trial of a search would look like its best to whoever reads the study without its limits."""
        alone = [self.trial(0.0, status="diverged", first=-5.0)]
        assert penalties(alone, [StudyDirection.MAXIMIZE]) == pytest.approx([-5.005])
        assert penalties([*alone, self.trial(-1.0)], [StudyDirection.MAXIMIZE]) == pytest.approx([-1.001])

    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_one_told_before_anything_was_measured_is_bad_to_the_sampler_all_the_same(
        self, mode: str, tmp_path: Path
    ) -> None:
        """Near 0 is what it was told then, and 0 may be a good score."""
        seen: list[float] = []

        class Watch(optuna.samplers.RandomSampler):
            def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
                seen[:] = [item.value for item in study.get_trials() if item.value is not None]

        space = space_of(tmp_path, CONFIG, objective={"metric": "loss", "mode": mode})
        study = open_ledger(space, InMemoryStorage()).study
        ledger = Ledger(space, study, lambda seed: Watch(seed=seed), tmp_path)
        ask(ledger)
        ledger.end("slot", "diverged", "")
        for loss in (5.0, 7.0):
            ask(ledger)
            ledger.report("slot", 1, {"loss": loss if mode == "min" else -loss})
            ledger.end("slot", "finished", "")
        ask(ledger)
        assert seen == pytest.approx([7.2, 5.0, 7.0] if mode == "min" else [-7.2, -5.0, -7.0])

    def test_there_is_one_for_each_objective(self) -> None:
        seen = [self.trial(1.0, 10.0), self.trial(2.0, 30.0)]
        directions = [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]
        assert penalties(seen, directions) == pytest.approx([2.1, 8.0])

    @pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0], [0.0], [-1e9], [-1.7e308, 1.7e308]])
    def test_it_is_finite_and_worse_than_all_that_was_seen(self, values: list[float]) -> None:
        for direction, sign in ((StudyDirection.MINIMIZE, 1), (StudyDirection.MAXIMIZE, -1)):
            (penalty,) = penalties([self.trial(value) for value in values], [direction])
            assert math.isfinite(penalty)
            assert all(sign * penalty > sign * value for value in values)


def test_seeds_of_proposals_differ_by_place_and_by_search() -> None:
    seeds = {proposal_seed(seed, place) for seed in range(10) for place in range(100)}
    assert len(seeds) == 1000
    assert proposal_seed(3, 7) == proposal_seed(3, 7)


class TestWarmStart:
    @pytest.fixture
    def earlier(self, space: Space) -> Earlier:
        """Six trials of every kind."""
        ledger = open_ledger(space, InMemoryStorage())
        for number, status in enumerate(["finished", "stopped", "diverged", "out_of_memory", "failed", "finished"]):
            opened = ask(ledger)
            if number < 3:
                ledger.report("slot", 1, {"loss": 0.5, "acc": 0.4})
            if number == 5:
                ledger.report("slot", 1, {"loss": 0.25, "acc": 0.9})
            ledger.end("slot", status, f"trial {opened.number}")
        return Earlier("earlier", space, ledger.study)

    def begin(self, space: Space, earlier: Earlier) -> tuple[Ledger, str]:
        """A search that starts from it, and what was said of that."""
        ledger = open_ledger(space, InMemoryStorage())
        said = take_over(ledger.study, space, earlier)
        return open_ledger(space, ledger.study._storage), said

    def searched(self, space: Space, *settings: dict[str, Any]) -> Earlier:
        """A search in which these settings finished."""
        ledger = open_ledger(space.with_trials(len(settings)), InMemoryStorage())
        for values in settings:
            ask(ledger).values = values
            end_toy(ledger, ledger.open["slot"], "finished")
        return Earlier("earlier", space, ledger.study)

    def test_what_taught_something_is_taken_with_its_constraints(self, space: Space, earlier: Earlier) -> None:
        ledger, said = self.begin(space, earlier)
        before = [trial for trial in earlier.study.trials if trial.state != TrialState.FAIL]
        after = told(ledger)
        assert said == "5 trials of earlier lie within this space"
        for old, new in zip(before, after, strict=True):
            assert (new.state, new.params, new.constraints) == (old.state, old.params, old.constraints)
            assert new.intermediate_values == old.intermediate_values
            assert new.user_attrs["from"] == "earlier"
            if new.state == TrialState.COMPLETE:
                assert new.values == old.values

    def test_what_was_taken_is_no_trial_of_this_search(self, space: Space, earlier: Earlier) -> None:
        ledger, _ = self.begin(space, earlier)
        assert ledger.left == space.search.trials
        assert records(ledger.study, space) == []
        assert len(play(ledger, 6)) == 6
        assert ledger.ask("slot") is None
        assert len(records(ledger.study, space)) == 6

    def test_known_settings_still_come_first(self, tmp_path: Path, earlier: Earlier) -> None:
        space = space_of(tmp_path, CONFIG, try_first=[{"lr": 0.125, "shape": [8]}])
        ledger, _ = self.begin(space, earlier)
        assert ask(ledger).values == {"lr": 0.125, "shape": [8]}

    @pytest.mark.parametrize(
        ("config", "by"),
        [
            ({**CONFIG, "lr": {"log": [1e-9, 1e-8]}}, "lr"),  # none lies in the range
            ({**CONFIG, "shape": {"choice": [[9], [8, 16, 32]]}}, "shape"),  # none is among the choices
            ({**CONFIG, "lr": {"choice": ["low", "high"]}}, "lr"),  # another kind of domain
            ({"lr": CONFIG["lr"]}, "shape"),  # they have a value for what is not there now
            ({**CONFIG, "lr": 0.125}, "lr"),  # they have others than what is fixed now
            ({**CONFIG, "width": {"int": [1, 3]}}, "width"),  # they have none for what is searched now
            ({**CONFIG, "epochs": {"int": [5, 9]}}, "epochs"),  # what was fixed lies outside now
            ({**CONFIG, "shape": {"choice": [[8], [8, 16]], "when": {"epochs": [99]}}}, "shape"),  # not searched now
        ],
        ids=str,
    )
    def test_what_lies_outside_this_space_is_left(
        self, config: dict[str, Any], by: str, tmp_path: Path, earlier: Earlier
    ) -> None:
        ledger, said = self.begin(space_of(tmp_path, config), earlier)
        assert said == f"0 trials of earlier lie within this space; outside it lie 5 by {by}"
        assert not told(ledger)

    def test_what_is_fixed_now_is_taken_from_the_trials_that_had_it(self, space: Space, tmp_path: Path) -> None:
        earlier = self.searched(space, {"lr": 0.125, "shape": [8]}, {"lr": 0.5, "shape": [8, 16]})
        ledger, said = self.begin(space_of(tmp_path, {**CONFIG, "shape": [8, 16]}), earlier)
        assert said == "1 trials of earlier lie within this space; outside it lie 1 by shape"
        (taken,) = told(ledger)
        assert (taken.params, taken.user_attrs["values"]) == ({"lr": 0.5}, {"lr": 0.5})

    def test_what_is_searched_now_had_its_fixed_value_in_all_earlier_trials(self, space: Space, tmp_path: Path) -> None:
        wide = space_of(tmp_path, {**CONFIG, "epochs": {"int": [1, 9]}, "net": {"width": {"choice": [16, 32]}}})
        earlier = self.searched(
            space_of(tmp_path, {**CONFIG, "net": {"width": 32}}), {"lr": 0.125, "shape": [8]}, {"lr": 0.5, "shape": [8]}
        )
        ledger, _ = self.begin(wide, earlier)
        found = [trial.user_attrs["values"] for trial in told(ledger)]
        assert found == [{"lr": lr, "shape": [8], "epochs": 4, "net.width": 32} for lr in (0.125, 0.5)]
        assert all(wide.holds(values) for values in found)
        assert ask(ledger).number == 2

    def test_conditions_are_those_of_this_search(self, tmp_path: Path) -> None:
        always = {"lr": CONFIG["lr"], "kind": {"choice": ["a", "b"]}, "width": 8}
        under = {**always, "width": {"int": [1, 9], "when": {"kind": ["a"]}}}
        a, b = {"lr": 0.125, "kind": "a"}, {"lr": 0.125, "kind": "b"}
        ledger, _ = self.begin(space_of(tmp_path, under), self.searched(space_of(tmp_path, always), a, b))
        assert [trial.user_attrs["values"] for trial in told(ledger)] == [{**a, "width": 8}, b]
        earlier = self.searched(space_of(tmp_path, under), {**a, "width": 8}, {**a, "width": 4}, b)
        ledger, said = self.begin(space_of(tmp_path, always), earlier)
        assert [trial.user_attrs["values"] for trial in told(ledger)] == [a, b]
        assert said.endswith("outside it lie 1 by width")

    def test_what_a_trial_that_was_itself_taken_over_had_fixed_is_not_known(self, space: Space, tmp_path: Path) -> None:
        first = self.searched(space_of(tmp_path, {**CONFIG, "width": 16}), {"lr": 0.125, "shape": [8]})
        between = space_of(tmp_path, {**CONFIG, "width": 32})
        second, _ = self.begin(between, first)
        end_toy(second, ask(second), "finished")
        wide = space_of(tmp_path, {**CONFIG, "width": {"int": [1, 64]}})
        ledger, said = self.begin(wide, Earlier("second", between, second.study))
        assert said == "1 trials of second lie within this space; outside it lie 1 by width"
        assert told(ledger)[0].params["width"] == 32

    def test_a_search_in_which_nothing_ended_is_told(self, space: Space) -> None:
        _, said = self.begin(space, self.searched(space))
        assert said == "0 trials of earlier lie within this space; none has ended there in a way to learn from"

    def test_only_what_lies_inside_is_taken(self, tmp_path: Path, earlier: Earlier) -> None:
        rates = sorted(trial.params["lr"] for trial in earlier.study.trials if trial.state != TrialState.FAIL)
        narrow = space_of(tmp_path, {**CONFIG, "lr": {"log": [rates[1], rates[2]]}})
        ledger, said = self.begin(narrow, earlier)
        assert said == "2 trials of earlier lie within this space; outside it lie 3 by lr"
        assert all(narrow.holds(trial.user_attrs["values"]) for trial in told(ledger))

    def test_constraints_are_those_of_this_search(self, tmp_path: Path, earlier: Earlier) -> None:
        space = space_of(
            tmp_path, CONFIG, constraints={"acc": {"min": 0.9}, "size": {"max": 1.0}}, search={"sampler": "gp"}
        )
        ledger, _ = self.begin(space, earlier)
        finished = told(ledger)[0]
        assert finished.constraints.keys() == {"diverged", "out_of_memory", "acc", "size"}
        assert finished.constraints["acc"] == pytest.approx(0.5)  # it had 0.4
        assert finished.constraints["size"] == 1.0  # it was not measured
        end_toy(ledger, ask(ledger), "finished")
        assert told(ledger)[-1].constraints.keys() == finished.constraints.keys()

    @pytest.mark.parametrize("objective", [{"metric": "loss", "mode": "max"}, {"metric": "acc", "mode": "min"}])
    def test_a_search_for_something_else_is_refused(
        self, objective: dict[str, str], tmp_path: Path, earlier: Earlier
    ) -> None:
        with pytest.raises(UserError, match="earlier: its objective was min loss, and here it is "):
            self.begin(space_of(tmp_path, CONFIG, objective=objective), earlier)


def test_a_proposal_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More would wait for cores that trials keep busy."""
    threads = list[int]()

    def learn(*_: object) -> None:
        threads.extend(item["num_threads"] for item in threadpool_info() if item["user_api"] == "blas")

    monkeypatch.setattr(ledger, "learn", learn)
    assert ask(open_ledger(space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}, "epochs": 2}), InMemoryStorage()))
    assert set(threads) == {1}
