"""The engine on a real Ray: slots on warm groups, every way in which a trial can end, schedulers, resuming."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
import torch
import yaml
from ray.tune.schedulers import TrialScheduler

from search import run as engine
from search.command import folder_of, open_results
from search.group import Group, GroupDied
from search.interruption import Interruption
from search.options import Options
from search.plan import Node, make_plan
from search.records.folder import TrialFolder
from search.results import trials_table, why
from search.retry import retry_failed
from search.scheduler import make_scheduler
from search.space.file import load_space
from search.study import ended_after, open_study
from search.trial import METRICS
from search.workers.messages import Advance, Begin, GroupSpec, Reported
from search.workers.states import load_state

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
HERE = Path(__file__).parent
ONE_CPU, TWO_CPUS = (Node(cpus=1, gpus=0),), (Node(cpus=2, gpus=0),)  # each slot of one worker takes one


def options(folder: Path, resume: Path | None = None) -> Options:
    return Options(
        file=folder / "toy.yaml",
        overrides=(),
        profile=None,
        results=folder / "results",
        uri=None,
        name=f"run{len(list((folder / 'results').glob('*')))}",
        resume=resume,
        retry_failed=False,
        warm_start=None,
        address=None,
        cold=False,
        export=None,
        dry_run=False,
    )


def search(
    folder: Path, space: dict[str, Any], machine: tuple[Node, ...] = ONE_CPU, cold: bool = False
) -> tuple[engine.Outcome, Path]:
    """Run a space to its end; returns the outcome and its results folder."""
    shutil.copy(HERE / "toys.py", folder)
    (folder / "toy.yaml").write_text(yaml.safe_dump(space))
    loaded, _ = load_space(folder / "toy.yaml")
    given = options(folder)
    results = folder_of(given, loaded)
    with ExitStack() as held:
        open_results(given, loaded, results, held)
        return engine.run(loaded, make_plan(loaded, machine), results, cold), results


def toy(function: str, **more: Any) -> dict[str, Any]:
    return {
        "trainable": f"toys:{function}",
        "objective": {"metric": "loss", "mode": "min"},
        "config": {"epochs": 4, "lr": {"log": [0.01, 0.4]}},
        "search": {"trials": 4, "sampler": "random"},
        **more,
    }


def study_of(results: Path) -> optuna.Study:
    loaded, _ = load_space(results / "space.yaml")
    return open_study(results / "study.journal", loaded, create=False)


@pytest.fixture(scope="module")
def descended(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[engine.Outcome, Path]:
    """A finished search of ten trials on two slots. Whoever changes its folder works on a copy."""
    # Without the pause, the first slot might take a second trial before the other has begun.
    config = {"epochs": 4, "pause_s": 0.5, "lr": {"log": [0.01, 0.4]}}
    space = toy("descend", config=config, search={"trials": 10, "sampler": "random"})
    return search(tmp_path_factory.mktemp("descended"), space, TWO_CPUS)


def test_a_search_leaves_what_the_design_says(descended: tuple[engine.Outcome, Path]) -> None:
    outcome, results = descended
    assert [record.status for record in outcome.records] == ["finished"] * 10
    assert {path.name for path in results.iterdir()} == {
        "space.yaml", "study.journal", "trials.csv", "best.yaml", "report.html", "trials",
    }  # fmt: skip
    rows = list(csv.DictReader((results / "trials.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == [str(number) for number in range(10)]
    best = yaml.safe_load((results / "best.yaml").read_text())
    assert best["objective"]["loss"] == min(float(row["loss"]) for row in rows)
    state = torch.load(results / best["checkpoint"], weights_only=True)
    assert state["w"] ** 2 == best["metrics"]["loss"]
    assert len((results / "trials/0000/metrics.jsonl").read_text().splitlines()) == 4
    assert list((results / "trials/0000").glob("events.out.tfevents*"))
    assert yaml.safe_load((results / "space.yaml").read_text())["ran"]["versions"]["ray"]


def test_slots_are_lent_from_one_trial_to_the_next(descended: tuple[engine.Outcome, Path]) -> None:
    outcome, _ = descended
    assert len({record.metrics["pid"] for record in outcome.records}) == 2
    assert all(record.metrics["lr_seen"] == record.values["lr"] for record in outcome.records)


def test_more_trials_extend_a_finished_search(descended: tuple[engine.Outcome, Path], tmp_path: Path) -> None:
    first, finished = descended
    results = shutil.copytree(finished, tmp_path / "results/longer")
    before = trials_table(load_space(results / "space.yaml")[0], first.records).splitlines()
    longer, _ = load_space(results / "space.yaml", ["search.trials=12"])
    with ExitStack() as held:
        open_results(options(tmp_path, resume=results), longer, results, held)
        second = engine.run(longer, make_plan(longer, ONE_CPU), results)
    after = (results / "trials.csv").read_text().splitlines()
    assert after[: len(before)] == before
    assert [record.number for record in second.records] == list(range(12))


def test_every_ending_has_its_status_and_reason(tmp_path: Path) -> None:
    kinds = ["nan", "diverge", "bug", "memory", "killed", "none"]
    space = toy(
        "misbehave",
        config={"epochs": 4, "lr": 0.1, "flag": str(tmp_path / "flag"), "kind": {"choice": kinds}},
        try_first=[{"name": kind, "kind": kind} for kind in kinds],
        search={"trials": 6},
    )
    outcome, results = search(tmp_path, space)
    ended = {record.values["kind"]: record for record in outcome.records}
    assert {kind: record.status for kind, record in ended.items()} == {
        "nan": "diverged",
        "diverge": "diverged",
        "bug": "failed",
        "memory": "out_of_memory",
        "killed": "finished",
        "none": "finished",
    }
    assert ended["nan"].reason == "loss is nan"
    assert ended["diverge"].reason == "loss_trans is not finite at step 812"
    assert "KeyError: 'no such batch' (toys.py:" in ended["bug"].reason
    assert "2.00 GiB" in ended["memory"].reason
    assert ended["killed"].metrics["started_at"] == 2, "the retry goes on from the last checkpoint"
    assert ended["killed"].metrics["loss"] == ended["none"].metrics["loss"]
    states = [trial.state for trial in study_of(results).trials]
    assert optuna.trial.TrialState.RUNNING not in states
    assert "KeyError" in (results / f"trials/{ended['bug'].number:04d}/error.txt").read_text()


def test_a_trial_that_hangs_is_told_where_and_goes_on_in_another_attempt(tmp_path: Path) -> None:
    space = toy(
        "one_rank_hangs",
        config={"lr": {"log": [0.1, 0.4]}, "flag": str(tmp_path / "flag")},
        resources={"workers": 2},
        search={"trials": 1, "retries": 1, "report_timeout": "20s"},
    )
    outcome, results = search(tmp_path, space, TWO_CPUS)
    [record] = outcome.records
    error = (results / "trials/0000/error.txt").read_text()
    told, _, stacks = error.partition("\n\n")
    assert re.fullmatch(
        r"rank 0: no report for 20 s: it hangs in one_rank_hangs \(toys.py:\d+\); "
        r"rank 1: no report for 20 s: it hangs in _wait_for_a_batch \(toys.py:\d+\)",
        told,
    )
    assert re.search(r"^rank 1:$", stacks, re.MULTILINE)
    assert "in _wait_for_a_batch\n" in stacks
    assert (record.status, record.metrics["started_at"]) == ("finished", 1)


def test_a_rank_that_dies_alone_is_a_failure_of_its_trial(tmp_path: Path) -> None:
    space = toy(
        "misbehave",
        config={"epochs": 4, "lr": {"choice": [0.1]}, "flag": str(tmp_path / "flag"), "kind": "killed"},
        search={"trials": 1, "retries": 0},
    )
    outcome, _ = search(tmp_path, space)
    assert [(record.status, record.epochs) for record in outcome.records] == [("failed", 2)]


def test_what_failed_runs_again_from_its_last_checkpoint_once_its_cause_is_mended(tmp_path: Path) -> None:
    (tmp_path / "mended_later.py").write_text(
        "from pathlib import Path\nfrom toys import descend\n"
        "def train(trial):\n"
        "    for report in descend(trial):\n"
        "        if report.metrics['loss'] < 9 and not Path(trial.config['flag']).exists():\n"
        "            raise KeyError('no such batch')\n"
        "        yield report\n"
    )
    flag = tmp_path / "mended"
    space = toy("descend", trainable="mended_later:train", search={"trials": 1, "retries": 0})
    first, results = search(tmp_path, space | {"config": {"epochs": 4, "lr": {"choice": [0.1]}, "flag": str(flag)}})
    assert [record.status for record in first.records] == ["failed"]
    flag.touch()
    loaded, _ = load_space(results / "space.yaml")
    retry_failed(results, loaded)
    second = engine.run(loaded, make_plan(loaded, ONE_CPU), results)
    assert [(record.number, record.status) for record in second.records] == [(0, "failed"), (1, "finished")]
    assert second.records[1].epochs == 4
    assert second.records[1].metrics["started_at"] == first.records[0].epochs == 2
    assert [record.number for record in second.best] == [1]


def test_what_blows_up_is_explained_and_what_is_too_large_is_cut(tmp_path: Path) -> None:
    """The shared loop in a real group: a post-mortem for a NaN, and micro-batches that fit for every batch size."""
    shutil.copy(HERE / "toy_task.py", tmp_path)
    sizes = [2, 8, 24, 48]
    space = toy(
        "train",
        trainable="toy_task:train",
        config={"epochs": 2, "samples": 96, "optim": {"batch_size": {"choice": sizes}, "lr": {"choice": [0.01, 3e38]}}},
        try_first=[{"optim.batch_size": size, "optim.lr": 0.01} for size in sizes]
        + [{"optim.batch_size": 24, "optim.lr": 3e38}],
        search={"trials": 5},
        resources={"memory_limit_mb": 0.015},
    )
    outcome, results = search(tmp_path, space)
    assert [record.status for record in outcome.records] == ["finished"] * 4 + ["diverged"], outcome.records
    assert [record.metrics["micro_batch"] for record in outcome.records[:4]] == [2, 8, 8, 8]
    found = json.loads((results / "trials/0004/divergence.json").read_text())
    assert found["epochs"] == 0
    assert "not finite" in found["reason"]
    assert "post-mortem:" in why(results, "4")


def test_a_warm_trial_equals_a_cold_one_bit_for_bit(tmp_path: Path) -> None:
    space = toy("network", search={"trials": 2, "sampler": "random", "seed": 3})
    warm, _ = search(tmp_path, space)
    cold, _ = search(tmp_path, space, cold=True)
    assert [(item.values, item.metrics) for item in warm.records] == [
        (item.values, item.metrics) for item in cold.records
    ]


def test_the_same_seed_proposes_the_same_settings_one_trial_at_a_time(tmp_path: Path) -> None:
    space = toy(
        "descend",
        search={"trials": 14, "sampler": "tpe", "seed": 5},
        config={"epochs": 1, "lr": {"log": [0.01, 0.4]}, "pause_s": {"choice": [0.0, 0.001]}},
    )
    first, _ = search(tmp_path, space)
    again, _ = search(tmp_path, space)
    assert [item.values for item in first.records] == [item.values for item in again.records]


@pytest.mark.parametrize(
    ("scheduler", "machine"), [("asha", ONE_CPU), ("hyperband", TWO_CPUS), ("median", ONE_CPU), ("pbt", TWO_CPUS)]
)
def test_every_scheduler_ends_every_trial_and_hears_of_finite_numbers_alone(
    tmp_path: Path, scheduler: str, machine: tuple[Node, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []

    def overheard(*arguments: Any) -> TrialScheduler:
        made = make_scheduler(*arguments)
        for name in ("on_trial_result", "on_trial_complete"):
            monkeypatch.setattr(made, name, partial(listen, name, getattr(made, name)))
        return made

    def listen(name: str, act: Any, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        heard.append((name, dict(result)))
        return act(controller, trial, result)

    monkeypatch.setattr(engine, "make_scheduler", overheard)
    space = toy(
        "misbehave",
        config={
            "epochs": 9,
            "lr": {"log": [0.001, 0.4]},
            "flag": "unused",
            "kind": {"choice": ["none", "aside", "nan", "diverge"]},
        },
        scheduler={"name": scheduler, "grace_epochs": 1, "reduction": 3},
        search={"trials": 12, "sampler": "random", "seed": 1},
    )
    outcome, results = search(tmp_path, space, machine)
    assert (len(outcome.records), outcome.interrupted) == (12, False)
    assert {name for name, _ in heard} == {"on_trial_result", "on_trial_complete"}
    numbers = [value for _, result in heard for value in result.values() if isinstance(value, float)]
    assert numbers
    assert all(math.isfinite(number) for number in numbers)
    assert any(result.get(f"{METRICS}/aside", 0) is None for _, result in heard), "what was infinite is left out"
    for record in outcome.records:
        if record.status == "diverged":
            last = TrialFolder(results, record.number).checkpoint()
            assert last is not None
            assert last.epoch == 2
            assert math.isfinite(load_state(last.path.read_bytes())["w"])
    statuses = {record.status for record in outcome.records}
    assert "finished" in statuses
    assert statuses <= {"finished", "stopped", "diverged"}, [(r.status, r.reason) for r in outcome.records]
    if scheduler in ("asha", "hyperband"):
        assert "stopped" in statuses


@pytest.mark.parametrize("scheduler", ["hyperband", "pbt"])
def test_of_the_copies_that_pausing_schedulers_need_the_latest_are_kept(tmp_path: Path, scheduler: str) -> None:
    """Of each trial one to go on from, one more that others may go on from, and what has been copied from."""
    space = toy(
        "counting",
        config={"epochs": 9, "lr": {"log": [0.001, 0.4]}, "folder": str(tmp_path)},
        scheduler={"name": scheduler, "grace_epochs": 1, "reduction": 2},
        search={"trials": 6, "sampler": "random", "seed": 1},
    )
    outcome, results = search(tmp_path, space, TWO_CPUS)
    assert {record.status for record in outcome.records} <= {"finished", "stopped"}
    rows = [row for record in outcome.records for row in TrialFolder(results, record.number).read_metrics()]
    copies = [row["metrics"]["copies"] for row in rows]
    assert 0 < max(copies) <= 3 * 6


def test_asha_keeps_what_falls_below_chance_before_it_learns(tmp_path: Path) -> None:
    """Beside four trials that sit at chance, which is better than where a network that learns begins."""
    space = toy("late", scheduler={"name": "asha", "grace_epochs": 1, "reduction": 2})
    space |= {
        "objective": {"metric": "score", "mode": "max"},
        "config": {"epochs": 4, "learns": {"choice": [False, True]}},
        "try_first": [{"learns": False}] * 4 + [{"learns": True}],
        "search": {"trials": 5},
    }
    outcome, _ = search(tmp_path, space)
    assert [(record.values["learns"], record.metrics["score"]) for record in outcome.best] == [(True, 0.8)]


def test_two_ranks_train_to_one_result(tmp_path: Path) -> None:
    space = toy("network", resources={"workers": 2}, search={"trials": 2, "sampler": "random"})
    outcome, _ = search(tmp_path, space, TWO_CPUS)
    assert [record.status for record in outcome.records] == ["finished", "finished"]


def test_ranks_have_the_environment_of_torchrun(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    space = toy("surrounded", config={"folder": str(ours)}, resources={"workers": 2}, search={"trials": 1})
    search(tmp_path, space, TWO_CPUS)
    program = tmp_path / "program.py"
    program.write_text(
        "from toys import surrounded\nfrom trainables.contract import Trial\n"
        f"list(surrounded(Trial({{'folder': {str(theirs)!r}}})))\n"
    )
    before = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(program)]
    subprocess.run(command, env=before, check=True, capture_output=True, timeout=300)
    for name in ("rank-0.json", "rank-1.json"):
        here, there = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
        of_its_agent = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"}
        told = there.keys() - before.keys() - of_its_agent
        assert {"RANK", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID"} <= told
        assert told <= here.keys()
        differ = {key for key in told if here[key] != there[key]}
        places = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"}
        assert differ <= places, "what a rank is, it is in both"


CHATTY = """
import logging, sys, warnings
from tqdm import tqdm
from trainables.contract import Report

