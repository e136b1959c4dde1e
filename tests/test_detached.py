"""docs/detached.md, followed on clusters of this machine: each of its commands, a head that is lost, and a bucket."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
import s3
import torch
import yaml
from printed import LONGEST_S, read_until
from processes import free_ports, kill_all

from search.cluster import RAY_ENVIRONMENT, STARTS
from search.records.record import Record
from search.space.file import read_space
from search.study import open_study, records

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/detached.md").read_text()
STARTING = (
    "RAY_raylet_start_wait_time_s",
    "RAY_worker_maximum_startup_concurrency",
    "RAY_worker_register_timeout_seconds",
    "RAY_agent_register_timeout_ms",
)  # how many processes a busy machine may start at once, and how long they may take; nothing that launch.py needs
SLOW_SPACE = """
trainable: toys:descend
objective: {metric: loss, mode: min}
config: {epochs: 3, pause_s: 0.2, lr: {log: [1.0e-2, 0.4]}}
search: {trials: 500, sampler: random}
"""


def commands() -> list[str]:
    """Every command of the page, in its order; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


@dataclass
class Machine:
    """A head with one CPU, started as cluster.yaml starts it, and a terminal in the checkout beside it."""

    home: Path
    environment: dict[str, str]
    dashboard: int
    scratch: str = field(
        default_factory=lambda: tempfile.mkdtemp(prefix="ray-")
    )  # a short path: Ray's sockets lie in it

    def start(self) -> None:
        for _ in range(STARTS):  # on a busy machine, Ray's processes may start too slowly for it
            if self._start():
                return
            self.go()
        raise AssertionError((self.home / "head.log").read_text())

    def _start(self) -> bool:
        """Start it; returns whether it answers in the end."""
        cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        settings = dict(re.findall(r"\b(RAY_[A-Z_]+)=(\S+)", cluster["head_start_ray_commands"][1]))
        agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        names = ["", *(f"{agent}-" for agent in agents)]
        ports = {"dashboard-": self.dashboard, **dict(zip(names, free_ports(len(names)), strict=True))}
        flags = [f"--{name}port={port}" for name, port in ports.items()]
        flags += ["--min-worker-port=0", "--max-worker-port=0"]  # any free ones
        flags += ["--num-cpus=1", "--object-store-memory=150000000", "--disable-usage-stats"]
        flags += ["--dashboard-host=127.0.0.1", f"--temp-dir={self.scratch}"]
        patience = {name: {**os.environ, **RAY_ENVIRONMENT}[name] for name in STARTING}
        with open(self.home / "head.log", "w") as log:
            self.head = subprocess.Popen(
                ["ray", "start", "--head", "--block", *flags],
                env={**self.environment, **settings, **patience},
                cwd=self.home,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until = time.monotonic() + LONGEST_S
        # the agent is up last, and the dashboard refuses a job where it waits for the agent more than 10 s
        while self.head.poll() is None and time.monotonic() < until:
            if answers(self.dashboard) and answers(ports["dashboard-agent-listen-"]):
                return True
            time.sleep(0.2)
        return False

    def go(self) -> None:
        """The machine is lost: nothing gets a chance to end well, and its disk is gone."""
        kill_all(f"HOME={self.home}")
        self.head.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass
class Terminal:
    """Types the commands of the page, one after another. Only the words in `others` are replaced."""

    folder: Path
    environment: dict[str, str]
    others: dict[str, str]
    typed: list[str] = field(default_factory=list)

    def run(self, beginning: str) -> str:
        """The next command of the page, which begins so, to its end; returns what it printed."""
        return finish(self.start(beginning))

    def start(self, beginning: str) -> subprocess.Popen[str]:
        command = self._next(beginning)
        into: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "-c", command], cwd=self.folder, env=self.environment, **into)

    def export(self) -> None:
        """The next command, which is for all that follow."""
        name, _, value = self._next("export ").removeprefix("export ").partition("=")
        self.environment[name] = value

    def _next(self, beginning: str) -> str:
        command = commands()[len(self.typed)]
        assert command.startswith(beginning), command
        self.typed.append(command)
        for old, new in self.others.items():
            command = command.replace(old, new)
        return command


def answers(port: int) -> bool:
    try:
        urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5)
    except HTTPError:  # it wants a token
        return True
    except (URLError, OSError):
        return False
    return True


def finish(process: subprocess.Popen[str]) -> str:
    told, _ = process.communicate(timeout=900)
    assert process.returncode == 0, told
    return told


def wait_for(file: Path, words: str) -> None:
    until = time.monotonic() + LONGEST_S
    while words not in (told := file.read_text() if file.exists() else f"no {file.name}"):
        assert time.monotonic() < until, told
        time.sleep(0.2)


def wait_for_the_first(kept: Path) -> None:
    """Until trial 0, which has finished, is in the bucket."""
    until = time.monotonic() + LONGEST_S
    while 0 not in ended(kept):
        assert time.monotonic() < until, "what has ended is not sent"
        time.sleep(0.2)


