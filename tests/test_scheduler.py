"""Ray Tune's own schedulers among trials that end in every way, some of them without an objective."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ledgers import open_ledger
from optuna.storages import InMemoryStorage
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import SearchGenerator
from spaces import LOSS, space_of

from search.scheduler import PAUSING, Past, make_scheduler, perturb
from search.searcher import StudySearcher
from search.space import Space
from search.trial import EPOCH, OBJECTIVE, REASON, STATUS
from trainables.contract import UserError

SCHEDULERS = ["none", "asha", "hyperband", "median", "pbt"]
EPOCHS = 9
CONFIG: dict[str, Any] = {
    "epochs": EPOCHS,
    "lr": {"log": [1e-4, 1.0]},
    "momentum": {"float": [0.0, 0.9], "step": 0.3},
    "warmup": {"float": [-1.0, 1.0]},
    "width": {"int": [8, 64], "log": True},
    "depth": {"int": [2, 14], "step": 4},
    "block": {"choice": ["bi", "uni", [1, 2]]},
    "state": {"int": [1, 9], "when": {"block": ["bi"]}},
}


class Tune:
    """As much of Tune's controller as schedulers use: some slots, each trial a script of its objective by epoch.

    The order of events is that of ray.tune.execution.tune_controller: a result goes to the scheduler unless it is the
    trial's last one, and a trial is completed, removed or failed according to the state it is in.
    """

    def __init__(self, scheduler: TrialScheduler, search_alg: SearchGenerator, slots: int, retries: int) -> None:
        self.scheduler = scheduler
        self.search_alg = search_alg
        self.slots = slots
        self.retries = retries
        self.bugs: Counter[Trial] = Counter()
        self.trials: list[Trial] = []
        self.epochs: dict[Trial, int] = {}
        self.paused: set[Trial] = set()

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.epochs[trial] = 0
        self.scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.is_finished()]

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        self.paused.add(trial)
        trial.set_status(Trial.PAUSED)

    def stop_trial(self, trial: Trial) -> None:
        if trial.is_finished():
            return
        if trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, dict(trial.last_result))
        else:
            self.scheduler.on_trial_remove(self, trial)
        trial.set_status(Trial.TERMINATED)

    def _schedule_trial_save(self, trial: Trial, result: dict[str, Any]) -> str:
        return f"checkpoint of {trial.trial_id}"

    def run(self, script: Callable[[Trial, int], dict[str, Any] | None]) -> None:
        """Until every trial has ended. script: a trial's result at an epoch; None for a bug."""
        for _ in range(EPOCHS * len(self.trials) * 4):
            while sum(trial.status == Trial.RUNNING for trial in self.trials) < self.slots:
                chosen = self.scheduler.choose_trial_to_run(self)
                if chosen is None:
                    break
                chosen.set_status(Trial.RUNNING)
            running = [trial for trial in self.trials if trial.status == Trial.RUNNING]
            if not running:
                break
            for trial in running:
                self._step(trial, script)
        assert not self.get_live_trials(), "the scheduler forgot a trial"

    def _step(self, trial: Trial, script: Callable[[Trial, int], dict[str, Any] | None]) -> None:
        result = script(trial, self.epochs[trial] + 1)
        if result is None:
            self.scheduler.on_trial_error(self, trial)
            trial.set_status(Trial.ERROR)
            self.bugs[trial] += 1
            if self.bugs[trial] <= self.retries:  # from its last report on
                trial.set_status(Trial.PENDING)
                self.scheduler.on_trial_add(self, trial)
            return
        self.epochs[trial] = result[EPOCH]
        decision = TrialScheduler.STOP
        if not result.get("done"):
            decision = self.scheduler.on_trial_result(self, trial, result)
        trial.update_last_result(result)
        if decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        elif decision == TrialScheduler.PAUSE:
            self.pause_trial(trial)


def end(epoch: int, status: str) -> dict[str, Any]:
    """The last result of a trial, as a slot gives it."""
    return {"done": True, EPOCH: epoch, STATUS: status, REASON: "as the script says"}


