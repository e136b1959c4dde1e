"""What divergence costs a search, and what searches learn from it: Ray Tune as documented, Optuna, and this platform.

    python benchmarks/divergence.py [--seeds 30] [--first 0] [--epochs 120 180 540]

All search the same synthetic training run with a stability edge (divergence_edge.py), one trial at a time, until the
same number of epochs is spent; a table for each number. All use successive halving and TPE (this platform's `gp` only
for every other setting). No cluster is started: Ray's OptunaSearch and ASHAScheduler are driven by the events that
Tune's controller would send, and so are this platform's ledger and scheduler.

The tables show means over the seeds, for the score with its standard error. `score` is the noise-free last loss of the
setting that a search would return, 0.1028 at best; `worse` counts the seeds on which it is worse than (a)'s and (b)'s,
with the largest difference.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import divergence_optuna
import divergence_ours
import divergence_ray
import optuna
from divergence_edge import Budget, Outcome, outcome

Method = Callable[[Budget], None]
METHODS: dict[str, Method] = {
    "(a) Ray's OptunaSearch and ASHA": divergence_ray.search,
    "(b) Optuna, NaN is FAIL": divergence_optuna.search,
    "(c) this platform, `survival: false`": partial(divergence_ours.search, sampler="tpe", survival=False),
    "(c) this platform, `tpe`": partial(divergence_ours.search, sampler="tpe"),
    "(c) this platform, `gp`": partial(divergence_ours.search, sampler="gp"),
}


def run(method: Method, seed: int, epochs: int) -> Outcome:
    budget = Budget(seed, epochs)
    method(budget)
    return outcome(budget.trials)


def row(name: str, runs: Sequence[Outcome], rivals: Sequence[Sequence[Outcome]]) -> str:
    def mean(figure: str) -> float:
        return statistics.fmean(getattr(run, figure) for run in runs)

    later = f"{mean('later'):.1f} ({100 * mean('later_share'):.1f} %)"
    shares = f"{mean('trials'):.0f} | {100 * mean('diverged'):.1f} % | {later}"
    lost = " | ".join(worse(runs, rival) for rival in rivals)
    error = statistics.stdev(run.score for run in runs) / len(runs) ** 0.5
    return f"| {name} | {shares} | {mean('epochs_lost'):.1f} | {mean('score'):.4f} ± {error:.4f} | {lost} |"


def worse(runs: Sequence[Outcome], rival: Sequence[Outcome]) -> str:
    if runs is rival:
        return ""
    gaps = [mine.score - other.score for mine, other in zip(runs, rival, strict=True)]
    return f"{sum(gap > 0 for gap in gaps)}, by {max(0.0, *gaps):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, metavar="N", help="two or more")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of the seeds")
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[120, 180, 540], metavar="N", help="of one search; a trial takes 9"
    )
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for epochs in arguments.epochs:
        print(f"\n{epochs} epochs a search, {arguments.seeds} seeds\n", flush=True)
        compare(range(arguments.first, arguments.first + arguments.seeds), epochs)


def compare(seeds: Sequence[int], epochs: int) -> None:
    runs = {name: [run(method, seed, epochs) for seed in seeds] for name, method in METHODS.items()}
    ray, alone, *_ = runs.values()
    print("| method | trials | diverged | in the second half | epochs after NaN | score | worse than (a) | than (b) |")
    print("|---|---|---|---|---|---|---|---|")
    for name, outcomes in runs.items():
        print(row(name, outcomes, [ray, alone]))


if __name__ == "__main__":
    main()
