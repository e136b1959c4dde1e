"""The sampler `gp`: what it expects of a setting, and what it proposes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledgers import ask, end_toy, open_ledger, told
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from scipy.integrate import quad
from spaces import LOSS, space_of
from timing import thread_s

from search.learning.features import feature_rows
from search.learning.ladder import Ladder, scores_of
from search.learning.surrogate import FIRST, judge, log_expected_improvement, nearby
from search.learning.survival import MAPPED
from search.ledger import Ledger
from search.space import Space
from search.warm_start import Earlier, take_over

CONFIG: dict[str, Any] = {"epochs": 9, "lr": {"log": [1e-4, 1.0]}, "clip": {"float": [0.0, 2.0]}}
ASHA = {"name": "asha", "grace_epochs": 1, "reduction": 3}


def bowl(values: dict[str, Any]) -> float:
    return (math.log10(values["lr"]) + 3) ** 2 + 0.5 * (values["clip"] - 0.5) ** 2


def search_of(folder: Path, config: dict[str, Any] = CONFIG, trials: int = 40, **sections: Any) -> Space:
    search = {"sampler": "gp", "trials": trials, "seed": 3, **sections.pop("search", {})}
    return space_of(folder, config, search=search, **sections)


def run(ledger: Ledger, trials: int, score: Callable[[dict[str, Any]], float | None]) -> list[dict[str, Any]]:
    """Trials of one epoch; None: the setting diverges."""
    played = []
    for _ in range(trials):
        opened = ask(ledger)
        played.append(opened.values)
        value = score(opened.values)
        if value is not None:
            ledger.report("slot", 1, {item.metric: value for item in ledger.space.objectives} | {"size": value})
        ledger.end("slot", "diverged" if value is None else "finished", "as the test says")
    return played


class TestLadder:
    @pytest.mark.parametrize(
        ("grace", "reduction", "longest", "expected"),
        [(1, 3, 9, [1, 3, 9]), (5, 3, 8, [5, 8]), (2, 2, 16, [2, 4, 8, 16]), (3, 3, 2, [2]), (1, 4, 1, [1])],
    )
    def test_the_rungs_are_the_schedulers(
        self, grace: int, reduction: int, longest: int, expected: list[int], tmp_path: Path
    ) -> None:
        space = space_of(tmp_path, CONFIG, scheduler={"grace_epochs": grace, "reduction": reduction})
        assert space.scheduler.rungs(longest) == expected

    def test_stopped_trials_tell_of_what_whole_ones_would_score(self, tmp_path: Path) -> None:
        """Curves that fall at a rate of their own; a third goes on at each rung."""
        space = space_of(tmp_path, CONFIG, scheduler=ASHA)
        rng = random.Random(0)
        settings = [space.draw(rng) for _ in range(60)]

        def score(values: dict[str, Any], epoch: int) -> float:
            return bowl(values) + (1 + 0.3 * values["clip"]) / epoch

        settings.sort(key=bowl)
        trials = []
        for i, values in enumerate(settings):
            reached = [1] if i >= 20 else [1, 3] if i >= 7 else [1, 3, 9]
            trials.append({epoch: score(values, epoch) for epoch in reached})
        ladder = Ladder(feature_rows(space, settings), trials, [1, 3, 9])
        unseen = [values for values in (space.draw(rng) for _ in range(200)) if bowl(values) < 1.5]
        mean, _ = ladder.predict(feature_rows(space, unseen))
        truth = np.array([score(values, 9) for values in unseen])
        assert len(unseen) > 30
        assert np.abs(mean - truth).max() < 0.3

    def test_what_is_left_of_a_rung_at_the_next_is_learned(self, tmp_path: Path) -> None:
        """A trial is twice as far from the best after the third epoch as after the first."""
        space = space_of(tmp_path, CONFIG)
        rng = random.Random(0)
        settings = sorted((space.draw(rng) for _ in range(40)), key=bowl)
        trials = [
            {1: bowl(values), 3: 2 * bowl(values)} if i < 12 else {1: bowl(values)} for i, values in enumerate(settings)
        ]
        mean, _ = Ladder(feature_rows(space, settings), trials, [1, 3]).predict(feature_rows(space, settings[12:30]))
        assert mean == pytest.approx([2 * bowl(values) for values in settings[12:30]], rel=0.1)

    def test_one_score_beyond_all_bounds_undoes_no_rung(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)
        rng = random.Random(0)
        settings = [space.draw(rng) for _ in range(40)]
        trials = [{1: bowl(values) + 1, 3: bowl(values)} for values in settings]
        trials[5] = {1: bowl(settings[5]) + 1, 3: 1e6}
        unseen = [space.draw(rng) for _ in range(40)]
        mean, _ = Ladder(feature_rows(space, settings), trials, [1, 3]).predict(feature_rows(space, unseen))
        assert np.corrcoef(mean, [bowl(values) for values in unseen])[0, 1] > 0.9

    def test_a_whole_trial_of_a_shorter_search_is_none_of_this_one(self, tmp_path: Path) -> None:
        short = open_ledger(search_of(tmp_path), InMemoryStorage())
        ask(short)
        for epoch in (1, 2, 3, 4):
            short.report("slot", epoch, {"loss": 1.0 / epoch})
        short.end("slot", "finished", "")
        own = [scores for _, scores in scores_of(short.space, told(short), 9, random.Random(0))]
        assert own == [{1: 1.0, 3: 1 / 3, 9: 0.25}]
        longer = open_ledger(search_of(tmp_path), InMemoryStorage())
        take_over(longer.study, longer.space, Earlier("earlier", short.space, short.study))
        taken = [scores for _, scores in scores_of(longer.space, told(longer), 9, random.Random(0))]
        assert taken == [{1: 1.0, 3: 1 / 3}]

    def test_a_rung_that_few_have_reached_is_left_out(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)
        rng = random.Random(0)
        rows = feature_rows(space, [space.draw(rng) for _ in range(6)])
        trials = [{1: 1.0 + i / 10} for i in range(6)]
        low = Ladder(rows, trials, [1, 9]).predict(rows)
        with_few = Ladder(rows, [{1: 1.0, 9: -5.0}, {1: 1.1, 9: -5.0}, *trials[2:]], [1, 9]).predict(rows)
        assert with_few[0] == pytest.approx(low[0])

    def test_what_was_stopped_is_not_the_most_promising_of_all(self, tmp_path: Path) -> None:
        """Nothing but rates below 1e-3 has got to the end, and the scores of these still fall towards higher ones."""
        space = space_of(tmp_path, CONFIG)
        rng = random.Random(0)
        settings = [space.draw(rng) for _ in range(80)]
        low = [values for values in settings if values["lr"] < 1e-3]
        high = [values for values in settings if values["lr"] > 1e-2]
        trials = [{1: 1.0, 9: -math.log10(values["lr"])} for values in low] + [{1: 1.2} for _ in high]
        ladder = Ladder(feature_rows(space, [*low, *high]), trials, [1, 9])
        mean, deviation = ladder.predict(feature_rows(space, high))
        best = min(scores[9] for scores in trials if 9 in scores)
        assert len(low) > 8 < len(high)
        assert (mean > best - 0.05).all()
        assert (deviation < 0.5 * np.ptp([scores[9] for scores in trials if 9 in scores])).all()

    @pytest.mark.parametrize(
        ("before", "after", "slope"),
        [
            ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], 1.0),
            ([1.0, 2.0, 3.0], [5.0, 10.0, 15.0], 4.0),  # one more trial of slope 1 beside a slope of 5
            ([9.0, 10.0, 11.0], [3.0, 2.0, 1.0], 0.0),
        ],
    )
    def test_three_trials_on_a_rung_tell_how_the_one_before_goes_on(
        self, before: list[float], after: list[float], slope: float, tmp_path: Path
    ) -> None:
        """If they show nothing of it, as it was; if they show the reverse, by nothing."""
        space = space_of(tmp_path, CONFIG)
        here = {"lr": 1e-2, "clip": 1.0}
        rest = [{"lr": 10 ** (i / 10 - 3), "clip": 0.1 * i} for i in range(20) if i != 10]
        first = [4.0 + values["clip"] for values in rest]
        trials = [{1: x, 3: y} for x, y in zip(before, after, strict=True)] + [{1: x} for x in first]
        ladder = Ladder(feature_rows(space, [here] * 3 + rest), trials, [1, 3])
        mean, _ = ladder.predict(feature_rows(space, rest))
        at_first, _ = Ladder(feature_rows(space, [here] * 3 + rest), trials, [1]).predict(feature_rows(space, rest))
        assert np.polyfit(at_first, mean, 1)[0] == pytest.approx(slope, abs=0.1)

    def test_what_is_as_expected_of_stopped_trials_changes_nothing_that_is_expected(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        space = space_of(tmp_path, CONFIG, scheduler=ASHA)
        rng = random.Random(0)
        settings = sorted((space.draw(rng) for _ in range(60)), key=bowl)
        trials = []
        for i, values in enumerate(settings):
            reached = [1, 3, 9] if i < 10 or i % 3 == 2 else [1, 3][: 1 + i % 3]
            trials.append({epoch: 3 - epoch / 9 + bowl(values) * (1 + epoch / 9) for epoch in reached})
        rows = feature_rows(space, settings)
        mean, deviation = Ladder(rows, trials, [1, 3, 9]).predict(rows)
        monkeypatch.setattr("search.learning.regression.Regression.add", lambda *_: None)
        as_expected, doubt = Ladder(rows, trials, [1, 3, 9]).predict(rows)
        assert mean == pytest.approx(as_expected, abs=1e-3)
        assert (deviation <= doubt + 1e-6).all()

    def test_the_unit_of_a_lower_rung_does_not_matter(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)
        rng = random.Random(0)
        settings = sorted((space.draw(rng) for _ in range(80)), key=bowl)
        rows, unseen = feature_rows(space, settings), feature_rows(space, [space.draw(rng) for _ in range(30)])
        first = [bowl(values) + 0.3 * rng.gauss(0.0, 1.0) for values in settings]

        def doubt(unit: float) -> Any:
            ended = [{1: unit * x, 3: bowl(values)} for x, values in zip(first[:60], settings, strict=False)]
            stopped = [{1: unit * x} for x in first[60:]]
            return Ladder(rows, ended + stopped, [1, 3]).predict(unseen)[1]

        assert doubt(10.0) == pytest.approx(doubt(1.0), rel=0.5)

    def test_a_rung_that_all_have_left_behind_adds_nothing(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)
        rng = random.Random(0)
        settings = [space.draw(rng) for _ in range(20)]
        rows = feature_rows(space, settings)
        both = [{1: rng.random(), 3: bowl(values)} for values in settings]
        last = [{3: bowl(values)} for values in settings]
        means = [Ladder(rows, trials, [1, 3]).predict(rows)[0] for trials in (both, last)]
        assert (means[0] == means[1]).all()

    def test_scores_are_those_that_schedulers_compare(self, tmp_path: Path) -> None:
        space = search_of(tmp_path, objective={"metric": "acc", "mode": "max"}, scheduler=ASHA)
        ledger = open_ledger(space, InMemoryStorage())
        for values in ([0.1, 0.1, 0.11, 0.4], [0.05, 0.5]):
            ask(ledger)
            for epoch, value in enumerate(values, 1):
                ledger.report("slot", epoch, {"acc": value, "acc_chance": 0.2})
            ledger.end("slot", "finished" if len(values) == 4 else "stopped", "")
        found = [scores for _, scores in scores_of(space, told(ledger), 9, random.Random(0))]
        assert found == [{1: -0.2, 3: -0.2, 9: -0.4}, {1: -0.2}], "what is below chance counts as chance"

    def test_of_several_objectives_too_a_shorter_search_has_no_whole_trials(self, tmp_path: Path) -> None:
        space = search_of(tmp_path, objective=[LOSS, {"metric": "acc", "mode": "max"}])
        short, longer = (open_ledger(space, InMemoryStorage()) for _ in range(2))
        for ledger in (short, longer):
            ask(ledger)
            ledger.report("slot", 1, {"loss": 0.0, "acc": 0.0})
            ledger.end("slot", "finished", "")
        take_over(longer.study, space, Earlier("earlier", space, short.study))
        assert len(list(scores_of(space, told(longer), 9, random.Random(0)))) == 1

    def test_of_several_objectives_every_trade_off_may_be_drawn(self, tmp_path: Path) -> None:
        space = search_of(tmp_path, objective=[LOSS, {"metric": "acc", "mode": "max"}])
        ledger = open_ledger(space, InMemoryStorage())
        for loss, acc in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.6, 0.4), (0.6, 0.39), (1e12, 0.0)):
            ask(ledger)
            ledger.report("slot", 1, {"loss": loss, "acc": acc})
            ledger.end("slot", "finished", "")
        best = set()
        for seed in range(60):
            scores = [found[9] for _, found in scores_of(space, told(ledger), 9, random.Random(seed))]
            assert scores[2] == max(scores[:3]), "the third is no better than either in anything"
            assert scores[4] > scores[3], "nor is the fifth than the fourth, by both together"
            best.add(scores.index(min(scores)))
        assert best == {0, 1, 3}


@pytest.mark.parametrize(
    ("scored", "diverged", "enough"),
    [(FIRST, 0, True), (FIRST - 1, MAPPED - FIRST, False), (1, MAPPED - 1, True), (0, MAPPED, False)],
)
def test_it_begins_with_some_scores_or_where_most_fail_with_one(
    scored: int, diverged: int, enough: bool, tmp_path: Path
) -> None:
    ledger = open_ledger(search_of(tmp_path), InMemoryStorage())
    run(ledger, scored, bowl)
    run(ledger, diverged, lambda values: None)
    assert (judge(ledger.space, told(ledger), None, random.Random(0)) is not None) == enough


@pytest.mark.slow
class TestProposals:
    def test_they_get_closer_to_the_best_than_draws_do(self, tmp_path: Path) -> None:
        played = run(open_ledger(search_of(tmp_path), InMemoryStorage()), 30, bowl)
        assert min(map(bowl, played[:MAPPED])) > 5 * min(map(bowl, played))
        assert min(map(bowl, played)) < 0.01

    def test_they_learn_from_stopped_trials_alone(self, tmp_path: Path) -> None:
        space = search_of(tmp_path, scheduler=ASHA)
        ledger = open_ledger(space, InMemoryStorage())
        for _ in range(30):
            opened = ask(ledger)
            ledger.report("slot", 1, {"loss": bowl(opened.values)})
            ledger.end("slot", "stopped", "as the test says")
        late = [bowl(trial.user_attrs["values"]) for trial in told(ledger)][20::2]
        assert min(late) < 0.02

    def test_those_of_tpe_keep_off_too(self, tmp_path: Path) -> None:
        """The score gets better towards where all diverges; three times as far is no search of the edge."""

        def far_beyond(survival: bool) -> int:
            space = search_of(tmp_path, trials=60, search={"survival": survival})
            rate = [v["lr"] for v in run(open_ledger(space, InMemoryStorage()), 60, score)]
            return sum(lr > 3e-2 for lr in rate[MAPPED + 1 :: 2])

        def score(values: dict[str, Any]) -> float | None:
            return None if values["lr"] > 1e-2 else -math.log10(values["lr"])

        assert far_beyond(survival=True) < 0.5 * far_beyond(survival=False)

    @pytest.mark.parametrize("survival", [True, False])
    def test_they_keep_off_what_diverges(self, survival: bool, tmp_path: Path) -> None:
        """The best lies at 1e-3, all that is above 2e-3 diverges."""
        space = search_of(tmp_path, search={"survival": survival})
        played = run(open_ledger(space, InMemoryStorage()), 40, lambda v: None if v["lr"] > 2e-3 else bowl(v))
        assert sum(values["lr"] > 2e-3 for values in played[:MAPPED]) >= 4
        assert sum(values["lr"] > 2e-3 for values in played[MAPPED::2]) <= 4
        assert min(bowl(values) for values in played if values["lr"] <= 2e-3) < 0.02

    def test_they_heed_the_limit_of_a_metric(self, tmp_path: Path) -> None:
        """The score is best where the limit is broken: the best that keeps it lies on it."""
        space = search_of(tmp_path, constraints={"size": {"min": 1.0}})
        played = run(open_ledger(space, InMemoryStorage()), 40, bowl)
        assert all(bowl(values) > 0.9 for values in played[20::2])
        assert 1.0 <= min(bowl(values) for values in played if bowl(values) >= 1.0) < 1.1

    def test_what_runs_beside_them_is_taken_for_measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def furthest_apart() -> float:
            ledger = open_ledger(search_of(tmp_path), InMemoryStorage())
            run(ledger, MAPPED, bowl)
            beside = feature_rows(ledger.space, [ask(ledger, f"slot {i}").values for i in range(6)][::2])
            return float(np.ptp(beside, axis=0).max())

        assert furthest_apart() > 0.1
        monkeypatch.setattr("search.learning.surrogate.Worth.expect", lambda worth, running: None)
        assert furthest_apart() < 0.05

    def test_nothing_is_tried_twice_where_there_is_something_new(self, tmp_path: Path) -> None:
        config = {"epochs": 9, "lr": {"choice": [1e-4, 1e-3, 1e-2]}, "clip": {"choice": [0.0, 0.5, 1.0, 1.5]}}
        ledger = open_ledger(search_of(tmp_path, config), InMemoryStorage())
        run(ledger, MAPPED, bowl)
        for _ in range(8):
            before = [str(trial.user_attrs["values"]) for trial in told(ledger)]
            (values,) = run(ledger, 1, bowl)
            if told(ledger)[-1].number % 2 == 0 and len(set(before)) < 12:
                assert str(values) not in before

    @pytest.mark.parametrize("status", ["failed", "diverged"])
    def test_what_came_to_nothing_is_not_tried_again(self, status: str, tmp_path: Path) -> None:
        """The best setting never ends well. TPE adds steps up in an order of its own."""
        config = {"epochs": 9, "lr": {"choice": [1e-4, 1e-3]}, "clip": {"float": [0.0, 2.0], "step": 0.1}}
        ledger = open_ledger(search_of(tmp_path, config, search={"survival": False}), InMemoryStorage())
        keys = []
        for _ in range(36):
            opened = ask(ledger)
            key = (opened.values["lr"], round(opened.values["clip"], 6))
            assert opened.number < MAPPED or opened.number % 2 or key not in keys
            keys.append(key)
            good = key[0] == 1e-4
            if good:
                ledger.report("slot", 1, {"loss": bowl(opened.values)})
            ledger.end("slot", "finished" if good else status, "as the test says")

    def test_a_trial_that_never_ran_has_broken_no_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        space = search_of(tmp_path, constraints={"size": {"min": -1.0}})
        ledger = open_ledger(space, InMemoryStorage())
        run(ledger, MAPPED, bowl)
        for _ in range(2):
            ask(ledger)
            ledger.end("slot", "stopped", "the time budget was over after epoch 0")
        modelled: list[Any] = []
        monkeypatch.setattr("search.learning.surrogate.Regression", lambda *rows: modelled.append(rows))
        assert judge(space, told(ledger), None, random.Random(0)) is not None
        assert modelled == []

    def test_a_limit_is_learned_from_whole_trials(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a metric was when its trial was stopped says nothing of the end; one that was lost breaks the limit."""
        space = search_of(tmp_path, constraints={"size": {"min": 1.0}}, scheduler=ASHA)
        ledger = open_ledger(space, InMemoryStorage())
        for size, status in [(10.0, "finished"), (0.5, "stopped"), (None, "finished"), (0.9, "finished")] * 4:
            ask(ledger)
            ledger.report("slot", 1, {"loss": 1.0, "size": size})
            ledger.end("slot", status, "as the test says")
        modelled: list[Any] = []
        monkeypatch.setattr("search.learning.surrogate.Regression", lambda rows, excess: modelled.append(excess))
        monkeypatch.setattr("search.learning.surrogate.Worth.__init__", lambda *_: None)
        monkeypatch.setattr("search.learning.surrogate.Worth.exclude", lambda *_: None)
        judge(space, told(ledger), None, random.Random(0))
        assert sorted(set(modelled[0])) == pytest.approx([-4.4, 0.1, 1.0]), "of -9, .1, and 1 for what was lost"
        assert len(modelled[0]) == 12

    def test_what_runs_and_breaks_a_limit_is_nothing_to_beat(self, tmp_path: Path) -> None:
        """The best within the limit is at a rate of 1e-2; a slot is busy with what would be better at 1e-3."""
        space = search_of(tmp_path, constraints={"size": {"min": -2.0}})
        ledger = open_ledger(space, InMemoryStorage())

        def play(trials: int) -> list[dict[str, Any]]:
            played = []
            for _ in range(trials):
                opened = ask(ledger)
                played.append(opened.values)
                ledger.report("slot", 1, {"loss": bowl(opened.values), "size": math.log10(opened.values["lr"])})
                ledger.end("slot", "finished", "")
            return played

        play(20)
        busy = ledger.study.ask({})
        for name, domain in ((item.name, item.domain) for item in space.parameters):
            value, number = {"lr": 1e-3, "clip": 0.5}[name], busy._trial_id
            ledger.study._storage.set_trial_param(number, name, value, domain.distribution())
        assert min(bowl(values) for values in play(18)[1::2] if values["lr"] >= 1e-2) < 1.2

    def test_what_was_tried_long_ago_or_failed_is_remembered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("search.learning.survival.LATEST", MAPPED)
        config = {"epochs": 9, "lr": {"choice": [1e-4, 1e-3]}, "clip": {"int": [0, 19]}}
        ledger = open_ledger(search_of(tmp_path, config), InMemoryStorage())
        known = []
        for _ in range(20):
            opened = ask(ledger)
            if opened.number >= MAPPED and opened.number % 2 == 0:
                assert opened.values not in known
            known.append(opened.values)
            ledger.report("slot", 1, {"loss": bowl(opened.values)})
            ledger.end("slot", "finished", "")
        for _ in range(2 * MAPPED):
            ask(ledger)
            ledger.end("slot", "failed", "as the test says")
        assert judge(ledger.space, told(ledger), None, random.Random(0)) is not None

    def test_the_best_is_remembered_however_long_ago(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("search.learning.survival.LATEST", 2 * MAPPED)
        best = {"lr": 1e-3, "clip": 0.5}
        space = search_of(tmp_path, try_first=[best], search={"sampler": "random", "survival": False})
        ledger = open_ledger(space, InMemoryStorage())
        assert min(run(ledger, 4 * MAPPED, bowl), key=bowl) == best
        worth = judge(space, told(ledger), None, random.Random(0))
        assert worth is not None
        assert worth.best[0] == best

    def test_a_trial_that_another_tool_ended_is_no_obstacle(self, tmp_path: Path) -> None:
        ledger = open_ledger(search_of(tmp_path), InMemoryStorage())
        run(ledger, MAPPED, bowl)
        ledger.study.tell(ledger.study.ask({}), state=TrialState.FAIL)
        assert all(ledger.space.holds(ask(ledger, f"slot {i}").values) for i in range(2))

    def test_scores_near_the_end_of_all_numbers_are_no_obstacle(self, tmp_path: Path) -> None:
        ledger = open_ledger(search_of(tmp_path), InMemoryStorage())
        run(ledger, 16, lambda values: -1.7e308 if values["lr"] < 1e-3 else 1.7e308)
        assert run(ledger, 1, lambda values: None)

    def test_where_no_setting_keeps_a_limit_survival_still_goes_first(self, tmp_path: Path) -> None:
        space = search_of(tmp_path, constraints={"size": {"min": 1000.0}})
        played = run(open_ledger(space, InMemoryStorage()), 40, lambda v: None if v["lr"] > 2e-3 else bowl(v))
        assert sum(values["lr"] > 4e-3 for values in played[20::2]) <= 1

    def test_parameters_that_come_and_go(self, tmp_path: Path) -> None:
        config = {**CONFIG, "block": {"choice": ["bi", [1, 2]]}, "state": {"int": [8, 64], "when": {"block": ["bi"]}}}
        space = search_of(tmp_path, config, trials=24)
        played = run(open_ledger(space, InMemoryStorage()), 24, lambda v: bowl(v) + v.get("state", 60) / 100)
        assert all(space.holds(values) for values in played)
        assert min(values.get("state", 60) for values in played) < 12

    def test_another_takes_its_place_at_once(self, tmp_path: Path) -> None:
        """A slot waits for it; after a hundred trials of seven parameters its own takes a third of a second."""
        config: dict[str, Any] = {"epochs": 9, **{f"p{i}": {"float": [0.0, 1.0]} for i in range(7)}}
        ledger = open_ledger(search_of(tmp_path, config, trials=200), InMemoryStorage())
        for number in range(100):
            opened = ledger.study.ask({})
            values = ledger.space.draw(random.Random(number))
            attrs = {"status": "finished", "values": values, "metrics": {}, "epochs": 9}
            for key, value in attrs.items():
                opened.set_user_attr(key, value)
            score = sum((value - 0.5) ** 2 for value in values.values())
            for epoch in (1, 3, 9):
                opened.report(score + 1 / epoch, epoch)
            ledger.study.tell(opened, score)
        slots = (f"slot {i}" for i in range(10))
        one_of_each_kind = thread_s(lambda: [ask(ledger, next(slots)) for _ in range(2)])
        assert one_of_each_kind < 20.0


def test_without_a_score_it_draws(tmp_path: Path) -> None:
    ledger = open_ledger(search_of(tmp_path), InMemoryStorage())
    played = run(ledger, MAPPED + 4, lambda values: None)
    assert len({str(values) for values in played}) == MAPPED + 4
    end_toy(ledger, ask(ledger), "failed")
    assert ledger.space.holds(ask(ledger).values)


@pytest.mark.parametrize("z", [3.0, 0.0, -2.0, -6.0, -29.0, -31.0, -50.0])
def test_the_improvement_is_the_integral(z: float) -> None:
    """Of what lies below the best, by how much; its logarithm stays finite where it itself is nought."""
    found = float(log_expected_improvement(np.array([z * 0.5]), np.array([0.5]))[0])
    integral, _ = quad(lambda gain: gain * math.exp(z * gain - 0.5 * gain**2), 0.0, math.inf)
    expected = math.log(0.5 * integral) - 0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    assert found == pytest.approx(expected, abs=0.01)


def test_nearby_settings_stay_inside_and_do_not_crowd_the_ends(tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "width": {"int": [8, 64], "log": True},
        "kind": {"choice": [None, "b"]},
        "fixed": {"int": [3, 3]},
    }
    space = space_of(tmp_path, config)
    rng = random.Random(0)
    centre = {"lr": 1.0, "clip": 0.0, "width": 64, "kind": None, "fixed": 3}
    around = [nearby(space, centre, 0.1, rng) for _ in range(300)]
    assert all(space.holds(values) for values in around)
    assert not any(values["lr"] == 1.0 or values["clip"] == 0.0 for values in around)
    assert sum(values["lr"] > 0.1 for values in around) > 280
    assert {values["kind"] for values in around} == {None, "b"}
    assert sum(values["kind"] is None for values in around) > 200
