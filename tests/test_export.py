"""A trial is taken elsewhere whole, from a results folder or from its mirror, or the reason is one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from ledgers import ask, open_journal
from s3 import Store
from spaces import LOSS, space_of

from search import yaml_file
from search.export import COPIES, export, export_trial
from search.records.folder import TrialFolder
from search.records.mirror import Mirror
from search.results import read_results
from search.space import Space
from search.space.file import load_space
from search.workers.states import save_state
from trainables.contract import State, UserError

RAN = {"space": "toy", "commit": "0cb57c5", "versions": {"torch": "2.13.0"}}
ENDINGS = [("finished", 0.9), ("finished", 0.8), ("stopped", 0.5), ("finished", 0.1), ("out_of_memory", None)]


def a_search(space: Space, results: Path) -> Path:
    """A trial for each of ENDINGS; the best by far, trial 3, breaks the constraint, and the last has no checkpoint."""
    ledger = open_journal(space, results)
    yaml_file.write(results / "space.yaml", {**space.document(), "ran": RAN})
    for status, loss in ENDINGS:
        opened = ask(ledger)
        folder = TrialFolder(results, opened.number)
        if loss is not None:
            metrics = {"loss": loss, "acc": 0.25 if opened.number == 3 else loss}
            for epoch in (1, 2):
                ledger.report("slot", epoch, metrics)
                folder.append_metrics({"epoch": epoch, "metrics": metrics})
            folder.write_checkpoint(2, save_state(state_of(opened.number)))
        ledger.end("slot", status, "as it was")
    return results


def state_of(number: int) -> State:
    return {"epoch": 1, "model": {"weight": torch.full((3,), float(number))}}


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return space_of(tmp_path, {"epochs": 2, "lr": {"log": [1e-4, 1.0]}}, constraints={"acc": {"min": 0.5}})


@pytest.fixture
def results(space: Space, tmp_path: Path) -> Path:
    return a_search(space, tmp_path / "results/run")


def test_the_best_is_the_best_within_the_constraints_with_all_one_needs(results: Path, tmp_path: Path) -> None:
    model = tmp_path / "deep/model"
    assert export(str(results), "best", str(model)) == f"trial 1, its checkpoint after epoch 2: {model}"
    files = {"checkpoint.pt", "config.yaml", "metrics.jsonl", "origin.yaml", "space.yaml"}
    assert {path.name for path in model.iterdir()} == files
    state = torch.load(model / "checkpoint.pt", weights_only=True)
    assert state["model"]["weight"].tolist() == [1.0, 1.0, 1.0]
    origin = yaml.safe_load((model / "origin.yaml").read_text())
    config = yaml.safe_load((model / "config.yaml").read_text())
    assert config == {"epochs": 2, "lr": origin["searched"]["lr"]}
    assert (origin["trial"], origin["status"], origin["metrics"]) == (1, "finished", {"loss": 0.8, "acc": 0.8})
    assert (origin["ran"], origin["trainable"]) == (RAN, "toys:descend")
    assert origin["checkpoint"] == {"epoch": 2, "weights_only": True}
    rows = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


def test_what_is_exported_can_be_trained_again(results: Path, tmp_path: Path) -> None:
    export(str(results), "2", str(tmp_path / "model"))
    space, trainable = load_space(tmp_path / "model/space.yaml", ["config.epochs=7", "search.seed=3"])
    record = read_results(results)[1][2]
    assert space.config({}) == {"epochs": 7, "lr": record.values["lr"]}
    assert (space.parameters, space.try_first, space.search.trials, space.scheduler.name) == ((), (), 1, "none")
    assert (space.name, space.search.seed, trainable.train.__name__) == ("toy", 3, "descend")


def test_so_can_one_whose_setting_has_mappings_with_keys_of_their_own(tmp_path: Path) -> None:
    rates = [{"encoder.layer1": 0.1, "int": 5}, {"encoder.layer1": 1.0, "int": 8}]
    space = space_of(tmp_path, {"epochs": 2, "net": {"rates": {"choice": rates}}}, constraints={"acc": {"min": 0.5}})
    export(str(a_search(space, tmp_path / "results/run")), "2", str(tmp_path / "model"))
    again, _ = load_space(tmp_path / "model/space.yaml")
    assert again.config(again.draw(random.Random(0))) == yaml_file.read(tmp_path / "model/config.yaml")


@pytest.mark.parametrize("what", ["2", "0002"])
def test_any_trial_with_a_checkpoint_goes_by_its_number(what: str, results: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()  # an empty folder will do
    export(str(results), what, str(model))
    assert yaml.safe_load((model / "origin.yaml").read_text())["status"] == "stopped"
    assert torch.load(model / "checkpoint.pt", weights_only=True)["model"]["weight"][0] == 2.0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("4", r"--export 4: trial 4 \(out_of_memory\) has no checkpoint: it gave no report"),
        ("9", r"trial 9: there is none in .*run; known: 0, 1, 2, 3, 4"),
        ("worst", r"--export worst: write best, or the number of a trial"),
        ("-1", r"--export -1: write best, or the number of a trial"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_written(
    what: str, message: str, results: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(str(results), what, str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_there_is_no_best_where_nothing_keeps_the_constraints(tmp_path: Path) -> None:
    strict = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}}, constraints={"acc": {"min": 0.95}})
    results = a_search(strict, tmp_path / "strict")
    with pytest.raises(UserError, match=r"--export best: no trial of .*strict finished within the constraints; "):
        export(str(results), "best", str(tmp_path / "model"))


def test_reports_without_a_state_leave_nothing_to_export(results: Path, tmp_path: Path) -> None:
    (results / "trials/0001/checkpoint-0002.pt").unlink()
    with pytest.raises(UserError, match=r"trial 1 \(finished\) has no checkpoint: its reports have no state"):
        export(str(results), "best", str(tmp_path / "model"))


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_torn_checkpoint_is_not_exported(kept: int, results: Path, tmp_path: Path) -> None:
    checkpoint = results / "trials/0001/checkpoint-0002.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"^--export best: checkpoint-0002.pt of trial 1 is torn and cannot be read$"):
        export(str(results), "best", str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("in_use", ["results", "results/run/space.yaml"])
def test_nothing_is_written_over(in_use: str, results: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exists and is not an empty folder; name a new one"):
        export(str(results), "best", str(tmp_path / in_use))


def test_a_folder_that_cannot_be_made_is_a_mistake(results: Path) -> None:
    with pytest.raises(UserError, match=r"--export best .*cannot be written: .*Not a directory"):
        export(str(results), "best", str(results / "space.yaml/model"))


def test_a_state_that_needs_trust_is_exported_and_said_so(results: Path, tmp_path: Path) -> None:
    TrialFolder(results, 1).write_checkpoint(2, save_state({"where": tmp_path}))
    told = export(str(results), "best", str(tmp_path / "model"))
    assert told.endswith("torch.load needs weights_only=False")
    assert yaml.safe_load((tmp_path / "model/origin.yaml").read_text())["checkpoint"]["weights_only"] is False


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("plain", [True, False])
def test_a_state_with_tensors_that_have_no_meta_form_is_exported(plain: bool, results: Path, tmp_path: Path) -> None:
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    state = {"ragged": ragged, **({} if plain else {"where": tmp_path})}
    TrialFolder(results, 1).write_checkpoint(2, save_state(state))
    export(str(results), "best", str(tmp_path / "model"))
    assert yaml.safe_load((tmp_path / "model/origin.yaml").read_text())["checkpoint"]["weights_only"] is plain


def train_on(results: Path, monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Let trial 1 finish another epoch, up to `epochs` of them, whenever its checkpoint is about to be copied."""
    folder, copyfile = TrialFolder(results, 1), shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        epoch = folder.recorded()
        if source.name == f"checkpoint-{epoch:04d}.pt" and epoch < 2 + epochs:
            folder.write_checkpoint(epoch + 1, save_state({"epoch": epoch}))
            folder.append_metrics({"epoch": epoch + 1, "metrics": {}})
            folder.keep_checkpoint(epoch + 1)
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)


