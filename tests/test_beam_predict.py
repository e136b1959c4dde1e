"""Beams predicted for windows without labels are those that the model was scored by."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_beam import SMALL, raw_files

from search import yaml_file
from trainables.beam import fusion, predict, rebuild
from trainables.beam.config import Data, Pretrain, Rebuild, Simulated
from trainables.beam.data import samples
from trainables.beam.prepare import find_table
from trainables.contract import Trial
from trainables.optim import Optim

written = raw_files(Simulated(passes=8, frames=20))
OPTIM = Optim(lr=1e-3, batch_size=8)
Config = fusion.Config | rebuild.Config


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Data:
    return Data(root=str(written), prepared=str(tmp_path / "cache"), history=2, image_size=32)


def exported(folder: Path, config: Config) -> dict[str, float]:
    """Train, and write what `launch.py --export` does; returns the last metrics."""
    family = rebuild if isinstance(config, rebuild.Config) else fusion
    *_, report = family.train(Trial(config))
    assert report.state is not None
    folder.mkdir()
    torch.save(report.state(), folder / "checkpoint.pt")
    yaml_file.write(folder / "config.yaml", plain(asdict(config)))
    yaml_file.write(folder / "origin.yaml", {"trainable": f"{family.__name__}:train"})
    return dict(report.metrics)


def plain(node: Any) -> Any:
    """As YAML has it."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return [plain(item) for item in node] if isinstance(node, (list, tuple)) else node


def held_out(config: Config, path: Path, without: Sequence[str] = ()) -> NDArray[np.int64]:
    """Write the CSV of the windows that validate, less their labels and some columns; returns their beams, (N, ...)."""
    table, val = find_table(config.data), samples(config, "val")
    with table.csvs[0].open(newline="") as file:
        rows = [row for number, row in enumerate(csv.DictReader(file)) if number in set(val.windows.tolist())]
    unwanted = ("unit1_beam", "unit1_pwr", "seq_index", *without)
    kept = [{key: text for key, text in row.items() if not key.startswith(unwanted)} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
    return val.beams(val.side)


def predicted(out: Path) -> NDArray[np.int64]:
    """The guesses of each window, (N, P, 3), from 0."""
    with (out / "beam_pred.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "top-1 beam", "top-2 beam", "top-3 beam"]
    guesses = [[[int(beam) - 1 for beam in row[f"top-{k} beam"].split("_")] for row in rows] for k in (1, 2, 3)]
    return np.moveaxis(np.array(guesses), 0, -1)


def dba(guesses: NDArray[np.int64], beams: NDArray[np.int64]) -> float:
    off = np.abs(guesses - beams.reshape(*guesses.shape[:2], 1))
    return float((1 - np.minimum(np.minimum.accumulate(off, axis=-1), 5) / 5).mean())


@pytest.mark.parametrize("form", ["local", "sincos"])
def test_the_beams_score_what_the_model_did(form: Literal["local", "sincos"], data: Data, tmp_path: Path) -> None:
    config = fusion.Config(data=replace(data, gps_repr=form), model=SMALL, optim=replace(OPTIM, ema=0.5), epochs=2)
    metrics = exported(tmp_path / "model", config)
    windows = data_csv(data, "test.csv")
    beams = held_out(config, windows)
    assert predict.main([str(tmp_path / "model"), str(windows), str(tmp_path / "out")]) == 0
    guesses = predicted(tmp_path / "out")
    assert dba(guesses, beams) == pytest.approx(metrics["dba"], abs=1e-6)
    assert 100 * (guesses[:, 0, 0] == beams).mean() == pytest.approx(metrics["top1"], abs=1e-4)


def data_csv(data: Data, name: str) -> Path:
    assert data.root is not None
    return Path(data.root) / "Multi_Modal" / name


def test_a_missing_sensor_is_rebuilt_and_its_files_are_not_asked_for(data: Data, tmp_path: Path) -> None:
    config = rebuild.Config(
        data=data,
        model=SMALL,
        optim=OPTIM,
        rebuild=Rebuild(source=("lidar", "radar"), target=("image",)),
        pretrain=Pretrain(epochs=1, optim=OPTIM),
        epochs=1,
    )
    metrics = exported(tmp_path / "model", config)
    windows = data_csv(data, "no_camera.csv")
    beams = held_out(config, windows, without=("unit1_rgb",))
    assert predict.main([str(tmp_path / "model"), str(windows), str(tmp_path / "out")]) == 0
    assert dba(predicted(tmp_path / "out"), beams) == pytest.approx(metrics["dba_rebuilt"], abs=1e-6)


def test_several_steps_and_how_sure_the_model_is(data: Data, tmp_path: Path) -> None:
    config = fusion.Config(data=replace(data, steps=3, modalities=("lidar",)), model=SMALL, optim=OPTIM, epochs=1)
    metrics = exported(tmp_path / "model", config)
    windows = data_csv(data, "steps.csv")
    beams = held_out(config, windows)
    names, _, confidence = predict.predict(predict.read_model(tmp_path / "model"), windows, torch.device("cpu"))
    assert confidence.shape == beams.shape == (len(names), 3)
    assert predict.main([str(tmp_path / "model"), str(windows), str(tmp_path / "out")]) == 0
    guesses = predicted(tmp_path / "out")
    assert dba(guesses, beams) == pytest.approx(metrics["dba"], abs=1e-6)
    with (tmp_path / "out" / "beam_confidence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == list(names)
    told = [[float(value) for value in row["confidence"].split("_")] for row in rows]
    np.testing.assert_allclose(told, confidence, atol=1e-6)


class TestMistakes:
    @pytest.fixture
    def model(self, data: Data, tmp_path: Path) -> Path:
        config = fusion.Config(data=replace(data, modalities=("lidar", "gps")), model=SMALL, optim=OPTIM, epochs=1)
        exported(tmp_path / "model", config)
        held_out(config, data_csv(data, "test.csv"))
        return tmp_path / "model"

    def told(self, capsys: pytest.CaptureFixture[str], *arguments: Path) -> str:
        assert predict.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    def test_a_column_that_the_model_needs(
        self, model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        windows = data_csv(data, "lacking.csv")
        windows.write_text(data_csv(data, "test.csv").read_text().replace("unit2_loc_2", "unit2_location"))
        told = self.told(capsys, model, windows, tmp_path / "out")
        assert told == f"error: {windows} has no column unit2_loc_2; the model needs it\n"

    def test_what_is_no_model(
        self, model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        windows, out = data_csv(data, "test.csv"), tmp_path / "out"
        assert "origin.yaml: cannot be read: " in self.told(capsys, tmp_path, windows, out)
        (model / "checkpoint.pt").write_bytes(b"no model")
        assert f"{model}: cannot be read as a model: " in self.told(capsys, model, windows, out)
        yaml_file.write(model / "origin.yaml", {"trainable": "trainables.mabe.tagging:train"})
        assert f"{model}: a model of trainables.mabe.tagging:train; " in self.told(capsys, model, windows, out)

    def test_predictions_that_are_there_are_kept(
        self, model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "beam_pred.csv").write_text("precious")
        told = self.told(capsys, model, data_csv(data, "test.csv"), tmp_path / "out")
        assert told == f"error: {tmp_path / 'out' / 'beam_pred.csv'} exists; name another folder\n"
        assert (tmp_path / "out" / "beam_pred.csv").read_text() == "precious"
