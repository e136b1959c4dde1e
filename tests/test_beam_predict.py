"""Beams predicted for windows without labels are those that the model was scored by."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from exports import exported
from numpy.typing import NDArray
from PIL import Image
from small_beam import SMALL, raw_files
from torch import Tensor

from search import yaml_file
from trainables.beam import fusion, predict, rebuild
from trainables.beam.config import Data, Pretrain, Rebuild, Simulated
from trainables.beam.data import samples
from trainables.beam.prepare import find_table
from trainables.contract import UserError
from trainables.optim import Optim

written = raw_files(Simulated(passes=8, frames=20))
OPTIM = Optim(lr=1e-3, batch_size=8)
Config = fusion.Config | rebuild.Config


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Data:
    return Data(root=str(written), prepared=str(tmp_path / "cache"), history=2, image_size=32)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def held_out(config: Config, path: Path, without: Sequence[str] = ()) -> NDArray[np.int64]:
    """Write the CSV of the windows that validate, less their labels and some columns; returns their beams, (N, ...)."""
    table, val = find_table(config.data), samples(config, "val")
    rows = read_rows(table.csvs[0])
    unwanted = ("unit1_beam", "unit1_pwr", "seq_index", *without)
    kept = [{key: text for key, text in rows[i].items() if not key.startswith(unwanted)} for i in val.windows]
    write_rows(path, kept)
    return val.beams(val.side)


def predicted(out: Path) -> NDArray[np.int64]:
    """The guesses of each window, (N, P, 3), from 0."""
    rows = read_rows(out / "beam_pred.csv")
    assert list(rows[0]) == ["index", "top-1 beam", "top-2 beam", "top-3 beam"]
    guesses = [[[int(beam) - 1 for beam in row[f"top-{k} beam"].split("_")] for row in rows] for k in (1, 2, 3)]
    return np.moveaxis(np.array(guesses), 0, -1)


def dba(guesses: NDArray[np.int64], beams: NDArray[np.int64]) -> float:
    off = np.abs(guesses - beams.reshape(*guesses.shape[:2], 1))
    return float((1 - np.minimum(np.minimum.accumulate(off, axis=-1), 5) / 5).mean())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["local", "sincos"])
def test_the_beams_score_what_the_model_did(form: Literal["local", "sincos"], data: Data, tmp_path: Path) -> None:
    model = replace(SMALL, pretrained_encoders="none")  # written out, as a space may do
    config = fusion.Config(data=replace(data, gps_repr=form), model=model, optim=replace(OPTIM, ema=0.5), epochs=2)
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


PUBLISHED = Rebuild(("image", "radar"), ("lidar",), encoders="copied", mistakes=("eval_mode", "picture_scale"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [Rebuild(("lidar", "radar"), ("image",)), PUBLISHED], ids=["camera", "published"])
def test_a_missing_sensor_is_rebuilt_and_its_files_are_not_asked_for(
    settings: Rebuild, data: Data, tmp_path: Path
) -> None:
    config = rebuild.Config(
        data=data,
        model=SMALL,
        optim=OPTIM,
        rebuild=settings,
        pretrain=Pretrain(epochs=1, optim=OPTIM),
        epochs=1,
    )
    metrics = exported(tmp_path / "model", config)
    windows = data_csv(data, "without_it.csv")
    beams = held_out(config, windows, without=({"image": "unit1_rgb", "lidar": "unit1_lidar"}[settings.target[0]],))
    assert predict.main([str(tmp_path / "model"), str(windows), str(tmp_path / "out")]) == 0
    assert dba(predicted(tmp_path / "out"), beams) == pytest.approx(metrics["dba_rebuilt"], abs=1e-6)


@pytest.mark.slow
def test_a_model_whose_predictions_depend_on_each_other_is_refused(data: Data, tmp_path: Path) -> None:
    mistaken = Rebuild(encoders="copied", mistakes=("training_mode",))
    config = rebuild.Config(data, replace(SMALL, norm="batch"), OPTIM, mistaken, pretrain=Pretrain(0), epochs=1)
    exported(tmp_path / "model", config)
    with pytest.raises(UserError, match="it has the mistake training_mode, by which the beam of a window depends on"):
        predict.read_model(tmp_path / "model")


def test_a_model_that_went_on_from_another_does_without_it(data: Data, tmp_path: Path) -> None:
    config = fusion.Config(data=replace(data, modalities=("lidar",)), model=SMALL, optim=OPTIM, epochs=1)
    exported(tmp_path / "first", config)
    going_on = replace(config, pretrained=str(tmp_path / "first/checkpoint.pt"))
    metrics = exported(tmp_path / "model", going_on)
    shutil.rmtree(tmp_path / "first")
    windows = data_csv(data, "later.csv")
    beams = held_out(config, windows)
    assert predict.main([str(tmp_path / "model"), str(windows), str(tmp_path / "out")]) == 0
    assert dba(predicted(tmp_path / "out"), beams) == pytest.approx(metrics["dba"], abs=1e-6)


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
    rows = read_rows(tmp_path / "out" / "beam_confidence.csv")
    assert [row["index"] for row in rows] == list(names)
    told = [[float(value) for value in row["confidence"].split("_")] for row in rows]
    np.testing.assert_allclose(told, confidence, atol=1e-6)


def seen(config: fusion.Config, windows: Path) -> dict[str, Tensor]:
    """What a model of this config sees of the CSV's windows."""
    network = fusion.build(config)
    _, batches = predict.batches(predict.Model(config, config.data, network, lambda batch: batch["lidar"]), windows)
    found = list(batches)
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}


