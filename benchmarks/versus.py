"""The best score over time of four ways to search one space, each with the same wall time.

    python benchmarks/versus.py [--space rebuild] [--seconds 240] [--seeds 3] [--against random guide chain]
                                [--plot benchmarks/versus.svg]

* this platform: the space unchanged
* random: random settings, all trained to the end, on this platform's warm groups
* the guide's pattern: OptunaSearch with a Ray Train run per trial (versus_guide.py), and ASHA as in the space
* the chain: only the known settings of the lab notes, in order

A score counts from the moment its report reaches the driver, if it satisfies the space's constraints. What all of them
need before the first trial (prepared data, a pre-trained network) is made beforehand and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plot import Curve, steps

from search.space import Space
from search.space.file import load_space

ROOT = Path(__file__).parents[1]
PLAIN = ("search.sampler=random", "search.survival=false", "scheduler.name=none", "try_first=[]")
RIVALS = {"random": "random", "guide": "the guide's pattern", "chain": "the chain"}
MANY = 10_000  # trials; the time budget ends the search before
Reports = list[tuple[float, Mapping[str, Any]]]  # seconds since the start, and metrics


def ours(file: Path, seed: int, seconds: float, overrides: Sequence[str] = (), trials: int = MANY) -> Reports:
    """Run a search through launch.py, and return the reports from its results folder, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "launch.py"), "--space", str(file), "--seed", str(seed)]
        command += ["--trials", str(trials), "--time-budget", f"{seconds:g}s", "--results", folder, "--name", "run"]
        command += [word for override in overrides for word in ("--set", override)]
        began = time.time()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        rows = [
            json.loads(line)
            for path in Path(folder).glob("run/trials/*/metrics.jsonl")
            for line in path.read_text().splitlines()
        ]
    return sorted(((row["time"] - began, row["metrics"]) for row in rows), key=lambda item: item[0])


def guide(file: Path, seed: int, seconds: float) -> Reports:
    command = [sys.executable, str(ROOT / "benchmarks/versus_guide.py"), str(file), str(seed), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.time()
    told = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    rows = [json.loads(line.split(" ", 1)[1]) for line in told.stdout.splitlines() if line.startswith("report ")]
    return [(row["time"] - began, row["metrics"]) for row in rows]


def best_so_far(reports: Reports, space: Space, seconds: float) -> Curve:
    """Return time and score of each report, within the time and the constraints, that is better than all before it."""
    objective = space.objectives[0]
    sign = 1 if objective.mode == "max" else -1
    curve: list[tuple[float, float]] = []
    for at, metrics in reports:
        told = [metrics.get(name) for name in space.constraints]
        kept = all(
            v is not None and limit.excess(v) <= 0 for v, limit in zip(told, space.constraints.values(), strict=True)
        )
        value = metrics[objective.metric]
        if kept and at <= seconds and (not curve or sign * value > sign * curve[-1][1]):
            curve.append((at, value))
    return curve


def reached(curve: Curve, score: float, sign: int) -> float | None:
    """Return when a curve first was at least as good as `score`, in seconds; None if never."""
    return next((at for at, value in curve if sign * value >= sign * score), None)


def table(curves: Mapping[str, Sequence[Curve]], sign: int) -> str:
    """Return a Markdown table of each method and seed's final score, and when this platform reached that score."""
    us, *others = curves
    lines = ["| method | seed | trials' best | had by this platform after | had by itself after | times sooner |"]
    lines.append("|---|---|---|---|---|---|")
    for name in (us, *others):
        for seed, curve in enumerate(curves[name]):
            if not curve:
                lines.append(f"| {name} | {seed} | none within the constraints | | | |")
                continue
            end, score = curve[-1]
            ours_at = reached(curves[us][seed], score, sign)
            sooner = "" if name == us or ours_at is None else f"{end / ours_at:.1f}"
            after = "never" if ours_at is None else f"{ours_at:.0f} s"
            lines.append(f"| {name} | {seed} | {score:.4f} | {after} | {end:.0f} s | {sooner} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="rebuild", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=240, help="that each search is given")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--against", nargs="+", choices=RIVALS, default=RIVALS, metavar="RIVAL", help=", ".join(RIVALS))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as SVG")
    arguments = parser.parse_args()
    file = ROOT / "search_spaces" / f"{arguments.space}.yaml"
    space, _ = load_space(file, has_gpu=False)
    known = len(space.try_first)
    rivals: dict[str, Callable[[int], Reports]] = {
        "random": lambda seed: ours(file, seed, arguments.seconds, PLAIN),
        "guide": lambda seed: guide(file, seed, arguments.seconds),
        "chain": lambda seed: ours(file, seed, arguments.seconds, ["scheduler.name=none"], known),
    }
    methods: dict[str, Callable[[int], Reports]] = {"this platform": lambda seed: ours(file, seed, arguments.seconds)}
    methods |= {RIVALS[name]: rivals[name] for name in RIVALS if name in arguments.against}
    ours(file, 0, 600, ["try_first=[]", "config.epochs=1"], trials=1)  # prepares data and networks
    curves: dict[str, list[Curve]] = {name: [] for name in methods}
    for seed in range(arguments.seeds):
        for name, method in methods.items():
            curves[name].append(best_so_far(method(seed), space, arguments.seconds))
            print(
                f"seed {seed}, {name}: {[(round(at), round(value, 4)) for at, value in curves[name][-1]]}", flush=True
            )
    objective = space.objectives[0]
    print(table(curves, 1 if objective.mode == "max" else -1))
    if arguments.plot:
        picture = steps(curves, "seconds since the start", f"best {objective.metric} so far", arguments.seconds)
        arguments.plot.write_text(picture)


if __name__ == "__main__":
    main()
