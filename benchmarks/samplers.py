"""What the samplers find where nothing diverges: standard test functions, and one with choices and conditions.

    python benchmarks/samplers.py [--seeds 8]

Each trial reports one noisy value of a function, one trial at a time, without early stopping. The tables show how far
the setting that a search would return lies above the minimum, without the noise: means over the seeds with their
standard errors. `optuna-gp` is Optuna's own GPSampler in the place of ours.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from bare_space import space_of
from optuna.storages import InMemoryStorage

from search.ledger import Ledger, MakeSampler
from search.sampler import sampler_maker
from search.space.domain import Choice, Integer, Parameter, Real
from search.space.sections import Scheduler, Search, section
from search.study import new_study

NOISE = 0.01  # standard deviation of a report, where a function's range is about 1
SHOWN = (20, 50)  # trials after which the tables look
SAMPLERS = ("random", "tpe", "gp", "optuna-gp")

Function = Callable[[Mapping[str, Any]], float]


def branin(setting: Mapping[str, Any]) -> float:
    """Return Branin's function less its minimum, over 300: two parameters, three minima."""
    x, y = 15 * setting["a"] - 5, 15 * setting["b"]
    bowl = (y - 5.1 * x**2 / (4 * math.pi**2) + 5 * x / math.pi - 6) ** 2
    return (bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10 - 0.397887) / 300


WIDTHS_46 = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
CENTRES_46 = np.array(
    [
        [0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886],
        [0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991],
        [0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650],
        [0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381],
    ]
)
DEPTHS_4 = np.array([1.0, 1.2, 3.0, 3.2])


def hartmann6(setting: Mapping[str, Any]) -> float:
    """Return Hartmann's function of six parameters less its minimum, over its depth: narrow valleys in a plain."""
    x_6 = np.array([setting[name] for name in "abcdef"])
    return 1 - float(DEPTHS_4 @ np.exp(-(WIDTHS_46 * (x_6 - CENTRES_46) ** 2).sum(axis=1))) / 3.32237


def rough(setting: Mapping[str, Any]) -> float:
    """Return a bowl in four parameters with ripples as deep as the bowl is high at half its width."""
    x_4 = 4 * np.array([setting[name] for name in "abcd"]) - 1.6
    return float((0.0625 * x_4**2 + 0.0375 * (1 - np.cos(4 * math.pi * x_4))).sum())


def idle(setting: Mapping[str, Any]) -> float:
    """Return a bowl with a fold in three of eight parameters; the other five do next to nothing."""
    a, b, c, *rest = (setting[name] for name in "abcdefgh")
    return (a - 0.3) ** 2 + 0.7 * (b - 0.6) ** 2 + 0.5 * (c - 0.8) ** 2 + 0.3 * abs(a - b + 0.3) + 0.02 * sum(rest)


def training(setting: Mapping[str, Any]) -> float:
    """Return what a training run might: with choices, a conditional momentum, a rate whose best depends on others."""
    rate, batch = math.log10(setting["lr"]) + 3, math.log2(setting["batch"]) - 4
    block = {"bi": 0.0, "uni": 0.15, "cs": 0.03, "transformer": 0.08}[setting["block"]]
    step = 0.0 if setting["optimizer"] == "adamw" else 0.1 + 0.05 * abs(math.log10(setting["momentum"]) + 0.05)
    best_rate = 0.12 * batch + (0.3 if setting["block"] == "cs" else 0.0)
    size = 0.01 * (batch - 1) ** 2 + 0.03 * (setting["layers"] - 3) ** 2
    return block + step + 0.08 * (rate - best_rate) ** 2 + size + 0.1 * abs(setting["dropout"] - 0.2)


def _unit(names: str) -> list[Parameter]:
    return [Parameter(name, Real(0.0, 1.0, log=False)) for name in names]


FUNCTIONS: dict[str, tuple[Function, Sequence[Parameter]]] = {
    "branin": (branin, _unit("ab")),
    "hartmann6": (hartmann6, _unit("abcdef")),
    "rough": (rough, _unit("abcd")),
    "idle": (idle, _unit("abcdefgh")),
    "training": (
        training,
        [
            Parameter("lr", Real(1e-5, 1e-1, log=True)),
            Parameter("block", Choice(("bi", "uni", "cs", "transformer"))),
            Parameter("optimizer", Choice(("adamw", "sgd"))),
            Parameter("momentum", Real(0.5, 0.99, log=True), {"optimizer": ("sgd",)}),
            Parameter("batch", Integer(4, 128, log=True)),
            Parameter("layers", Integer(1, 8)),
            Parameter("dropout", Real(0.0, 0.6, log=False)),
        ],
    ),
}


def search(name: str, sampler: str, seed: int) -> list[float]:
    """Return the noise-free values of the settings that a search would return after each number of `SHOWN`."""
    function, parameters = FUNCTIONS[name]
    rival = sampler == "optuna-gp"
    wanted = {"sampler": "random" if rival else sampler, "trials": max(SHOWN), "seed": seed}
    space = space_of(
        parameters, 1, section(Search, wanted, "search"), section(Scheduler, {"name": "none"}, "scheduler")
    )
    make: MakeSampler = (lambda s: optuna.samplers.GPSampler(seed=s)) if rival else sampler_maker(space)
    ledger = Ledger(space, new_study(InMemoryStorage(), space), make, Path("no results"))
    noise = random.Random(f"{seed}/{name}")
    best, found = (math.inf, math.inf), []
    for count in range(1, max(SHOWN) + 1):
        opened = ledger.ask("slot")
        assert opened is not None
        true = function(opened.values)
        measured = true + noise.gauss(0.0, NOISE)
        ledger.report("slot", 1, {"loss": measured})
        ledger.end("slot", "finished", "")
        best = min(best, (measured, true))
        if count in SHOWN:
            found.append(best[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="two or more")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print("| function | trials | " + " | ".join(SAMPLERS) + " |")
    print("|---|---|" + "---|" * len(SAMPLERS))
    for name in FUNCTIONS:
        runs = {sampler: [search(name, sampler, seed) for seed in range(arguments.seeds)] for sampler in SAMPLERS}
        for i, count in enumerate(SHOWN):
            cells = (_mean([run[i] for run in runs[sampler]]) for sampler in SAMPLERS)
            print(f"| {name} | {count} | " + " | ".join(cells) + " |", flush=True)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
