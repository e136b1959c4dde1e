"""The readers give what the files of the public layouts say; mistakes in them are one line with file and name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from trainables.contract import UserError
from trainables.mabe import calms21, challenge
from trainables.mabe.challenge import head_first
from trainables.mabe.config import CLASSES, Data
from trainables.mabe.data import samples
from trainables.mabe.prepare import prepare_data
from trainables.mabe.tagging import Config

PARTS = ["tail_base", "body_center", "nose"]
Columns = dict[str, list[Any]]


def tracking() -> Columns:
    """Four frames; mouse 2 is seen in two of them, and once its nose has no number."""
    rows = [(t, 1, part, 10.0 * t + k, 50.0 + k) for t in range(4) for k, part in enumerate(PARTS)]
    rows += [(t, 2, "nose", float("nan") if t == 1 else 70.0, 20.0) for t in (1, 2)]
    return dict(zip(("video_frame", "mouse_id", "bodypart", "x", "y"), map(list, zip(*rows, strict=True)), strict=True))


def annotation() -> Columns:
    return {
        "agent_id": [1, 1, 2, 1],
        "target_id": [2, 1, 1, 2],
        "action": ["sniff", "rear", "attack", "mount"],
        "start_frame": [0, 0, 2, 1],
        "stop_frame": [2, 4, 3, 3],
    }


def row(video: int = 7) -> dict[str, Any]:
    return {
        "lab_id": "SomeLab",
        "video_id": video,
        "frames_per_second": 25.0,
        "video_width_pix": 200,
        "video_height_pix": 100,
        "body_parts_tracked": json.dumps(PARTS),
        "behaviors_labeled": json.dumps(["mouse1,mouse2,sniff", "mouse1,self,rear"]),
    }


def write_challenge(root: Path, rows: list[dict[str, Any]], points: Columns, events: Columns) -> Path:
    root.mkdir(exist_ok=True)
    with (root / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for folder, columns in (("train_tracking", points), ("train_annotation", events)):
        for one in rows:
            path = root / folder / "SomeLab" / f"{one['video_id']}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), path)
    return root


def test_the_challenge_layout(tmp_path: Path) -> None:
    root = write_challenge(tmp_path / "a", [row(7), row(8)], tracking(), annotation())
    (root / "train_annotation/SomeLab/8.parquet").unlink()
    (video,) = challenge.read(root)
    assert (video.lab, video.unit, video.fps, video.frames, video.mice) == ("SomeLab", "SomeLab/7", 25.0, 4, 2)
    assert video.parts == ("nose", "body_center", "tail_base")
    points, labels = video.read()
    np.testing.assert_allclose(points[2, 0] * 200, [[22, 52], [21, 51], [20, 50]], rtol=1e-6)
    np.testing.assert_allclose(points[2, 1, 0] * 200, [70, 20], rtol=1e-6)
    assert np.isfinite(points[:, 1]).all(-1).sum() == 1  # the point of which x has no number is not seen
    names = [CLASSES[number] for number in labels]
    assert names == ["investigation", "mount", "attack", "other"]  # the higher class holds, the stop frame is outside


def test_an_annotation_without_events_labels_every_frame_other(tmp_path: Path) -> None:
    """What writes an empty table gives its columns the type null."""
    root = write_challenge(tmp_path / "a", [row()], tracking(), {name: [] for name in annotation()})
    (video,) = challenge.read(root)
    assert video.read()[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("cell", "known"),
    [
        (None, CLASSES),
        ("", CLASSES),
        ("[]", CLASSES),
        ('["mouse1,mouse2,sniff", "mouse1,self,rear"]', ("other", "investigation")),
        ('["mouse1,self,rear"]', ("other",)),
        # as in the public data, where quotes are left over
        ("""["'mouse1','mouse2','sniff'", "mouse1','mouse2','attack'"]""", ("other", "investigation", "attack")),
        ('["mouse2,mouse1,ejaculate", "mouse1,mouse4,chase"]', ("other", "mount", "attack")),
    ],
)
def test_the_actions_that_were_annotated_tell_the_classes(
    tmp_path: Path, cell: str | None, known: tuple[str, ...]
) -> None:
    one = row()
    if cell is None:
        del one["behaviors_labeled"]
    else:
        one["behaviors_labeled"] = cell
    (video,) = challenge.read(write_challenge(tmp_path / "a", [one], tracking(), annotation()))
    assert video.known == known


def test_a_class_that_was_annotated_unannounced_is_known(tmp_path: Path) -> None:
    """The row names sniffs and rears; the annotation has a mount and an attack too."""
    root = write_challenge(tmp_path / "a", [row(7), row(8)], tracking(), annotation())
    path = root / "train_annotation/SomeLab/8.parquet"
    pq.write_table(pq.read_table(path).filter(pc.field("action") == "mount"), path)
    prepared = prepare_data(Data(root=str(root), prepared=str(tmp_path / "cache")))
    assert prepared.known == [list(CLASSES), ["other", "investigation", "mount"]]


def test_mice_may_be_named_instead_of_numbered(tmp_path: Path) -> None:
    named = tracking() | {"mouse_id": [f"mouse{number}" for number in tracking()["mouse_id"]]}
    numbered = write_challenge(tmp_path / "a", [row()], tracking(), annotation())
    other = write_challenge(tmp_path / "b", [row()], named, annotation())
    (one,), (two,) = challenge.read(numbered), challenge.read(other)
    np.testing.assert_array_equal(one.read()[0], two.read()[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r, p, e: r.pop("body_parts_tracked"), r"train.csv has no column body_parts_tracked"),
        (
            lambda r, p, e: r.update(frames_per_second=0),
            r"row 1 of .*frames_per_second = '0' must be a positive number",
        ),
        (lambda r, p, e: r.update(video_width_pix=""), r"row 1 of .*video_width_pix = '' must be a positive number"),
        (lambda r, p, e: r.update(body_parts_tracked="nose"), r"body_parts_tracked = 'nose' must be a JSON list"),
        (
            lambda r, p, e: r.update(behaviors_labeled="sniff"),
            r"row 1 of .*behaviors_labeled = 'sniff' must be a JSON list of names",
        ),
        (lambda r, p, e: p.update(body_part=p.pop("bodypart")), r"7.parquet has no column bodypart, but video_frame"),
        (
            lambda r, p, e: p["bodypart"].__setitem__(3, "paw"),
            r"7.parquet: bodypart = paw is not in body_parts_tracked",
        ),
        (lambda r, p, e: p["mouse_id"].__setitem__(3, 0), r"7.parquet: mouse_id = 0 must be 1, 2 and so on"),
        (lambda r, p, e: p.update(x=["far"] * len(p["x"])), r"7.parquet: the column x is of type string"),
        (lambda r, p, e: p["video_frame"].__setitem__(0, -1), r"7.parquet: video_frame = -1 must not be negative"),
        (lambda r, p, e: e.update(stop=e.pop("stop_frame")), r"7.parquet has no column stop_frame"),
        (lambda r, p, e: e["stop_frame"].__setitem__(2, 1), r"row 3: start_frame = 2 and stop_frame = 1 must be 0 or"),
    ],
)
def test_mistakes_in_the_challenge_layout(tmp_path: Path, spoil: Callable[..., Any], message: str) -> None:
    one, points, events = row(), tracking(), annotation()
    spoil(one, points, events)
    root = write_challenge(tmp_path / "a", [one], points, events)
    with pytest.raises(UserError, match=message):
        _ = [video.read() for video in challenge.read(root)]


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    root = write_challenge(tmp_path / "a", [row()], tracking(), annotation())
    (root / "train_tracking/SomeLab/7.parquet").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"7.parquet cannot be read: .*restore the file$"):
        challenge.read(root)


def test_the_head_comes_first_and_the_tail_last() -> None:
    parts = ["ear_left", "tail_tip", "tail_base", "nose", "body_center"]
    assert head_first(parts) == ("nose", "body_center", "ear_left", "tail_base", "tail_tip")


def record(frames: int = 6, mice: int = 2, points: int = 7) -> dict[str, Any]:
    keypoints = np.arange(frames * mice * 2 * points, dtype=float).reshape(frames, mice, 2, points)
    vocabulary = {"attack": 0, "investigation": 1, "mount": 2, "other": 3}
    return {
        "keypoints": keypoints.tolist(),
        "scores": np.ones((frames, mice, points)).tolist(),
        "annotations": [3, 0, 1, 2, 3, 3][:frames],
        "metadata": {"vocab": vocabulary},
    }


def write_calms21(root: Path, records: dict[str, Any], suffix: str = "json") -> Path:
    root.mkdir(exist_ok=True)
    tree = {"annotator-id_0": {f"task1/train/{name}": one for name, one in records.items()}}
    path = root / f"calms21_task1_train.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(tree))
    else:
        np.save(path, np.array(tree, dtype=object), allow_pickle=True)
    return path


@pytest.mark.parametrize("suffix", ["json", "npy"])
def test_calms21_as_published(tmp_path: Path, suffix: str) -> None:
    path = write_calms21(tmp_path, {"mouse001_task1_annotator1": record()}, suffix)
    assert calms21.found(tmp_path) == [path]
    (video,) = calms21.read([path], trust_pickle=True)
    assert (video.unit, video.fps, video.frames, video.mice) == ("mouse001", 30.0, 6, 2)
    points, labels = video.read()
    assert points.shape == (6, 2, 7, 2)
    assert points[4, 1, 3, 1] * 1024 == record()["keypoints"][4][1][1][3]
    assert [CLASSES[number] for number in labels] == ["other", "attack", "investigation", "mount", "other", "other"]


def test_a_pickle_is_not_read_unasked(tmp_path: Path) -> None:
    path = write_calms21(tmp_path, {"mouse001": record()}, "npy")
    with pytest.raises(UserError, match=r"train.npy is a pickle, .* set data.trust_pickle = true"):
        calms21.read([path], trust_pickle=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.pop("annotations"), r"train.json: task1/train/mouse001 has no annotations, but keypoints, scores"),
        (lambda r: r.update(annotations=[3, 3]), r"mouse001: annotations are \(2,\), they must be \(6,\), one a frame"),
        (lambda r: r["annotations"].__setitem__(2, 9), r"mouse001: the annotation 9 is none of \[0, 1, 2, 3\]"),
        (
            lambda r: r["metadata"]["vocab"].pop("mount"),
            r"metadata.vocab names attack, investigation, other and not mount",
        ),
        (
            lambda r: r.update(keypoints=np.zeros((6, 2, 7, 2)).tolist()),
            r"keypoints are \(6, 2, 7, 2\), they must be \(frames, mice, 2, points\)",
        ),
        (lambda r: r["keypoints"][1].pop(), r"mouse001: keypoints must be one array of numbers"),
    ],
)
def test_mistakes_in_calms21(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    one = record()
    spoil(one)
    path = write_calms21(tmp_path, {"mouse001": one})
    with pytest.raises(UserError, match=message):
        calms21.read([path], trust_pickle=False)


def test_a_cut_off_download_is_refused(tmp_path: Path) -> None:
    path = write_calms21(tmp_path, {"mouse001": record()})
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"train.json cannot be read: .*; download it again"):
        calms21.read([path], trust_pickle=False)


@pytest.mark.parametrize("labels", ["annotations", "labels"])
def test_an_extract_of_any_animals_and_points(tmp_path: Path, labels: str) -> None:
    """Two rats of five points, a third of them missing: nothing that reaches the network is missing or infinite."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for i in range(3):
        keypoints = rng.uniform(0, 1024, (40, 2, 2, 5)).astype(np.float32)
        keypoints.swapaxes(2, 3)[rng.random((40, 2, 5)) < 0.36] = np.nan
        keypoints[3, :, 1] = np.inf
        arrays |= {f"keypoints_{i}": keypoints, f"{labels}_{i}": rng.integers(0, 4, 40)}
    np.savez(tmp_path / "rats.npz", **arrays)
    videos = calms21.read(calms21.found(tmp_path), trust_pickle=False)
    assert [(video.frames, video.mice, len(video.parts)) for video in videos] == [(40, 2, 5)] * 3

    data = Data(
        root=str(tmp_path),
        prepared=str(tmp_path / "cache"),
        features=("coords", "presence", "geometry", "rolling", "motion"),
        window=20,
        stride=10,
    )
    prepared = prepare_data(data)
    assert np.isnan(prepared.points()).mean() == pytest.approx(0.36, abs=0.05)
    batch = samples(Config(data=data), "train")[torch.arange(4)]
    assert {name: batch[name].shape[-1] for name in data.features} == {
        "coords": 20,
        "presence": 10,
        "geometry": 23,
        "rolling": 92,
        "motion": 20,
    }
    assert all(batch[name].isfinite().all() for name in data.features)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tracks": np.zeros(3)}, "holds no keypoints_0 and so on, but tracks"),
        ({"keypoints_0": np.zeros((3, 2, 2, 7))}, "holds neither annotations_0 nor labels_0, but keypoints_0"),
        (
            {"keypoints_0": np.zeros((3, 2, 2, 7)), "labels_0": np.zeros((2,), dtype=int)},
            r"sequence 0: annotations are \(2,\), they must be \(3,\)",
        ),
        (
            {"keypoints_0": np.array([None, "x"], dtype=object), "labels_0": np.zeros(2, dtype=int)},
            "sequence 0 cannot be read: .*it must hold plain arrays",
        ),
    ],
)
def test_mistakes_in_an_extract(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=f"a.npz.*{message}"):
        calms21.read([tmp_path / "a.npz"], trust_pickle=False)


@pytest.mark.parametrize(
    "spoil", [lambda whole: b"", lambda whole: whole[:-10], lambda whole: whole.replace(b"~", b"-")]
)
def test_an_extract_that_is_not_whole_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, keypoints_0=np.full((3, 2, 2, 7), ord("~"), dtype=np.uint8), labels_0=np.zeros(3, dtype=int))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=r"a.npz.* cannot be read"):
        calms21.read([path], trust_pickle=False)


def test_a_byte_order_mark_before_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    root = write_challenge(tmp_path / "a", [row()], tracking(), annotation())
    path = write_calms21(tmp_path / "b", {"mouse001": record()})
    for text in (root / "train.csv", path):
        text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    assert [len(videos) for videos in (challenge.read(root), calms21.read([path], trust_pickle=False))] == [1, 1]


def test_a_folder_of_nothing_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.root = .* holds neither train.csv \(MABe challenge\) nor calms21"):
        prepare_data(Data(root=str(tmp_path), prepared=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"data.root = .*/none: no such folder"):
        prepare_data(Data(root=str(tmp_path / "none"), prepared=str(tmp_path / "cache")))