def toy_script(trial: Trial, epoch: int) -> dict[str, Any] | None:
    """Trials that are as good as their number is high and end in every way; none has an objective at its end."""
    number = trial.config["number"]
    ending = ("finished", "diverged", "finished", "out_of_memory", "failed", "finished", "bug", "at once")[number % 8]
    when = {"finished": EPOCHS, "at once": 0, "diverged": 2 + number % 4}.get(ending, 3)
    if epoch > when:
        return None if ending == "bug" else end(epoch - 1, "diverged" if ending == "at once" else ending)
    return {EPOCH: epoch, OBJECTIVE: 1.0 / (1 + number) + 0.01 / epoch}


def tune_of(space: Space, trials: int, slots: int, past: Sequence[Past] = (), retries: int = 0) -> Tune:
    ledger = open_ledger(space, InMemoryStorage())
    tune = Tune(make_scheduler(space, past), SearchGenerator(StudySearcher(ledger)), slots, retries)
    rng = random.Random(0)
    for number in range(trials):
        config = {"number": number, "values": space.draw(rng)}
        tune.add(Trial("toy", stub=True, config=config, trial_id=f"trial-{number}"))
    return tune


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("name", SCHEDULERS)
class TestScheduler:
    """What each scheduler must do with trials that end in every way."""

    @pytest.fixture
    def space(self, name: str, mode: str, tmp_path: Path) -> Space:
        return space_of(
            tmp_path, CONFIG, scheduler={"name": name}, objective={"metric": "loss", "mode": mode}, search={"seed": 1}
        )

    def test_every_trial_comes_to_its_end(self, space: Space) -> None:
        for slots in (1, 3, 24):
            tune = tune_of(space, 24, slots)
            tune.run(toy_script)
            assert all(trial.is_finished() for trial in tune.trials)

    def test_a_trial_that_fails_once_comes_to_its_end_whenever_that_is(self, space: Space) -> None:
        for failing in range(EPOCHS):
            tune = tune_of(space, 8, 8, retries=1)

            def script(trial: Trial, epoch: int, failing: int = failing) -> dict[str, Any] | None:
                if trial.config["number"] == failing and epoch == failing + 1 and not tune.bugs[trial]:
                    return None
                if epoch > EPOCHS:
                    return end(EPOCHS, "finished")
                return {EPOCH: epoch, OBJECTIVE: 1.0 / (1 + trial.config["number"])}

            tune.run(script)
            assert all(trial.is_finished() for trial in tune.trials)

    def test_trials_that_have_begun_before_come_to_their_end(self, space: Space) -> None:
        """As after an interruption: each goes on from its own epoch."""
        for epoch in range(1, EPOCHS):
            tune = tune_of(space, 17, 4)
            tune.epochs = dict.fromkeys(tune.trials, epoch)
            tune.run(toy_script)
            assert all(trial.is_finished() for trial in tune.trials)

    def test_when_every_trial_diverges_at_once_none_is_left_waiting(self, space: Space) -> None:
        tune = tune_of(space, 12, 3)
        tune.run(lambda trial, epoch: end(0, "diverged"))
        assert all(trial.is_finished() for trial in tune.trials)

    def test_the_values_of_every_trial_stay_in_the_space(self, space: Space) -> None:
        tune = tune_of(space, 24, 4)
        tune.run(toy_script)
        assert all(space.holds(trial.config["values"]) for trial in tune.trials)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_bad_trials_are_stopped_early_and_the_best_is_not(name: str, tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG, scheduler={"name": name, "grace_epochs": 2})
    tune = tune_of(space, 18, 18)
    order = list(range(18))
    random.Random(0).shuffle(order)

    def script(trial: Trial, epoch: int) -> dict[str, Any]:
        if epoch > EPOCHS:
            return end(EPOCHS, "finished")
        return {EPOCH: epoch, OBJECTIVE: float(order[trial.config["number"]])}

    tune.run(script)
    epochs = {order[trial.config["number"]]: tune.epochs[trial] for trial in tune.trials}
    assert epochs[0] == EPOCHS
    assert epochs[17] < EPOCHS
    assert sum(epochs.values()) < 0.8 * 18 * EPOCHS
    assert min(epochs.values()) >= (2 if name != "hyperband" else 1)


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_trial_at_its_last_epoch_ends_by_itself_also_where_the_length_is_searched(name: str, tmp_path: Path) -> None:
    space = space_of(tmp_path, {**CONFIG, "epochs": {"choice": [3, 9]}}, scheduler={"name": name, "reduction": 3})
    tune = tune_of(space, 18, 18)
    ended = set[Trial]()

    def script(trial: Trial, epoch: int) -> dict[str, Any]:
        longest = trial.config["values"]["epochs"]
        if epoch > longest:
            ended.add(trial)
            return end(longest, "finished")
        return {EPOCH: epoch, OBJECTIVE: 9.0 if epoch == longest else 1.0}

    tune.run(script)
    assert ended == set(tune.trials)