def check_out(folder: Path) -> None:
    """What `git clone` and `make` put there, and a space of one's own."""
    for name in ("search", "search_spaces", "trainables"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("launch.py", ".gitignore", "tests/toys.py"):
        shutil.copy(ROOT / file, folder)
    (folder / "slow.yaml").write_text(SLOW_SPACE)
    (folder / ".venv").symlink_to(sys.prefix)


def trials(results: Path) -> list[Record]:
    """The trials of a results folder."""
    space = read_space(results / "space.yaml")
    return records(open_study(results / "study.journal", space, create=False), space)


def ended(results: Path) -> dict[int, Record]:
    """The finished ones by number."""
    return {record.number: record for record in trials(results) if record.status == "finished"}


@dataclass(frozen=True)
class Story:
    """What was printed, and where things are. lost: the bucket's copy when the first head went."""

    typed: list[str]
    followed: str
    lost: Path
    stopped: str
    log: str
    exported: str
    checkout: Path
    kept: Path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    home = tmp_path_factory.mktemp("home")
    check_out(home / "hyperparameter-search")
    (home / "store/bucket").mkdir(parents=True)
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("1" * 64)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON", "AWS_"))}
    with s3.serving(home / "store") as store:
        path = f"{home}/hyperparameter-search/.venv/bin:{inherited['PATH']}"
        yield follow(home, {**inherited, **store.environment, "HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"})


def follow(home: Path, environment: dict[str, str]) -> Story:
    """The page from its top to its end, with two heads: one that is lost, and one that goes on."""
    checkout, kept = home / "hyperparameter-search", home / "store/bucket/searches/night"
    [port] = free_ports(1)
    others = {"127.0.0.1:8265": f"127.0.0.1:{port}", "--space rebuild": "--space slow.yaml"}
    terminal = Terminal(checkout, dict(environment), others)
    machine = Machine(home, environment, port)
    try:
        machine.start()
        terminal.export()
        terminal.export()
        terminal.run(".venv/bin/ray job submit")
        with terminal.start(".venv/bin/ray job logs --follow") as following:
            followed = read_until(following, r"trial +0 +finished")
            terminal.run(".venv/bin/ray job status")
            wait_for_the_first(kept)
            machine.go()
        lost = shutil.copytree(kept, home / "lost")
        assert not (checkout / "results").exists(), "everything that is left is in the bucket"

        machine = Machine(home, environment, port)
        machine.start()
        terminal.run(".venv/bin/ray job submit")
        log = Path(machine.scratch) / "session_latest/logs/job-driver-night-2.log"
        wait_for(log, " finished ")
        stopped = terminal.run(".venv/bin/ray job stop")
        told = log.read_text()
        machine.go()

        report = terminal.start(".venv/bin/python launch.py --report")  # both at once: each imports Ray and PyTorch
        exported = terminal.run(".venv/bin/python launch.py --report")
        assert finish(report).startswith(f"{len(trials(kept))} trials: ")
        return Story(terminal.typed, followed, lost, stopped, told, exported, checkout, kept)
    finally:
        machine.go()


def test_every_command_of_the_page_was_typed(story: Story) -> None:
    assert story.typed == commands()


def test_the_log_tells_each_trial_as_it_ends(story: Story) -> None:
    assert "plan: 1 slot x 1 worker" in story.followed, "the job found its cluster by itself"
    assert re.search(r"trial +0 +finished", story.followed)


def test_nothing_that_had_ended_is_lost_with_the_machine(story: Story) -> None:
    before, after = ended(story.lost), ended(story.kept)
    assert {0} <= before.keys() < after.keys()
    for number, record in before.items():
        assert after[number] == record
        name = f"trials/{number:04d}/metrics.jsonl"
        assert (story.kept / name).read_bytes() == (story.lost / name).read_bytes()


def test_a_stopped_job_ends_cleanly_and_in_time(story: Story) -> None:
    assert "stopped" in story.stopped
    assert "interrupted; go on with: python launch.py --resume s3://bucket/searches/night\n" in story.log
    rows = list(csv.DictReader((story.kept / "trials.csv").read_text().splitlines()))
    assert {"finished"} <= {row["status"] for row in rows} <= {"finished", "interrupted"}


def test_only_the_last_checkpoint_of_a_trial_is_kept_in_the_bucket(story: Story) -> None:
    folders = [path.parent for path in story.kept.glob("trials/*/checkpoint-*.pt")]
    assert len(folders) == len(set(folders)) >= len(ended(story.kept))


def test_the_best_model_is_taken_home(story: Story) -> None:
    model = story.checkout / "model"
    origin = yaml.safe_load((model / "origin.yaml").read_text())
    best = min(ended(story.kept).values(), key=lambda record: record.metrics["loss"] or 0.0)
    assert story.exported.startswith(f"trial {best.number}, its checkpoint after epoch 3: model\n")
    assert (origin["search"], origin["trial"]) == ("s3://bucket/searches/night", best.number)
    state = torch.load(model / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert state["w"] ** 2 == best.metrics["loss"]
    assert yaml.safe_load((model / "config.yaml").read_text())["lr"] == best.values["lr"]


def test_the_page_tells_the_wait_that_the_cluster_has(story: Story) -> None:
    (told,) = set(re.findall(r"sets (\d+) seconds", PAGE))
    assert f"RAY_JOB_STOP_WAIT_TIME_S={told} " in (ROOT / "cluster.yaml").read_text().replace("\n", " ")
