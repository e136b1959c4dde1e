"""Searches one of our spaces as Ray's guide documents: a Ray Train run for every trial, OptunaSearch, ASHA.

    python benchmarks/versus_guide.py SPACE SEED SECONDS LONGEST SCORE

It searches for SECONDS, and then on until a report is as good as SCORE, but no longer than LONGEST seconds in all.
Prints `report` and JSON on a line for each report that reaches the driver: its time and metrics. Conditions (`when`)
are ignored: each trial draws every parameter. For ray 2.60.
https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.tune
from guide_pattern import run_train
from measured import SLOTS
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from versus import is_kept, sign_of

from search.space import Space
from search.space import tree as trees
from search.space.domain import Choice, Domain, Integer, Real
from search.space.file import load_space
from search.space.loading import load
from trainables.contract import Trial


class Listener(ray.tune.Callback):
    """Prints every report as it reaches the driver."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        metrics = {name: value for name, value in result.items() if isinstance(value, float)}
        print("report", json.dumps({"time": time.time(), "metrics": metrics}), flush=True)


class AsGood(ray.tune.Stopper):
    """Ends the search once a report is as good as `score`, but not before it has run for `seconds`."""

    def __init__(self, space: Space, score: float, seconds: float) -> None:
        self._space, self._score, self._seconds = space, score, seconds
        self._began = time.time()
        self._had = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        sign, value = sign_of(self._space), result.get(self._space.objectives[0].metric)
        self._had |= value is not None and sign * value >= sign * self._score and is_kept(self._space, result)
        return False

    def stop_all(self) -> bool:
        return self._had and time.time() - self._began >= self._seconds


def tune_domain(domain: Domain) -> Any:
    """Convert a domain to Tune's, for the kinds of domain that our spaces use."""
    if isinstance(domain, Choice):
        return ray.tune.choice(list(domain.values))
    assert isinstance(domain, (Real, Integer))
    if isinstance(domain, Integer) and not domain.log:
        return ray.tune.qrandint(domain.low, domain.high, domain.step)  # `high` included, unlike in randint
    if isinstance(domain, Integer):
        return ray.tune.lograndint(domain.low, domain.high + 1)
    if domain.step is not None:
        return ray.tune.quniform(domain.low, domain.high, domain.step)
    return (ray.tune.loguniform if domain.log else ray.tune.uniform)(domain.low, domain.high)


def train_worker(given: dict[str, Any]) -> None:
    trainable = load(given["trainable"], given["paths"])
    tree = dict(given["tree"])
    for name, value in given["searched"].items():
        trees.put(tree, name.replace(":", "."), value)
    for report in trainable.train(Trial(trainable.config(tree), seed=given["seed"])):
        ray.train.report(dict(report.metrics))


def train_driver(config: dict[str, Any]) -> None:
    run_train(train_worker, config)


def search(space: Space, seconds: float, longest: float, score: float) -> None:
    objective = space.objectives[0]
    given = {
        "trainable": space.trainable,
        "paths": list(space.paths),
        "tree": space.config(space.draw(random.Random(0))),
        "seed": space.search.seed,
        "searched": {item.name.replace(".", ":"): tune_domain(item.domain) for item in space.parameters},
    }
    # One CPU for each trial's driver function, one for each worker, and as many again: Tune reserves some for pending
    # trials, and a worker that needed those would wait forever.
    # The dashboard, which Ray starts by default, is needed: when ASHA stops a trial, Ray Train frees its workers' CPUs
    # only if the dashboard says that the trial's controller has gone. Without it, a search soon waits forever.
    ray.init(num_cpus=4 * SLOTS, include_dashboard=True, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        ray.tune.Tuner(
            train_driver,
            param_space={"train_loop_config": given, "storage_path": folder},
            tune_config=ray.tune.TuneConfig(
                metric=objective.metric,
                mode=objective.mode,
                num_samples=-1,
                time_budget_s=longest,
                max_concurrent_trials=SLOTS,
                search_alg=OptunaSearch(seed=space.search.seed),
                scheduler=ASHAScheduler(
                    max_t=space.epochs or 1,
                    grace_period=space.scheduler.grace_epochs,
                    reduction_factor=space.scheduler.reduction,
                ),
            ),
            run_config=ray.tune.RunConfig(
                storage_path=folder, callbacks=[Listener()], stop=AsGood(space, score, seconds), verbose=0
            ),
        ).fit()
    ray.shutdown()


if __name__ == "__main__":
    file, seed, *limits = sys.argv[1:]
    search(load_space(Path(file), [f"search.seed={seed}"], has_gpu=False)[0], *map(float, limits))