def test_a_window_is_seen_as_in_training_whichever_windows_stand_beside_it(data: Data) -> None:
    config = fusion.Config(data=replace(data, lidar="filtered", modalities=("lidar", "gps")), model=SMALL, optim=OPTIM)
    windows = data_csv(data, "all.csv")
    held_out(config, windows)
    val = samples(config, "val")
    trained_on, together = val[torch.arange(len(val))], seen(config, windows)
    alone = seen(config, write_rows(windows.with_name("one.csv"), read_rows(windows)[5:6]))
    for name in ("lidar", "gps"):
        torch.testing.assert_close(together[name], trained_on[name])
        torch.testing.assert_close(alone[name], trained_on[name][5:6])


def test_positions_alone_are_carried_on_for_as_long_as_in_training(data: Data) -> None:
    """In windows built from the raw files the label is nearer to the positions than in the published ones."""
    config = fusion.Config(data=replace(data, steps=2, modalities=("gps",)), model=SMALL, optim=OPTIM)
    windows = data_csv(data, "positions.csv")
    held_out(config, windows)
    val = samples(config, "val")
    torch.testing.assert_close(seen(config, windows)["gps"], val[torch.arange(len(val))]["gps"])
    held_out(config, windows, without=("unit1_rgb", "unit1_lidar", "unit1_radar"))  # nothing tells the frames then
    torch.testing.assert_close(seen(config, windows)["gps"], val[torch.arange(len(val))]["gps"])