print("imported")

def train(trial):
    try:
        for epoch in range(trial.resume["epoch"] if trial.resume else 0, 2):
            if trial.config["kind"] != "quiet":
                say(trial, epoch)
            if trial.config["kind"] == "bug" and epoch == 1:
                raise KeyError("no such batch")
            metric = "lost" if trial.config["kind"] == "unmeasured" else "loss"
            yield Report({metric: 1.0}, state=lambda: {"epoch": epoch + 1})
    finally:
        if trial.config["kind"] != "quiet":
            print("closed", file=sys.stderr)

def say(trial, epoch):
    print("epoch", epoch, "of rank", trial.rank)
    logging.getLogger("own").info("logged")
    list(tqdm(range(9), bar_format="{n}", file=sys.stdout))
    warnings.warn(f"{trial.config['kind']} {epoch}")  # Python tells the same only once
"""


def test_what_rank_0_prints_is_kept_in_the_folder_of_its_trial(tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text(CHATTY)
    kinds = ["all", "unmeasured", "quiet", "bug"]
    space = toy(
        "train",
        trainable="chatty:train",
        config={"kind": {"choice": kinds}},
        resources={"workers": 2},
        try_first=[{"kind": kind} for kind in kinds],
        search={"trials": 4},
    )
    outcome, results = search(tmp_path, space, TWO_CPUS)
    assert [record.status for record in outcome.records] == ["finished", "failed", "finished", "failed"]
    line = next(number for number, line in enumerate(CHATTY.splitlines(), start=1) if "warnings.warn" in line)

    def said(kind: str, *epochs: int) -> str:
        warned = f"{tmp_path / 'chatty.py'}:{line}: UserWarning: {kind} %d\n  {CHATTY.splitlines()[line - 1].strip()}\n"
        return "".join(f"epoch {epoch} of rank 0\nlogged\n9\n{warned % epoch}" for epoch in epochs) + "closed\n"

    printed = {path.parent.name: path.read_text() for path in results.glob("trials/*/output.txt")}
    assert printed == {
        "0000": "imported\n" + said("all", 0, 1),
        "0001": said("unmeasured", 0),  # closed when the next trial begins, and all ranks have been told
        "0003": f"{said('bug', 0, 1)}imported\n{said('bug', 1)}",  # the retry is in other processes
    }
    told = why(results, "3").splitlines()
    place = told.index(f"{results / 'trials/0003/output.txt'} ends:")
    assert told[place + 10] == "  closed"


def test_a_rank_that_diverges_alone_does_not_hang_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = toy(
        "one_rank_blows",
        config={"lr": {"choice": [0.1, 0.9]}},
        resources={"workers": 2},
        try_first=[{"lr": 0.9}, {"lr": 0.1}],
        search={"trials": 2},
    )
    outcome, _ = search(tmp_path, space, TWO_CPUS)
    assert [(record.status, record.reason) for record in outcome.records] == [
        ("diverged", "rank 1 alone"),
        ("finished", "ran to its end"),
    ]


def test_a_time_budget_stops_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs out once the first trial has reported. HyperBand has all trials drawn before that."""
    reported = property(lambda stop: any(tmp_path.glob("**/metrics.jsonl")))
    monkeypatch.setattr(engine._Stop, "out_of_time", reported)
    space = toy(
        "descend",
        config={"epochs": 100, "pause_s": 0.5, "lr": {"log": [0.01, 0.4]}},
        search={"trials": 50, "time_budget": "1h"},
        scheduler={"name": "hyperband"},
    )
    outcome, results = search(tmp_path, space)
    assert (len(outcome.records) > 0, outcome.interrupted) == (True, False)
    assert {record.status for record in outcome.records} == {"stopped"}
    assert all("time budget of 1h ran out" in record.reason for record in outcome.records)
    trials = study_of(results).get_trials(deepcopy=False)
    begun = [trial.number for trial in trials if trial.state.is_finished()]
    assert begun == [record.number for record in outcome.records]
    assert all(trial.state == optuna.trial.TrialState.WAITING for trial in trials[len(begun) :]), (
        "drawn, and never begun"
    )


