"""What a search costs besides the training itself: this engine's, and the pattern that Ray's own guide documents.

    python benchmarks/overhead.py [--guide-trials 6] [--trials 200]

Both tune benchmarks/toy.py: a linear regression of five epochs, one report each, two trials at a time, one worker per
trial, Optuna's sampler. Two figures are compared:

cost per further trial   slot-seconds per additional trial once the search runs: the wall time between two trial ends,
                         times the slots, over the trials that ended in between. Start-up is excluded.
report latency           time from metrics leaving the training loop until the driver has them; a scheduler cannot stop
                         a trial any sooner.
"""

from __future__ import annotations

import argparse

import guide_pattern
import our_engine
from measured import Measured


def row(name: str, run: Measured) -> str:
    latencies = " | ".join(f"{1000 * run.latency_s(percent):.1f}" for percent in (50, 95))
    return f"| {name} | {len(run.ends)} | {run.wall_s:.1f} | {run.cost_per_trial_s:.3f} | {latencies} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guide-trials", type=int, default=6, metavar="N", help="about 20 s each")
    parser.add_argument("--trials", type=int, default=200, metavar="N", help="of our own search")
    arguments = parser.parse_args()
    ours = our_engine.search(arguments.trials)
    guide = guide_pattern.search(arguments.guide_trials)
    print("| search | trials | wall s | s per further trial | report p50 ms | p95 ms |")
    print("|---|---|---|---|---|---|")
    print(row("Ray's documented pattern", guide))
    print(row("this engine", ours))
    cost = guide.cost_per_trial_s / ours.cost_per_trial_s
    latency = [guide.latency_s(percent) / ours.latency_s(percent) for percent in (50, 95)]
    print(f"| ratio | | | {cost:.0f} x | {latency[0]:.0f} x | {latency[1]:.0f} x |")


if __name__ == "__main__":
    main()
