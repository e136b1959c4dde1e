"""The survival model learns an edge; proposals that heed it stay reproducible and leave nothing else behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from ledgers import ask, end_toy, open_ledger, play, told
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from spaces import space_of
from timing import thread_s

from search.learning.features import features
from search.learning.proposals import ASKED_AGAIN, proposal_seed
from search.learning.survival import KNOWN, MAPPED, Survival, demanded, learn, remembered
from search.ledger import Ledger, OpenTrial
from search.sampler import sampler_maker
from search.space import Space
from search.space.domain import Parameter

CONFIG: dict[str, Any] = {"epochs": 4, "lr": {"log": [1e-4, 1.0]}, "clip": {"float": [0.0, 2.0]}}
CONDITIONAL: dict[str, Any] = {
    "epochs": 4,
    "lr": {"log": [1e-4, 1.0]},
    "block": {"choice": ["bi", [1, 2], "uni"]},
    "state": {"int": [8, 64], "when": {"block": ["bi"]}},
    "fixed": {"int": [3, 3]},
}


def learned(space: Space, survives: Any, trials: int = 40, seed: int = 0) -> Survival:
    rng = random.Random(seed)
    tried = [space.draw(rng) for _ in range(trials)]
    return Survival(space, tried, [float(survives(values)) for values in tried], [1.0] * trials)


class TestModel:
    def test_an_edge_is_learned(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)

        def survives(values: dict[str, Any]) -> bool:
            return bool(values["lr"] * 10 ** values["clip"] < 0.1)

        model = learned(space, survives)
        rng = random.Random(1)
        unseen = [space.draw(rng) for _ in range(200)]
        right = sum((model.probability(values) > 0.5) == survives(values) for values in unseen)
        assert right >= 0.9 * len(unseen)

    def test_across_the_edge_survival_falls_and_it_is_uncertain_there(self, tmp_path: Path) -> None:
        model = learned(space_of(tmp_path, CONFIG), lambda values: values["lr"] < 0.01)
        near = [model.probability({"lr": 10 ** (-2.5 + i / 10), "clip": 1.0}) for i in range(11)]
        assert near == sorted(near, reverse=True)
        assert model.probability({"lr": 1e-4, "clip": 1.0}) > 0.85
        assert model.probability({"lr": 1.0, "clip": 1.0}) < 0.15
        assert 0.2 < model.probability({"lr": 0.01, "clip": 1.0}) < 0.8

    def test_it_carries_the_edge_on_into_what_was_not_tried(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)
        tried = [{"lr": 10**-power, "clip": 1.0} for power in (3.0, 2.6, 2.3, 1.9, 1.7, 1.5)]
        model = Survival(space, tried, [1, 1, 1, 0, 0, 0], [1.0] * 6)
        assert model.probability({"lr": 1.0, "clip": 1.0}) < 0.3
        assert model.probability({"lr": 1e-4, "clip": 1.0}) > 0.7

    def test_a_choice_and_what_it_brings_are_told_apart(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONDITIONAL)
        model = learned(space, lambda values: values["block"] != [1, 2] and values.get("state", 8) < 40)
        base = {"lr": 0.01, "fixed": 3}
        assert model.probability({**base, "block": "uni"}) > 0.6
        assert model.probability({**base, "block": [1, 2]}) < 0.4
        assert model.probability({**base, "block": "bi", "state": 10}) > 0.6
        assert model.probability({**base, "block": "bi", "state": 60}) < 0.4

    def test_features_are_of_one_scale(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONDITIONAL)
        inactive = {"lr": 1e-4, "block": [1, 2], "fixed": 3}
        assert list(features(space, inactive)) == pytest.approx(
            [-1, 0, 1, 0, 0, 0, 0]
        )  # lr, block, fixed, state and whether it is active
        active = {"lr": 1.0, "block": "bi", "state": 36, "fixed": 3}
        assert list(features(space, active)) == pytest.approx([1, 1, 0, 0, 0, 1, 0])

    def test_a_trial_that_was_stopped_early_says_little(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)
        tried = [{"lr": 1e-3, "clip": 1.0}, {"lr": 0.1, "clip": 1.0}]
        whole, part = (Survival(space, tried, [1, 0], [weight, 1.0]) for weight in (1.0, 0.1))
        assert 0.3 < part.probability(tried[0]) < whole.probability(tried[0])

    def test_it_costs_milliseconds(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, CONFIG)

        def learn_and_ask() -> float:
            model = learned(space, lambda values: values["lr"] < 0.01, trials=200)
            return model.probability({"lr": 0.01, "clip": 1.0})

        assert thread_s(learn_and_ask) < 2.0  # about 0.1 s; the rest is for a slow machine

    def test_there_is_none_before_both_endings_were_seen(self, tmp_path: Path) -> None:
        ledger = open_ledger(space_of(tmp_path, CONFIG), InMemoryStorage())
        for status in ("finished", "failed", "stopped") * 6:
            end_toy(ledger, ask(ledger), status)
            assert learn(ledger.space, told(ledger)) is None
        end_toy(ledger, ask(ledger), "out_of_memory")
        assert learn(ledger.space, told(ledger)) is not None

    def test_what_never_ran_tells_nothing(self, tmp_path: Path) -> None:
        """Trials that the end of the time kept from their first report."""
        ledger = open_ledger(space_of(tmp_path, CONFIG), InMemoryStorage())
        for _ in range(MAPPED):
            ask(ledger)
            ledger.end("slot", "stopped", "the time budget was over after epoch 0")
        end_toy(ledger, ask(ledger), "diverged")
        assert learn(ledger.space, told(ledger)) is None
        for _ in range(MAPPED - 1):
            end_toy(ledger, ask(ledger), "finished")
        model = learn(ledger.space, told(ledger))
        assert model is not None
        assert model.tried == MAPPED

    def test_divergences_of_long_ago_are_remembered_and_little_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("search.learning.survival.LATEST", 2 * MAPPED)
        ledger = open_ledger(space_of(tmp_path, CONFIG, search={"trials": 100}), InMemoryStorage())
        for status in ("diverged", "finished") * MAPPED + ("finished",) * 3 * MAPPED:
            end_toy(ledger, ask(ledger), status)
        model = learn(ledger.space, told(ledger))
        assert model is not None
        assert model.tried == 2 * MAPPED
        kept = remembered(told(ledger), lambda trial: trial.user_attrs["status"] == "diverged")
        assert [trial.number for trial in kept][: MAPPED // 2] == [10, 12, 14, 16, 18]
        assert [trial.number for trial in kept][MAPPED // 2 :] == list(range(5 * MAPPED - 15, 5 * MAPPED))

    def test_there_is_none_where_nothing_is_searched(self, tmp_path: Path) -> None:
        ledger = open_ledger(space_of(tmp_path, {"lr": 0.1}), InMemoryStorage())
        for status in ("finished", "diverged") * MAPPED:
            ask(ledger)
            ledger.report("slot", 1, {"loss": 0.5})
            ledger.end("slot", status, "as the test says")
        assert learn(ledger.space, told(ledger)) is None

    def test_there_is_none_before_the_space_is_mapped(self, tmp_path: Path) -> None:
        ledger = open_ledger(space_of(tmp_path, CONFIG), InMemoryStorage())
        for status in ["diverged", "failed", *["finished"] * (MAPPED - 2)]:  # a failed one says nothing
            end_toy(ledger, ask(ledger), status)
            assert learn(ledger.space, told(ledger)) is None
        end_toy(ledger, ask(ledger), "stopped")
        assert learn(ledger.space, told(ledger)) is not None


TRIALS = 14


def search_of(sampler: str, folder: Path, config: dict[str, Any], survival: bool = True, **sections: Any) -> Space:
    search = {"sampler": sampler, "trials": TRIALS, "seed": 3, "survival": survival}
    return space_of(folder, config, search=search, **sections)


@pytest.mark.parametrize("sampler", ASKED_AGAIN)
class TestProposals:
    def test_they_are_the_same_after_an_interruption(self, sampler: str, tmp_path: Path) -> None:
        space = search_of(sampler, tmp_path, CONDITIONAL)
        whole = play(open_ledger(space, InMemoryStorage()), TRIALS)
        storage = InMemoryStorage()
        parts = play(open_ledger(space, storage), MAPPED + 2)
        lost = ask(open_ledger(space, storage))  # the driver dies while this one runs
        parts += play(open_ledger(space, storage), TRIALS - MAPPED - 2)
        assert lost.values == whole[MAPPED + 2]
        assert parts == whole
        assert all(space.holds(values) for values in whole)

    def test_one_that_was_written_in_part_is_gone_on_with(
        self, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The driver died between two values; by what has ended since, another block would be proposed."""
        config = {
            "epochs": 3,
            "block": {"choice": ["bi", "uni"]},
            "rate": {"log": [1, 10], "when": {"block": ["bi"]}},
            "share": {"float": [0, 1], "when": {"block": ["uni"]}},
        }

        def end(ledger: Ledger, opened: OpenTrial, key: str) -> None:
            diverged = opened.values.get("share", 0.0) > 0.7
            if not diverged:
                ledger.report(key, 1, {"loss": opened.values.get("share", 0.4)})
            ledger.end(key, "diverged" if diverged else "finished", "")

        for seed in range(4):
            space = space_of(tmp_path, config, search={"sampler": sampler, "trials": 60, "seed": seed})
            storage = InMemoryStorage()
            ledger = open_ledger(space, storage)
            for _ in range(20):
                end(ledger, ask(ledger), "slot")
            ask(ledger, "beside")
            with monkeypatch.context() as dying:
                suggest = Parameter.suggest
                dying.setattr(Parameter, "suggest", lambda own, trial: {"block": suggest}[own.name](own, trial))
                with pytest.raises(KeyError):
                    ask(ledger, "half")
            resumed = open_ledger(space, storage)
            beside = ask(resumed, "beside")
            resumed.report("beside", 1, {"loss": 0.0 if "rate" in beside.values else 9.0})
            resumed.end("beside", "finished", "")
            assert space.holds(ask(resumed, "half").values)

    def test_candidates_leave_no_trials(self, sampler: str, tmp_path: Path) -> None:
        ledger = open_ledger(search_of(sampler, tmp_path, CONFIG), InMemoryStorage())
        played = play(ledger, TRIALS)
        assert [trial.user_attrs["values"] for trial in told(ledger)] == played
        assert TrialState.WAITING not in [trial.state for trial in told(ledger)]

    def test_without_it_they_are_the_samplers_own(self, sampler: str, tmp_path: Path) -> None:
        space = search_of(sampler, tmp_path, CONFIG, survival=False)
        ledger = open_ledger(space, InMemoryStorage())
        play(ledger, TRIALS - 1)
        plain = optuna.create_study(sampler=sampler_maker(space)(proposal_seed(3, TRIALS - 1)))
        plain.add_trials(told(ledger))
        assert ask(ledger).values == space.suggest(plain.ask())


