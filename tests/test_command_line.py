"""Mistakes in the command or the space: exit status 2 and one line, before Ray starts. And what starts nothing."""

from __future__ import annotations

import errno
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import ray
import torch
import yaml
from ledgers import ask, end_toy, open_journal
from s3 import Store
from spaces import write_family

import launch
from search import cluster, command, files, yaml_file
from search import run as engine
from search.interruption import SIGNALS, Interruption, OwnHandler
from search.plan import Node, make_plan
from search.records.folder import SCRATCH, TrialFolder, running
from search.records.mirror import Mirror
from search.records.provenance import write_space
from search.records.record import Record, best_of
from search.results import read_results
from search.space import Space
from search.space.file import load_space, read_space
from search.study import ended_after, open_study, records
from search.workers.states import save_state
from trainables.contract import UserError

ROOT = Path(__file__).parents[1]
SPACE: dict[str, Any] = {
    "trainable": "toys:descend",
    "objective": {"metric": "loss", "mode": "min"},
    "config": {"epochs": 4, "lr": {"log": [0.01, 0.4]}},
    "search": {"trials": 4, "sampler": "random"},
}
FAMILY = """
def train(trial):
    yield {"loss": trial.config["lr"]}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, in an empty folder with the space `toy`, on a machine without Ray."""

    def no_ray(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", no_ray)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test may have started one
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "argv", ["platform/launch.py"])
    monkeypatch.setattr(launch, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "toy.yaml").write_text("# Descend a parabola.\n" + yaml_file.dump(SPACE))

    def launched(*arguments: str) -> tuple[int, str, str]:
        status = launch.main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return launched


def finished_search(folder: Path) -> Path:
    """A results folder with one trial."""
    space, _ = load_space(folder / "search_spaces" / "toy.yaml")
    results = folder / "results" / "done"
    ledger = open_journal(space, results)
    yaml_file.write(results / "space.yaml", space.document())
    end_toy(ledger, ask(ledger), "finished")
    TrialFolder(results, 0).append_metrics({"epoch": 1, "seconds": 0.5, "metrics": {"loss": 0.5}})
    return results


TOY = ("--space", "toy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a space with --space, or a results folder"),
        (["--space", "tpy"], "--space tpy: no such file and no such space; did you mean `toy`?"),
        (["--space", "search_spaces"], "--space search_spaces: no such file and no such space"),
        ([*TOY, "--resume", "results/x"], "name a space with --space, or a results folder"),
        (["--resume", "results/x"], "--resume results/x: there is no space.yaml here"),
        (["--resume", "results/x", "--name", "y"], "--name cannot be combined with --resume: the folder determines it"),
        (
            [*TOY, "--name", "../mine"],
            "--name ../mine: it must be the name of a folder, in the one",
        ),
        ([*TOY, "--name", ".."], "--name ..: it must be the name of a folder"),
        (["--why", "3"], "--why needs --report RESULTS_DIR"),
        (["--report", "results/x"], "results/x: there is no space.yaml here"),
        (["--report", "results/x", "--seed", "0"], "--seed cannot be combined with --report"),
        (["--report", "results/x", "--set", "a=1"], "--set cannot be combined with --report"),
        (["--list", "--why", "3"], "--why cannot be combined with --list"),
        (["--export", "best", "model"], "name a space with --space, or a results folder"),
        (["--report", "results/x", "--export", "best", "model"], "results/x: there is no space.yaml here"),
        (
            ["--report", "results/x", "--export", "best", "search_spaces"],
            "search_spaces exists and is not an empty fol",
        ),
        (["--report", "results/x", "--why", "3", "--export", "3", "model"], "--why cannot be combined with --export"),
        ([*TOY, "--export", "best", "search_spaces"], "--export: search_spaces exists and is not an empty folder"),
        ([*TOY, "--export", "3", "model"], "--export 3: a search exports its best; write best, or add --report"),
        ([*TOY, "--export", "best", "a" * 300], f"--export: {'a' * 300}: File name too long"),
        ([*TOY, "--table", "--export", "best", "model"], "--export cannot be combined with --table"),
        ([*TOY, "--export", "best"], "argument --export: expected 2 arguments"),
        ([*TOY, "--warm-start", "results/x"], "--warm-start results/x: there is no space.yaml here"),
        ([*TOY, "--retry-failed"], "--retry-failed needs --resume RESULTS_DIR"),
        (["--report", "results/x", "--retry-failed"], "--retry-failed cannot be combined with --report"),
        ([*TOY, "--profile", "night"], "search_spaces/toy.yaml: profile 'night' is unknown; none are known"),
        ([*TOY, "--trials", "ten"], "argument --trials: invalid int value: 'ten'"),
        ([*TOY, "--trails", "10"], "unrecognized arguments: --trails 10"),
        ([*TOY, "--trials", "0"], "search_spaces/toy.yaml: search.trials: 0 is refused"),
        ([*TOY, "--epochs", "0"], "--epochs 0: a trial has at least one epoch; write 1 or more"),
        ([*TOY, "--epochs", "-1"], "--epochs -1: a trial has at least one epoch; write 1 or more"),
        ([*TOY, "--set", "config.epochs=-1"], "toy.yaml: config.epochs: -1: a trial has at least one epoch; write 1"),
        (["--space", "a" * 300], f"{'a' * 300}: File name too long"),
        (["--report", "a" * 300], f"{'a' * 300}/space.yaml: File name too long"),
        (["--resume", "a" * 300], f"{'a' * 300}/space.yaml: File name too long"),
        ([*TOY, "--seed", "-1"], "search_spaces/toy.yaml: search.seed: -1 is refused"),
        (
            [*TOY, "--time-budget", "90"],
            "search.time_budget: 90 is refused: '90' is not a duration; write a number and",
        ),
        ([*TOY, "--time-budget", "soon"], "search.time_budget: 'soon' is refused: 'soon' is not a duration"),
        (
            [*TOY, "--time-budget", ""],
            "--time-budget: empty value; is a variable unset? Otherwise leave it out",
        ),
        ([*TOY, "--set", "config.lrr=1"], "--set config.lrr: no such key; did you mean `config.lr`?"),
        ([*TOY, "--set", "config.lr"], "--set config.lr: write KEY=VALUE"),
        ([*TOY, "--set", "config.lr=1e-4"], "--set config.lr: line 1: YAML reads 1e-4 as text; write 1.0e-4"),
        ([*TOY, "--set", "search.sampler=grid"], "toy.yaml: search.sampler: grid needs finitely many values of lr"),
        ([*TOY, "--set", "scheduler.name=ashaa"], "scheduler.name: 'ashaa' is unknown; did you mean `asha`?"),
        ([*TOY, "--set", "resources.workers=999"], "toy.yaml: resources: a group of 999 x (1 CPU, "),
        (
            [*TOY, "--set", "trainable=toys:descent"],
            "trainable: toys has no function 'descent'; did you mean `descend`",
        ),
        ([*TOY, "--set", "scheduler.name=hyperband", "--set", "config.epochs=null"], "hyperband needs a known"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], message: str, run: Run) -> None:
    status, _, told = run(*arguments)
    assert status == 2
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert message in told
    assert not Path("results").exists()


