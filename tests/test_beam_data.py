"""Prepared arrays say what the raw files say; mistakes in files are one line; nobody trains on what is held out."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from trainables.beam import fusion
from trainables.beam.checkpoint import given_weights, settings_of
from trainables.beam.config import Data, Modality, Simulated
from trainables.beam.data import describe, gps_width, names, samples, timing_of
from trainables.beam.decode import Decoder, decode
from trainables.beam.files import fov_of, radar_maps, read_points
from trainables.beam.gps import Timing, gps_features, scale_of
from trainables.beam.prepare import array_path, data_root, prepare_data
from trainables.beam.simulator import simulate
from trainables.beam.split import split
from trainables.beam.table import Table, read_table
from trainables.contract import UserError

SIZE = 16
SMALL = Simulated(passes=8, frames=8)
Row = dict[str, str]


@dataclass(frozen=True)
class Config:
    data: Data


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(cache: str) -> Data:
    return Data(prepared=cache, image_size=SIZE, simulated=SMALL)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    simulate(root, Simulated(passes=2, frames=6))
    return root


@pytest.fixture
def own(written: Path, tmp_path: Path) -> Data:
    """A small data set that a test may spoil."""
    shutil.copytree(written, tmp_path / "root")
    return Data(root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"), image_size=SIZE)


def sides_of(table: Table, data: Data) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which windows train, and which validate."""
    train, val = split(table, data)
    return train.holds(len(table.beam_NP)), val.holds(len(table.beam_NP))


def csv_of(data: Data) -> Path:
    return data_root(data) / "Multi_Modal" / "ml_challenge_dev_multi_modal.csv"


def rows_of(data: Data) -> list[Row]:
    with csv_of(data).open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(data: Data, rows: list[Row]) -> None:
    write_rows(csv_of(data), rows)


