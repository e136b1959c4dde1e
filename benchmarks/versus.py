"""The best score over time of four ways to search one space, each with the same wall time.

    python benchmarks/versus.py [--space rebuild] [--seconds 240] [--seeds 0 1 2] [--against random guide chain]
                                [--longer 10] [--plot benchmarks/versus.svg] [--keep results/versus]

* this platform: the space unchanged
* random: random settings, all trained to the end, on this platform's warm groups
* the guide's pattern: OptunaSearch with a Ray Train run per trial (versus_guide.py), and ASHA as in the space
* the chain: only the known settings of the lab notes, in order

With --longer N, the guide's pattern goes on after its time until it has the best score of the others too, but for at
most N times as long as this platform took for that.

A score counts from the moment its report reaches the driver, if it satisfies the space's constraints. What all of them
need before the first trial (prepared data, a pre-trained network) is made beforehand and not timed.
"""

from __future__ import annotations

import argparse
import json
import math
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
RIVALS = {"random": "random", "chain": "the chain", "guide": "the guide's pattern"}
MANY = 10_000  # trials; the time budget ends the search before
Reports = list[tuple[float, Mapping[str, Any]]]  # seconds since the start, and metrics


def ours(
    file: Path, results: Path, seed: int, seconds: float, overrides: Sequence[str] = (), trials: int = MANY
) -> Reports:
    """Run a search through launch.py, and return the reports from its new results folder, in order of time."""
    command = [sys.executable, str(ROOT / "launch.py"), "--space", str(file), "--seed", str(seed)]
    command += ["--trials", str(trials), "--time-budget", f"{seconds:g}s"]
    command += ["--results", str(results.parent), "--name", results.name]
    command += [word for override in overrides for word in ("--set", override)]
    began = time.time()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    rows = [
        json.loads(line) for path in results.glob("trials/*/metrics.jsonl") for line in path.read_text().splitlines()
    ]
    return sorted(((row["time"] - began, row["metrics"]) for row in rows), key=lambda item: item[0])


def guide(file: Path, seed: int, seconds: float, longest: float, score: float) -> Reports:
    """Search for `seconds` at least, and on until a report is as good as `score` or until `longest` seconds."""
    command = [sys.executable, str(ROOT / "benchmarks/versus_guide.py"), str(file)]
    command += [str(word) for word in (seed, seconds, longest, score)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.time()
    told = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    rows = [json.loads(line.split(" ", 1)[1]) for line in told.stdout.splitlines() if line.startswith("report ")]
    return [(row["time"] - began, row["metrics"]) for row in rows]


def is_kept(space: Space, metrics: Mapping[str, Any]) -> bool:
    """Return whether metrics satisfy the space's constraints."""
    told = ((metrics.get(name), limit) for name, limit in space.constraints.items())
    return all(value is not None and limit.excess(value) <= 0 for value, limit in told)


def sign_of(space: Space) -> int:
    """Return the factor that makes larger values of the objective better."""
    return 1 if space.objectives[0].mode == "max" else -1


def best_so_far(reports: Reports, space: Space, seconds: float = math.inf) -> Curve:
    """Return time and score of each report, within the time and the constraints, that is better than all before it."""
    curve: list[tuple[float, float]] = []
    for at, metrics in reports:
        value = metrics[space.objectives[0].metric]
        better = not curve or sign_of(space) * value > sign_of(space) * curve[-1][1]
        if at <= seconds and better and is_kept(space, metrics):
            curve.append((at, value))
    return curve


def reached(curve: Curve, score: float, sign: int) -> float | None:
    """Return when a curve first was at least as good as `score`, in seconds; None if never."""
    return next((at for at, value in curve if sign * value >= sign * score), None)


def table(curves: Mapping[str, Sequence[Curve]], seeds: Sequence[int], sign: int) -> str:
    """Return a Markdown table of each method and seed's final score, and when this platform reached that score."""
    us, *others = curves
    lines = ["| method | seed | trials' best | had by this platform after | had by itself after | times sooner |"]
    lines.append("|---|---|---|---|---|---|")
    for name in (us, *others):
        for seed, our, curve in zip(seeds, curves[us], curves[name], strict=True):
            if not curve:
                lines.append(f"| {name} | {seed} | none within the constraints | | | |")
                continue
            end, score = curve[-1]
            at = reached(our, score, sign)
            sooner = "" if name == us or at is None else f"{end / at:.1f}"
            lines.append(f"| {name} | {seed} | {score:.4f} | {after(at)} | {end:.0f} s | {sooner} |")
    return "\n".join(lines)


def after(at: float | None) -> str:
    return "never" if at is None else f"{at:.0f} s"


def best_of(curves: Sequence[Curve], sign: int) -> float:
    """Return the best final score of several curves; the worst there is if none has any."""
    return max((curve[-1][1] for curve in curves if curve), key=lambda score: sign * score, default=-sign * math.inf)


def race(curves: Mapping[str, Sequence[Curve]], longer: Sequence[Curve], seeds: Sequence[int], sign: int) -> str:
    """Return a Markdown table of when this platform and the guide's pattern had the best final score of all others."""
    us, *others = curves
    lines = [
        "| seed | the others' best | had by this platform after | by the guide's pattern after |",
        "|---|---|---|---|",
    ]
    for place, (seed, theirs) in enumerate(zip(seeds, longer, strict=True)):
        score = best_of([curves[name][place] for name in others], sign)
        had = [after(reached(curve, score, sign)) for curve in (curves[us][place], theirs)]
        lines.append(f"| {seed} | {score:.4f} | {had[0]} | {had[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="rebuild", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=240, help="that each search is given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--against", nargs="+", choices=RIVALS, default=RIVALS, metavar="RIVAL", help=", ".join(RIVALS))
    parser.add_argument("--longer", type=float, default=0, metavar="N", help="how long the guide's pattern goes on")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as SVG")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for this platform's results folders")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True)  # must be new: runs of another time would count as this one's
    with tempfile.TemporaryDirectory() as passing:
        compare(arguments, arguments.keep or Path(passing))


