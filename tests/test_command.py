"""The command as a person types it: whole processes, their output, exit status and what they leave behind."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from printed import LONGEST_S, read_until
from processes import started_by

from search.space.file import load_space
from search.study import ended_after, open_study

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]
BY_EPOCH = ("metrics.jsonl", "output.txt")  # in a trial's folder

OWN_LOOP = """
def train(trial):
    w = 5.0
    for epoch in range(4):
        w -= trial.config["lr"] * 2 * w
        yield {"loss": w * w}


def prepare(config):
    return "one parabola, honest split"
"""
OWN_SPACE = """
trainable: my_loop:train
objective: {metric: loss, mode: min}
config:
  lr: {log: [1.0e-2, 0.4]}
search: {trials: 6}
resources: {cpus_per_worker: 2}
"""
TABLES = """
tables:
  budgets: {title: Budget, rows: {one: {search.trials: 1}, two: {search.trials: 2}}, metrics: {loss: loss}}
"""
LONG_PREPARATION = """
def prepare(config):
    import time

    print("long", flush=True)
    time.sleep(600)
"""
SLOW_SPACE = """
trainable: toys:descend
objective: {metric: loss, mode: min}
config:
  epochs: 6
  pause_s: 0.5
  lr: {log: [1.0e-2, 0.4]}
search: {trials: 5, sampler: random}
resources: {cpus_per_worker: 2}
"""


def launch(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def wait_for_the_middle_of_a_trial(process: subprocess.Popen[str], results: Path) -> None:
    """Until one of the slow space's has two epochs behind it, and two before it."""
    until = time.monotonic() + LONGEST_S
    while not any(2 <= file.read_bytes().count(b"\n") <= 4 for file in results.glob("trials/*/metrics.jsonl")):
        assert process.poll() is None, "the search has ended"
        assert time.monotonic() < until, "no trial reports"
        time.sleep(0.05)