def test_of_a_trial_that_trains_on_meanwhile_the_newer_checkpoint_is_exported(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on(results, monkeypatch, COPIES - 1)
    told = export(str(results), "1", str(tmp_path / "model"))
    assert told.startswith(f"trial 1, its checkpoint after epoch {COPIES + 1}: ")
    assert torch.load(tmp_path / "model/checkpoint.pt", weights_only=True)["epoch"] == COPIES


def test_a_checkpoint_that_is_deleted_again_and_again_is_no_traceback(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on(results, monkeypatch, COPIES)
    with pytest.raises(UserError, match=rf"0001: the trial runs, and deleted its checkpoint {COPIES} times before"):
        export(str(results), "1", str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_of_several_objectives_the_first_decides_and_the_others_are_named(tmp_path: Path) -> None:
    both = space_of(tmp_path, {"lr": {"log": [1e-4, 1.0]}}, objective=[LOSS, {"metric": "acc", "mode": "max"}])
    results = a_search(both, tmp_path / "both")  # trial 3 has the least loss, and 0 the best acc: none is beaten
    told = export_trial(results, "best", tmp_path / "model")
    assert told.splitlines()[0].startswith("trial 3, ")
    assert told.splitlines()[1] == "it is the best in loss; no other beats these either: trials 1, 0"


@pytest.mark.slow
def test_of_a_mirror_only_that_trial_is_fetched(results: Path, tmp_path: Path, store: Store) -> None:
    Mirror(results, "s3://bucket/searches/run").push()
    store.sent.clear()
    told = export("s3://bucket/searches/run", "best", str(tmp_path / "model"))
    assert told.startswith("trial 1, ")
    assert yaml.safe_load((tmp_path / "model/origin.yaml").read_text())["search"] == "s3://bucket/searches/run"
    assert torch.load(tmp_path / "model/checkpoint.pt", weights_only=True)["epoch"] == 1
    assert set(store.sent) == {
        "bucket/searches/run/space.yaml",
        "bucket/searches/run/study.journal",
        "bucket/searches/run/trials/0001/checkpoint-0002.pt",
        "bucket/searches/run/trials/0001/metrics.jsonl",
    }
