"""Windows hold the frames they should, no video is on both sides, and simulated mice do what they are said to."""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_mabe import SMALL, write_calms21

from trainables.contract import UserError
from trainables.mabe import challenge, prepare, tagging
from trainables.mabe.config import CLASSES, Augment, Data, Simulated
from trainables.mabe.data import describe, names, samples, training_frames, videos_of
from trainables.mabe.network import Inputs
from trainables.mabe.prepare import Prepared, prepare_data
from trainables.mabe.simulator import ATTACK, INVESTIGATION, LABS, MOUNT, OTHER, play, simulate
from trainables.mabe.tagging import Config, build
from trainables.mabe.video import UNLABELLED
from trainables.samples import Batch

SIMULATED = Simulated(videos=8, seconds=5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache: str) -> Config:
    data = Data(prepared=cache, features=("coords", "motion"), window=64, stride=16, simulated=SIMULATED)
    return Config(data=data, augment=Augment(jitter=3))


def test_a_full_disk_is_told_before_anything_is_written(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"points\.npy: No space left on device; make room, or set data\.prepared to"):
        prepare_data(replace(config.data, prepared=str(tmp_path)))
    assert not list(tmp_path.rglob("points.npy"))


def test_a_window_is_named_by_its_frames(config: Config) -> None:
    prepared, train, labels = prepare_data(config.data), samples(config, "train"), prepare_data(config.data).labels()
    batch = train[torch.arange(len(train))]
    for name, label_S in zip(names(config, range(len(train))), batch["label"], strict=True):
        found = re.fullmatch(r"frames (\d+) to (\d+) of video (\d+) \((.+)\)", name)
        assert found is not None
        first, last, video, unit = found.groups()
        assert prepared.unit[int(video) - 1] == unit
        start = prepared.start[int(video) - 1]
        told = labels[start + int(first) : start + int(last) + 1]
        assert label_S[label_S != UNLABELLED].tolist() == told.tolist()


def test_validation_windows_hold_every_frame_once(config: Config) -> None:
    prepared, val = prepare_data(config.data), samples(config, "val")
    batch = val[torch.arange(len(val))]
    labels = prepared.labels()
    held_out = np.concatenate(
        [labels[prepared.start[v] : prepared.start[v + 1]] for v in videos_of(prepared, config.data, "val")]
    )
    known = batch["label"] != UNLABELLED
    assert torch.equal(batch["label"][known], torch.from_numpy(held_out.astype(np.int64)))
    coords = np.concatenate(
        [
            prepared.group("coords")[prepared.start[v] : prepared.start[v + 1]]
            for v in videos_of(prepared, config.data, "val")
        ]
    )
    assert torch.equal(batch["coords"][known], torch.from_numpy(coords))


def test_training_windows_have_margins_for_jitter_without_labels_beyond_the_video(config: Config) -> None:
    prepared, train = prepare_data(config.data), samples(config, "train")
    batch = train[torch.arange(len(train))]
    assert batch["label"].shape == (len(train), 64 + 2 * 3)
    assert batch["coords"].shape == (len(train), 64 + 2 * 3, 2 * 2 * 9)  # nine parts, of either lab
    first = batch["index"] == prepared.start[videos_of(prepared, config.data, "train")[0]]
    assert first.sum() == 1
    assert (batch["label"][first][0, :3] == UNLABELLED).all()
    assert (batch["label"][first][0, 3:] != UNLABELLED).all()
    assert torch.equal(batch["coords"][first][0, 0], batch["coords"][first][0, 3])


def test_windows_of_a_split_stay_within_its_videos(config: Config) -> None:
    prepared = prepare_data(config.data)
    sides = {split: set(videos_of(prepared, config.data, split)) for split in ("train", "val")}
    assert sides["train"] | sides["val"] == set(range(8))
    assert not sides["train"] & sides["val"]
    for lab in LABS:  # a share of each
        assert {prepared.lab[v] for v in sides["val"]} >= {lab.name}
    for split, videos in sides.items():
        index = samples(config, split).first_N
        assert set((np.searchsorted(prepared.start, index, side="right") - 1).tolist()) == videos


def test_one_line_says_what_is_used(config: Config) -> None:
    line = describe(config)
    assert line.startswith("simulated mabe data in ")
    assert f"{len(samples(config, 'train'))} windows of 6 videos to train" in line
    assert "of 2 to validate, 2 x 9 points, other" in line


def test_a_split_is_the_same_until_its_seed_changes(config: Config) -> None:
    prepared = prepare_data(config.data)
    first, again = (videos_of(prepared, config.data, "val") for _ in range(2))
    assert first == again
    seeds = [videos_of(prepared, replace(config.data, split_seed=seed), "val") for seed in range(5)]
    assert len({tuple(videos) for videos in seeds}) > 1


def split_of(units: list[str]) -> list[int]:
    prepared = Prepared(
        Path("a"), Path("b"), ["lab"] * len(units), units, [30.0] * len(units), [0], 2, ["nose"], [], []
    )
    return videos_of(prepared, Data(holdout=0.5), "val")


def test_all_videos_of_an_animal_are_on_one_side() -> None:
    held = split_of(["mouse001", "mouse002", "mouse001", "mouse002"])
    assert held in ([0, 2], [1, 3])


def test_a_single_video_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"data.root = a must hold two videos .* it holds 1: mouse001"):
        split_of(["mouse001"])


