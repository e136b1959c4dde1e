"""Windows built from the raw files are the published ones; several labels a window are read and kept in order."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_beam import DataConfig, raw_files

from trainables.beam.config import Data, Simulated
from trainables.beam.data import describe, samples
from trainables.beam.multistep import newest_ids
from trainables.beam.prepare import find_table, labels, prepare_data
from trainables.beam.split import split
from trainables.contract import UserError

SIZE, H, P = 8, 7, 3
LEFT_OUT = "beam data: {} of 9 windows are left out: they lack files, or powers that are not NaN\n"
SMALL = Simulated(passes=3, frames=18)  # all in one scenario, so that passes follow one another without a gap


written = raw_files(SMALL)


@pytest.fixture
def long(written: Path) -> Data:
    """Windows of more instants and labels than the data set's own; no test may spoil these files."""
    return Data(root=str(written), prepared=str(written.parent / "cache"), image_size=SIZE, history=H, steps=P)


@pytest.fixture
def own(long: Data, tmp_path: Path) -> Data:
    assert long.root is not None
    shutil.copytree(long.root, tmp_path / "root")
    return replace(long, root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number(name: str) -> int:
    return int(name.rsplit("_", 1)[1].split(".")[0])


def numbers(row: dict[str, str], prefix: str, count: int) -> list[int]:
    return [number(row[f"{prefix}{k}"]) for k in range(1, count + 1)]


def newest_of(data: Data) -> list[int]:
    """The newest instant of every window."""
    return [number(row[f"unit1_rgb_{H}"]) for row in rows_of(find_table(data).csvs[0])]


def own_csv(data: Data) -> Path:
    assert data.root is not None
    return Path(data.root) / "Multi_Modal" / data.csv


def test_the_newest_instants_are_the_published_ones() -> None:
    assert newest_ids(range(100, 120), history=5, steps=1) == list(range(10, 19))
    ids = [*range(30), *range(60, 90), *range(90, 110, 2)]
    found = newest_ids(ids, history=10, steps=5)
    assert found[0] == 20  # the first 2 H are skipped
    assert found[-1] < len(ids) - 5  # and the last P
    assert all(ids[k + 5] - ids[k] < 10 for k in found)
    skipped = set(range(20, len(ids) - 5)) - set(found)
    assert skipped == {*range(25, 30), *range(60, 65)}  # the gap, and where every second file is missing


def test_built_windows_hold_every_other_file_of_one_pass(long: Data) -> None:
    table = find_table(long)
    rows = rows_of(table.csvs[0])
    powers = {
        i: np.loadtxt(table.root / f"Multi_Modal/scenario31/unit1/mmWave_data/mmWave_power_{i}.txt") for i in range(54)
    }
    for row in rows:
        newest = number(row[f"unit1_rgb_{H}"])
        for sensor in ("rgb", "lidar", "radar"):
            assert numbers(row, f"unit1_{sensor}_", H) == [newest - 2 * (H - k) for k in range(1, H + 1)]
        assert numbers(row, "unit2_loc_", 2) == [newest - 12, newest - 6]
        labelled = numbers(row, "unit1_pwr_60ghz_", P)
        assert labelled == [newest, newest + 1, newest + 2]
        assert row["unit1_beam"] == "_".join(str(powers[i].argmax() + 1) for i in labelled)
        assert (newest - 12) // 18 == labelled[-1] // 18 == int(row["seq_index"].split("-")[1])
    # A window takes 12 files before its newest and two after; the first 2 H ids and the last P are skipped.
    assert newest_of(long) == [14, 15, *range(30, 34), *range(48, 51)]
    assert rows[0].keys() >= {"index", "unit1_loc"}


def test_a_batch_holds_the_beams_of_all_steps(long: Data) -> None:
    side = samples(DataConfig(long), "val")
    batch = side[torch.arange(len(side))]
    assert batch["beam"].shape == (len(side), P)
    assert batch["image"].shape == (len(side), H, 3, SIZE, SIZE)
    rows = rows_of(find_table(long).csvs[0])
    told = [[int(beam) - 1 for beam in rows[i]["unit1_beam"].split("_")] for i in batch["index"].tolist()]
    assert batch["beam"].tolist() == told


def test_windows_of_a_shorter_history_may_be_those_of_a_longer_one(long: Data) -> None:
    short, alone = replace(long, history=2, longest_history=H), replace(long, history=2)
    assert find_table(short).csvs == find_table(long).csvs, "and so are the decoded arrays"
    assert len(find_table(alone).lines) > len(find_table(short).lines)
    ours, theirs = (samples(DataConfig(data), "val") for data in (short, long))
    every = torch.arange(len(theirs))
    assert len(ours) == len(theirs)
    for name, tensor in theirs[every].items():
        torch.testing.assert_close(ours[every][name], tensor[:, -2:] if name in ("image", "lidar", "radar") else tensor)


def test_the_longest_history_is_no_shorter_than_any() -> None:
    with pytest.raises(UserError, match=r"data\.longest_history = 6 must be at least data\.history = 7"):
        Data(history=H, longest_history=6)


def test_nothing_is_written_beside_the_data(own: Data) -> None:
    assert own.root is not None
    before = sorted(Path(own.root).rglob("*"))
    samples(DataConfig(own), "train")
    assert sorted(Path(own.root).rglob("*")) == before


def test_a_window_file_of_several_labels_may_be_given(own: Data, tmp_path: Path) -> None:
    built = find_table(own).csvs[0]
    given = replace(own, csv="7to3.csv", prepared=str(tmp_path / "other"))
    shutil.copy(built, own_csv(given))
    assert find_table(given).csvs == (own_csv(given),)
    theirs, ours = (samples(DataConfig(data), "train") for data in (given, own))
    some = torch.arange(len(ours))
    for name, tensor in ours[some].items():
        torch.testing.assert_close(theirs[some][name], tensor)
    single = samples(DataConfig(replace(given, steps=1, history=2)), "train")
    torch.testing.assert_close(single[some]["beam"], ours[some]["beam"][:, 0])
    torch.testing.assert_close(single[some]["radar"], ours[some]["radar"][:, -2:])
    torch.testing.assert_close(single[some]["gps"], ours[some]["gps"])  # learnt from the newest instant alone


@pytest.mark.parametrize(("beam", "message"), [("12_13", "'12_13'"), ("12_13_0", "'12_13_0'"), ("1_2_x", "'1_2_x'")])
def test_labels_that_do_not_match_their_powers_are_a_mistake(own: Data, beam: str, message: str) -> None:
    rows = rows_of(find_table(own).csvs[0])
    rows[1]["unit1_beam"] = beam
    given = replace(own, csv="7to3.csv")
    with own_csv(given).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UserError, match=rf"row 2 of .*{message} is not 3 numbers joined by _, each in 1\.\.64"):
        find_table(given)