@pytest.mark.parametrize("ending", ["diverged", "bug"])
def test_hyperband_goes_on_when_the_last_trial_of_a_later_comparison_ends_by_itself(
    ending: str, tmp_path: Path
) -> None:
    """In its bracket of nine, three are left after the first epoch, and two of them wait at the third for the last."""
    tune = tune_of(space_of(tmp_path, CONFIG, scheduler={"name": "hyperband", "reduction": 3}), 17, 17)

    def script(trial: Trial, epoch: int) -> dict[str, Any] | None:
        number = trial.config["number"]
        if number == 16 and epoch == 3:
            return None if ending == "bug" else end(2, ending)
        return end(EPOCHS, "finished") if epoch > EPOCHS else {EPOCH: epoch, OBJECTIVE: 1.0 / (1 + number)}

    tune.run(script)
    assert [tune.epochs[trial] for trial in tune.trials[8:]] == [1] * 6 + [3, EPOCHS, 2]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_search_that_goes_on_is_judged_as_if_it_had_not_been_left(name: str, mode: str, tmp_path: Path) -> None:
    space = space_of(
        tmp_path, CONFIG, objective={**LOSS, "mode": mode}, scheduler={"name": name, "grace_epochs": 1, "reduction": 2}
    )
    quality = [random.Random(number).random() for number in range(20)]

    def script(trial: Trial, epoch: int) -> dict[str, Any]:
        if epoch > EPOCHS:
            return end(EPOCHS, "finished")
        return {EPOCH: epoch, OBJECTIVE: quality[trial.config["number"]] * (1 - 0.7**epoch)}

    whole = tune_of(space, 20, 1)
    whole.run(script)
    epochs = [whole.epochs[trial] for trial in whole.trials]
    assert len(set(epochs)) > 2, "some are stopped, at more than one rung"
    left = next(number for number in range(8, 20) if epochs[number] == EPOCHS)  # at its fifth epoch
    done = [*epochs[:left], 5]
    past = [
        Past(i, tuple((e, quality[i] * (1 - 0.7**e)) for e in range(1, until + 1)), over=i < left)
        for i, until in enumerate(done)
    ]
    rest = tune_of(space, 20, 1, past)
    for trial in rest.trials[:left]:
        trial.set_status(Trial.TERMINATED)
    rest.epochs[rest.trials[left]] = 5
    rest.run(script)
    assert [rest.epochs[trial] for trial in rest.trials[left:]] == epochs[left:]


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "pbt"])
def test_no_trial_is_judged_after_its_last_epoch(name: str, tmp_path: Path) -> None:
    """There lies one of asha's rungs, of 9 epochs with a reduction of 3, but code may follow a trial's last report."""
    space = space_of(tmp_path, CONFIG, scheduler={"name": name, "grace_epochs": 1, "reduction": 3})
    tune, ended = tune_of(space, 18, 18), set[int]()

    def script(trial: Trial, epoch: int) -> dict[str, Any]:
        number = trial.config["number"]
        if epoch > EPOCHS:
            ended.add(number)
            return end(EPOCHS, "finished")
        # each is as good as all others, and at its last epoch all are worse than the first of them
        return {EPOCH: epoch, OBJECTIVE: 1.0 if epoch < EPOCHS else float(number)}

    tune.run(script)
    assert {trial.config["number"] for trial in tune.trials if tune.epochs[trial] == EPOCHS} == ended
    assert len(ended) > 1