def test_scale_and_axes_come_from_training_videos_alone(config: Config) -> None:
    prepared = prepare_data(config.data)
    _, label = training_frames(config.data)
    frames = [prepared.start[v + 1] - prepared.start[v] for v in videos_of(prepared, config.data, "train")]
    assert len(label) == sum(frames)


@pytest.fixture
def written(tmp_path: Path) -> Data:
    """A data set in a folder of its own."""
    simulate(tmp_path / "root", Simulated(videos=4, seconds=1))
    return Data(root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"), features=("coords", "pca"), pca=3)


def without_events(data: Data, in_place: bool) -> None:
    """Empty the annotations of a data set, in the files as they are or in others that take their places."""
    for path in (Path(str(data.root)) / "train_annotation").rglob("*.parquet"):
        other = path if in_place else path.with_suffix(".new")
        pq.write_table(pq.read_table(path).slice(0, 0), other)
        other.replace(path)


@pytest.mark.parametrize("in_place", [False, True])
def test_changed_files_are_read_anew(written: Data, in_place: bool) -> None:
    before = prepare_data(written).labels()
    assert before.any()
    without_events(written, in_place)
    if in_place:  # for the next process to notice, which knows of nothing yet
        assert prepare_data(written).labels().any()
        prepare._digest.cache_clear()
    assert before.shape == prepare_data(written).labels().shape
    assert not prepare_data(written).labels().any()


def test_files_of_calms21_that_are_written_over_are_read_anew(tmp_path: Path) -> None:
    data = Data(root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"), features=("coords",))
    path = tmp_path / "root/calms21_task1_train.json"
    for frames in (20, 30):
        write_calms21(path, sequences=3, frames=frames)
        assert len(prepare_data(data).labels()) == 3 * frames


def test_arrays_that_were_removed_are_made_again(written: Data) -> None:
    before = prepare_data(written)
    labels = before.labels()
    shutil.rmtree(before.folder)
    np.testing.assert_array_equal(prepare_data(written).labels(), labels)


def test_a_process_looks_at_a_data_set_and_fits_it_once(written: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, fitted = list[Path](), list[Data]()
    files, make_inputs = challenge.files, tagging.make_inputs

    def counted(root: Path) -> list[Path]:
        looked.append(root)
        return files(root)

    def made(data: Data, groups: Batch) -> Inputs:
        fitted.append(data)
        return make_inputs(data, groups)

    monkeypatch.setattr(challenge, "files", counted)
    monkeypatch.setattr(tagging, "make_inputs", made)
    config = Config(data=replace(written, window=8, stride=8), model=SMALL)
    states = []
    for _ in range(2):
        for split in ("train", "val"):
            samples(config, split)
        torch.manual_seed(0)
        network = build(config)
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        network.inputs.scale_F.fill_(0.0)  # a trial's own
    assert (len(looked), len(fitted)) == (1, 1)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    build(replace(config, data=replace(config.data, pca=2)))
    without_events(written, in_place=False)
    build(config)
    assert (len(looked), len(fitted)) == (2, 3)


def test_the_same_seed_writes_the_same_data(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        simulate(tmp_path / name, Simulated(videos=4, seconds=2, seed=seed))
    one, same, other = (challenge.read(tmp_path / name)[0].read() for name in "abc")
    np.testing.assert_array_equal(one[0], same[0])
    np.testing.assert_array_equal(one[1], same[1])
    assert not np.array_equal(one[0], other[0])


def test_simulated_data_have_two_labs_gaps_and_a_short_video(config: Config) -> None:
    prepared = prepare_data(config.data)
    assert set(prepared.fps) == {25.0, 30.0}
    assert set(prepared.parts) == {part for lab in LABS for part in lab.parts}
    assert min(np.diff(prepared.start)) < config.data.window
    gaps = []
    for v, name in enumerate(prepared.lab):
        points = prepared.points()[prepared.start[v] : prepared.start[v + 1]]
        lab = next(lab for lab in LABS if lab.name == name)
        tracked = [prepared.parts.index(part) for part in lab.parts]
        absent = [k for k in range(len(prepared.parts)) if k not in tracked]
        assert np.isnan(points[:, :, absent]).all()
        gaps.append(np.isnan(points[:, :, tracked]).mean())
    assert 0.02 < np.mean(gaps) < 0.3


def test_behaviours_are_told_apart_by_motion() -> None:
    """Attacks are fast, mounts close and aligned, sniffs slow with the nose at the other's tail."""
    poses, shown, agents = (np.concatenate(parts) for parts in zip(*map(long_play, range(6)), strict=True))
    at = np.arange(len(poses))
    agent, target = poses[at, agents], poses[at, 1 - agents]
    speed = np.append(np.hypot(*np.diff(agent[:, :2], axis=0).T) * 30, 0)
    apart = np.hypot(*(agent - target)[:, :2].T)
    aligned = np.cos(agent[:, 2] - target[:, 2])
    middle = {kind: np.median(speed[shown == kind]) for kind in (OTHER, INVESTIGATION, MOUNT, ATTACK)}
    assert middle[ATTACK] > 2 * max(middle[OTHER], middle[INVESTIGATION])
    assert np.median(apart[shown == MOUNT]) < 3 < np.median(apart[shown == INVESTIGATION]) < 9
    assert np.median(aligned[shown == MOUNT]) > 0.9
    assert np.median(apart[shown == OTHER]) > 9
    assert min(np.bincount(shown, minlength=len(CLASSES))) > 0.02 * len(shown)


def long_play(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return play(30 * 60, 30.0, np.random.default_rng(seed))
