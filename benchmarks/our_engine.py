"""Tunes the toy with this project's engine, through launch.py; measurements are read from the results folder."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import ray
from measured import Measured

import launch
from search.exits import EXIT_FOUND
from search.results import read_results
from search.study import open_study

SPACE = Path(__file__).with_name("toy.yaml")


def search(trials: int) -> Measured:
    """Run `trials` trials on a Ray instance of their own, and return the measurements."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        status = launch.main(["--space", str(SPACE), "--trials", str(trials), "--results", folder, "--name", "toy"])
        ray.shutdown()
        assert status == EXIT_FOUND, "the toy trains under every setting"
        return _read(began, Path(folder) / "toy")


def _read(began: float, results: Path) -> Measured:
    space, _ = read_results(results)
    study = open_study(results / "study.journal", space, create=False)
    ends = [trial.datetime_complete.timestamp() for trial in study.trials if trial.datetime_complete is not None]
    latencies = []
    for file in results.glob("trials/*/metrics.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            latencies.append(row["time"] - row["metrics"]["sent_at"])
    return Measured(began, ends, latencies)