@pytest.mark.parametrize(("budget_s", "over"), [(-1.0, True), (3600.0, False), (None, False)])
def test_a_time_budget_runs_out(budget_s: float | None, over: bool) -> None:
    assert engine._Stop(Interruption(), budget_s).out_of_time == over


def test_what_the_recorder_trips_over_ends_the_search_to_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("the line")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "trial_line", broken)
        cut, results = search(tmp_path, toy("descend", search={"trials": 3, "sampler": "random"}))
    assert cut.interrupted
    assert (cut.reason or "").startswith("RuntimeError: the line (")
    assert [record.status for record in cut.records if record.epochs == 4] == ["finished"], "and is not run again"
    assert ended_after(study_of(results)) is None
    space, _ = load_space(results / "space.yaml")
    whole = engine.run(space, make_plan(space, ONE_CPU), results)
    assert (whole.interrupted, [record.status for record in whole.records]) == (False, ["finished"] * 3)
    assert whole.records[0] == cut.records[0]
    assert ended_after(study_of(results)) == 3


def test_a_full_disk_ends_the_search_to_be_resumed(small_disk: Path) -> None:
    """Its trials have done nothing wrong, and those after them would meet the same."""
    cut, results = search(small_disk, toy("heavy", search={"trials": 8, "sampler": "random"}))
    assert cut.interrupted
    assert "the disk is full (" in (cut.reason or "")
    statuses = [record.status for record in cut.records]
    assert statuses == ["finished"] * (len(statuses) - 1) + ["interrupted"], cut.records
    assert ended_after(study_of(results)) is None
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    space, _ = load_space(results / "space.yaml")
    whole = engine.run(space, make_plan(space, ONE_CPU), results)
    assert (whole.interrupted, [record.status for record in whole.records]) == (False, ["finished"] * 8)
    assert whole.records[len(statuses) - 1].metrics["started_at"] != 0, "it goes on from its checkpoint"


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    space = toy(
        "descend",
        objective=[{"metric": "loss", "mode": "min"}, {"metric": "lr_seen", "mode": "min"}],
        search={"trials": 6, "sampler": "nsga2"},
    )
    outcome, results = search(tmp_path, space)
    assert len(outcome.best) == 6, "a larger learning rate always gives the smaller loss here"
    assert len(yaml.safe_load((results / "best.yaml").read_text())["front"]) == 6


