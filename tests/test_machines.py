"""A search by the command on a cluster of this machine, from which a machine goes for good."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from printed import LONGEST_S, read_until
from processes import free_ports, kill_all, living_in, named
from spaces import write_space

from search.cluster import RAY_ENVIRONMENT, STARTS

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, **RAY_ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}
TOGETHER = """
import os, time, torch, torch.distributed as dist
from trainables.contract import Report

def train(trial):
    start = trial.resume["epoch"] + 1 if trial.resume else 0
    for epoch in range(start, 8):
        time.sleep(0.5)
        while epoch == 4 and not os.path.exists(trial.config["lost"]):  # or all may be over before the machine goes
            time.sleep(0.1)
        dist.all_reduce(torch.ones(1))
        yield Report({"loss": 1.0, "started_at": start}, state=lambda: {"epoch": epoch})
"""
MARK = "MACHINE_OF_A_TEST"  # in the environment of all that a machine runs
LOST = "lost"  # the file that tells the trial that its machine has gone


@dataclass
class Cluster:
    """A head on which nothing is trained; its other machines come and go."""

    scratch: str
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_ports(1)[0]}")
    begun: list[str] = field(default_factory=list)

    def start(self, *flags: str) -> str:
        """One more machine, in processes of this one; returns its name."""
        self.begun.append(name := f"{self.address}/{len(self.begun)}")
        own = f"--node-ip-address=127.0.0.{len(self.begun)}"
        limits = ["--object-store-memory=100000000", "--disable-usage-stats"]
        limits += ["--min-worker-port=0", "--max-worker-port=0"]  # any free ones: the machines share them
        environment = {**ENVIRONMENT, MARK: name}
        command = [str(Path(sys.executable).with_name("ray")), "start", own, *flags, *limits]
        for _ in range(STARTS):  # on a busy machine, Ray's processes may start too slowly for it
            if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0:
                return name
            self.lose(name)
        raise AssertionError(f"failed {STARTS} times: {shlex.join(command)}")

    def add(self) -> str:
        return self.start(f"--address={self.address}", "--num-cpus=1")

    def lose(self, name: str) -> None:
        """Nothing on it gets a chance to end well."""
        kill_all(f"{MARK}={name}")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    scratch = tempfile.mkdtemp(prefix="ray-")  # a short path: Ray's sockets lie in it
    cluster = Cluster(scratch)
    port = cluster.address.rpartition(":")[2]
    cluster.start("--head", "--num-cpus=0", f"--port={port}", "--include-dashboard=false", f"--temp-dir={scratch}")
    yield cluster
    for name in cluster.begun:
        cluster.lose(name)
    shutil.rmtree(scratch, ignore_errors=True)


def start(folder: Path, cluster: Cluster, retries: int = 0) -> subprocess.Popen[str]:
    """A search of one trial, on two ranks that wait for each other."""
    (folder / "together.py").write_text(TOGETHER)
    more = {"trainable": "together:train", "search": {"trials": 1, "retries": retries}, "resources": {"workers": 2}}
    config = {"epochs": 8, "lr": {"log": [0.01, 0.4]}, "lost": str(folder / LOST)}
    file = write_space(folder, config, **more)
    command = [sys.executable, str(ROOT / "launch.py"), "--space", str(file), "--results", str(folder), "--name", "run"]
    cluster.begun.append(name := f"{cluster.address}/search")
    into: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**ENVIRONMENT, MARK: name}
    return subprocess.Popen([*command, "--address", cluster.address], cwd=folder, env=environment, **into)


def wait_for_reports(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    file, until = folder / "run/trials/0000/metrics.jsonl", time.monotonic() + LONGEST_S
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert process.poll() is None, "the search has ended"
        assert time.monotonic() < until, "the trial does not report"
        time.sleep(0.1)


def test_a_trial_whose_machine_goes_for_good_waits_for_another_and_goes_on_there(
    tmp_path: Path, cluster: Cluster
) -> None:
    cluster.add()
    machine = cluster.add()
    process = start(tmp_path, cluster)
    wait_for_reports(process, tmp_path, 2)
    cluster.lose(machine)
    (tmp_path / LOST).touch()
    read_until(process, "a machine was lost, ")
    time.sleep(5.0)
    assert process.poll() is None
    cluster.add()
    told, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, told
    assert "a machine was added, " in told
    [row] = csv.DictReader((tmp_path / "run/trials.csv").read_text().splitlines())
    assert (row["status"], row["epochs"]) == ("finished", "8")
    assert float(row["started_at"]) >= 2, "it goes on from its last checkpoint"
    rows = [json.loads(line) for line in (tmp_path / "run/trials/0000/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9)), "no epoch twice"


def test_a_slot_that_waits_for_a_machine_can_be_interrupted(tmp_path: Path, cluster: Cluster) -> None:
    cluster.add()
    machine = cluster.add()
    process = start(tmp_path, cluster)
    wait_for_reports(process, tmp_path, 1)
    cluster.lose(machine)
    (tmp_path / LOST).touch()
    read_until(process, r"^1 slot waits for room in the cluster: 2 x \(1 CPU\)$")
    os.kill(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 130, told
    assert "--resume" in told


def test_what_a_killed_slot_has_reserved_is_freed_for_its_next_attempt(tmp_path: Path, cluster: Cluster) -> None:
    head = cluster.begun[0]
    cluster.add(), cluster.add()
    process = start(tmp_path, cluster, retries=1)
    wait_for_reports(process, tmp_path, 2)
    [slot] = [pid for pid in living_in(f"{MARK}={head}") if named(pid).startswith("ray::ResourceTrainable")]
    os.kill(slot, signal.SIGKILL)
    (tmp_path / LOST).touch()
    read_until(process, r"^freed what a group that was killed had reserved: 2 x \(1 CPU\)$")
    told, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, told
    [row] = csv.DictReader((tmp_path / "run/trials.csv").read_text().splitlines())
    assert (row["status"], row["epochs"]) == ("finished", "8")