def test_epochs_where_a_space_has_none_are_refused_by_the_option_that_was_typed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml_file.dump({**SPACE, "config": {"lr": 0.1, "steps": 3}}))
    status, _, told = run("--space", "mine.yaml", "--epochs", "2")
    assert status == 2
    assert told == (
        "error: mine.yaml: --epochs, which is --set config.epochs: no such key; did you mean `config.steps`?\n"
    )


def test_a_mistake_of_the_data_is_told_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    name = write_family(
        tmp_path,
        """
        from trainables.contract import UserError

        def train(trial):
            yield {"loss": 1.0}

        def prepare(config):
            raise UserError(f"config.root: there is nothing in {config['root']}; name the folder of the data set")
        """,
    )
    space = {**SPACE, "trainable": f"{name}:train", "config": {"root": "/data"}}
    (tmp_path / "mine.yaml").write_text(yaml_file.dump(space))
    status, _, told = run("--space", "mine.yaml")
    assert (status, told) == (2, "error: config.root: there is nothing in /data; name the folder of the data set\n")
    assert not (tmp_path / "results").exists()


def test_a_bug_in_prepare_is_a_line_and_names_the_place(run: Run, tmp_path: Path) -> None:
    name = write_family(
        tmp_path,
        """
        def train(trial):
            yield {"loss": 1.0}

        def prepare(config):
            return config["root"]
        """,
    )
    (tmp_path / "mine.yaml").write_text(yaml_file.dump({**SPACE, "trainable": f"{name}:train", "config": {"lr": 0.1}}))
    status, _, told = run("--space", "mine.yaml")
    assert status == 2
    assert told.startswith(f"error: {name}:train: its module's `prepare` failed: KeyError: 'root' (")
    assert told.rstrip().endswith("rename a helper that happens to be called so")
    assert told.count("\n") == 1


