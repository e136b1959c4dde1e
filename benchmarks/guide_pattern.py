"""Tunes the toy as Ray's guide documents: each Tune trial is a function that launches its own Ray Train run.

https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html, for ray 2.60.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.tune
from measured import SLOTS, Measured
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch
from toy import linear_regression


class Stopwatch(ray.tune.Callback):
    """Records on the driver each report's latency and each trial's end time."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.latencies: list[float] = []

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.latencies.append(time.time() - result["sent_at"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.ends.append(time.time())


def train_worker(config: dict[str, Any]) -> None:
    for metrics in linear_regression(config["lr"]):
        ray.train.report(metrics)


def train_driver(config: dict[str, Any]) -> None:
    run_train(train_worker, config)


def run_train(worker: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    """Launch a Ray Train run and wait for it, as a trial's driver function does in the guide."""
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=config["train_loop_config"],
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name=f"train-{ray.tune.get_context().get_trial_id()}",
            storage_path=config["storage_path"],
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def search(trials: int) -> Measured:
    """Run `trials` trials on a Ray instance of their own, and return the measurements."""
    # One CPU for each trial's driver function, one for each worker, and as many again: Tune reserves some for pending
    # trials, and a worker that needed those would wait forever.
    ray.init(num_cpus=4 * SLOTS, include_dashboard=True, log_to_driver=False)  # as Ray does by default
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        tuner = ray.tune.Tuner(
            train_driver,
            param_space={"train_loop_config": {"lr": ray.tune.loguniform(1e-4, 1e-1)}, "storage_path": folder},
            tune_config=ray.tune.TuneConfig(
                metric="loss",
                mode="min",
                num_samples=trials,
                max_concurrent_trials=SLOTS,
                search_alg=OptunaSearch(seed=0),
            ),
            run_config=ray.tune.RunConfig(storage_path=folder, callbacks=[stopwatch], verbose=0),
        )
        began = time.time()
        tuner.fit()
    ray.shutdown()
    return Measured(began, stopwatch.ends, stopwatch.latencies)
