"""What divergence costs in a real network: the published uni-directional block, which overflows as it learns.

    PYTHONPATH=. python benchmarks/divergence_real.py [--epochs 150] [--seed 0]

The methods of divergence.py search the fusion network of the laptop profile on simulated data (40 passes of 10 frames),
with block, initialiser and missing residual as published and two layers per stage. They search learning rate, clip norm
and weight decay (`weight` hundredths) over the ranges of divergence_edge.py. The loss is 1 - DBA on held-out passes. A
complete trial takes 9 epochs and is first judged after the third: after one epoch, a setting that stays at chance is
ahead of most that learn. When the shared loop ends a diverged trial, a method that would continue it is charged the
epochs that it would have trained on NaN; they are not trained.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import divergence_optuna
import divergence_ours
import divergence_ray
import optuna
import torch
from divergence_edge import EPOCHS, RANGES, Budget, Setting, Trial

from search.records.health import compared
from search.space.file import load_space
from search.space.sections import Objective
from trainables import contract
from trainables.beam import fusion

SPACE = Path(__file__).parents[1] / "search_spaces" / "fusion.yaml"
METHODS: dict[str, Callable[[Budget], None]] = {
    "(a) Ray's OptunaSearch and ASHA": divergence_ray.search,
    "(b) Optuna, NaN is FAIL": divergence_optuna.search,
    "(c) this platform, `tpe`": partial(divergence_ours.search, sampler="tpe"),
    "(c) this platform, `gp`": partial(divergence_ours.search, sampler="gp"),
}
GRACE = 3  # epochs
PUBLISHED = {"block": "uni", "mamba_init": "legacy", "residual": "false", "n_layer": 2}


def config_of(setting: Setting) -> fusion.Config:
    fixed = [f"config.model.{name}={value}" for name, value in PUBLISHED.items()]
    fixed += ["config.data.simulated={passes: 40, frames: 10}", "config.data.gps_repr=local", "config.loss.kind=ce"]
    fixed += [
        "config.loss.sigma=1.0",
        "config.model.dropout=0.1",
        "config.optim.batch_size=12",
        f"config.epochs={EPOCHS}",
    ]
    searched = {"lr": setting["lr"], "clip_norm": setting["clip_norm"], "weight_decay": setting["weight"] / 100}
    fixed += [f"config.optim.{name}={value:.10f}" for name, value in searched.items()]
    space, trainable = load_space(SPACE, fixed, "laptop")
    config = trainable.config(space.config({}))
    assert isinstance(config, fusion.Config)
    return config


class RealBudget(Budget):
    """The epochs of one search, spent on real training."""

    metrics: Mapping[str, float]  # of the latest epoch

    def train(self, setting: Setting) -> Iterator[tuple[int, float]]:
        trial = Trial({name: setting[name] for name in RANGES})
        self.trials.append(trial)
        reports = reports_of(config_of(setting), self.seed)
        for epoch in range(1, EPOCHS + 1):
            if self.left == 0:
                return
            self.left -= 1
            self.metrics = next(reports, {"dba": math.nan})
            trial.losses.append(1 - self.metrics["dba"])
            yield epoch, trial.losses[-1]

    def compared(self, loss: float) -> float:
        dba = compared(self.metrics, Objective(metric="dba", mode="max"))
        assert dba is not None
        return 1 - dba


def reports_of(config: fusion.Config, seed: int) -> Iterator[Mapping[str, float]]:
    """Yield the metrics after each epoch; ends before the epoch in which training diverges."""
    with contextlib.suppress(contract.Diverged):
        for report in fusion.train(contract.Trial(config, seed=seed)):
            yield report.metrics


def row(name: str, trials: list[Trial]) -> str:
    later = trials[len(trials) // 2 :]
    lost = sum(max(0, sum(map(math.isnan, trial.losses)) - 1) for trial in trials)
    counts = f"{sum(trial.diverged for trial in trials)} | {sum(trial.diverged for trial in later)} of {len(later)}"
    whole = [trial.losses[-1] for trial in trials if len(trial.losses) == EPOCHS and not trial.diverged]
    return f"| {name} | {len(trials)} | {counts} | {lost} | {1 - min(whole, default=math.nan):.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150, metavar="N", help="of one search")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    fusion.prepare(config_of({"lr": 1e-3, "clip_norm": 1.0, "weight": 1.0}))
    print("| method | trials | diverged | in the second half | epochs after NaN | best DBA |")
    print("|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        budget = RealBudget(arguments.seed, arguments.epochs, GRACE)
        method(budget)
        print(row(name, budget.trials), flush=True)


if __name__ == "__main__":
    main()
