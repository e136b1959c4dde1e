"""Every sampler keeps the same contract with the ledger, and learns from divergence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from ledgers import ENDINGS, ask, end_toy, open_ledger, play, told
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from spaces import LOSS, space_of

from search.ledger import Ledger
from search.sampler import OWN_COURSE, grid_size, sampler_maker, unlearned
from search.searcher import StudySearcher
from search.space import Space
from search.warm_start import Earlier, take_over
from trainables.contract import UserError

SAMPLERS = ["tpe", "gp", "cmaes", "nsga2", "qmc", "random", "grid"]
TRIALS = 15  # gp draws at random until ten have ended: two of the last five are its own
CONFIG: dict[str, Any] = {
    "epochs": 2,
    "optim": {"lr": 0.0},
    "lr": {"log": [1e-4, 1.0]},
    "width": {"int": [8, 64], "log": True},
    "dropout": {"float": [0.0, 0.5], "step": 0.1},
    "layers": {"choice": [[8], [8, 16], "none"]},
}
FINITE: dict[str, Any] = {"epochs": 2, "lr": {"choice": [1e-4, 1e-3, 0.01, 0.1, 0.5]}, "depth": {"int": [1, 5]}}


def config_for(sampler: str) -> dict[str, Any]:
    return FINITE if sampler == "grid" else CONFIG


@pytest.mark.parametrize("sampler", SAMPLERS)
class TestSampler:
    """What each sampler must do, whatever became of its trials."""

    @pytest.fixture
    def space(self, sampler: str, tmp_path: Path) -> Space:
        search = {"sampler": sampler, "trials": TRIALS, "seed": 3}
        return space_of(tmp_path, config_for(sampler), search=search, constraints={"loss": {"max": 1.5}})

    def test_it_tries_different_things_inside_the_domains_and_ends(self, space: Space) -> None:
        ledger = open_ledger(space, InMemoryStorage())
        played = play(ledger, TRIALS)
        assert all(space.holds(values) for values in played)
        for name in played[0]:
            assert len({str(values[name]) for values in played}) > 1, f"every trial has the same {name}"
        assert ledger.ask("slot") is None
        states = [trial.state for trial in told(ledger)]
        assert len(states) == TRIALS
        assert TrialState.RUNNING not in states

    def test_another_seed_proposes_other_settings(self, space: Space, tmp_path: Path) -> None:
        search = {"sampler": space.search.sampler, "trials": TRIALS, "seed": 4}
        other = space_of(tmp_path, config_for(space.search.sampler), search=search)
        assert play(open_ledger(other, InMemoryStorage()), 3) != play(open_ledger(space, InMemoryStorage()), 3)

    def test_one_seed_proposes_the_same_whether_the_search_was_interrupted_or_not(self, space: Space) -> None:
        whole = play(open_ledger(space, InMemoryStorage()), TRIALS)
        storage = InMemoryStorage()
        parts = play(open_ledger(space, storage), 3)
        lost = ask(open_ledger(space, storage))  # the driver dies while this one runs
        parts += play(open_ledger(space, storage), 8)
        stopped = open_ledger(space, storage)
        ask(stopped)
        stopped.interrupt("slot")
        parts += play(open_ledger(space, storage), TRIALS - 11)
        assert lost.values == whole[3]
        assert parts == whole

    def test_trials_side_by_side_go_on_after_an_interruption(self, space: Space) -> None:
        storage = InMemoryStorage()
        ledger = open_ledger(space, storage)
        running = {key: ask(ledger, key) for key in ("left", "right", "third")}
        end_toy(ledger, running.pop("left"), "finished", "left")
        again = open_ledger(space, storage)
        assert again.left == TRIALS - 1
        for before in running.values():
            after = ask(again, str(before.number))
            assert (after.number, after.values) == (before.number, before.values)
        assert ask(again).number == 3

    @pytest.mark.parametrize("status", ENDINGS)
    def test_every_ending_is_told_in_optunas_terms(self, space: Space, status: str) -> None:
        ledger = open_ledger(space, InMemoryStorage())
        end_toy(ledger, ask(ledger), "finished")
        record = end_toy(ledger, ask(ledger), status)
        assert record.status == status
        known, trial = told(ledger)
        if status == "failed":
            assert trial.state == TrialState.FAIL
            return
        assert trial.constraints.keys() == known.constraints.keys()
        assert (trial.constraints["diverged"] > 0) == (status == "diverged")
        assert (trial.constraints["out_of_memory"] > 0) == (status == "out_of_memory")
        if status == "stopped":
            assert trial.state == TrialState.PRUNED
            assert trial.intermediate_values.keys() == {1, 2}
            assert trial.intermediate_values[2] == record.metrics["loss"]
            return
        assert trial.state == TrialState.COMPLETE
        assert trial.value is not None
        assert known.value is not None
        assert math.isfinite(trial.value)
        if status == "finished":
            assert trial.value == record.metrics["loss"]
        else:
            assert trial.value > max(known.value, *known.intermediate_values.values())


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2"])
def test_a_line_says_which_samplers_learn_nothing_from_stopped_trials(sampler: str, tmp_path: Path) -> None:
    def proposals(ending: str) -> list[dict[str, Any]]:
        ledger = open_ledger(space, InMemoryStorage())
        for number in range(120 if sampler == "nsga2" else 16):  # which draws its first fifty at random
            end_toy(ledger, ask(ledger), ending if number % 4 == 0 else "finished")
        return [ask(ledger, str(key)).values for key in range(4)]

    search = {"sampler": sampler, "trials": 200, "survival": False}
    space = space_of(tmp_path, CONFIG, search=search, scheduler={"name": "asha"})
    learns = proposals("stopped") != proposals("failed")  # nobody learns from what failed
    assert [f"search.sampler: {sampler} learns nothing" in line for line in unlearned(space)] == [True] * (not learns)
    assert learns == (sampler in ("tpe", "gp"))
    assert unlearned(space_of(tmp_path, CONFIG, search=search)) == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_line_says_which_samplers_learn_nothing_from_a_warm_start(sampler: str, tmp_path: Path) -> None:
    drawn = space_of(tmp_path, config_for(sampler), search={"sampler": "random", "trials": 60, "survival": False})
    space = space_of(tmp_path, config_for(sampler), search={"sampler": sampler, "trials": 8})

    def proposals(better: int) -> list[dict[str, Any]]:
        """After an earlier search in which large learning rates were better (1), or worse (-1)."""
        earlier, ledger = open_ledger(drawn, InMemoryStorage()), open_ledger(space, InMemoryStorage())
        for _ in range(60):
            speed = better * (math.log10(ask(earlier).values["lr"]) + 2)
            if speed > -1:
                earlier.report("slot", 2, {"loss": -speed})
            earlier.end("slot", "finished" if speed > -1 else "diverged", "")
        said.append(take_over(ledger.study, space, Earlier("earlier", drawn, earlier.study)))
        return [ask(ledger, str(key)).values for key in range(4)]

    said: list[str] = []
    learns = proposals(1) != proposals(-1)
    told = "60 trials of earlier lie within this space"
    assert said == [told if learns else f"{told}; {sampler} learns nothing from them"] * 2
    assert learns == (sampler not in OWN_COURSE)


def test_nsga2_breeds_from_known_settings_and_from_a_warm_start(tmp_path: Path) -> None:
    known: list[dict[str, Any]] = [{"lr": 10.0**-i, "width": 8, "dropout": 0.1, "layers": [8, 16]} for i in (1, 2, 3)]
    space = space_of(tmp_path, CONFIG, search={"sampler": "nsga2", "trials": 50}, try_first=known)
    earlier = open_ledger(space, InMemoryStorage())
    for _ in range(50):
        end_toy(earlier, ask(earlier), "finished")
    sampler = optuna.samplers.NSGAIISampler()
    assert len(sampler.get_population(earlier.study, 0)) == 50, "one generation"
    ledger = open_ledger(space_of(tmp_path, CONFIG, search={"sampler": "nsga2"}), InMemoryStorage())
    take_over(ledger.study, ledger.space, Earlier("earlier", space, earlier.study))
    assert len(sampler.get_population(ledger.study, 0)) == 50
    end_toy(ledger, ask(ledger), "finished")
    assert len(sampler.get_population(ledger.study, 1)) == 1


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "random"])
def test_several_objectives(sampler: str, tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        CONFIG,
        objective=[LOSS, {"metric": "size", "mode": "max"}],
        search={"sampler": sampler, "trials": TRIALS},
    )
    ledger = open_ledger(space, InMemoryStorage())
    assert all(space.holds(values) for values in play(ledger, TRIALS))
    for trial in told(ledger):
        if trial.state == TrialState.COMPLETE:
            assert len(trial.values) == 2
            assert all(math.isfinite(value) for value in trial.values)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "random"])
def test_conditions(sampler: str, tmp_path: Path) -> None:
    config = {
        "lr": {"log": [1e-4, 1.0]},
        "block": {"choice": ["bi", "uni"]},
        "state": {"int": [8, 64], "when": {"block": ["bi"]}},
    }
    space = space_of(tmp_path, config, search={"sampler": sampler, "trials": TRIALS})
    played = play(open_ledger(space, InMemoryStorage()), TRIALS)
    assert all(space.holds(values) for values in played)
    states = [values["state"] for values in played if "state" in values]
    assert len(set(states)) > 1 or len(states) < 3


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc", "random"])
def test_a_known_setting_may_be_given_in_part(sampler: str, tmp_path: Path) -> None:
    """What it leaves out is sampled, what it brings with it too."""
    config = {"lr": {"log": [1e-4, 1.0]}, "block": {"choice": ["bi", "uni"]}}
    config["state"] = {"int": [8, 64], "when": {"block": ["bi"]}}
    for seed in range(8):
        search = {"sampler": sampler, "trials": 4, "seed": seed}
        space = space_of(tmp_path, config, search=search, try_first=[{"block": "bi"}, {"block": "uni", "lr": 0.01}])
        ledger = open_ledger(space, InMemoryStorage())
        first, second = play(ledger, 2)
        assert space.holds(first)
        assert first["block"] == "bi"
        assert second == {"block": "uni", "lr": 0.01}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_settings_come_first(sampler: str, tmp_path: Path) -> None:
    known: dict[str, Any] = {"lr": 1e-3, "width": 8, "dropout": 0.1, "layers": [8, 16]}
    if sampler == "grid":
        known = {"lr": 1e-3, "depth": 2}
    search = {"sampler": sampler, "trials": 4}
    space = space_of(tmp_path, config_for(sampler), search=search, try_first=[{"name": "notes", **known}])
    ledger = open_ledger(space, InMemoryStorage())
    first = end_toy(ledger, ask(ledger), "finished")
    assert (first.name, first.values) == ("notes", known)
    assert len(play(ledger, 3)) == 3


class TestGrid:
    def test_it_visits_every_setting_once(self, tmp_path: Path) -> None:
        config = {
            "lr": {"choice": [1e-3, 1e-2]},
            "drop": {"float": [0.0, 0.3], "step": 0.1},
            "shape": {"choice": [[1]]},
        }
        space = space_of(tmp_path, config, search={"sampler": "grid"})
        assert grid_size(space) == 8
        played = play(open_ledger(space, InMemoryStorage()), 8)
        assert len({str(sorted(values.items())) for values in played}) == 8

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"lr": {"log": [0.1, 1.0]}}, "grid needs finitely many values of lr; write a choice, an int or a step"),
            (
                {"a": {"choice": [1, 2]}, "b": {"choice": [1], "when": {"a": [1]}}},
                r"grid does not support `when` \(b\)",
            ),
            (
                {"a": {"int": [1, 10**9]}, "b": {"choice": [1, 2]}},
                "grid of 2000000000 settings exceeds the limit of 1000",
            ),
        ],
    )
    def test_what_has_no_grid_is_refused(self, config: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            sampler_maker(space_of(tmp_path, config, search={"sampler": "grid"}))

    def test_a_known_setting_must_be_whole(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, FINITE, search={"sampler": "grid"}, try_first=[{"depth": 2}])
        with pytest.raises(
            UserError, match=r"try_first\.0: grid does not fill in missing values; give lr a value there too"
        ):
            sampler_maker(space)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"objective": [LOSS, {"metric": "size", "mode": "max"}]},
            "cmaes does not support several objectives; use tpe",
        ),
        (
            {"config": {"a": {"choice": [1, 2]}, "b": {"int": [1, 3], "when": {"a": [1]}}}},
            r"cmaes does not support `when` \(b\)",
        ),
    ],
)
def test_cmaes_refuses_what_it_cannot_search(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    space = space_of(tmp_path, **{"config": CONFIG, "search": {"sampler": "cmaes"}, **sections})
    with pytest.raises(UserError, match=message):
        sampler_maker(space)


def test_tune_is_given_a_number_and_values_until_the_end(tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG, search={"trials": 2})
    ledger = open_ledger(space, InMemoryStorage())
    searcher = StudySearcher(ledger)
    for number in range(2):
        suggestion = searcher.suggest(f"trial-{number}")
        assert suggestion["number"] == number
        assert space.holds(suggestion["values"])
    assert searcher.suggest("one-more") == StudySearcher.FINISHED


@pytest.mark.parametrize("seed", range(3))
def test_a_sampler_that_is_told_of_divergence_meets_less_of_it(seed: int, tmp_path: Path) -> None:
    """Loss falls as lr x momentum grows, up to an edge where training blows up; beside it, what FAIL teaches."""
    config = {"lr": {"log": [1e-4, 10.0]}, "momentum": {"float": [0.0, 0.99]}}
    space = space_of(tmp_path, config, search={"trials": 60, "seed": seed})

    def diverged(status: str) -> int:
        ledger = Ledger(space, optuna.create_study(), sampler_maker(space), tmp_path)
        late = 0
        for _ in range(60):
            opened = ask(ledger)
            speed = math.log10(opened.values["lr"] / (1 - opened.values["momentum"]))
            if speed > 0.0:
                ledger.end("slot", status, "blew up")
                late += opened.number >= 30
            else:
                ledger.report("slot", 1, {"loss": -speed})
                ledger.end("slot", "finished", "ran to its end")
        return late

    assert 1.5 * diverged("diverged") < diverged("failed")
