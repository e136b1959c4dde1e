"""Taggers that train in a moment, and videos for them in the public layouts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from trainables.mabe import predict
from trainables.mabe.config import Augment, Data, Model, Simulated
from trainables.mabe.simulator import simulate
from trainables.mabe.tagging import Config
from trainables.optim import Optim

SMALL = Model(channels=(8, 16), hidden=8, layers=1, dropout=0.0)
OPTIM = Optim(lr=1e-2, batch_size=8)
VOCABULARY = {"attack": 0, "investigation": 1, "mount": 2, "other": 3}
Rows = list[dict[str, str]]


def two_labs() -> Any:
    """A fixture: eight videos of two labs that the tests of a module share.

    The last is shorter than a window of `small_config`, and the others are no multiple of one.
    """

    @pytest.fixture(scope="module")
    def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("data") / "root"
        simulate(root, Simulated(videos=8, seconds=9))
        return root

    return root


def forget_attacks(root: Path, lab: str) -> None:
    """Make `lab` one that did not annotate attacks, as train.csv then says; of the other labs it says nothing."""
    for path in (root / "train_annotation" / lab).glob("*.parquet"):
        pq.write_table(pq.read_table(path).filter(~pc.field("action").isin(["attack", "chase"])), path)
    named = json.dumps(["mouse1,mouse2,sniff", "'mouse1','mouse2','mount'", "mouse1,self,rear"])
    rows = [{**row, "behaviors_labeled": named if row["lab_id"] == lab else ""} for row in rows_of(root)]
    write_rows(root / "train.csv", rows)


def small_config(root: Path, cache: Path) -> Config:
    data = Data(root=str(root), prepared=str(cache), window=64, stride=32, split_seed=1)
    return Config(data=data, model=SMALL, augment=Augment(noise=0.0), optim=OPTIM, epochs=3)


def rows_of(root: Path) -> Rows:
    with (root / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def challenge_csv(root: Path, folder: Path, rows: Rows, labelled: bool = True) -> Path:
    """Some videos of `root` as somebody else's, in `folder`/new.csv and beside it."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "new.csv", rows)
    for kind in ("tracking", "annotation") if labelled else ("tracking",):
        (folder / f"new_{kind}").symlink_to(root / f"train_{kind}")
    return folder / "new.csv"


def write_calms21(path: Path, sequences: int, frames: int, annotated: bool = True, points: int = 7) -> Path:
    """Sequences of a mouse each, whose nose shows what it does."""
    rng, tree = np.random.default_rng(0), {}
    for number in range(sequences):
        labels = np.repeat(rng.integers(0, 4, frames // 10 + 1), 10)[:frames]
        keypoints = np.linspace(0, 1024, 4 * points).reshape(2, 2, points) + rng.normal(0, 5, (frames, 2, 2, points))
        keypoints[:, 0, 0, 0] = 200 * labels
        record: dict[str, Any] = {"keypoints": keypoints.tolist(), "metadata": {"vocab": VOCABULARY}}
        record |= {"annotations": labels.tolist()} if annotated else {}
        tree[f"task1/train/mouse{number:03d}_task1_annotator1"] = record
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"annotator-id_0": tree}))
    return path


def tag(*arguments: Path) -> int:
    return predict.main([str(argument) for argument in arguments])