def test_relative_paths_mean_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(
        "import os\ndef train(trial):\n    yield {'loss': float(os.getcwd() == trial.config['here'])}\n"
    )
    space = toy("descend", trainable="where:train", config={"here": os.getcwd()}, search={"trials": 1})
    outcome, _ = search(tmp_path, space)
    assert outcome.records[0].metrics["loss"] == 1.0


def test_a_mailbox_imports_nothing_large(tmp_path: Path) -> None:
    """All ranks wait for it when they begin."""
    spec = GroupSpec("toys:descend", (str(HERE),), ("loss",), 1, 1, 0.0, None, None, str(tmp_path))
    group = Group(spec)
    assert isinstance(group.ask(Begin({"epochs": 3, "lr": 0.1}, 0)), Reported)
    imported = ray.get(group._mailbox.__ray_call__.remote(lambda self: set(sys.modules)))
    group.stop()
    assert "search.workers.messages" in imported
    assert {"torch", "optuna", "pandas", "ray.train", "ray.tune", "ray.data"} & imported == set()


def test_a_group_whose_mailbox_died_is_dead_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """As when the node that the mailbox ran on has gone."""
    spec = GroupSpec("toys:descend", (str(HERE),), ("loss",), 1, 1, 0.0, None, None, str(tmp_path))
    group = Group(spec)
    assert isinstance(group.ask(Begin({"epochs": 3, "lr": 0.1}, 0)), Reported)
    ray.kill(group._mailbox)
    with pytest.raises(GroupDied, match="the group's mailbox died: "):
        group.ask(Advance())
    group.stop()
    group._thread.join(300)  # a busy machine takes longer than `stop` waits
    assert not group._thread.is_alive()
    assert not list(tmp_path.iterdir())


def test_ranks_that_hang_end_with_their_group_even_without_a_mailbox(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    spec = GroupSpec("toys:one_rank_hangs", (str(HERE),), ("loss",), 2, 1, 0.0, None, None, str(tmp_path / "scratch"))
    group = Group(spec)
    assert isinstance(group.ask(Begin({"flag": str(flag)}, 0)), Reported)
    ray.get(group._mailbox.post.remote(Advance()))
    give_up = time.monotonic() + 300
    while not flag.exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert flag.exists(), "rank 1 hangs from here on"
    ray.kill(group._mailbox)
    group.stop()
    group._thread.join(300)  # a busy machine takes longer than `stop` waits
    assert not group._thread.is_alive()