def rows(results: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((results / "trials.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A finished search of somebody's own loop: where it ran, its exit status and what it printed."""
    folder = tmp_path_factory.mktemp("brought")
    (folder / "own").mkdir()
    (folder / "own/my_loop.py").write_text(OWN_LOOP)
    (folder / "own/my.yaml").write_text(OWN_SPACE)
    return folder, *finish(launch(folder, "--space", "own/my.yaml", "--name", "mine"))


def test_bring_your_own_loop_from_another_folder(brought: tuple[Path, int, str]) -> None:
    folder, status, output = brought
    assert status == 0, output
    assert "6 trials: 6 finished" in output
    assert "best: trial" in output
    assert len(rows(folder / "results/mine")) == 6


def test_what_the_data_are_stands_in_every_result(brought: tuple[Path, int, str]) -> None:
    folder, _, output = brought
    results = folder / "results/mine"
    assert "\none parabola, honest split\n" in output
    assert "\ndata: one parabola, honest split\n" in output
    assert "data: one parabola, honest split" in (results / "report.html").read_text()
    assert yaml.safe_load((results / "best.yaml").read_text())["data"] == "one parabola, honest split"
    status, output = finish(launch(folder, "--report", str(results)))
    assert (status, output.startswith("data: one parabola, honest split\n")) == (0, True)


def test_exit_status_1_when_nothing_keeps_the_constraints(tmp_path: Path) -> None:
    (tmp_path / "my_loop.py").write_text(OWN_LOOP)
    (tmp_path / "my.yaml").write_text(OWN_SPACE + "constraints: {loss: {max: -1.0}}\n")
    status, output = finish(launch(tmp_path, "--space", "my.yaml", "--trials", "1"))
    assert status == 1, output
    assert "no trial finished within the constraints" in output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    """Nothing finished is run again or lost, and what was running goes on from its last checkpoint."""
    shutil.copy(Path(__file__).parent / "toys.py", tmp_path)
    (tmp_path / "slow.yaml").write_text(SLOW_SPACE)
    process = launch(tmp_path, "--space", "slow.yaml", "--name", "cut", "--export", "best", "model")
    read_until(process, r"trial +\d+ +finished")
    wait_for_the_middle_of_a_trial(process, tmp_path / "results/cut")
    for each in started_by(process.pid) if how == signal.SIGUSR1 else [process.pid]:  # Slurm may send it to all
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, how)
    status, output = finish(process)
    results = tmp_path / "results/cut"
    assert not (tmp_path / "model").exists(), "the search is not at its end"
    space, _ = load_space(results / "space.yaml")
    assert ended_after(open_study(results / "study.journal", space, False)) is None
    if how != signal.SIGKILL:
        assert status == 130, output
        assert "--resume" in output
        before = rows(results)
        assert "interrupted" in {row["status"] for row in before}
    else:
        assert status == -signal.SIGKILL
        before = []
    done = {path.parent.name for path in results.glob("trials/*/metrics.jsonl")}
    written = {(name, file): (results / "trials" / name / file).read_text() for name in done for file in BY_EPOCH}

    status, output = finish(launch(tmp_path, "--resume", str(results), "--export", "best", "model"))
    assert status == 0, output
    after = rows(results)
    best = min(after, key=lambda row: float(row["loss"]))
    assert yaml.safe_load((tmp_path / "model/origin.yaml").read_text())["trial"] == int(best["trial"])
    assert [row["trial"] for row in after] == ["0", "1", "2", "3", "4"]
    assert {row["status"] for row in after} == {"finished"}
    for row in before:
        if row["status"] == "finished":
            assert row in after
    for (name, file), text in written.items():
        assert (results / "trials" / name / file).read_text().startswith(text), "no epoch was run twice"
    for row in after:
        metrics, printed = (
            (results / f"trials/{int(row['trial']):04d}" / file).read_text().splitlines() for file in BY_EPOCH
        )
        epochs = [json.loads(line)["epoch"] for line in metrics]
        assert epochs == list(range(1, int(row["epochs"]) + 1)), "nor is an epoch missing"
        assert {f"epoch {epoch - 1}" for epoch in epochs} == set(printed)
    study = open_study(results / "study.journal", space, False)
    assert all(trial.state.is_finished() for trial in study.trials)
    assert ended_after(study) == 5


def test_ctrl_c_while_memory_is_measured_is_heeded_at_once(tmp_path: Path) -> None:
    wait = "import time\n\n\ndef memory_need(trial):\n    time.sleep(500)\n"
    (tmp_path / "my_loop.py").write_text(wait + OWN_LOOP)
    (tmp_path / "my.yaml").write_text(
        OWN_SPACE.replace("cpus_per_worker: 2", "gpus_per_worker: auto, memory_limit_mb: 64")
    )
    process = launch(tmp_path, "--space", "my.yaml", "--name", "mine")
    read_until(process, r"measuring the memory")
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    assert status == 130, output
    assert output.endswith(f"go on with: python {ROOT / 'launch.py'} --resume results/mine\n")


@pytest.mark.parametrize("pressed", [True, False])
def test_a_reader_that_has_left_changes_nothing(tmp_path: Path, pressed: bool) -> None:
    """As `tee` does at Ctrl-C, or `head` before it: the search ends as it would have, and with that exit status."""
    shutil.copy(Path(__file__).parent / "toys.py", tmp_path)
    (tmp_path / "slow.yaml").write_text(SLOW_SPACE)
    trials = "9" if pressed else "3"  # so many that it is not over when the signal comes
    process = launch(tmp_path, "--space", "slow.yaml", "--name", "deaf", "--trials", trials)
    read_until(process, r"trial +\d+ +finished")
    assert process.stdout is not None
    process.stdout.close()
    if pressed:
        process.send_signal(signal.SIGINT)
    assert process.wait(900) == (130 if pressed else 0)
    results = tmp_path / "results/deaf"
    assert len(rows(results)) == 3 or pressed
    assert {row["status"] for row in rows(results)} - ({"interrupted"} if pressed else set()) == {"finished"}
    assert (results / "report.html").exists()
    assert not (results / ".ray").exists()


def test_a_full_disk_under_the_log_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "my_loop.py").write_text(OWN_LOOP)
    (tmp_path / "my.yaml").write_text(OWN_SPACE)
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "launch.py"), "--space", "my.yaml", "--name", "mine"]
        status = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=full, timeout=900).returncode
    assert status == 0
    assert [row["status"] for row in rows(tmp_path / "results/mine")] == ["finished"] * 6