def test_a_setting_is_not_exchanged_after_the_last_epoch(tmp_path: Path) -> None:
    tune = tune_of(space_of(tmp_path, CONFIG, scheduler={"name": "pbt"}), 24, 24)
    trained: dict[Trial, list[Any]] = {trial: [] for trial in tune.trials}

    def script(trial: Trial, epoch: int) -> dict[str, Any]:
        if epoch > EPOCHS:
            return end(EPOCHS, "finished")
        trained[trial].append(trial.config["values"])
        return {EPOCH: epoch, OBJECTIVE: float(trial.config["number"])}

    tune.run(script)
    assert any(values[0] != values[-1] for values in trained.values()), "none was exchanged"
    assert all(trial.config["values"] == values[-1] for trial, values in trained.items())


def test_a_trial_that_is_retried_is_exchanged_when_it_would_have_been(tmp_path: Path) -> None:
    tune = tune_of(space_of(tmp_path, CONFIG, scheduler={"name": "pbt", "grace_epochs": 4}), 12, 12, retries=1)
    settings: dict[Trial, Any] = {}
    exchanged: set[int] = set()

    def script(trial: Trial, epoch: int) -> dict[str, Any] | None:
        if epoch > EPOCHS:
            return end(EPOCHS, "finished")
        known = settings.setdefault(trial, trial.config["values"])
        if known != trial.config["values"]:
            settings[trial] = trial.config["values"]
            exchanged.add(epoch - 1)
        if epoch == 7 and not tune.bugs[trial]:
            return None
        return {EPOCH: epoch, OBJECTIVE: float(trial.config["number"])}

    tune.run(script)
    assert exchanged, "none was exchanged"
    assert exchanged <= {4, 8}


class TestPerturb:
    @pytest.fixture
    def space(self, tmp_path: Path) -> Space:
        return space_of(tmp_path, CONFIG)

    def test_it_stays_inside_the_domains(self, space: Space) -> None:
        rng = random.Random(0)
        values = space.draw(rng)
        for _ in range(500):
            values = perturb(space, values, rng)
            assert space.holds(values)

    def test_without_resampling_it_moves_by_a_fifth_or_one_step(self, space: Space) -> None:
        rng = random.Random(0)
        for _ in range(100):
            values = space.draw(rng)
            moved = perturb(space, values, rng, resample=0.0)
            assert moved["lr"] in (pytest.approx(0.8 * values["lr"]), pytest.approx(1.2 * values["lr"]), 1e-4, 1.0)
            assert abs(moved["depth"] - values["depth"]) in (0, 4)
            assert abs(moved["momentum"] - values["momentum"]) < 0.3001

    def test_a_choice_of_none_stays_as_often_as_any_other(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, {"decay": {"choice": [None, 0.1, 0.2]}})
        moved = {perturb(space, {"decay": None}, random.Random(seed), resample=0.0)["decay"] for seed in range(20)}
        assert moved == {None, 0.1}, "itself or the next, and not any"

    def test_every_value_of_a_grid_can_be_reached(self, space: Space) -> None:
        rng = random.Random(0)
        values, seen = space.draw(rng), set()
        for _ in range(300):
            values = perturb(space, values, rng, resample=0.0)
            seen.add(values["depth"])
        assert seen == {2, 6, 10, 14}


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "none"])
def test_several_objectives_are_refused(name: str, tmp_path: Path) -> None:
    space = space_of(tmp_path, CONFIG, objective=[LOSS, {"metric": "size", "mode": "max"}], scheduler={"name": name})
    with pytest.raises(UserError, match=f"{name} compares one objective, this space has several; use none"):
        make_scheduler(space)


def test_hyperband_wants_to_know_the_epochs(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"epochs": {"int": [1, 9]}}, scheduler={"name": "hyperband"})
    with pytest.raises(UserError, match=r"hyperband needs a known number of epochs; fix config\.epochs"):
        make_scheduler(space)


@pytest.mark.parametrize("name", ["asha", "median", "pbt"])
def test_the_others_do_not(name: str, tmp_path: Path) -> None:
    tune = tune_of(space_of(tmp_path, {"lr": {"log": [0.1, 1.0]}}, scheduler={"name": name}), 8, 2)
    tune.run(toy_script)
    assert [trial.is_finished() for trial in tune.trials] == [True] * 8


@pytest.mark.parametrize("name", SCHEDULERS)
def test_those_that_pause_are_known(name: str, tmp_path: Path) -> None:
    tune = tune_of(space_of(tmp_path, CONFIG, scheduler={"name": name}), 24, 2)
    tune.run(toy_script)
    assert bool(tune.paused) == (name in PAUSING)