def test_a_scenario_that_training_did_not_see_is_scaled_by_itself(
    data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fusion.Config(data=replace(data, modalities=("gps",)), model=SMALL, optim=OPTIM)
    windows = data_csv(data, "every.csv")
    held_out(whole, windows)
    assert any("scenario34" in row["unit1_rgb_1"] for row in read_rows(windows))
    rows = read_rows(data_csv(data, data.csv))
    write_rows(data_csv(data, "less.csv"), [row for row in rows if "scenario34" not in row["unit1_rgb_1"]])
    config = replace(whole, data=replace(whole.data, csv="less.csv"))
    assert seen(config, windows)["gps"].isfinite().all()
    assert capsys.readouterr().out.count("scenario34: the model was not trained on it") == 1


def test_pictures_come_from_where_training_took_them(data: Data, tmp_path: Path) -> None:
    shutil.copytree(data_csv(data, "").parent, tmp_path / "root")
    data = replace(data, root=str(tmp_path / "root"), modalities=("image",), camera="camera_data_seg")
    shutil.copytree(tmp_path / "root" / "Multi_Modal", others := tmp_path / "root" / "scenario31-34_test")
    trained_on = tmp_path / "root" / "Multi_Modal"
    for folder, numbers in ((trained_on, (31,)), (others, (31, 32))):
        for number in numbers:
            black(shutil.copytree(cameras(folder, number), cameras(folder, number).with_name("camera_data_seg")))
    config = fusion.Config(data=data, model=SMALL, optim=OPTIM)
    held_out(config, others / "test.csv")
    val = samples(config, "val")
    torch.testing.assert_close(seen(config, others / "test.csv")["image"], val[torch.arange(len(val))]["image"])
    shutil.rmtree(cameras(others, 31).with_name("camera_data_seg"))
    with pytest.raises(UserError, match=r"camera_data_seg: no such folder, and the model saw scenario31 from one"):
        seen(config, others / "test.csv")


def cameras(folder: Path, scenario: int) -> Path:
    return folder / f"scenario{scenario}" / "unit1" / "camera_data"


def black(folder: Path) -> None:
    for path in folder.iterdir():
        Image.new("RGB", (8, 8)).save(path)


def write_config(model: Path, config: dict[str, Any], section: str, **changed: Any) -> None:
    yaml_file.write(model / "config.yaml", {**config, section: {**config.get(section, {}), **changed}})


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
        assert f"{model / 'checkpoint.pt'}: it cannot be read as a checkpoint" in self.told(capsys, model, windows, out)
        torch.save({"model": {}}, model / "checkpoint.pt")
        assert f"{model / 'checkpoint.pt'}: not the weights of {model / 'config.yaml'}" in self.told(
            capsys, model, windows, out
        )
        (model / "config.yaml").write_text("epochs: many")
        assert f"{model / 'config.yaml'}: epochs: Input should be a valid integer" in self.told(
            capsys, model, windows, out
        )
        (model / "config.yaml").write_text("model: {residul: false}")
        assert f"{model / 'config.yaml'}: model.residul: this version" in self.told(capsys, model, windows, out)
        (model / "origin.yaml").write_text("[]")
        assert f"{model / 'origin.yaml'}: not a mapping; " in self.told(capsys, model, windows, out)
        yaml_file.write(model / "origin.yaml", {"trainable": "trainables.mabe.tagging:train"})
        assert f"{model}: a model of trainables.mabe.tagging:train; " in self.told(capsys, model, windows, out)

    def test_a_default_that_has_changed_since(
        self, model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = yaml_file.read(model / "config.yaml")
        write_config(model, config, "model", residual=False)
        told = self.told(capsys, model, data_csv(data, "test.csv"), tmp_path / "out")
        assert told.startswith(f"error: {model}: it was trained with model.residual = True; by its config.yaml,")

    def test_data_that_have_gone_matter_where_they_scale_what_the_model_sees(
        self, model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = yaml_file.read(model / "config.yaml")
        write_config(model, config, "data", root=str(tmp_path / "gone"))
        told = self.told(capsys, model, data_csv(data, "test.csv"), tmp_path / "out")
        assert f"the data that the model was trained on, as its config.yaml names them: data.root = {tmp_path}" in told
        without = fusion.Config(data=replace(data, modalities=("lidar",)), model=SMALL, optim=OPTIM, epochs=1)
        exported(tmp_path / "other", without)
        config = yaml_file.read(tmp_path / "other" / "config.yaml")
        write_config(tmp_path / "other", config, "data", root=str(tmp_path / "gone"))
        assert predict.main([str(tmp_path / "other"), str(data_csv(data, "test.csv")), str(tmp_path / "out")]) == 0

    def test_predictions_that_are_there_are_kept(
        self, model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "beam_pred.csv").write_text("precious")
        told = self.told(capsys, model, data_csv(data, "test.csv"), tmp_path / "out")
        assert told == f"error: {tmp_path / 'out' / 'beam_pred.csv'} exists; name another folder\n"
        assert (tmp_path / "out" / "beam_pred.csv").read_text() == "precious"