def test_a_mistake_in_the_data_ends_before_ray_starts(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with tempfile.TemporaryDirectory(prefix="ray-") as rays:  # a short path: Ray's sockets would lie in it
        process = launch(ROOT, "--space", "fusion", "--set", f"config.data.root={nowhere}", RAY_TMPDIR=rays)
        status, output = finish(process)
        assert not os.listdir(rays), "what Ray writes as it starts"
    assert status == 2
    assert str(nowhere) in output
    assert len(output.strip().splitlines()) <= 4
    assert "dashboard:" not in output


def test_report_and_why_of_a_finished_search(brought: tuple[Path, int, str]) -> None:
    folder, _, _ = brought
    results = folder / "results/mine"
    written = {name: (results / name).read_text() for name in ("trials.csv", "best.yaml", "report.html")}
    for name in written:
        (results / name).unlink()
    status, _ = finish(launch(folder, "--report", str(results)))
    assert status == 0
    assert {name: (results / name).read_text() for name in written} == written
    status, output = finish(launch(folder, "--report", str(results), "--why", "1"))
    assert status == 0
    assert "finished" in output
    assert "ran to its end" in output


def test_warm_start_learns_from_a_finished_search(brought: tuple[Path, int, str]) -> None:
    folder, _, _ = brought
    more = ("--trials", "2", "--name", "second", "--warm-start", "results/mine")
    status, output = finish(launch(folder, "--space", "own/my.yaml", *more))
    assert status == 0, output
    assert "warm start: 6 trials" in output
    assert len(rows(folder / "results/second")) == 2
    document = yaml.safe_load((folder / "results/second/space.yaml").read_text())
    assert "--warm-start" in document["ran"]["command"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_data_are_prepared_interrupts(tmp_path: Path, how: signal.Signals) -> None:
    """Slurm's warning may come then, and a script that resumes looks for this exit status."""
    (tmp_path / "my_loop.py").write_text(OWN_LOOP + LONG_PREPARATION)
    (tmp_path / "my.yaml").write_text(OWN_SPACE)
    process = launch(tmp_path, "--space", "my.yaml")
    read_until(process, "long")
    process.send_signal(how)
    assert finish(process) == (130, "interrupted\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_at_the_end_of_a_search_ends_its_tables(tmp_path: Path, how: signal.Signals) -> None:
    """It comes too late for the search, whose summary is being printed, and before the next one."""
    (tmp_path / "my_loop.py").write_text(OWN_LOOP)
    (tmp_path / "my.yaml").write_text(OWN_SPACE + TABLES)
    process = launch(tmp_path, "--space", "my.yaml", "--table", "--name", "t")
    read_until(process, "^best: ")
    process.send_signal(how)
    status, told = finish(process)
    assert status == 130, told
    assert not (tmp_path / "results/t/budgets-two/best.yaml").exists()


def test_a_table_is_filled_and_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "my_loop.py").write_text(OWN_LOOP)
    (tmp_path / "my.yaml").write_text(OWN_SPACE + TABLES)
    command = ["--space", "my.yaml", "--table", "--name", "t"]
    status, _ = finish(launch(tmp_path, *command))
    results = tmp_path / "results/t"
    text = (results / "tables.md").read_text()
    assert status == 0
    for row in ("one", "two"):
        best = yaml.safe_load((results / f"budgets-{row}" / "best.yaml").read_text())
        assert f"| {row} | {best['metrics']['loss']:.4g} |" in text
    before = [(results / f"budgets-{row}" / "study.journal").read_bytes() for row in ("one", "two")]
    status, told = finish(launch(tmp_path, *command))
    assert status == 0
    assert text in told
    assert [(results / f"budgets-{row}" / "study.journal").read_bytes() for row in ("one", "two")] == before
