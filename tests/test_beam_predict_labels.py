"""Where windows have labels, their beams are scored as the search scored them, and windows that trained are counted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import exported
from small_beam import SMALL, raw_files
from test_beam_predict import data_csv, read_rows, write_rows

from trainables.beam import fusion, predict
from trainables.beam.config import Data, Simulated
from trainables.beam.data import samples
from trainables.beam.prepare import find_table
from trainables.beam.split import split
from trainables.optim import Optim

written = raw_files(Simulated(passes=8, frames=20))
Row = dict[str, str]
LABELS = ("unit1_beam", "unit1_pwr")
REMEDY = "; or remove the column unit1_beam, to predict without scores\n"


@dataclass(frozen=True)
class Exported:
    folder: Path
    config: fusion.Config
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def model(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("one")
    data = Data(root=str(written), prepared=str(folder / "cache"), modalities=("gps",), history=2, image_size=32)
    config = fusion.Config(data=data, model=SMALL, optim=Optim(lr=1e-2, batch_size=8), epochs=2)
    return Exported(folder / "model", config, exported(folder / "model", config))


@pytest.fixture(scope="module")
def ahead(model: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model of three steps."""
    folder = tmp_path_factory.mktemp("three") / "model"
    config = replace(model.config, data=replace(model.config.data, steps=3))
    return Exported(folder, config, exported(folder, config))


def rows_of(model: Exported) -> list[Row]:
    return read_rows(find_table(model.config.data).csvs[0])


def held_out(model: Exported) -> list[Row]:
    rows = rows_of(model)
    return [rows[i] for i in samples(model.config, "val").windows]


def without(rows: Sequence[Row], *columns: str) -> list[Row]:
    return [{key: text for key, text in row.items() if not key.startswith(columns)} for row in rows]


def printed(model: Path, windows: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the command prints, from that of its beams on."""
    capsys.readouterr()
    assert predict.main([str(model), str(windows), str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("beams of ")) :]


def scores_in(lines: Sequence[str]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in map(str.split, line.split(", "))} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["model", "ahead"])
def test_labelled_windows_score_what_the_search_reported(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Exported = request.getfixturevalue(which)
    labelled = write_rows(data_csv(model.config.data, f"{which}.csv"), held_out(model))
    first, second, *lines = printed(model.folder, labelled, tmp_path / "out", capsys)
    assert first == f"beams of {len(held_out(model))} windows: {tmp_path / 'out' / 'beam_pred.csv'}"
    assert second == "they have labels; the model was trained on 0 of them:"
    found = scores_in(lines)
    names = [["dba", "top1", "top2", "top3"], ["dba_31", "dba_32", "dba_33", "dba_34"]]
    names += [["dba_step1", "dba_step2", "dba_step3"]] if which == "ahead" else []
    assert [list(scores) for scores in found] == names
    for scores in found:
        assert scores == {name: pytest.approx(model.metrics[name], abs=1e-4) for name in scores}

    bare = write_rows(labelled.with_name("bare.csv"), without(held_out(model), *LABELS))
    assert printed(model.folder, bare, tmp_path / "bare", capsys) == [
        first.replace(str(tmp_path / "out"), str(tmp_path / "bare"))
    ]
    empty = write_rows(bare, [{**row, "unit1_beam": ""} for row in held_out(model)])
    assert len(printed(model.folder, empty, tmp_path / "empty", capsys)) == 1
    guesses = [(tmp_path / name / "beam_pred.csv").read_text() for name in ("out", "bare", "empty")]
    assert len(set(guesses)) == 1


def test_windows_that_trained_are_known_wherever_their_files_lie(
    model: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data_csv(model.config.data, "").parent, tmp_path / "root")
    windows = write_rows(tmp_path / "root/Multi_Modal/other_names.csv", rows_of(model))
    train, _ = split(find_table(model.config.data), model.config.data)
    assert 0 < len(train) < len(rows_of(model))
    line = printed(model.folder, windows, tmp_path / "out", capsys)[1]
    assert line == f"they have labels; the model was trained on {len(train)} of them:"

    older = shutil.copytree(model.folder, tmp_path / "older")
    state = torch.load(older / "checkpoint.pt", weights_only=True)
    del state["settings"]["trained_on"]
    torch.save(state, older / "checkpoint.pt")
    line = printed(older, windows, tmp_path / "out2", capsys)[1]
    assert line == (
        "they have labels; how many of them the model was trained on is unknown, as its checkpoint does not say:"
    )


def test_a_nan_power_is_relabelled_as_for_training(model: Exported, tmp_path: Path) -> None:
    shutil.copytree(data_csv(model.config.data, "").parent, tmp_path / "root")
    rows = rows_of(model)[:4]
    power = tmp_path / "root/Multi_Modal" / rows[2]["unit1_pwr_60ghz"]
    powers = np.loadtxt(power)
    powers[[3, 40]] = np.nan
    powers[17] = 1.0
    power.write_text("\n".join(map(str, powers)))
    rows[2]["unit1_beam"] = "4"  # the official label is the first NaN
    windows = write_rows(tmp_path / "root/Multi_Modal/nan.csv", rows)
    labels = predict.read_labels(windows, replace(model.config.data, prepared=str(tmp_path / "cache")))
    assert labels is not None
    assert labels.beam.tolist() == [17 if i == 2 else int(row["unit1_beam"]) - 1 for i, row in enumerate(rows)]


class TestMistakes:
    def told(
        self, model: Exported, rows: Sequence[Row], capsys: pytest.CaptureFixture[str], name: str = "wrong.csv"
    ) -> str:
        windows = write_rows(data_csv(model.config.data, name), rows)
        out = model.folder.parent / "never"
        assert predict.main([str(model.folder), str(windows), str(out)]) == 2
        assert not list(out.iterdir())
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.endswith(REMEDY)
        return error.removeprefix("error: ").removesuffix(REMEDY)

    def test_labels_that_count_from_zero(self, model: Exported, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [{**row, "unit1_beam": str(int(row["unit1_beam"]) - 1)} for row in rows_of(model)]
        rows = [row for row in rows if row["unit1_beam"] != "0"]
        message = (
            f"wrong.csv: unit1_beam names the beam below the strongest in {len(rows)} of {len(rows)} labels; it must"
        )
        assert message in self.told(model, rows, capsys)
        rows[5]["unit1_beam"] = "0"
        assert re.search(r"row 6 of .*: unit1_beam = '0' is not one number in 1\.\.64", self.told(model, rows, capsys))

    def test_labels_without_their_powers(self, model: Exported, capsys: pytest.CaptureFixture[str]) -> None:
        told = self.told(model, without(held_out(model), "unit1_pwr"), capsys)
        assert told.endswith("wrong.csv has no column unit1_pwr_60ghz; every window needs its power")
        rows = held_out(model)
        rows[1]["unit1_pwr_60ghz"] = rows[1]["unit1_pwr_60ghz"].replace("power_", "power_9")
        assert "is not there; row 2 of " in self.told(model, rows, capsys, "gone.csv")

    def test_fewer_labels_than_the_model_has_steps(self, ahead: Exported, capsys: pytest.CaptureFixture[str]) -> None:
        rows = read_rows(data_csv(ahead.config.data, ahead.config.data.csv))
        told = self.told(ahead, rows, capsys)
        assert told.endswith("wrong.csv: its windows have 1 labels, and the model predicts 3; give as many")
