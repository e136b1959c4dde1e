"""What every trial asks for again is read once in a process, and anew when its files have changed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_beam import DataConfig, raw_files

from trainables.beam import table
from trainables.beam.config import Data, Modality, Simulated
from trainables.beam.data import describe, samples
from trainables.beam.health import dba_of_guessing
from trainables.beam.prepare import array_path, find_table, prepare_data

written = raw_files(Simulated(passes=2, frames=18))


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Data:
    shutil.copytree(written, tmp_path / "root")
    return Data(
        root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"), image_size=8, modalities=("lidar", "gps")
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the CSV files that are read from here on."""
    names: list[str] = []
    read_csv = table._read_csv

    def counted(path: Path, modalities: tuple[Modality, ...], labelled: bool) -> list[table.Row]:
        names.append(path.name)
        return read_csv(path, modalities, labelled)

    monkeypatch.setattr(table, "_read_csv", counted)
    return names


def trial(data: Data) -> None:
    describe(DataConfig(data))
    for side in ("train", "val"):
        samples(DataConfig(data), side)
    dba_of_guessing(DataConfig(data))


def windows_of(data: Data) -> Path:
    return Path(str(data.root)) / "Multi_Modal" / data.csv


def test_a_process_reads_a_window_file_once(data: Data, read: list[str]) -> None:
    trial(data)
    trial(replace(data, gps_repr="sincos", split_seed=7))  # which say nothing about what is in it
    assert read == [data.csv]
    one, other = (samples(DataConfig(data), "train") for _ in range(2))
    assert one is other


def test_a_process_reads_windows_once_that_it_built(data: Data, read: list[str]) -> None:
    long = replace(data, history=7, steps=3)
    trial(long)
    trial(long)
    assert read == [data.csv, find_table(long).csvs[0].name]


def test_a_window_file_that_changed_is_read_anew(data: Data, read: list[str]) -> None:
    count = len(prepare_data(data).beam_NP)
    rows = windows_of(data).read_text().splitlines(keepends=True)
    windows_of(data).write_text("".join(rows[:-1]))
    assert len(prepare_data(data).beam_NP) == count - 1
    windows_of(data).write_text("".join(rows[:-1]).replace("31-0", "31-9"))  # of the same length
    os.utime(windows_of(data), ns=(0, 1))
    passes = prepare_data(data).passes_N
    assert passes is not None
    assert "31-9" in passes
    assert len(read) == 3


def test_arrays_that_were_made_anew_are_opened_anew(data: Data) -> None:
    before = samples(DataConfig(data), "train")
    path = array_path(data, find_table(data), "unit1_lidar_")
    path.unlink()
    after = samples(DataConfig(data), "train")
    assert path.exists()
    assert after is not before
    for name, tensor in after[torch.arange(3)].items():
        assert torch.equal(tensor, before[torch.arange(3)][name])


def test_what_is_shared_cannot_be_written(data: Data) -> None:
    side, found = samples(DataConfig(data), "train"), find_table(data)
    assert side.gps_2N2G is not None
    shared = [found.beam_NP, found.scenario_N, found.frame_NK, found.adaptation_N, found.groups["unit1_lidar_"].at_NK]
    for array in (*shared, side.beam_N, side.gps_2N2G, side.apart_N, side.windows, side.at_NH["lidar"]):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    batch = side[torch.arange(2)]
    kept = batch["beam"].clone()
    batch["beam"] += 1
    np.testing.assert_array_equal(side[torch.arange(2)]["beam"], kept)
