"""The tags of other videos are those that the model was scored by."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import exported
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from small_mabe import OPTIM, SMALL, Rows, challenge_csv, rows_of, small_config, tag, two_labs, write_calms21

from search import yaml_file
from trainables.mabe import calms21, challenge, predict
from trainables.mabe.config import CLASSES, Data
from trainables.mabe.data import samples, videos_of
from trainables.mabe.prepare import prepare_data
from trainables.mabe.tagging import Config
from trainables.mabe.video import UNLABELLED
from trainables.optim import EarlyStop, Optim

root = two_labs()


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return small_config(root, tmp_path / "cache")


def held_out(config: Config) -> Rows:
    assert config.data.root is not None
    every = rows_of(Path(config.data.root))
    return [every[v] for v in videos_of(prepare_data(config.data), config.data, "val")]


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows: Rows) -> NDArray[np.int64]:
    assert [int(row["frame"]) for row in rows] == list(range(len(rows)))
    return np.array([CLASSES.index(row["behaviour"]) for row in rows])


def macro_f1(label: NDArray[Any], guess: NDArray[Any]) -> float:
    """Scikit-learn's over all frames."""
    return float(f1_score(label, guess, labels=range(len(CLASSES)), average="macro", zero_division=0.0))


def scores_in(text: str) -> dict[str, float]:
    pairs = [pair.split() for line in text.splitlines()[2:] for pair in line.split(", ")]
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize(
    "setting",
    [
        (("geometry", "rolling", "pca"), 0, replace(OPTIM, ema=0.5)),
        (("coords", "presence", "motion"), 2, replace(OPTIM, early_stop=EarlyStop("macro_f1", "max", 1))),
    ],
    ids=["average", "best"],
)
def test_the_tags_of_validation_videos_score_what_the_search_reported(
    setting: tuple[Any, int, Optim],
    config: Config,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features, pool, optim = setting
    config = replace(config, data=replace(config.data, features=features), model=replace(SMALL, pool=pool), optim=optim)
    metrics = exported(tmp_path / "model", config)
    rows = held_out(config)
    assert {row["lab_id"] for row in rows} == {"SimulatedSeven", "SimulatedFive"}
    videos = challenge_csv(root, tmp_path / "others", rows)
    capsys.readouterr()
    assert tag(tmp_path / "model", videos, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    labels, guesses = [], []
    for video in challenge.read(videos.parent, "new"):
        labels.append(video.read()[1])
        guesses.append(numbers(read(tmp_path / "out" / f"{video.key}.csv")))
        assert len(labels[-1]) == len(guesses[-1])
        assert len(labels[-1]) % config.data.window
    assert macro_f1(np.concatenate(labels), np.concatenate(guesses)) == pytest.approx(metrics["macro_f1"], abs=1e-6)
    told = {name: value for name, value in scores_in(printed).items() if "event" not in name}  # here they are whole
    assert told == {name: pytest.approx(metrics[name], abs=1e-4) for name in told}
    wanted = {"macro_f1", "macro_f1_labs", "macro_f1_behaviours", "accuracy", *(f"f1_{name}" for name in CLASSES)}
    assert wanted <= {*told, *(f"f1_{name}" for name in CLASSES if f"f1_{name}" not in metrics)}
    assert f"{len(rows)} of them have labels, {sum(map(len, labels))} frames:" in printed


def test_the_short_video_is_among_those_that_validate_somewhere(config: Config, tmp_path: Path) -> None:
    """Its only window repeats its last frame for a while, as in validation."""
    seeds = (replace(config, data=replace(config.data, split_seed=seed)) for seed in range(20))
    short = next(one for one in seeds if any(row["video_duration_sec"] == "2" for row in held_out(one)))
    metrics = exported(tmp_path / "model", short)
    assert short.data.root is not None
    videos = challenge_csv(Path(short.data.root), tmp_path / "others", held_out(short))
    model = predict.read_model(tmp_path / "model")
    read_in = predict.read_videos(videos, trust_pickle=False)
    assert min(video.frames for video in read_in) < short.data.window
    tags = list(predict.tagged(model, read_in, torch.device("cpu")))
    assert predict.scores_of(tags)["macro_f1_labs"] == pytest.approx(metrics["macro_f1_labs"], abs=1e-6)
    val = samples(short, "val")
    label_NT = val[torch.arange(len(val))]["label"]
    assert torch.equal(torch.cat([each.label_T for each in tags]), label_NT[label_NT != UNLABELLED])


def test_a_video_is_tagged_alike_whichever_stand_beside_it_and_without_labels(
    config: Config, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(tmp_path / "model", config)
    rows = held_out(config)
    together = challenge_csv(root, tmp_path / "together", rows)
    alone = challenge_csv(root, tmp_path / "alone", rows[:1], labelled=False)
    assert tag(tmp_path / "model", together, tmp_path / "a") == 0
    capsys.readouterr()
    assert tag(tmp_path / "model", alone, tmp_path / "b") == 0
    assert capsys.readouterr().out == f"tags of 1 videos: {tmp_path / 'b'}\n"
    (file,) = (tmp_path / "b").rglob("*.csv")
    assert file.read_text() == (tmp_path / "a" / file.relative_to(tmp_path / "b")).read_text()


def test_calms21_and_how_sure_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_calms21(tmp_path / "root/calms21_task1_train.json", 5, 150).parent
    data = Data(str(root), str(tmp_path / "cache"), features=("coords",), window=64, stride=16)
    config = Config(data=data, model=SMALL, optim=OPTIM, epochs=15)
    metrics = exported(tmp_path / "model", config)
    (animal,) = {prepare_data(data).unit[v] for v in videos_of(prepare_data(data), data, "val")}
    tree = json.loads((root / "calms21_task1_train.json").read_text())["annotator-id_0"]
    name = f"task1/train/{animal}_task1_annotator1"
    (tmp_path / "test.json").write_text(json.dumps({"annotator-id_0": {name: tree[name]}}))
    capsys.readouterr()
    assert tag(tmp_path / "model", tmp_path / "test.json", tmp_path / "out") == 0
    told = scores_in(capsys.readouterr().out)
    assert told["macro_f1"] == pytest.approx(metrics["macro_f1"], abs=1e-4)
    assert metrics["macro_f1"] > 1.5 * metrics["macro_f1_chance"]
    rows = read(tmp_path / "out" / f"{name}.csv")
    guess = numbers(rows)
    label = calms21.read([tmp_path / "test.json"], trust_pickle=False)[0].read()[1]
    assert macro_f1(label, guess) == pytest.approx(metrics["macro_f1"], abs=1e-6)

    network = predict.read_model(tmp_path / "model").network.eval()
    val = samples(config, "val")
    with torch.no_grad():
        share_TK = network(val[torch.arange(len(val))]).softmax(-1).flatten(0, 1)[:150]
    np.testing.assert_array_equal(share_TK.argmax(-1), guess)
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], share_TK.amax(-1), atol=1e-5)

    del tree[name]["annotations"]
    (tmp_path / "bare.json").write_text(json.dumps({"annotator-id_0": {name: tree[name]}}))
    keypoints = np.array(tree[name]["keypoints"], dtype=np.float32)
    np.savez(tmp_path / "extract.npz", keypoints_4=keypoints)
    np.save(tmp_path / "pickled.npy", np.array({"all": {name: tree[name]}}, dtype=object), allow_pickle=True)
    trusting = yaml_file.read(tmp_path / "model/config.yaml")
    trusting["data"]["trust_pickle"] = True
    yaml_file.write(tmp_path / "model/config.yaml", trusting)
    for file, key in (("bare.json", name), ("extract.npz", "keypoints_4"), ("pickled.npy", name)):
        assert tag(tmp_path / "model", tmp_path / file, tmp_path / f"out_of_{file}") == 0
        assert read(tmp_path / f"out_of_{file}" / f"{key}.csv") == rows