def write_rows(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def adapt(data: Data, rows: list[Row]) -> None:
    """Give the data set an adaptation set of these rows, with copies of all files."""
    folder = data_root(data) / "Adaptation_dataset_multi_modal"
    shutil.copytree(data_root(data) / "Multi_Modal", folder)
    (folder / csv_of(data).name).unlink()
    write_rows(folder / "ml_challenge_data_adaptation_multi_modal.csv", rows)


def slow_counts(path: Path, x: tuple[float, float], y: tuple[float, float]) -> NDArray[np.int64]:
    """The lidar histogram point by point."""
    counts = np.zeros((SIZE, SIZE), dtype=np.int64)
    for line in path.read_text().split("end_header\n")[1].splitlines():
        place = [float(word) for word in line.split()]
        if x[0] <= place[0] <= x[1] and y[0] <= place[1] <= y[1]:
            row, column = ((place[i] - low) / (high - low) * SIZE for i, (low, high) in enumerate((x, y)))
            counts[min(int(row), SIZE - 1), min(int(column), SIZE - 1)] += 1
    return counts.clip(max=5)


def slow_radar(cube: NDArray[np.complex64]) -> NDArray[np.float64]:
    """The published maps by matrices of waves, at a length that every axis divides, pooled cell by cell."""
    antennas, samples_, chirps = cube.shape

    def waves(length: int) -> NDArray[np.complex128]:
        bins = -(-length // SIZE) * SIZE
        return np.exp(-2j * np.pi * np.outer(np.arange(bins), np.arange(length)) / bins)

    ranges = np.einsum("rs,asc->arc", waves(samples_), cube)
    still = ranges - ranges.mean(axis=2, keepdims=True)
    maps = [
        np.abs(np.einsum("ga,arc->rgc", waves(antennas), still)).sum(axis=2),
        np.abs(np.einsum("vc,arc->arv", waves(chirps), ranges)).sum(axis=0),
    ]
    pooled = []
    for fine in maps:
        rows, columns = fine.shape[0] // SIZE, fine.shape[1] // SIZE
        cells = [
            [fine[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].max() for j in range(SIZE)]
            for i in range(SIZE)
        ]
        pooled.append((np.array(cells) - np.min(cells)) / (np.max(cells) - np.min(cells)))
    return np.array(pooled)


def test_batches_equal_a_reading_of_the_raw_files_one_by_one(data: Data) -> None:
    rows, folder = rows_of(data), csv_of(data).parent
    fovs = {
        "31": ((-70, 0), (-25, 14)),
        "32": ((-60, 0), (-40, 5.5)),
        "33": ((-50, 0), (-12, 7)),
        "34": ((-50, 0), (-20, 10)),
    }
    side = samples(Config(data), "train")
    batch = side[torch.arange(0, len(side), 7)]
    for b, window in enumerate(batch["index"].tolist()):
        row = rows[window]
        scenario = row["unit1_loc"].split("scenario")[1][:2]
        assert side.scenarios[int(batch["scenario"][b])] == f"scenario{scenario}"
        assert (
            int(batch["beam"][b]) == np.loadtxt(folder / row["unit1_pwr_60ghz"]).argmax() == int(row["unit1_beam"]) - 1
        )
        for h in range(5):
            with Image.open(folder / row[f"unit1_rgb_{h + 1}"]) as image:
                picture = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(batch["image"][b, h].permute(1, 2, 0), picture)
            counts = slow_counts(folder / row[f"unit1_lidar_{h + 1}"], *fovs[scenario])
            moved = np.abs(batch["lidar"][b, h, 0].numpy().astype(int) - counts)
            assert moved.sum() <= 2, "a point on the border of two bins may fall to either side, and no other"
            maps = slow_radar(np.load(folder / row[f"unit1_radar_{h + 1}"]))
            np.testing.assert_allclose(batch["radar"][b, h].float(), maps, atol=1e-3)  # half floats


def test_a_sample_is_named_by_the_row_of_its_window(data: Data) -> None:
    config = Config(replace(data, augment=1, flip=True))
    side, path = samples(config, "train"), csv_of(config.data)
    found = names(config, range(len(side)))
    windows, kinds = len(side) // 4, ("", "copy 1 of ", "mirrored ", "mirrored copy 1 of ")
    rows = [f"row {window + 1} of {path}" for window in side[torch.arange(windows)]["index"].tolist()]
    assert found == [kind + row for kind in kinds for row in rows]


def test_the_radar_maps_are_the_published_ones_where_nothing_is_pooled() -> None:
    rng = np.random.default_rng(0)
    cube = (rng.standard_normal((4, 32, 31)) + 1j * rng.standard_normal((4, 32, 31))).astype(np.complex64)
    ranges = np.fft.fft(cube, axis=1)
    angle = np.abs(np.fft.fft(ranges - ranges.mean(axis=2, keepdims=True), n=32, axis=0)).sum(axis=2).T
    velocity = np.abs(np.fft.fft(ranges, n=32, axis=2)).sum(axis=0)
    published = [(x - x.min()) / (x.max() - x.min()) for x in (angle, velocity)]
    np.testing.assert_allclose(radar_maps(cube, 32), published, atol=1e-3)
    assert radar_maps(cube, 20).shape == (2, 20, 20)  # any size, whatever it divides


def test_a_batch_has_the_promised_shapes_and_types(data: Data) -> None:
    side = samples(Config(data), "val")
    found = {name: (tuple(x.shape), x.dtype) for name, x in side[torch.tensor([0, 3, 1])].items()}
    assert found == {
        "image": ((3, 5, 3, SIZE, SIZE), torch.uint8),
        "lidar": ((3, 5, 1, SIZE, SIZE), torch.uint8),
        "radar": ((3, 5, 2, SIZE, SIZE), torch.float16),
        "gps": ((3, 2, gps_width(Config(data))), torch.float32),
        "beam": ((3,), torch.int64),
        "scenario": ((3,), torch.int64),
        "apart": ((3,), torch.bool),
        "index": ((3,), torch.int64),
    }


def test_only_the_wanted_sensors_and_the_newest_instants_are_read(data: Data) -> None:
    full = samples(Config(data), "train")[torch.arange(4)]
    few = samples(Config(replace(data, modalities=("lidar",), history=2)), "train")[torch.arange(4)]
    assert set(few) == {"lidar", "beam", "scenario", "apart", "index"}
    torch.testing.assert_close(few["lidar"], full["lidar"][:, -2:])


def test_a_radar_without_velocities_is_its_map_of_angles(data: Data) -> None:
    """Read, changed, mirrored, and from the same prepared files."""
    more = replace(data, modalities=("radar",), augment=1, flip=True)
    both, angle = (samples(Config(replace(more, radar=kind)), "train") for kind in ("angle_velocity", "angle"))
    plain, changed = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (both.side.copy_S == 0, both.side.copy_S))
    assert both.side.mirrored_S[plain.numpy()].any()
    torch.testing.assert_close(angle[plain]["radar"], both[plain]["radar"][:, :, :1])
    assert angle[changed]["radar"].shape == (len(changed), data.history, 1, data.image_size, data.image_size)


@pytest.mark.parametrize("kind", ["honest", "legacy"])
def test_every_window_is_on_one_side_and_stays_there(data: Data, kind: Literal["honest", "legacy"]) -> None:
    chosen = replace(data, split=kind)
    table = prepare_data(data)
    train, val = sides_of(table, chosen)
    assert not (train & val).any()
    assert (train | val).all()  # passes, or random windows: none straddles a border
    again, _ = sides_of(read_table(data_root(data), data), chosen)
    np.testing.assert_array_equal(train, again)
    other, _ = sides_of(table, replace(chosen, split_seed=1))
    assert (train != other).any()


def test_passes_that_are_held_out_never_train(data: Data) -> None:
    rows = rows_of(data)
    sides = {side: samples(Config(data), side).windows for side in ("train", "val")}
    passes = {side: {rows[i]["seq_index"] for i in windows} for side, windows in sides.items()}
    assert not passes["train"] & passes["val"]
    assert {name[:2] for name in passes["val"]} == {"31", "32", "33", "34"}  # a share of each scenario
    files = {side: {rows[i][f"unit1_rgb_{k}"] for i in sides[side] for k in range(1, 6)} for side in sides}
    assert not files["train"] & files["val"]


def positions_only(root: Path, frames: int, windows: int) -> Data:
    """One scenario without `seq_index`: windows of five frames, the newest ones labelled."""
    folder = root / "Multi_Modal"
    for name in ("unit1/GPS_data", "unit1/mmWave_data", "unit2/GPS_data"):
        (folder / "scenario7" / name).mkdir(parents=True)
    (folder / "scenario7/unit1/GPS_data/gps_location.txt").write_text("33.42\n-111.93\n")
    rows = []
    for i in range(frames):
        (folder / f"scenario7/unit2/GPS_data/GPS_location_{i}.txt").write_text(f"{33.4201 + 1e-6 * i}\n-111.9299\n")
        powers = np.eye(64)[i % 64]
        (folder / f"scenario7/unit1/mmWave_data/mmWave_power_{i}.txt").write_text("\n".join(map(str, powers)))
    for i in range(windows):
        car = {f"unit2_loc_{k + 1}": f"./scenario7/unit2/GPS_data/GPS_location_{i + k}.txt" for k in range(2)}
        power = {"unit1_pwr_60ghz": f"./scenario7/unit1/mmWave_data/mmWave_power_{i + 4}.txt"}
        station = {"unit1_loc": "./scenario7/unit1/GPS_data/gps_location.txt"}
        rows.append({"index": str(i), **station, **car, **power, "unit1_beam": str((i + 4) % 64 + 1)})
    data = Data(root=str(root), prepared=str(root / "cache"), modalities=("gps",))
    rewrite(data, rows)
    return data


def test_without_passes_no_frame_is_on_both_sides(tmp_path: Path) -> None:
    data = positions_only(tmp_path, 304, 300)
    train, val = sides_of(prepare_data(data), data)
    frames = [{frame for i in np.flatnonzero(side) for frame in (i, i + 1, i + 4)} for side in (train, val)]
    assert not frames[0] & frames[1]
    assert {frame // 50 for frame in frames[0]}.isdisjoint({frame // 50 for frame in frames[1]})
    assert 0 < 300 - train.sum() - val.sum() <= 8  # only windows at the two borders of one block are lost
    assert val.sum() >= 40
    lost = 300 - int(train.sum() + val.sum())
    line = f"(honest split), scenarios 7; {lost} of 300 windows straddle a border between blocks and are left out"
    assert describe(Config(data)).endswith(line)
    assert describe(Config(replace(data, split="legacy"))).endswith("(legacy split), scenarios 7")


def test_a_data_set_that_cannot_be_split_says_so(tmp_path: Path) -> None:
    data = positions_only(tmp_path, 24, 20)
    with pytest.raises(
        UserError, match=r"validates on 0; it needs two passes, or two blocks of 50 files .* that hold whole windows"
    ):
        samples(Config(data), "train")


def test_the_adaptation_set_only_validates_where_the_split_is_honest(own: Data) -> None:
    adapt(own, rows_of(own))
    table = prepare_data(own)
    assert table.adaptation_N.sum() == len(table.adaptation_N) / 2
    train, val = sides_of(table, own)
    assert not (train & table.adaptation_N).any()
    assert (val >= table.adaptation_N).all()
    train, _ = sides_of(table, replace(own, split="legacy"))
    assert (train & table.adaptation_N).any()


def test_an_adaptation_set_that_trains_is_one_of_the_scenarios(own: Data) -> None:
    adapt(own, [{name: x.replace("scenario31/", "scenario34/") for name, x in row.items()} for row in rows_of(own)])
    folder = data_root(own) / "Adaptation_dataset_multi_modal"
    (folder / "scenario31").rename(folder / "scenario34")
    config = Config(replace(own, adaptation="train"))
    for side in ("train", "val"):
        found = samples(config, side)
        batch = found[torch.arange(len(found))]
        assert found.scenarios == ("scenario31", "scenario34")
        assert set(batch["scenario"].tolist()) == {0, 1}
        assert not batch["apart"].any()


@pytest.mark.parametrize("kind", ["honest", "legacy"])
def test_a_checkpoint_that_was_trained_on_what_is_held_out_now_is_refused(
    own: Data, kind: Literal["honest", "legacy"], tmp_path: Path
) -> None:
    """The window file has changed since: the passes have exchanged their names, or the order of the rows is another."""
    config, file = fusion.Config(data=replace(own, split=kind)), tmp_path / "x.pt"
    torch.save({"model": {}, "settings": settings_of(config)}, file)
    given_weights("pretrained", str(file), config)
    rows = rows_of(own)
    names_ = sorted({row["seq_index"] for row in rows})
    rewrite(own, [{**row, "seq_index": names_[1 - names_.index(row["seq_index"])]} for row in rows[::-1]])
    with pytest.raises(UserError, match=r"\.pt: [1-9]\d* of the windows that are held out here have trained it"):
        given_weights("pretrained", str(file), config)


def test_data_sets_that_share_a_linked_csv_have_arrays_of_their_own(written: Path, tmp_path: Path) -> None:
    """Its rows name files relative to the link."""
    paths = []
    for name in ("a", "b"):
        shutil.copytree(written, tmp_path / name)
        own = Data(root=str(tmp_path / name), prepared=str(tmp_path / "cache"), image_size=SIZE)
        csv_of(own).rename(tmp_path / "shared.csv")
        csv_of(own).symlink_to(tmp_path / "shared.csv")
        paths.append(array_path(own, read_table(data_root(own), own), "unit1_rgb"))
    assert paths[0] != paths[1]


def test_an_adaptation_set_without_passes_leaves_those_of_the_development_set(own: Data) -> None:
    before = sides_of(prepare_data(own), own)
    adapt(own, [{name: x for name, x in row.items() if name != "seq_index"} for row in rows_of(own)])
    table = prepare_data(own)
    assert table.passes_N is not None
    for side, was in zip(sides_of(table, own), before, strict=True):
        np.testing.assert_array_equal(side[~table.adaptation_N], was)


def test_labels_of_an_adaptation_set_alone_that_count_from_zero_are_a_mistake(own: Data) -> None:
    rows = [row | {"unit1_beam": str(int(row["unit1_beam"]) - 1)} for row in rows_of(own)]
    adapt(own, [row for row in rows if row["unit1_beam"] != "0"][:1])
    with pytest.raises(UserError, match=r"data_adaptation_multi_modal\.csv: unit1_beam names .* in 1 of 1 labels"):
        prepare_data(own)


def test_a_nan_power_is_relabelled_by_the_strongest_of_the_others(
    own: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    power = csv_of(own).parent / rows_of(own)[0]["unit1_pwr_60ghz"]
    powers = np.loadtxt(power)
    powers[[3, 40]] = np.nan
    powers[17] = 1.0
    power.write_text("\n".join(str(x) for x in powers))
    rewrite(own, [row | {"unit1_beam": "4"} if i == 0 else row for i, row in enumerate(rows_of(own))])
    side = samples(Config(replace(own, split="legacy", holdout=0.5)), "train")
    assert side.beam_N[0] == 17
    np.testing.assert_array_equal(side.beam_N[1:], [int(row["unit1_beam"]) - 1 for row in rows_of(own)[1:]])
    assert ": 1 windows relabelled, because a power is NaN" in capsys.readouterr().out


Spoil = Callable[[Path], object]


def cut(share: float) -> Spoil:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def text(content: str) -> Spoil:
    return lambda path: path.write_text(content)


def zipped(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, cube=np.zeros(3))


@pytest.mark.parametrize(
    ("column", "spoil", "message"),
    [
        ("unit1_rgb_1", cut(0.5), "image_BS1_0.jpg: not a whole image"),
        ("unit1_rgb_1", text(""), "image_BS1_0.jpg: not a whole image"),
        ("unit1_radar_1", cut(0.9), "radar_data_0.npy: not a whole .npy file"),
        ("unit1_radar_1", text("zeros"), "radar_data_0.npy: not a whole .npy file"),
        ("unit1_radar_1", zipped, "radar_data_0.npy: an archive of arrays"),
        ("unit1_radar_1", lambda path: path.write_bytes(b"PK\3\4"), "radar_data_0.npy: not a whole .npy file"),
        ("unit1_radar_1", lambda path: np.save(path, np.zeros((4, 8))), r"float64 of shape \(4, 8\), not a complex"),
        ("unit1_lidar_1", cut(0.9), "lidar_data_0.ply: the header promises"),
        ("unit1_lidar_1", text("ply\nformat ascii 1.0\n"), "lidar_data_0.ply: not a PLY file"),
        ("unit1_lidar_1", text("ply\nformat binary_little_endian 1.0\nend_header\n"), "lidar_data_0.ply: a binary PLY"),
        ("unit1_lidar_1", lambda path: text(path.read_text().replace("vertex", "vortex"))(path), "is not `vertex`"),
        ("unit1_lidar_1", text("ply\nformat ascii 1.0\nelement vertex\nend_header\n"), "is not `vertex` and a number"),
        ("unit1_lidar_1", lambda path: text(path.read_text() + "oops")(path), "lidar_data_0.ply: .* not a number"),
        ("unit2_loc_1", text("33.4\n"), "GPS_location_0.txt: 1 numbers instead of 2"),
        ("unit2_loc_1", text("33.4\nwest\n"), "GPS_location_0.txt: not 2 numbers"),
        (
            "unit2_loc_1",
            text("-111.9\n33.4\n"),
            "GPS_location_0.txt: latitude -111.9, longitude 33.4 is not a position",
        ),
        ("unit2_loc_1", text("0.0\n0.0\n"), "GPS_location_0.txt: latitude 0.0, longitude 0.0 is not a position"),
        ("unit1_pwr_60ghz", text("0.5\n" * 63), "mmWave_power_4.txt: 63 numbers instead of 64"),
        ("unit1_pwr_60ghz", text("nan\n" * 64), "mmWave_power_4.txt: every power is NaN"),
        ("unit1_rgb_1", Path.unlink, r"image_BS1_0.jpg is not there; row 1 of .*\.csv names it: restore the file"),
    ],
)
def test_a_broken_file_is_named_with_its_row_and_a_remedy(own: Data, column: str, spoil: Spoil, message: str) -> None:
    spoil(csv_of(own).parent / rows_of(own)[0][column])
    with pytest.raises(UserError, match=message) as caught:
        prepare_data(own)
    assert "row 1 of " in str(caught.value)
    assert "restore the file or remove the row" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit1_beam": "0"}, r"row 1 of .*: unit1_beam = '0' is not one number in 1\.\.64; correct the row"),
        ({"unit1_beam": "3_4_5_6_7"}, "unit1_beam = '3_4_5_6_7' is not one number"),
        ({"unit1_pwr_60ghz": "./elsewhere/mmWave_power_4.txt"}, "is not in a scenarioNN folder"),
    ],
)
def test_a_row_that_cannot_be_meant_is_a_mistake(own: Data, change: Row, message: str) -> None:
    rewrite(own, [rows_of(own)[0] | change, *rows_of(own)[1:]])
    with pytest.raises(UserError, match=message):
        prepare_data(own)


@pytest.mark.parametrize(("group", "modality"), [("unit1_rgb_", "image"), ("unit1_loc", "gps"), ("unit2_loc_", "gps")])
def test_a_missing_column_names_the_modality_to_leave_out(own: Data, group: str, modality: Modality) -> None:
    rewrite(own, [{name: x for name, x in row.items() if not name.startswith(group)} for row in rows_of(own)])
    with pytest.raises(UserError, match=rf"has no column {group}1?; take {modality} out of data\.modalities"):
        prepare_data(own)
    others: tuple[Modality, ...] = tuple(name for name in own.modalities if name != modality)
    prepare_data(replace(own, modalities=others))


@pytest.mark.parametrize("column", ["unit1_rgb_5", "unit1_radar_3", "unit1_lidar_1", "unit2_loc_1", "unit2_loc_2"])
def test_a_single_missing_column_is_named_and_no_other_instant_taken_for_it(own: Data, column: str) -> None:
    rewrite(own, [{name: x for name, x in row.items() if name != column} for row in rows_of(own)])
    with pytest.raises(UserError, match=rf"\.csv has no column {column}; take (image|radar|lidar|gps) out of"):
        prepare_data(replace(own, history=1))


def test_a_label_column_for_each_step_is_a_mistake(own: Data) -> None:
    rewrite(own, [row | {"unit1_beam_1": row["unit1_beam"]} for row in rows_of(own)])
    words = csv_of(own).read_text()
    csv_of(own).write_text(words.replace(",unit1_beam,", ",unit1_beam_2,", 1))
    with pytest.raises(UserError, match=r"\.csv has no column unit1_beam; every window needs its label"):
        prepare_data(own)


def test_a_csv_is_read_behind_a_byte_order_mark_and_refused_in_another_encoding(own: Data) -> None:
    rewrite(own, [{"unit1_rgb_1": row["unit1_rgb_1"], **row} for row in rows_of(own)])
    words, table = csv_of(own).read_text(), prepare_data(own)
    csv_of(own).write_text(words, encoding="utf-8-sig")
    assert prepare_data(own).groups["unit1_rgb_"].paths == table.groups["unit1_rgb_"].paths
    csv_of(own).write_text(words, encoding="utf-16")
    with pytest.raises(UserError, match=r"\.csv is not a CSV in UTF-8 \(.*; save it as one"):
        prepare_data(own)


def test_pictures_are_taken_from_a_folder_beside_the_cameras_where_there_is_one(tmp_path: Path) -> None:
    simulate(tmp_path / "root", SMALL)
    plain = Data(root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"), modalities=("image",), image_size=SIZE)
    chosen = replace(plain, camera="camera_data_mask")
    with pytest.raises(UserError, match=r"data\.camera = camera_data_mask: no such folder is beside .*scenario31"):
        prepare_data(chosen)
    cameras = sorted({(csv_of(plain).parent / row["unit1_rgb_1"]).parent for row in rows_of(plain)})
    first, other = (camera.with_name("camera_data_mask") for camera in cameras[:2])
    shutil.copytree(cameras[0], first)
    for path in first.iterdir():
        Image.new("RGB", (96, 54), "black").save(path)
    before, after = (samples(Config(data), "train")[torch.arange(12)] for data in (plain, chosen))
    masked = before["scenario"] == 0
    assert 0 < masked.sum() < len(masked)
    torch.testing.assert_close(after["image"], before["image"] * ~masked.view(-1, 1, 1, 1, 1))
    assert describe(Config(chosen)).endswith(f"; pictures from {first.relative_to(tmp_path / 'root')}")
    other.mkdir()
    with pytest.raises(UserError, match=rf"{other} holds none of the \d+ files that scenario32 needs"):
        prepare_data(chosen)


def test_points_that_are_not_finite_are_no_points_and_a_cloud_may_be_empty(own: Data) -> None:
    path = csv_of(own).parent / rows_of(own)[0]["unit1_lidar_1"]
    head, end, body = path.read_text().partition("end_header\n")
    points = read_points(path)
    first, *others = body.splitlines(keepends=True)
    path.write_text(head + end + "".join([" ".join(["nan"] * len(first.split())) + "\n", *others]))
    np.testing.assert_array_equal(read_points(path), points[1:])
    prepare_data(replace(own, lidar="filtered"))
    path.write_text(re.sub(r"vertex \d+", "vertex 0", head) + end)
    assert read_points(path).shape == (0, 3)
    prepare_data(replace(own, lidar="filtered", prepared=f"{own.prepared}2", augment=1))


def test_a_broken_point_cloud_is_named_with_its_row_where_the_background_is_made(own: Data) -> None:
    cut(0.9)(csv_of(own).parent / rows_of(own)[0]["unit1_lidar_1"])
    with pytest.raises(UserError, match=r"lidar_data_0.ply: the header promises .*; row 1 of .* names it: restore"):
        prepare_data(replace(own, lidar="filtered"))


def test_a_file_that_breaks_its_reader_is_named_with_its_row(own: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(UserError, match=r"jpg: DecompressionBombError: .*; row \d of .* names it: restore the file"):
        prepare_data(own)


def test_a_short_row_and_a_missing_folder_are_mistakes(own: Data, tmp_path: Path) -> None:
    csv_of(own).write_text(csv_of(own).read_text().rstrip().rsplit(",", 1)[0])
    with pytest.raises(UserError, match=r"row 4 does not have the header's 22 fields; correct the row"):
        prepare_data(own)
    with pytest.raises(
        UserError, match=r"data\.root = .*nowhere: no such folder; give the one that holds Multi_Modal/"
    ):
        prepare_data(replace(own, root=str(tmp_path / "nowhere")))


def test_a_changed_setting_makes_another_array(data: Data) -> None:
    table = prepare_data(data)
    for group, change in (("unit1_rgb_", {"image_size": 8}), ("unit1_lidar_", {"scenario_fov": False})):
        assert array_path(data, table, group) != array_path(replace(data, **change), table, group)
    other_split = replace(data, split="legacy", history=1, gps_repr="minmax")
    assert all(array_path(data, table, group) == array_path(other_split, table, group) for group in table.groups)


DECODE = """
import os, sys, time
from trainables.beam import prepare
from trainables.beam.config import Data

def decode(path, size, read=prepare.read_image):
    with open(sys.argv[3], "a") as log:
        log.write(f"{path.name}\\n")
    if sys.argv[4] == "dies" and path.name.endswith("_7.jpg"):
        os.kill(os.getpid(), 9)
    time.sleep(0.01)
    return read(path, size)

prepare.read_image = decode
from trainables.beam import decode as decoding
decoding.CHUNK = 4
prepare.prepare_data(Data(root=sys.argv[1], prepared=sys.argv[2], image_size=16, modalities=("image",)))
"""


def decoding(data: Data, log: Path, how: str) -> subprocess.Popen[bytes]:
    """Prepares the pictures in another process, which writes down every file it decodes."""
    assert data.root is not None
    assert data.prepared is not None
    repository = Path(__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", DECODE, data.root, data.prepared, log, how], cwd=repository)


@pytest.mark.slow
def test_what_a_killed_process_left_is_gone_on_with_by_one_process_only(own: Data, tmp_path: Path) -> None:
    pictures = replace(own, modalities=("image",))
    assert decoding(pictures, tmp_path / "killed", "dies").wait() == -9
    table = read_table(Path(str(own.root)), pictures)
    path = array_path(pictures, table, "unit1_rgb_")
    assert not path.exists()
    assert list(path.parent.glob(f"{path.name}.unfinished"))

    both = [decoding(pictures, tmp_path / "log", "lives") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    decoded = (tmp_path / "log").read_text().split()
    names = [file.name for file in table.groups["unit1_rgb_"].paths]
    assert sorted(decoded) == sorted(names[4:])  # each file once, and none of the chunk that was finished
    assert not list(path.parent.glob("*.unfinished*"))
    fresh = replace(pictures, prepared=str(tmp_path / "fresh"))
    prepare_data(fresh)
    np.testing.assert_array_equal(np.load(path), np.load(array_path(fresh, table, "unit1_rgb_")))


def test_a_count_of_rows_that_outlived_its_array_is_not_believed(tmp_path: Path) -> None:
    unfinished, paths = tmp_path / "x.npy.unfinished", tuple(Path(str(i)) for i in range(9))
    (tmp_path / "x.npy.unfinished.rows").write_text("7")

    def broken(path: Path) -> NDArray[np.int64]:
        raise UserError(f"{path} is broken")

    with pytest.raises(UserError, match="is broken"):
        decode(unfinished, Decoder(broken, (), np.int64, ""), paths, "x", str)
    decode(unfinished, Decoder(lambda path: np.array(int(path.name)), (), np.int64, ""), paths, "x", str)
    assert np.load(unfinished).tolist() == list(range(9))


def test_a_cache_folder_that_is_a_file_is_a_mistake(own: Data) -> None:
    (Path(str(own.root)) / "file").write_text("")
    for folder in ("file", "file/cache"):
        with pytest.raises(UserError, match=r"cannot be made and locked: .*; set data\.prepared to a folder elsewhere"):
            prepare_data(replace(own, prepared=f"{own.root}/{folder}"))


def test_a_disk_without_room_is_a_mistake_at_once(own: Data) -> None:
    vast = replace(own, image_size=2_000_000)  # pixels of a side: 12 files of 11 TiB
    with pytest.raises(
        UserError, match=r"prepared data take \d+ MiB more and \d+ MiB are free; make room, or set data"
    ):
        prepare_data(vast)
    assert not list(Path(str(own.prepared)).rglob("*.npy*"))


def test_no_array_is_left_behind_by_a_mistake(own: Data) -> None:
    picture = csv_of(own).parent / rows_of(own)[0]["unit1_rgb_3"]
    whole = picture.read_bytes()
    picture.write_bytes(whole[:100])
    for _ in range(2):
        with pytest.raises(UserError, match="not a whole image"):
            prepare_data(own)
    picture.write_bytes(whole)
    assert samples(Config(own), "train")[torch.arange(1)]["image"].float().std() > 0


def some_positions() -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    first = rng.uniform((5, -20), (25, 20), (200, 2))
    metres = np.stack([first, first + rng.uniform(-1, 1, (200, 2))], axis=1)
    bearing = np.rad2deg(np.arctan2(metres[:, 1, 0], metres[:, 1, 1]))
    return metres, (bearing / 2.5).astype(np.int64).clip(0, 63), np.arange(200) < 150


def test_only_what_trains_is_learnt_from(cache: str) -> None:
    metres, beam, known = some_positions()
    data = Data(prepared=cache)
    before = gps_features(data, "scenario1", metres, beam, known)
    assert before.shape == (200, 2, gps_width(Config(data)))
    changed = np.where(known[:, None, None], metres, 3 * metres)
    after = gps_features(data, "scenario1", changed, np.where(known, beam, 0), known)
    np.testing.assert_array_equal(before[known], after[known])
    unlabelled = gps_features(data, "scenario1", metres, beam, np.zeros_like(known))
    np.testing.assert_array_equal(unlabelled, gps_features(data, "scenario1", metres, 0 * beam, np.zeros_like(known)))


def test_published_forms_of_a_position() -> None:
    metres, beam, known = some_positions()
    metres[0, 0] = (3.0, 4.0)
    by = {
        kind: gps_features(Data(gps_repr=kind), "scenario32", metres, beam, known)
        for kind in ("minmax", "angle2", "sincos")
    }
    turned = np.arctan(4 / 3) - np.deg2rad(44.8)
    np.testing.assert_allclose(by["sincos"][0, 0], [np.cos(turned), np.sin(turned)])
    elsewhere = gps_features(Data(gps_repr="sincos"), "scenario1", metres, beam, known)  # whose offset nobody knows
    np.testing.assert_allclose(elsewhere[0, 0], [0.6, 0.8])
    np.testing.assert_allclose(by["angle2"][0, 0], np.deg2rad(np.rad2deg(np.arctan(4 / 3)) - 44.8))  # twice the same
    np.testing.assert_allclose(by["minmax"][0, 0], [(3 + 7.18029715) / 47.3898506, (4 + 97.55563452) / 149.86949593])
    assert np.abs(by["angle2"]).max() <= np.pi / 2


@pytest.mark.parametrize(
    ("scenario", "expected_deg"),
    [("31", 80 + 50.52 - 180), ("32", 80 - 44.8), ("33", 80 - 55.6), ("34", 80 + 60 - 180)],
)
def test_the_published_angle_is_turned_for_each_station_and_wrapped(scenario: str, expected_deg: float) -> None:
    metres = np.tile([np.cos(np.deg2rad(80)), np.sin(np.deg2rad(80))], (3, 2, 1))
    known, beam = np.ones(3, dtype=bool), np.arange(3)
    angle = gps_features(Data(gps_repr="angle2"), f"scenario{scenario}", metres, beam, known)
    np.testing.assert_allclose(np.rad2deg(angle), expected_deg)
    opposite = gps_features(Data(gps_repr="angle2"), f"scenario{scenario}", -metres, beam, known)
    np.testing.assert_allclose(opposite, angle)  # an arc tangent of dy / dx cannot tell them apart


def test_the_lidar_s_field_of_view_where_it_is_not_cut_per_scenario() -> None:
    assert fov_of("scenario31", per_scenario=False) == ((-50, 0), (-50, 50))
    assert fov_of("scenario7", per_scenario=True) == ((-50, 0), (-50, 50))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [1, 3, 5, 6])
def test_real_measurements_are_read_and_their_direction_names_the_beam(
    scenario: int, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    script = shared_data("deepsense6g") / "lay_out.py"
    subprocess.run(
        [sys.executable, script, tmp_path, "--scenarios", str(scenario)], check=True, stdout=subprocess.DEVNULL
    )
    data = Data(root=str(tmp_path), prepared=str(tmp_path / "cache"), modalities=("gps",))
    side = samples(Config(data), "val")
    np.testing.assert_array_equal(side.beam_N, [int(row["unit1_beam"]) - 1 for row in rows_of(data)])
    line = describe(Config(data))
    assert line.startswith(f"real beam data in {tmp_path}: ")
    assert line.endswith(f"(honest split), scenarios {scenario}")

    batch = side[torch.arange(len(side))]
    assert torch.isfinite(batch["gps"]).all()
    straight = 31.5 + 16 * batch["gps"][:, 0, 8]  # the straight line through the beams of other passes
    assert np.corrcoef(straight, batch["beam"])[0, 1] > 0.94


@pytest.mark.parametrize("lead", [-3.0, 0.0, 5.5])
def test_how_far_positions_run_ahead_of_the_beams_is_found(lead: float) -> None:
    rng = np.random.default_rng(0)
    speed_N = rng.uniform(-2, 2, 300)
    place_N2 = np.stack([rng.uniform(-15, 15, 300), np.full(300, 12.0)], axis=1)
    step_N2 = np.stack([speed_N, np.zeros(300)], axis=1)
    seen_N2 = place_N2 + lead * step_N2
    beam_N = np.round(31.5 + 40 * np.arctan2(seen_N2[:, 0], seen_N2[:, 1]) / 2).astype(np.int64)
    windows_N22 = np.stack([place_N2 - step_N2, place_N2], axis=1)
    told = gps_features(Data(), "scenario1", windows_N22, beam_N, np.arange(300) < 200)
    np.testing.assert_allclose(31.5 + 16 * told[:, 0, 8], beam_N, atol=0.6)


@pytest.mark.parametrize("late", [-1.5, 0.0, 1.0])
def test_windows_at_another_rate_are_told_the_same_of_the_same_car(late: float) -> None:
    """Of each car two windows with one label: at every other file, as those that train, and at every file.

    By the second one's numbers its positions are half as far apart, and half as long before the label.
    """
    rng = np.random.default_rng(0)
    cars, files_late = 200, 2 * late
    at_label_N2 = np.stack([rng.uniform(-15, 15, cars), np.full(cars, 12.0)], axis=1)
    per_file_N2 = np.stack([rng.uniform(-1, 1, cars), np.zeros(cars)], axis=1)
    slow, fast = (
        np.stack([at_label_N2 - (files + files_late) * per_file_N2 for files in before], axis=1)
        for before in ((8, 6), (4, 3))
    )
    beam_N = np.round(31.5 + 20 * np.arctan2(at_label_N2[:, 0], at_label_N2[:, 1])).astype(np.int64)
    timing = Timing(np.repeat([1.0, 0.5], cars), np.repeat([3.0, 1.5], cars))
    known_N = np.arange(2 * cars) < cars
    told = gps_features(Data(), "scenario1", np.concatenate([slow, fast]), np.tile(beam_N, 2), known_N, timing)
    np.testing.assert_allclose(told[:cars, :, -9:], told[cars:, :, -9:], atol=1e-6)
    np.testing.assert_allclose(31.5 + 16 * told[:, 0, 8], np.tile(beam_N, 2), atol=0.6)


@pytest.mark.parametrize("known", [1, 4])
def test_a_handful_of_windows_tells_nothing_of_the_receivers_clocks(known: int) -> None:
    """A cubic fits them with any lead, and what the others are told would be far from where they are."""
    rng = np.random.default_rng(0)
    place_N2 = np.stack([rng.uniform(-15, 15, 100), np.full(100, 12.0)], axis=1)
    windows_N22 = np.stack([place_N2, place_N2 + np.array([0.5, 0.0])], axis=1)
    beam_N = np.round(31.5 + 20 * np.arctan2(place_N2[:, 0], place_N2[:, 1])).astype(np.int64)
    timing = Timing(np.ones(100), np.full(100, 3.0))
    assert scale_of(windows_N22, beam_N, np.arange(100) < known, timing).line.late == 0


def test_the_rate_of_a_window_is_read_off_its_files(own: Data) -> None:
    usual = timing_of(prepare_data(own))
    assert (set(usual.interval_N), set(usual.ahead_N)) == ({1.0}, {3.0})
    rows = rows_of(own)
    newest, place = (rows[0][column].rpartition("_") for column in ("unit1_pwr_60ghz", "unit2_loc_1"))
    number = int(newest[2].removesuffix(".txt"))
    rows[0] |= {f"unit2_loc_{k}": f"{place[0]}_{number - back}.txt" for k, back in ((1, 4), (2, 2))}
    rewrite(own, rows)
    timing = timing_of(prepare_data(own))
    np.testing.assert_array_equal(timing.interval_N, [2.0] + [1.0] * (len(rows) - 1))
    np.testing.assert_array_equal(timing.ahead_N, [2.0] + [3.0] * (len(rows) - 1))


def test_tables_tell_simulated_from_real_only_by_their_settings(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    table: Table = prepare_data(data)
    counts = "16 windows to train and 16 to validate (honest split), scenarios 31, 32, 33, 34"
    assert describe(Config(data)) == f"simulated beam data in {data_root(data)}: {counts}"
    capsys.readouterr()
    prepare_data(data)
    assert capsys.readouterr().out == ""  # nothing was left to do
    same = replace(data, root=str(data_root(data)))
    assert read_table(data_root(same), same).digest == table.digest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Simulated(passes=1), r"data\.simulated\.passes = 1 must be at least 2"),
        (lambda: Simulated(frames=4), r"data\.simulated\.frames = 4 must be at least 5"),
        (lambda: Simulated(seed=-1), r"data\.simulated\.seed = -1 must not be negative"),
        (lambda: Data(holdout=1.0), r"data\.holdout = 1\.0 must lie between 0 and 1"),
        (lambda: Data(modalities=()), r"data\.modalities is empty"),
        (lambda: Data(history=0), r"data\.history = 0 must be at least 1"),
        (lambda: Data(image_size=0), r"data\.image_size = 0 must be at least 1 pixel"),
    ],
)
def test_settings_that_cannot_be_meant_are_mistakes(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong()
