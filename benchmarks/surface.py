"""Searches of a surface fitted to a real search: what a change of sampler or scheduler does, over many seeds.

    python launch.py --space rebuild --set search.sampler=random --set scheduler.name=none --set 'try_first=[]' \\
        --trials 30 --name whole
    python launch.py --space rebuild --set search.sampler=grid --set scheduler.name=none --set 'try_first=[]' \\
        --set 'config.optim.lr={choice: [0.0035, 0.003501, ...]}' --set config.optim.clip_norm=3 ... --name same
    PYTHONPATH=. python benchmarks/surface.py results/whole --same results/same --change search.sampler=tpe

A real search takes ten minutes and ends by luck as much as by merit. Here one takes seconds: what a setting would score
after each epoch is predicted from the trials that ran to the end, by a Gaussian process for each epoch. Two slots train
in step until the budget of epochs is spent. The noise of a trial's scores is drawn once for the setting, with the
covariance, between epochs, of the scores of trials that differ by next to nothing (`--same`).

`--change` takes overrides as launch.py does, separated by spaces. A row shows the best score that any trial of a search
has reported, and the surface's own last score of the setting that reported it: means over the seeds with their standard
errors.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from whole_trials import whole_trials

from search.learning.features import Array, feature_rows
from search.learning.regression import Regression
from search.ledger import Ledger
from search.sampler import sampler_maker
from search.scheduler import make_scheduler
from search.space import Space
from search.space.file import load_space
from search.study import new_study
from search.trial import EPOCH, OBJECTIVE

ROOT = Path(__file__).parents[1]
SLOTS = 2


class Surface:
    """What a setting scores after each of E epochs, lower is better, learned from N trials that ran to the end.

    same_SE: the scores of S trials of which nobody could tell the settings apart.
    """

    def __init__(self, space: Space, settings: Sequence[Mapping[str, Any]], score_NE: Array, same_SE: Array) -> None:
        self._space = space
        x_ND = feature_rows(space, settings)
        self._models = [Regression(x_ND, score_N) for score_N in score_NE.T]
        self._noise_EE = np.cov(same_SE.T)

    def scores(self, setting: Mapping[str, Any]) -> Array:
        """Return the E scores of a setting without noise."""
        x_1D = feature_rows(self._space, [setting])
        return np.array([model.predict(x_1D)[0][0] for model in self._models])

    def noise(self, setting: Mapping[str, Any], seed: int) -> Array:
        """Return the noise of the E scores, the same for each call."""
        drawn = random.Random(f"{seed}/{json.dumps(setting, sort_keys=True)}")
        return np.random.default_rng(drawn.getrandbits(64)).multivariate_normal(
            np.zeros(len(self._noise_EE)), self._noise_EE, method="eigh"
        )


@dataclass
class UnderWay:
    """A trial in a slot. true, reported: its scores by epoch, lower is better."""

    key: str
    trial: Trial
    true: Array
    reported: Array
    epoch: int = 0


class Search:
    """A search by this project's ledger and scheduler, with events in the order of Tune's controller."""

    def __init__(self, surface: Surface, space: Space, seed: int) -> None:
        self._surface, self._seed = surface, seed
        self._space = replace(space, search=space.search.model_copy(update={"seed": seed}))
        study = new_study(InMemoryStorage(), self._space)
        self._ledger = Ledger(self._space, study, sampler_maker(self._space), Path("no results"))
        self._scheduler = make_scheduler(self._space)
        self.best = (np.inf, np.inf)  # reported, and true at the end

    def run(self, epochs: int) -> None:
        slots: list[UnderWay | None] = [None] * SLOTS
        for step in range(epochs):
            place = step % SLOTS
            under_way = slots[place] or self._begin(place)
            slots[place] = under_way if self._goes_on(under_way) else None

    def _begin(self, place: int) -> UnderWay:
        opened = self._ledger.ask(f"slot {place}")
        assert opened is not None
        trial = Trial("surface", stub=True, config={"values": opened.values}, trial_id=f"trial-{opened.number}")
        self._scheduler.on_trial_add(None, trial)
        true = self._surface.scores(opened.values)
        return UnderWay(f"slot {place}", trial, true, true + self._surface.noise(opened.values, self._seed))

    def _goes_on(self, under_way: UnderWay) -> bool:
        """Train a trial for an epoch; returns whether it goes on."""
        objective = self._space.objectives[0]
        score, last = float(under_way.reported[under_way.epoch]), len(under_way.true)
        under_way.epoch += 1
        self.best = min(self.best, (score, float(under_way.true[-1])))
        told = score if objective.mode == "min" else -score
        self._ledger.report(under_way.key, under_way.epoch, {objective.metric: told})
        result = {EPOCH: under_way.epoch, OBJECTIVE: told}
        stops = self._scheduler.on_trial_result(None, under_way.trial, result) == TrialScheduler.STOP
        if under_way.epoch < last and not stops:
            return True
        self._scheduler.on_trial_complete(None, under_way.trial, result)
        self._ledger.end(under_way.key, "stopped" if stops else "finished", "")
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results folders whose trials ran to the end")
    parser.add_argument(
        "--same", type=Path, required=True, help="a results folder of trials of one setting, as it were"
    )
    parser.add_argument("--space", default="rebuild", metavar="NAME", help="what to search, of the same parameters")
    parser.add_argument("--change", nargs="*", action="append", metavar="KEY=VALUE", help="a row with these overrides")
    parser.add_argument("--seeds", type=int, default=24, metavar="N", help="two or more")
    parser.add_argument("--epochs", type=int, default=147, metavar="N", help="of one search")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _, _, same_SE = whole_trials([arguments.same])
    surface = Surface(*whole_trials(arguments.results), same_SE)
    print("| changed | best reported | its setting's own |\n|---|---|---|")
    for change in arguments.change or [[]]:
        overrides = [*filter(None, change), f"search.trials={arguments.epochs}", "constraints={}"]
        space, _ = load_space(ROOT / "search_spaces" / f"{arguments.space}.yaml", overrides, has_gpu=False)
        sign = 1.0 if space.objectives[0].mode == "min" else -1.0
        found = []
        for seed in range(arguments.seeds):
            search = Search(surface, space, seed)
            search.run(arguments.epochs)
            found.append([sign * score for score in search.best])
        cells = [
            f"{statistics.fmean(each):.4f} ± {statistics.stdev(each) / len(each) ** 0.5:.4f}"
            for each in np.array(found).T.tolist()
        ]
        print(f"| {' '.join(change) or 'nothing'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
