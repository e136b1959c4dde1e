"""Videos that a tagger cannot know are refused, in a line that says why, and so is what is no tagger."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import exported
from small_mabe import OPTIM, SMALL, challenge_csv, rows_of, small_config, tag, two_labs, write_calms21

from search import yaml_file
from trainables.mabe.config import Data
from trainables.mabe.tagging import Config

root = two_labs()


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return small_config(root, tmp_path / "cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of two mice of seven points."""
    root = write_calms21(tmp_path / "root/calms21_task1_train.json", 2, 80).parent
    data = Data(str(root), str(tmp_path / "cache"), features=("pca", "coords"), window=64, stride=16)
    exported(tmp_path / "model", Config(data=data, model=SMALL, optim=OPTIM, epochs=1))
    return tmp_path / "model"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_calms21(tmp_path / "good.json", 1, 20)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must fail; returns the one line that it says."""

    def run(*arguments: Path) -> str:
        capsys.readouterr()
        assert tag(*arguments) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1, printed
        return printed.removeprefix("error: ")

    return run


def test_other_points_and_mice(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    five = write_calms21(tmp_path / "five.json", 1, 20, points=5)
    told = refused(model, five, tmp_path / "out")
    assert told.startswith(f"{five}: task1/train/mouse000_task1_annotator1: its points are point0, point1, point2")
    assert "the model was trained with nose, left_ear, right_ear, neck, left_hip, right_hip, tail_base; tag" in told
    np.savez(tmp_path / "three.npz", keypoints_0=np.ones((20, 3, 2, 7)))
    told = refused(model, tmp_path / "three.npz", tmp_path / "out")
    assert "three.npz: sequence 0: it shows 3 mice, the model was trained with 2; " in told
    assert not (tmp_path / "out").exists()


def test_other_rates_and_points_that_one_lab_lacks(
    config: Config, root: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Each lab alone leaves out points of the union; what no lab left out must be there."""
    exported(tmp_path / "model", replace(config, epochs=1))
    rows = rows_of(root)[:2]
    videos = challenge_csv(root, tmp_path / "a", [{**rows[0], "frames_per_second": "29.97"}, rows[1]])
    assert tag(tmp_path / "model", videos, tmp_path / "out") == 0
    videos = challenge_csv(root, tmp_path / "b", [rows[1], {**rows[0], "frames_per_second": "60"}])
    told = refused(tmp_path / "model", videos, tmp_path / "new")
    assert "0.parquet: it has 60 frames per second, the model was trained with 25 or 30; tag videos that" in told
    more = json.dumps([*json.loads(rows[0]["body_parts_tracked"]), "lateral_left"])
    videos = challenge_csv(root, tmp_path / "c", [{**rows[0], "body_parts_tracked": more}])
    told = refused(tmp_path / "model", videos, tmp_path / "new")
    assert "0.parquet: its points are nose, neck, " in told
    assert "lateral_left" not in told.partition("the model was trained with ")[2]


def test_other_behaviours(model: Path, good: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    tree = json.loads(good.read_text())
    record = next(iter(tree["annotator-id_0"].values()))
    record["metadata"]["vocab"] = {"approach": 0, "other": 1}
    good.write_text(json.dumps(tree))
    told = refused(model, good, tmp_path / "out")
    assert "metadata.vocab names approach, other and not investigation; " in told
    state = torch.load(model / "checkpoint.pt", weights_only=True)
    state["settings"]["videos"]["classes"] = ("other", "approach")
    torch.save(state, model / "checkpoint.pt")
    told = refused(model, good, tmp_path / "out")
    assert told.startswith(f"{model}: it was trained to tag other, approach; this version tags other, inv")


def test_what_is_no_file_of_videos(model: Path, good: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    told = refused(model, tmp_path / "none.json", tmp_path / "out")
    assert told == f"{tmp_path / 'none.json'}: no such file; name a .json, .npy, .npz or .csv of videos\n"
    told = refused(model, tmp_path, tmp_path / "out")
    assert told == f"{tmp_path}: a folder; name the file of the videos in it: good.json\n"
    told = refused(model, model / "checkpoint.pt", tmp_path / "out")
    assert told.endswith("checkpoint.pt: no file of videos; name a .json, .npy, .npz or .csv of videos\n")
    np.save(tmp_path / "a.npy", np.array({}, dtype=object), allow_pickle=True)
    assert "a.npy is a pickle, " in refused(model, tmp_path / "a.npy", tmp_path / "out")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe")
    assert "a.csv cannot be read: " in refused(model, tmp_path / "a.csv", tmp_path / "out")
    (tmp_path / "empty.json").write_text("{}")
    assert "empty.json: no video is in it" in refused(model, tmp_path / "empty.json", tmp_path / "out")


def test_names_that_are_no_places(model: Path, good: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (record,) = json.loads(good.read_text())["annotator-id_0"].values()
    good.write_text(json.dumps({"one": {"../../evil": record}}))
    told = refused(model, good, tmp_path / "out")
    assert f"{good}: ../../evil: its name must not lead out of {tmp_path / 'out'}; rename it" in told
    good.write_text(json.dumps({"one": {"a": record}, "two": {"a": record}}))
    told = refused(model, good, tmp_path / "out")
    assert told == f"{good}: a: another video of this name is in the file; give each its own\n"


def test_tags_that_are_there_are_kept(model: Path, good: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert tag(model, good, tmp_path / "out") == 0
    (file,) = (tmp_path / "out").rglob("*.csv")
    file.write_text("precious")
    assert refused(model, good, tmp_path / "out") == f"{file} exists; name another folder\n"
    assert file.read_text() == "precious"


def test_what_is_no_model(model: Path, good: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """What every family refuses is in the tests of beam prediction."""
    given = (model, good, tmp_path / "out")
    config = yaml_file.read(model / "config.yaml")
    for section, changed, message in (
        ("data", {"window": 32}, f"{model}: it was trained with data.window = 64; by its config.yaml,"),
        ("data", {"features": ["coords", "pca"]}, f"{model}: it was trained with data.features = ('pca', 'c"),
        ("model", {"pool": 1}, f"{model}: it was trained with model.pool = 0; by its config.yaml,"),
        ("model", {"hidden": 4}, f"{model / 'checkpoint.pt'}: not the weights of {model / 'config.yaml'}: "),
    ):
        yaml_file.write(model / "config.yaml", {**config, section: {**config[section], **changed}})
        assert refused(*given).startswith(message)
    yaml_file.write(model / "config.yaml", config)
    state = torch.load(model / "checkpoint.pt", weights_only=True)
    del state["settings"]
    torch.save(state, model / "checkpoint.pt")
    assert "it does not say which points and behaviours it was trained on" in refused(*given)
    yaml_file.write(model / "origin.yaml", {"trainable": "trainables.beam.fusion:train"})
    assert f"{model}: a model of trainables.beam.fusion:train; behaviour is tagged" in refused(*given)