def compare(arguments: argparse.Namespace, kept: Path) -> None:
    """Run all methods on all seeds, one after another, and print the tables."""
    file, seconds = ROOT / "search_spaces" / f"{arguments.space}.yaml", arguments.seconds
    space, _ = load_space(file, has_gpu=False)
    sign = sign_of(space)
    rivals: dict[str, Callable[[int], Reports]] = {
        "random": lambda seed: ours(file, kept / f"random-{seed}", seed, seconds, PLAIN),
        "chain": lambda seed: ours(
            file, kept / f"chain-{seed}", seed, seconds, ["scheduler.name=none"], len(space.try_first)
        ),
    }
    methods: dict[str, Callable[[int], Reports]] = {
        "this platform": lambda seed: ours(file, kept / f"ours-{seed}", seed, seconds)
    }
    methods |= {RIVALS[name]: method for name, method in rivals.items() if name in arguments.against}
    ours(file, kept / "first", 0, 600, ["try_first=[]", "config.epochs=1"], trials=1)  # prepares data and networks
    curves: dict[str, list[Curve]] = {name: [] for name in methods}
    longer: list[Curve] = []
    for seed in arguments.seeds:
        for name, method in methods.items():
            curves[name].append(best_so_far(method(seed), space, seconds))
            show(seed, name, curves[name][-1])
        if "guide" in arguments.against:
            us, *others = (by_seed[-1] for name, by_seed in curves.items() if name != RIVALS["guide"])
            score = best_of(others, sign)
            longest = max(seconds, arguments.longer * (reached(us, score, sign) or 0))
            told = guide(file, seed, seconds, longest, score)
            longer.append(best_so_far(told, space))
            curves.setdefault(RIVALS["guide"], []).append(best_so_far(told, space, seconds))
            show(seed, RIVALS["guide"], longer[-1])
    print(table(curves, arguments.seeds, sign))
    if longer:
        print(race(curves, longer, arguments.seeds, sign))
    if arguments.plot:
        picture = steps(curves, "seconds since the start", f"best {space.objectives[0].metric} so far", seconds)
        arguments.plot.write_text(picture)


def show(seed: int, name: str, curve: Curve) -> None:
    print(f"seed {seed}, {name}: {[(round(at), round(value, 4)) for at, value in curve]}", flush=True)


if __name__ == "__main__":
    main()
