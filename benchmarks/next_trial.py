"""How long a divergence delays its slot: from the first non-finite loss to the start of the slot's next trial.

    python benchmarks/next_trial.py [--trials 12] [--workers 1]

Runs a search of `fusion` through launch.py, on the laptop profile; each trial has a NaN at step 20 (`fusion_nan.py`).
The delay includes the steps begun before the verdict is known, the replay that finds the module, sending the
post-mortem to the driver, the sampler's next proposal and the group's clean-up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]


def search(trials: int, workers: int, folder: Path) -> str:
    """Run the search, and return the logged events of all ranks, one per line."""
    events = folder / "events"
    command = [sys.executable, str(ROOT / "launch.py"), "--space", str(ROOT / "search_spaces/fusion.yaml")]
    command += ["--trials", str(trials), "--results", str(folder), "--name", "run"]
    overrides = ("trainable=fusion_nan:train", "scheduler.name=none", f"resources.workers={workers}")
    command += [word for override in overrides for word in ("--set", override)]
    # Driver and workers find the trainable in the working directory.
    subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "NAN_EVENTS": str(events)},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    return events.read_text()


def lost(events: str) -> list[tuple[float, int]]:
    """Return, for all but a rank's last trial, the seconds from NaN to the next trial, and steps begun meanwhile."""
    by_rank: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for line in events.splitlines():
        rank, at, event = line.split()
        by_rank[rank].append((float(at), event))
    found = []
    for told in by_rank.values():
        begins = [i for i, (_, event) in enumerate(told) if event == "begin"]
        for begin, following in pairwise(begins):
            nans = [at for at, event in told[begin:following] if event == "nan"]
            # The first NaN is the bad step's own, the last the replay's.
            found.append((told[following][0] - nans[0], len(nans) - 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, metavar="N")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = lost(search(arguments.trials, arguments.workers, Path(folder)))
    times_s = [seconds for seconds, _ in found]
    print("| workers | waits | median s | longest s | steps begun after NaN, at most |")
    print("|---|---|---|---|---|")
    steps = max(steps for _, steps in found)
    print(f"| {arguments.workers} | {len(found)} | {statistics.median(times_s):.2f} | {max(times_s):.2f} | {steps} |")


if __name__ == "__main__":
    main()