@pytest.mark.parametrize("sampler", ["nsga2", "random"])  # tpe would go for the toy's optimum, away from the edge
def test_fewer_settings_diverge_and_the_edge_is_still_explored(sampler: str, tmp_path: Path) -> None:
    def rates(survival: bool) -> list[float]:
        space = search_of(sampler, tmp_path, {**CONFIG, "lr": {"log": [0.01, 4.0]}}, survival).with_trials(40)
        ledger = open_ledger(space, InMemoryStorage())
        for _ in range(40):
            opened = ask(ledger)
            end_toy(ledger, opened, "diverged" if opened.values["lr"] > 0.2 else "finished")
        return [trial.params["lr"] for trial in told(ledger)][20:]

    assert sum(lr > 0.2 for lr in rates(True)) < sum(lr > 0.2 for lr in rates(False))
    assert any(0.1 < lr < 0.4 for lr in rates(True)), "it keeps away from the edge"


def test_the_more_has_been_tried_the_likelier_a_proposal_must_be_to_survive() -> None:
    limits = [demanded(tried, parameters=3) for tried in (0, 10, 40, 200)]
    assert limits == sorted(limits)
    assert limits[0] == 0.5 < limits[1]
    assert limits[-1] < 1
    assert demanded(KNOWN * 6, parameters=6) == pytest.approx(2 / 3)
    assert demanded(40, parameters=6) < demanded(40, parameters=3), "more parameters take longer to know"