def test_a_window_that_lacks_a_file_is_not_built(own: Data, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own_csv(own).parent / "scenario31/unit1"
    (folder / "lidar_data/lidar_data_30.ply").unlink()
    assert newest_of(replace(own, modalities=("image", "gps"))) == [14, 15, *range(30, 34), *range(48, 51)]
    assert "left out" not in capsys.readouterr().out  # those that would straddle two passes are no loss
    assert newest_of(own) == [14, 15, 31, 33, *range(48, 51)]
    assert capsys.readouterr().out == LEFT_OUT.format(2)
    assert newest_of(own) == [14, 15, 31, 33, *range(48, 51)]
    assert capsys.readouterr().out == ""


def test_windows_are_built_again_once_a_download_is_complete(own: Data, tmp_path: Path) -> None:
    picture = own_csv(own).parent / "scenario31/unit1/camera_data/image_BS1_30.jpg"
    picture.rename(tmp_path / "later.jpg")
    short = find_table(own).csvs
    assert newest_of(own) == [14, 15, 31, 33, *range(48, 51)]
    (tmp_path / "later.jpg").rename(picture)
    assert newest_of(own) == [14, 15, *range(30, 34), *range(48, 51)]
    picture.rename(tmp_path / "later.jpg")
    assert find_table(own).csvs == short  # what was built is found again


def test_frames_of_no_known_pass_are_in_no_window(own: Data) -> None:
    """The window file lists the first pass alone, the folders hold all three."""
    rows = [row for row in rows_of(own_csv(own)) if row["seq_index"].endswith("-0")]
    with own_csv(own).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert newest_of(own) == [14, 15]


def test_without_passes_only_gaps_end_a_window(own: Data) -> None:
    rows = rows_of(own_csv(own))
    with own_csv(own).open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "seq_index"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert newest_of(own) == [*range(14, 51)]


def test_a_nan_power_is_passed_over_in_every_step(own: Data) -> None:
    power = own_csv(own).parent / "scenario31/unit1/mmWave_data/mmWave_power_32.txt"
    powers = np.loadtxt(power)
    powers[[3, 40]] = np.nan
    powers[17] = 1.0
    power.write_text("\n".join(str(x) for x in powers))
    rows = {number(row["unit1_rgb_7"]): row["unit1_beam"].split("_") for row in rows_of(find_table(own).csvs[0])}
    assert rows[32][0] == rows[31][1] == rows[30][2] == "18"


def test_a_sweep_without_a_power_is_lacking_and_none_of_the_others_is(
    own: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_csv(own).parent / "scenario31/unit1/mmWave_data/mmWave_power_32.txt").write_text("nan\n" * 64)
    assert newest_of(own) == [14, 15, 33, *range(48, 51)]
    assert capsys.readouterr().out == LEFT_OUT.format(3)
    samples(DataConfig(own), "train")  # no window that is built names that sweep


def test_what_no_pass_is_long_enough_for_is_a_mistake(long: Data) -> None:
    with pytest.raises(
        UserError, match=r"windows of 20 instants .* and data\.steps = 5: nowhere in .* are there 44 files in a"
    ):
        find_table(replace(long, history=20, steps=5))
    with pytest.raises(UserError, match=r"data\.simulated\.frames = 30 must be at least 44"):
        Data(history=20, steps=5)
    assert Data(history=10, steps=5, simulated=Simulated(frames=24)).steps == 5


def test_a_scenario_without_a_sensors_files_says_what_to_do(own: Data) -> None:
    shutil.rmtree(own_csv(own).parent / "scenario31/unit1/radar_data")
    with pytest.raises(UserError, match=r"scenario31 needs.*take their modality out of data\.modalities"):
        find_table(own)
    short = replace(own, history=5, steps=1)
    rule = r"radar_data holds none of the 54 files that scenario31 needs, row 1 of .*csv the first: restore them, "
    with pytest.raises(UserError, match=rule + r"take radar out of data\.modalities, or remove the rows of scenario31"):
        prepare_data(short)
    prepare_data(replace(short, modalities=("image", "gps")))


def test_labels_that_count_from_zero_are_a_mistake(long: Data) -> None:
    data = replace(long, history=5, steps=1)
    table = prepare_data(data)
    power = np.eye(64)[np.arange(len(table.groups["unit1_pwr_60ghz"].paths)) % 60 + 2]
    best = power[table.groups["unit1_pwr_60ghz"].at_NK].argmax(axis=2)
    np.testing.assert_array_equal(labels(replace(table, beam_NP=best), power), best)
    with pytest.raises(
        UserError, match=r"unit1_beam names the beam below the strongest in 42 of 42 labels; it must count"
    ):
        labels(replace(table, beam_NP=best - 1), power)  # what 0..63 become when 1 is subtracted


def test_the_adaptation_set_is_left_out_where_its_windows_are_too_short(
    own: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own.root is not None
    adaptation = Path(own.root) / "Adaptation_dataset_multi_modal"
    shutil.copytree(Path(own.root) / "Multi_Modal", adaptation)
    (adaptation / own.csv).rename(adaptation / "ml_challenge_data_adaptation_multi_modal.csv")
    assert not prepare_data(own).adaptation_N.any()
    assert "left out" not in capsys.readouterr().out
    for _ in range(2):  # at each search, and not only where something is decoded
        assert describe(DataConfig(own)).endswith(" is left out: its windows have 1 labels, and data.steps = 3")
    shutil.copy(find_table(own).csvs[0], own_csv(replace(own, csv="7to3.csv")))
    mixed = replace(own, csv="7to3.csv", history=4, steps=1)
    table = prepare_data(mixed)
    assert table.adaptation_N.sum() == 42
    assert table.groups["unit1_rgb_"].at_NK.shape[1] == 5  # the longer windows' newest
    _, val = split(table, mixed)
    assert val.holds(len(table.beam_NP))[table.adaptation_N].all()