def test_a_prepare_that_leaves_the_program_has_not_found_anything(run: Run, tmp_path: Path) -> None:
    code = "import sys\ndef train(trial):\n    yield {'loss': 1.0}\ndef prepare(config):\n    sys.exit()\n"
    name = write_family(tmp_path, code)
    (tmp_path / "mine.yaml").write_text(yaml_file.dump({**SPACE, "trainable": f"{name}:train", "config": {"lr": 0.1}}))
    status, _, told = run("--space", "mine.yaml")
    assert status == 2
    assert "its module's `prepare` failed: SystemExit" in told


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("config.lr=0.1", "config.lr"),
        ("config.epochs=7", "config.epochs"),
        ("objective.mode=max", "objective.mode"),
        ("try_first=[{lr: 0.3}]", "try_first"),
    ],
)
def test_a_search_goes_on_as_it_was(override: str, changed: str, run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    before = (results / "space.yaml").read_text()
    status, _, told = run("--resume", str(results), "--set", override)
    assert status == 2
    assert f"--resume {results}: " in told
    assert f"{changed} cannot change, because its trials have run" in told
    assert (results / "space.yaml").read_text() == before


def test_other_constraints_judge_the_trials_anew(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = finished_search(tmp_path)
    monkeypatch.setattr(cluster, "start_ray", lambda address: None)
    for limit, status, told in ((-1.0, 1, "no trial finished within the constraints"), (9.0, 0, "best: trial 0")):
        constraints = f"constraints={{loss: {{max: {limit}}}}}"
        ended, out, _ = run("--resume", str(results), "--trials", "1", "--set", constraints)
        assert (ended, told in out) == (status, True)
        assert read_space(results / "space.yaml").constraints["loss"].max == limit
        assert (results / "best.yaml").exists() == (status == 0)


def test_a_folder_says_by_which_commands_its_trials_ran(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, _ = load_space(tmp_path / "search_spaces" / "toy.yaml")
    for word in ("first", "second", "third"):
        monkeypatch.setattr(sys, "argv", ["launch.py", word])
        write_space(tmp_path, space)
    ran = yaml_file.read(tmp_path / "space.yaml")["ran"]
    assert ran["command"] == "python launch.py third"
    assert [before["command"] for before in ran["before"]] == ["python launch.py first", "python launch.py second"]
    assert all(set(before) == {"command", "versions", "commit", "time"} for before in ran["before"])
    assert read_space(tmp_path / "space.yaml").document() == space.document()


def test_a_results_folder_is_not_used_twice(run: Run, tmp_path: Path) -> None:
    finished_search(tmp_path)
    status, _, told = run(*TOY, "--name", "done")
    assert status == 2
    assert "results/done holds a search already; go on with it by --resume, or choose another --name" in told


@pytest.mark.parametrize(
    "content",
    [*(yaml_file.dump({**SPACE, "ran": ran}) for ran in (None, {"space": "exported"}, 5)), "# not written yet"],
)
def test_a_space_file_that_is_not_of_a_search_is_not_replaced(content: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/space.yaml").write_text(content)
    status, _, told = run(*TOY, "--results", ".", "--name", "mine")
    assert (status, told) == (
        2,
        "error: mine/space.yaml is not of a search, and would be replaced; choose another --name\n",
    )
    assert (tmp_path / "mine/space.yaml").read_text() == content


def test_searches_begun_in_one_second_have_folders_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    monkeypatch.setattr(command, "is_there", lambda path: False)  # both look before either has made its folder
    monkeypatch.setattr(cluster, "start_ray", lambda address: ())
    monkeypatch.setattr(engine, "run", lambda *arguments: engine.Outcome((), (), interrupted=False))
    for _ in range(3):
        run(*TOY)
    assert sorted(path.name for path in Path("results").iterdir()) == ["toy-now", "toy-now-2", "toy-now-3"]


def test_results_on_a_disk_that_is_not_there_are_refused(run: Run) -> None:
    Path("results").symlink_to("no such disk")
    status, _, told = run(*TOY)
    assert (status, "cannot make a folder here: File exists" in told) == (2, True)


def test_results_in_a_file_are_refused_before_anything_runs(run: Run) -> None:
    Path("notes.txt").write_text("mine")
    for dry in ([], ["--dry-run"]):
        assert run(*TOY, "--results", "notes.txt", *dry)[::2] == (
            2,
            "error: --results notes.txt: it is a file; name a folder\n",
        )


def test_a_resume_does_not_look_at_where_new_results_would_go(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path).rename(tmp_path / "elsewhere")
    Path("results").rmdir()
    Path("results").write_text("mine")
    assert run("--resume", str(results), "--dry-run")[0] == 0


def test_two_processes_do_not_run_one_search(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    before = (results / "space.yaml").read_text()
    lock = results / "study.journal.lock"
    lock.symlink_to("study.journal")
    with running(results):
        status, _, told = run("--resume", str(results), "--trials", "9")
    assert status == 2
    assert told == f"error: {results}: another process is running this search; wait for it, or end it first\n"
    assert (results / "space.yaml").read_text() == before
    assert lock.is_symlink(), "it is writing"


@pytest.mark.parametrize(
    "target", ["study.journal", "results/done/study.journal", "/before/it/was/moved/study.journal"]
)
def test_a_lock_that_a_killed_process_left_is_not_waited_for(
    target: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "start_ray", lambda address: os.kill(os.getpid(), signal.SIGINT))
    results = finished_search(tmp_path)
    (results / "study.journal.lock").symlink_to(target)
    assert run("--resume", str(results))[0] == 130
    assert not (results / "study.journal.lock").is_symlink()


def test_a_search_that_holds_a_nan_is_the_same_as_itself(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml_file.dump({**SPACE, "config": {"fill": math.nan, "bins": [0.5, math.nan]}}))
    command.check_same(read_space(tmp_path / "toy.yaml"), read_space(tmp_path / "toy.yaml"), tmp_path)


def test_a_folder_that_cannot_be_written_to_is_reported_all_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = finished_search(tmp_path)

    def full(path: Path, content: bytes, durable: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "replace_bytes", full)
    status, told, _ = run("--report", str(results))
    assert status == 0
    assert "best: trial 0" in told
    assert f"the tables in {results} were not updated: [Errno {errno.EROFS}] Read-only file system" in told
    status, _, told = run("--resume", str(results))
    assert (status, told) == (2, f"error: {results}: cannot be written to: Read-only file system\n")


@pytest.mark.parametrize("what", ["best", "0"])
def test_a_trial_without_a_checkpoint_is_not_exported(what: str, run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    status, _, told = run("--report", str(results), "--export", what, "model")
    assert status == 2
    lacks = "trial 0 (finished) has no checkpoint: its reports have no state, or it was deleted"
    assert told == f"error: --export {what}: {lacks}\n"
    assert not (tmp_path / "model").exists()


def test_an_export_that_fails_leaves_the_search_its_exit_status(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(space: Space, *_: object) -> engine.Outcome:
        ledger = open_journal(space, tmp_path / "results/mine")
        end_toy(ledger, ask(ledger), "finished")
        found = records(ledger.study, space)
        return engine.Outcome(tuple(found), tuple(best_of(found, space)), interrupted=False)

    monkeypatch.setattr(cluster, "start_ray", lambda address: None)
    monkeypatch.setattr(engine, "run", ran)
    status, _, told = run(*TOY, "--name", "mine", "--export", "best", "model")
    assert status == 0
    lacks = "trial 0 (finished) has no checkpoint: its reports have no state, or it was deleted"
    assert told == f"error: not exported: --export best: {lacks}\n"


def test_an_export_prints_where_it_went_and_changes_no_results(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    TrialFolder(results, 0).write_checkpoint(2, save_state({"w": 0.5}))
    before = sorted(results.rglob("*"))
    status, told, _ = run("--report", str(results), "--export", "best", "model")
    assert (status, told) == (0, "trial 0, its checkpoint after epoch 2: model\n")
    assert sorted(results.rglob("*")) == before


def test_why_of_an_unknown_trial_is_a_mistake(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    status, _, told = run("--report", str(results), "--why", "7")
    assert status == 2
    assert told == f"error: trial 7: there is none in {results}; known: 0\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("study.journal", "", "study.journal: there is no search in it; name a results folder of an earlier"),
        ("study.journal", "{torn\n{}\n", "study.journal: line 1 cannot be read: "),
        ("space.yaml", "[1, 2]", "space.yaml: a space file is a mapping with the keys trainable,"),
    ],
)
@pytest.mark.parametrize("option", ["--report", "--resume"])
def test_a_folder_whose_files_were_cut_off_is_named(
    option: str, file: str, text: str, message: str, run: Run, tmp_path: Path
) -> None:
    results = finished_search(tmp_path)
    (results / file).write_text(text)
    status, _, told = run(option, str(results))
    assert (status, told.count("\n")) == (2, 1)
    assert message in told


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["--report", "results/done"], "study.journal"),
        (["--report", "results/done"], "trials/0001/metrics.jsonl"),
        (["--report", "results/done", "--export", "best", "model"], "study.journal"),
        (["--resume", "results/done"], "study.journal"),
        (["--resume", "results/done", "--dry-run"], "trials/0001/metrics.jsonl"),
        ([*TOY, "--warm-start", "results/done", "--name", "new"], "study.journal"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_file_that_may_not_be_opened_is_named(arguments: list[str], file: str, run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    ask(open_journal(read_space(results / "space.yaml"), results))  # trial 1 is under way
    (results / file).unlink(missing_ok=True)
    (results / file).mkdir(parents=True)
    status, _, told = run(*arguments)
    assert (status, told) == (2, f"error: results/done/{file}: cannot be opened: Is a directory\n")


def test_a_folder_without_its_study_cannot_be_resumed(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    (results / "study.journal").unlink()
    assert run("--resume", str(results))[0] == 2


def test_a_name_that_the_locale_cannot_write_is_written_escaped(tmp_path: Path) -> None:
    family = write_family(tmp_path, "def train(trial):\n    yield {'λ': 1.0}\n")
    (tmp_path / "greek.yaml").write_text(f"trainable: {family}:train\nobjective: {{metric: λ, mode: min}}\n")
    command = [sys.executable, str(ROOT / "launch.py"), "--space", "greek.yaml", "--dry-run"]
    told = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert r"greek: min \u03bb over " in told.stdout


def test_results_that_cannot_be_a_folder_are_a_mistake(run: Run, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    assert run(*TOY)[0] == 2


def test_a_warm_start_that_breaks_off_can_be_begun_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finished_search(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    new = (*TOY, "--warm-start", "results/done", "--name", "new")
    monkeypatch.setattr(cluster, "start_ray", lambda address: os.kill(os.getpid(), signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "add_trial", full)
        assert run(*new)[::2] == (
            2,
            "error: --warm-start: results/new: cannot be written to: No space left on device\n",
        )
    (tmp_path / "results/new/.study.journal.lock").symlink_to("gone/.study.journal")  # as a kill leaves it
    status, out, _ = run(*new)
    assert (status, "warm start: 1 trials of" in out) == (130, True)
    assert not list((tmp_path / "results/new").glob(".study*"))
    assert run("--resume", "results/new", "--dry-run")[0] == 0


def test_a_warm_start_from_another_objective_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    status, _, told = run(*TOY, "--set", "objective.mode=max", "--warm-start", str(results), "--name", "new")
    assert (status, "its objective was min loss, and here it is max loss" in told) == (2, True)
    assert not (tmp_path / "results" / "new").exists()


def test_ctrl_c_before_there_is_anything_to_go_on_with_is_status_130(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_space", pressed)
    status, _, told = run(*TOY)
    assert (status, told) == (130, "interrupted\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("how", SIGNALS)
def test_ctrl_c_while_ray_starts_leaves_a_search_to_go_on_with(
    how: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "start_ray", lambda address: os.kill(os.getpid(), how))
    status, out, told = run(*TOY, "--name", "early", "--cold", "--export", "best", "my model")
    assert (status, told) == (130, "")
    assert "no trial was run" in out
    assert out.endswith(
        "interrupted; go on with: python platform/launch.py --resume results/early --cold --export best 'my model'\n"
    )
    assert (tmp_path / "results/early/trials.csv").exists()


def test_slurms_warning_reaches_the_search_after_tune_has_taken_the_signal() -> None:
    """Also between the last trial of a table's cell and its next search, when Tune no longer listens."""
    interruption = Interruption()
    with interruption.heeded():
        own = OwnHandler()
        signal.signal(signal.SIGUSR1, lambda *_: None)
        own.setup(stop=None, num_samples=1)
        signal.raise_signal(signal.SIGUSR1)
        assert interruption.pressed
        own.setup()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, "a second warning is none"
    assert pickle.loads(pickle.dumps(own))


def test_a_signal_that_comes_as_soon_as_it_is_handled_stops_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    interruption, install, before = Interruption(), signal.signal, signal.getsignal(SIGNALS[0])

    def pressed(signum: int, handler: Any) -> Any:
        earlier = install(signum, handler)
        monkeypatch.undo()
        signal.raise_signal(signum)
        return earlier

    monkeypatch.setattr(signal, "signal", pressed)
    with interruption.heeded():
        assert interruption.pressed
    assert signal.getsignal(SIGNALS[0]) == before


@pytest.mark.parametrize(("uri", "told"), [("s3://nowhere/runs", "cannot be written to"), ("s4://x", "cannot be open")])
def test_a_mirror_that_cannot_be_used_leaves_nothing_in_the_way(
    uri: str, told: str, run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "start_ray", lambda address: os.kill(os.getpid(), signal.SIGINT))
    status, _, error = run(*TOY, "--name", "night", "--results", uri)
    assert (status, error.count("\n")) == (2, 1)
    assert f"{uri}/night: {told}" in error
    assert not Path("results").exists()
    status, out, _ = run(*TOY, "--name", "night", "--results", "s3://bucket/runs")
    assert (status, "\nkept at: s3://bucket/runs/night\n" in out) == (130, True)


class TestResumeOfAMirroredSearch:
    """By the local folder, which may know more of the search than the mirror, or less."""

    @pytest.fixture
    def there(self, run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The mirror of results/night, a search that was interrupted at once."""
        monkeypatch.setattr(cluster, "start_ray", lambda address: os.kill(os.getpid(), signal.SIGINT))
        run(*TOY, "--name", "night", "--results", "s3://bucket/my%20runs")
        return store.folder / "bucket/my runs/night"

    def extend(self, results: Path) -> None:
        ledger = open_journal(read_space(results / "space.yaml"), results)
        end_toy(ledger, ask(ledger), "finished")

    def test_it_goes_on_mirroring_and_says_so(self, there: Path, run: Run) -> None:
        for _ in range(2):  # the second time, too, it is known
            self.extend(Path("results/night"))
            status, out, _ = run("--resume", "results/night")
            assert status == 130
            assert "\nmirrored to s3://bucket/my%20runs/night, as before\n" in out
            assert "--resume results/night\n" in out, "the folder that is at hand need not be fetched"
            assert (there / "study.journal").read_bytes() == Path("results/night/study.journal").read_bytes()

    def test_a_mirror_that_has_more_is_not_overwritten(self, there: Path, run: Run, tmp_path: Path) -> None:
        shutil.copytree("results/night", "elsewhere/night")
        self.extend(Path("results/night"))
        run("--resume", "results/night")
        before = [(there / name).read_bytes() for name in ("study.journal", "space.yaml")]
        old = Path("elsewhere/night/space.yaml").read_text()
        status, _, error = run("--resume", "elsewhere/night")
        assert (status, error.count("\n")) == (2, 1)
        assert "has more of this search than elsewhere/night; go on from there, with --resume s3://bucket/my%" in error
        assert [(there / name).read_bytes() for name in ("study.journal", "space.yaml")] == before
        assert Path("elsewhere/night/space.yaml").read_text() == old

    def test_a_copy_of_the_folder_does_not_take_the_place_of_what_it_was_copied_from(
        self, there: Path, run: Run
    ) -> None:
        shutil.copytree("results/night", "results/day")
        before = (there / "space.yaml").read_bytes()
        status, out, _ = run("--resume", "results/day")
        assert (status, "mirrored to s3://bucket/my%20runs/night, as before" in out) == (130, False)
        assert "\nnot mirrored to s3://bucket/my%20runs/night, which belongs to another folder\n" in out
        assert (there / "space.yaml").read_bytes() == before

    def test_without_a_word_of_the_mirror_it_goes_on_here_alone(self, there: Path, run: Run) -> None:
        shutil.rmtree(there.parents[1])  # the bucket
        status, _, error = run("--resume", "results/night")
        assert (status, error.count("\n")) == (2, 1)
        assert error.endswith("; without `mirror` in results/night/space.yaml it goes on here alone\n")
        document = yaml_file.read(Path("results/night/space.yaml"))
        del document["ran"]["mirror"]
        yaml_file.write(Path("results/night/space.yaml"), document)
        status, out, _ = run("--resume", "results/night")
        assert (status, "mirrored" in out) == (130, False)


@pytest.mark.parametrize(
    ("hopeless", "again"), [(False, "--resume results/full"), (True, "--resume results/full --retry-failed")]
)
def test_what_a_search_could_not_go_on_for_stands_before_the_line_that_resumes(
    hopeless: bool, again: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = engine.Outcome((), (), interrupted=True, reason="it says why", hopeless=hopeless)
    monkeypatch.setattr(cluster, "start_ray", lambda address: None)
    monkeypatch.setattr(engine, "run", lambda *_: cut)
    status, out, _ = run(*TOY, "--name", "full")
    line = f"interrupted: it says why; go on with: python platform/launch.py {again}\n"
    assert (status, out.endswith(f"\n{line}")) == (1, True)
    assert "no trial" not in out, "nothing is known of them"


def test_a_ray_that_does_not_start_leaves_a_search_that_can_be_resumed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(address: None) -> None:
        raise UserError("Ray did not start")

    monkeypatch.setattr(cluster, "start_ray", fails)
    status, out, error = run(*TOY, "--name", "early")
    line = "interrupted: Ray did not start; go on with: python platform/launch.py --resume results/early\n"
    assert (status, out.endswith(f"\n{line}"), error) == (1, True, "")
    status, out, _ = run("--resume", "results/early")
    assert (status, out.endswith(f"\n{line}")) == (1, True)


def test_a_folder_that_goes_while_trials_run_is_told_and_no_bug(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = finished_search(tmp_path)
    space, _ = load_space(tmp_path / "search_spaces/toy.yaml", ["search.trials=2"])

    def fit() -> None:
        (results / ".ray").mkdir(parents=True)  # as Tune does
        (results / "trials/0001").mkdir()

    def goes(*_: object) -> SimpleNamespace:
        results.rename(tmp_path / "moved")
        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(engine, "_tuner", goes)
    outcome = engine.run(space, make_plan(space, [Node(1, 0)]), results)
    told = f"the results cannot be written ([Errno 2] No such file or directory: '{results}/trials/0001')"
    assert (outcome.interrupted, outcome.reason, outcome.records) == (True, told, ())
    assert not results.exists()


def test_what_fails_at_the_end_of_a_search_leaves_the_rest_to_be_done(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = finished_search(tmp_path)
    (results / SCRATCH).mkdir()
    space, _ = load_space(tmp_path / "search_spaces/toy.yaml", ["search.trials=1"])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine, "write_results", full)
    mirror = Mirror(results, f"file://{tmp_path}/mirror")
    outcome = engine.run(space, make_plan(space, [Node(1, 0)]), results, mirror=mirror)
    assert (outcome.interrupted, len(outcome.best)) == (True, 1)
    assert outcome.reason == "the disk is full ([Errno 28] No space left on device)"
    assert not (results / SCRATCH).exists()
    assert (tmp_path / "mirror/study.journal").exists()
    assert ended_after(open_study(results / "study.journal", space, create=False)) is None


def test_ray_s_files_go_even_where_a_slot_still_writes_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SCRATCH).mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: monkeypatch.undo())  # the first time in vain
    engine._remove(tmp_path / SCRATCH)
    assert not (tmp_path / SCRATCH).exists()


def test_a_dry_run_passes_over_a_folder_that_is_torn(run: Run, tmp_path: Path) -> None:
    (tmp_path / "results/other").mkdir(parents=True)
    for text in ("a: [", "", "trainable: toys:descend\nran:"):
        (tmp_path / "results/other/space.yaml").write_text(text)
        assert run(*TOY, "--dry-run")[0] == 0
    (finished_search(tmp_path) / "study.journal").unlink()
    (tmp_path / "results/done/study.journal").mkdir()  # which nobody may open
    assert "GPU-hours follow once an epoch has been timed" in run(*TOY, "--dry-run")[1]


def test_a_dry_run_prints_the_resolved_space_the_plan_and_the_estimate(run: Run, tmp_path: Path) -> None:
    status, told, error = run(*TOY, "--set", "config.lr=0.5", "--trials", "7", "--dry-run")
    assert (status, error) == (0, "")
    assert "plan: " in told
    assert "estimate: at most 28 epochs; GPU-hours follow once an epoch has been timed" in told
    resolved = yaml.safe_load(told[told.index("trainable:") :])
    assert resolved["config"] == {"epochs": 4, "lr": 0.5}
    assert resolved["search"]["trials"] == 7
    (tmp_path / "again.yaml").write_text(told[told.index("trainable:") :])
    assert load_space(tmp_path / "again.yaml")[0].search.trials == 7
    assert not (tmp_path / "results").exists()


def test_a_dry_run_says_what_will_be_measured_and_what_holds_until_then(run: Run, tmp_path: Path) -> None:
    auto = "resources={gpus_per_worker: auto, memory_limit_mb: 64}"
    name = write_family(
        tmp_path, FAMILY + "def memory_need(trial):\n    raise AssertionError('something was started')\n"
    )
    _, told, _ = run(*TOY, "--set", auto, "--set", f"trainable={name}:train", "--dry-run")
    assert "plan: 1 slot x 1 worker x 1 CPU (a whole simulated GPU for each worker: what a training step takes" in told
    assert "is measured at the start" in told
    name = write_family(tmp_path, FAMILY)
    _, told, _ = run(*TOY, "--set", auto, "--set", f"trainable={name}:train", "--dry-run")
    assert f"a whole simulated GPU for each worker: the module of {name}:train has no function memory_need" in told


def test_a_dry_run_estimates_from_the_newest_search_of_the_same_trainable(run: Run, tmp_path: Path) -> None:
    finished_search(tmp_path)
    assert "s an epoch measured before)" in run(*TOY, "--dry-run")[1]


def test_what_comes_before_the_first_epoch_is_not_counted_for_the_others(tmp_path: Path) -> None:
    """A group starts and a network is pre-trained within the first epoch of one trial, and never again."""
    trials = [(0, 1, 100.0, 100.0), (1, 3, 90.0, 98.0), (2, 2, 6.0, 10.0)]
    found = []
    for number, epochs, first_s, seconds in trials:
        TrialFolder(tmp_path, number).append_metrics({"epoch": 1, "seconds": first_s, "metrics": {}})
        found.append(Record(number, "finished", "", None, {}, {}, epochs, seconds))
    assert command.seconds_per_epoch(tmp_path, []) is None
    assert command.seconds_per_epoch(tmp_path, found[:1]) == 100.0
    assert command.seconds_per_epoch(tmp_path, [Record(9, "failed", "", None, {}, {}, 0, 30.0)]) is None
    assert command.seconds_per_epoch(tmp_path, found) == (8.0 + 4.0) / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TOY, "--warm-start", "nowhere"], "--warm-start nowhere: there is no space.yaml here"),
        (
            [*TOY, "--set", "objective.mode=max", "--warm-start", "results/done"],
            "was min loss, and here it is max loss",
        ),
        (["--resume", "results/done", "--epochs", "9"], "config.epochs cannot change, because its trials have run"),
        ([*TOY, "--name", "done"], "results/done holds a search already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_dry_run_refuses_what_the_run_refuses(arguments: list[str], message: str, run: Run, tmp_path: Path) -> None:
    finished_search(tmp_path)
    told = run(*arguments, "--dry-run")
    assert (told[0], message in told[2]) == (2, True)
    assert told == run(*arguments)


def test_a_dry_run_of_a_search_that_goes_on_counts_what_is_left_and_takes_its_own_time(
    run: Run, tmp_path: Path
) -> None:
    results = finished_search(tmp_path).rename(tmp_path / "elsewhere")
    told = run("--resume", str(results), "--dry-run")[1]
    assert "estimate: at most 12 epochs; " in told
    assert "s an epoch measured before)" in told
    before = (results / "study.journal").read_bytes()
    assert "estimate: at most 20 epochs; " in run("--resume", str(results), "--trials", "6", "--dry-run")[1]
    assert "estimate: no trial is left to run; " in run("--resume", str(results), "--trials", "1", "--dry-run")[1]
    assert (results / "study.journal").read_bytes() == before
    ask(open_journal(load_space(results / "space.yaml")[0], results))  # and its machine goes
    assert "estimate: at most 12 epochs; " in run("--resume", str(results), "--dry-run")[1]


def test_what_failed_is_run_again_where_that_is_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = finished_search(tmp_path)
    ledger = open_journal(load_space(results / "space.yaml")[0], results)
    end_toy(ledger, ask(ledger), "failed")
    before = (results / "study.journal").read_bytes()
    assert "estimate: at most 8 epochs; " in run("--resume", str(results), "--dry-run")[1]
    assert "estimate: at most 12 epochs; " in run("--resume", str(results), "--retry-failed", "--dry-run")[1]
    assert (results / "study.journal").read_bytes() == before

    def ran(space: Space, *_: object) -> engine.Outcome:
        return engine.Outcome(tuple(records(open_journal(space, results).study, space)), (), interrupted=False)

    monkeypatch.setattr(cluster, "start_ray", lambda address: None)
    monkeypatch.setattr(engine, "run", ran)
    told = run("--resume", str(results), "--retry-failed")[1]
    assert "\nrun again: trial 1 as 2\n" in told
    assert "3 trials: 1 finished, 1 failed, 1 interrupted" in told
    told = run("--resume", str(results), "--retry-failed")[1]
    assert "\n--retry-failed: no failed trial is left\n" in told


@pytest.mark.parametrize(
    ("quota", "cpus"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 8), ("", 8)]
)
def test_a_container_has_the_cpus_that_its_quota_pays_for(
    quota: str, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cluster, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    assert cluster.cpus_here() == cpus
    monkeypatch.setattr(cluster, "CPU_QUOTA", tmp_path / "none")
    assert cluster.cpus_here() == 8


SLOW = ["The current node timed out during startup. This", "Timed out waiting for file /tmp/ray/gcs_server_port"]


@pytest.mark.parametrize(
    ("errors", "told"),
    [([], None), (SLOW, None), ([*SLOW, SLOW[0]], "3 times: The current"), (["no room"], "^no room$")],
)
def test_a_ray_whose_processes_start_slowly_is_started_again(
    errors: list[str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()

    def init(address: str) -> str:
        tried.append(address)
        if len(tried) <= len(errors):
            raise RuntimeError(errors[len(tried) - 1])
        return "running"

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # of the one that other tests may have started
    if told is None:
        assert cluster.init_ray(address="local") == "running"
    else:
        with pytest.raises(UserError if len(errors) > 1 else RuntimeError, match=told):
            cluster.init_ray(address="local")
        assert len(tried) == len(errors)


def test_ray_knows_each_variable_that_it_is_given() -> None:
    """It passes over one that it does not know, as of a setting that a new version has renamed."""
    root = Path(ray.__file__).parent
    code = [file for part in ("_common", "_private", "air", "train", "tune") for file in (root / part).rglob("*.py")]
    python, compiled = b"".join(file.read_bytes() for file in code), (root / "_raylet.so").read_bytes()
    given = [*cluster.RAY_ENVIRONMENT, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "TUNE_MAX_PENDING_TRIALS_PG"]
    unread = [name for name in given if name.encode() not in python]
    assert [name for name in unread if name.removeprefix("RAY_").encode() not in compiled] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPUs can be used")
def test_gpus_that_pytorch_cannot_use_are_told_before_anything_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the driver is too old: it counts them all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, _, error = run(*TOY, "--dry-run")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: there are 2 GPUs here, and PyTorch {torch.__version__} cannot use them: ")
    assert "CUDA_VISIBLE_DEVICES= " in error


@pytest.mark.parametrize("folder", ["/scratch/firstname.lastname/slurm-job-12345678", "/tmp/für"])
def test_a_folder_that_ray_s_sockets_cannot_lie_in_is_told_before_anything_is_written(
    folder: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    status, _, error = run(*TOY, "--name", "new")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: TMPDIR={folder}: Ray's sockets cannot lie there: only in a folder of at most 39 ")
    assert not (tmp_path / "results/new").exists()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert run(*TOY, "--dry-run")[0] == 0


def test_a_grid_ends_where_it_ends(run: Run) -> None:
    _, told, _ = run(*TOY, "--set", "search.sampler=grid", "--set", "config.lr={choice: [0.1, 0.2]}", "--dry-run")
    assert "; 2 trials by grid" in told


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_told_without_asking_ray(run: Run, address: str) -> None:
    status, _, error = run(*TOY, "--address", address)
    assert (status, error.count("\n")) == (2, 1)
    assert f"--address {address}: no Ray cluster answers there: " in error


@pytest.mark.slow
def test_a_cluster_s_token_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        address = f"127.0.0.1:{somebody.getsockname()[1]}"
        command = [sys.executable, str(ROOT / "launch.py"), "--space", "rebuild", "--address", address]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        environment = {**kept, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
        told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert told.stderr.startswith("error: the Ray cluster requires a token and was given none or a wrong one: ")


def test_a_sampler_and_a_scheduler_that_do_not_go_together_are_told(run: Run) -> None:
    _, told, _ = run(*TOY, "--set", "search.sampler=nsga2", "--set", "scheduler.name=median", "--dry-run")
    assert "\nsearch.sampler: nsga2 learns nothing from the trials that median stops, " in told
    hyperband = ("--set", "scheduler.name=hyperband", "--set", "scheduler.grace_epochs=2", "--dry-run")
    assert "\nscheduler.grace_epochs: hyperband has its own brackets and ignores it" in run(*TOY, *hyperband)[1]


@pytest.mark.parametrize("scheduler", ["asha", "median", "pbt"])
def test_a_scheduler_that_would_wait_until_a_trial_is_over_is_told(scheduler: str, run: Run) -> None:
    for grace, told in ((1, False), (2, False), (3, True), (4, True)):
        sets = (f"scheduler.name={scheduler}", f"scheduler.grace_epochs={grace}", "config.epochs=3")
        _, printed, _ = run(*TOY, *(word for item in sets for word in ("--set", item)), "--dry-run")
        line = f"\nscheduler.grace_epochs: {grace}, and a trial has 3 epochs: {scheduler} will do nothing\n"
        assert (line in printed) == told


def test_known_settings_for_which_there_are_no_trials_are_told(run: Run) -> None:
    for trials, told in ((1, True), (2, False)):
        known = ("--set", "try_first=[{lr: 0.3}, {lr: 0.2}]")
        _, printed, error = run(*TOY, *known, "--trials", str(trials), "--dry-run")
        assert not error
        assert ("\nsearch.trials: 1, so only the first 1 of 2 known settings run\n" in printed) == told


def test_the_spaces_at_hand_are_listed(run: Run) -> None:
    assert run("--list") == (0, "toy          Descend a parabola.\n", "")


def test_report_and_why_read_a_folder_alone(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    status, told, _ = run("--report", str(results))
    assert (status, "best: trial 0" in told) == (0, True)
    assert {"trials.csv", "best.yaml", "report.html"} <= {path.name for path in results.iterdir()}
    status, told, _ = run("--report", str(results), "--why", "0")
    assert (status, told.startswith("trial 0: finished")) == (0, True)


def test_a_report_of_a_search_under_way_says_that_its_trials_run(run: Run, tmp_path: Path) -> None:
    results = finished_search(tmp_path)
    ask(open_journal(load_space(results / "space.yaml")[0], results))
    with running(results):
        told = run("--report", str(results))[1]
    assert "2 trials: 1 finished, 1 running\n" in told
    assert "\n1,running," in (results / "trials.csv").read_text()
    assert "2 trials: 1 finished, 1 interrupted\n" in run("--report", str(results))[1]


def test_a_report_does_not_keep_what_a_search_that_ends_meanwhile_has_made_obsolete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = finished_search(tmp_path)

    def overtaken(folder: Path) -> tuple[Space, list[Record]]:
        found = read_results(folder)
        monkeypatch.undo()
        ledger = open_journal(found[0], folder)
        end_toy(ledger, ask(ledger), "finished")
        return found

    monkeypatch.setattr(command, "read_results", overtaken)
    command.report(str(results), None)
    assert len((results / "trials.csv").read_text().splitlines()) == 1 + 2


def test_a_module_that_changes_the_working_directory_moves_no_results(run: Run, tmp_path: Path) -> None:
    """Research code often goes to its own folder, and reads its data there."""
    there = tmp_path / "theirs"
    there.mkdir()
    code = """
        import os
        os.chdir(os.path.dirname(os.path.abspath(__file__)))

        def train(trial):
            yield {"loss": 0.0}

        def prepare(config):
            assert os.getcwd() == os.path.dirname(os.path.abspath(__file__))
            os.makedirs("prepared", exist_ok=True)
            raise RuntimeError("no further")
        """
    document = {**SPACE, "trainable": f"{write_family(there, code)}:train"}
    (there / "own.yaml").write_text(yaml_file.dump(document))
    for _ in range(2):  # the second time, the module has been imported already
        status, _, told = run("--space", "theirs/own.yaml")
        assert (status, "RuntimeError: no further" in told) == (2, True)
        assert Path.cwd() == tmp_path
    assert (there / "prepared").is_dir()


@pytest.mark.slow
def test_looking_starts_no_ray(tmp_path: Path) -> None:
    """In a process of its own, since another test may have started one."""
    (tmp_path / "toy.yaml").write_text(
        yaml_file.dump({**SPACE, "trainable": f"{write_family(tmp_path, FAMILY)}:train"})
    )
    code = (
        "import sys, ray, launch\n"
        "assert launch.main(['--list']) == 0\n"
        "assert launch.main(['--space', 'toy.yaml', '--dry-run']) == 0\n"
        "assert launch.main(['--space', 'toy.yaml', '--trials', '0']) == 2\n"
        "assert not ray.is_initialized()\n"
    )
    python = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    told = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert told.returncode == 0, told.stderr
    assert "plan: " in told.stdout
    assert told.stderr.splitlines() == [
        "error: toy.yaml: search.trials: 0 is refused: input should be greater than or equal to 1"
    ]


def test_help_and_typos_wait_for_no_large_library() -> None:
    code = (
        "import contextlib, sys, launch\n"
        "with contextlib.suppress(SystemExit):\n"
        "    launch.main(['--help'])\n"
        "statuses = launch.main(['--sapce', 'rebuild']), launch.main(['--list', '--seed', '1'])\n"
        "print(statuses, {'torch', 'ray', 'optuna', 'numpy'} & sys.modules.keys())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "(2, 2) set()"


@pytest.mark.slow
def test_a_space_is_read_without_what_only_networks_need() -> None:
    """These take twice as long to import as PyTorch itself, before a search says its first word."""
    code = (
        "import gc, sys, launch\n"
        "status = launch.main(['--space', 'rebuild', '--dry-run', '--profile', 'laptop'])\n"
        "collects = gc.isenabled()  # again, after the imports\n"
        "print(status, collects, {'transformers', 'torch._dynamo', 'scipy.stats'} & sys.modules.keys())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 True set()"


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} {ROOT / 'launch.py'} --space rebuild --dry-run 2>{tmp_path / 'errors'} | head -n 1"
    told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert told.startswith("rebuild: max dba_rebuilt over ")
    assert (tmp_path / "errors").read_text() == ""