def test_the_likeliest_is_taken_where_none_is_likely_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.learning.proposals.demanded", lambda tried, parameters: 1.0)
    space = search_of("random", tmp_path, CONFIG)
    ledger = open_ledger(space, InMemoryStorage())
    rng = random.Random(5)
    for _ in range(MAPPED):
        opened = ask(ledger)
        end_toy(ledger, opened, "diverged" if opened.values["lr"] > 0.01 else "finished")
    model = learn(space, told(ledger))
    assert model is not None
    typical = sorted(model.probability(space.draw(rng)) for _ in range(200))[100]
    assert model.probability(ask(ledger).values) > typical


def test_known_settings_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole or in part, and whatever was seen before them."""
    monkeypatch.setattr("search.learning.survival.MAPPED", 2)
    known = [
        {"lr": 1e-4, "block": "uni", "fixed": 3},
        {"lr": 1.0, "block": "uni", "fixed": 3},
        {"lr": 1.0, "block": "bi", "state": 60, "fixed": 3},
        {"lr": 0.9, "block": "bi"},
    ]
    space = search_of("tpe", tmp_path, CONDITIONAL, try_first=known)
    storage = InMemoryStorage()
    for setting in known:
        opened = ask(open_ledger(space, storage))
        assert setting.items() <= opened.values.items()
        again = open_ledger(space, storage)
        assert ask(again).values == opened.values
        end_toy(again, opened, "diverged" if opened.values["lr"] > 0.2 else "finished")
