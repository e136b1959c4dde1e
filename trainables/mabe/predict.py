"""Tags the behaviour in every frame of other videos, with a model that `launch.py --export best MODEL` wrote.

    python -m trainables.mabe.predict MODEL VIDEOS OUT

VIDEOS is a file of videos in a layout that training reads, labelled or not:

    calms21_task1_test.json   CalMS21 as published; also as .npy, if MODEL/config.yaml has data.trust_pickle: true
    any .npz                  an extract of CalMS21: keypoints_<i>, and annotations_<i> or labels_<i>
    test.csv, or any .csv     the MABe challenge: a row per video, with test_tracking/<lab_id>/<video_id>.parquet beside
                              it and, if there are labels, test_annotation/<lab_id>/<video_id>.parquet

A CSV for each video is written to OUT, by its name in the data set: OUT/task1/test/mouse071_task1_annotator1.csv,
OUT/keypoints_0.csv, OUT/<lab_id>/<video_id>.csv. It has a header and a row per frame: `frame`, from 0; `behaviour`:
other, investigation, mount or attack; `confidence`: the largest softmax probability. Where a CSV's column
behaviors_labeled leaves behaviours out, the video is tagged with the others only, unless the model was trained with
data.unlabelled: other. If videos have labels, their scores are printed, computed as a search does for validation
videos: windows do not overlap, and a video's last window is padded with its last frame. Only events differ: a search
cuts them at the borders of windows, and here they are whole.

Shape suffixes: T frames of a video, V videos.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from trainables.checkpoint import read_checkpoint
from trainables.contract import UserError, default_device
from trainables.exported import check_settings, load_weights, make_room, predict_command, read_config, trainable_of
from trainables.mabe import calms21, challenge
from trainables.mabe.checkpoint import Seen, seen_of, unseen_settings
from trainables.mabe.config import CLASSES
from trainables.mabe.data import Samples, known_of, lab_of, windows_of
from trainables.mabe.features import group, width
from trainables.mabe.metrics import derived, event_scores, frame_scores, lab_scores
from trainables.mabe.network import FrameTagger, Inputs, Tagger
from trainables.mabe.prepare import groups_of, placed
from trainables.mabe.tagging import Config, scored
from trainables.mabe.video import UNLABELLED, Video, known_classes
from trainables.samples import on_device
from trainables.step import autocast

TRAINABLE = "trainables.mabe.tagging:train"
SUFFIXES = (".json", ".npy", ".npz", ".csv")


@dataclass(frozen=True)
class Model:
    """A trained network, its config, and the kinds of video it knows."""

    config: Config
    seen: Seen
    network: Tagger


@dataclass(frozen=True)
class Tags:
    """The predicted class, confidence and label of every frame of a video, (T,) each; UNLABELLED where it has none."""

    lab: str
    guess_T: Tensor
    confidence_T: Tensor
    label_T: Tensor


def read_model(folder: Path) -> Model:
    """Load the model in an exported folder; raises `UserError` if it holds none of this family."""
    if (trainable := trainable_of(folder)) != TRAINABLE:
        raise UserError(f"{folder}: a model of {trainable}; behaviour is tagged by one of {TRAINABLE}")
    config = read_config(folder / "config.yaml", Config)
    state = read_checkpoint(folder / "checkpoint.pt", str(folder / "checkpoint.pt"))
    seen = seen_of(state, folder)
    check_settings(folder, state, unseen_settings(config.data, config.model))
    network = untrained(config, seen)
    load_weights(network, state, folder)
    return Model(config, seen, network)


def untrained(config: Config, seen: Seen) -> Tagger:
    """Build the network into which a checkpoint's weights, scale and principal axes are loaded."""
    mice, points = max(seen.mice), len(seen.parts)
    coords = width("coords", mice, points) if "pca" in config.data.features else 0
    axes_DQ = torch.zeros(coords, min(config.data.pca, coords))
    widths = [axes_DQ.shape[1] if name == "pca" else width(name, mice, points) for name in config.data.features]
    inputs = Inputs(config.data.features, torch.zeros(coords), axes_DQ, sum(widths))
    return Tagger(inputs, FrameTagger(sum(widths), config.model), torch.ones(len(CLASSES)))


def read_videos(path: Path, trust_pickle: bool) -> list[Video]:
    """Return the videos that a file holds or lists; raises `UserError` if it is no such file or has no videos."""
    if path.is_dir():
        there = ", ".join(sorted(each.name for each in path.iterdir() if each.suffix in SUFFIXES))
        raise UserError(f"{path}: a folder; name the file of the videos in it: {there or 'there is none'}")
    if path.suffix not in SUFFIXES or not path.exists():
        problem = "no file of videos" if path.exists() else "no such file"
        raise UserError(f"{path}: {problem}; name a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} of videos")
    if path.suffix == ".csv":
        return challenge.read(path.parent, path.stem, unlabelled=True)
    if not (videos := calms21.read([path], trust_pickle, unlabelled=True)):
        raise UserError(f"{path}: no video is in it; name another file")
    return videos


def places(out: Path, videos: Sequence[Video]) -> list[Path]:
    """Return the file for each video's tags; raises `UserError` if two are the same, or one lies outside `out`."""
    files: dict[Path, Video] = {}
    for video in videos:
        file = out / f"{video.key}.csv"
        if file in files:
            raise UserError(f"{video.name}: another video of this name is in the file; give each its own")
        if not file.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{video.name}: its name must not lead out of {out}; rename it")
        files[file] = video
    return list(files)


def samples_of(model: Model, video: Video) -> Samples:
    """Return a video's windows, cut as validation windows are."""
    data, seen = model.config.data, model.seen
    given, labels = video.read()
    points = placed(given, video.parts, max(seen.mice), seen.parts).astype(np.float64)
    groups: dict[str, NDArray[np.float32]] = {
        name: group(name, points, video.fps).astype(np.float32) for name in groups_of(data)
    }
    first_N, bounds_N2 = windows_of(0, video.frames, data, train=False)
    known = known_of(data, [known_classes(video, labels)] * len(first_N))
    return Samples(first_N, bounds_N2, data.window, data.context, groups, labels, known)


@torch.no_grad()
def tag(model: Model, video: Video, device: torch.device) -> Tags:
    """Tag one video; the network must be in eval mode and on `device`."""
    samples, optim = samples_of(model, video), model.config.optim
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in on_device(samples, torch.arange(len(samples)).split(optim.scored_at_once), device):
        with autocast(device, optim):
            logits, label = scored(model.network, batch, model.config.data.context)
        parts.append((logits.argmax(-1).cpu(), logits.float().softmax(-1).amax(-1).cpu(), label.cpu()))
    return Tags(video.lab, *(torch.cat(column).flatten()[: video.frames] for column in zip(*parts, strict=True)))


def tagged(model: Model, videos: Sequence[Video], device: torch.device) -> Iterator[Tags]:
    """Move the network to `device`, and yield the tags of each video, in order."""
    model.network.to(device).eval()
    for video in tqdm(videos, desc="tagging", unit=" videos", leave=False, disable=not sys.stderr.isatty()):
        yield tag(model, video, device)


def scores_of(tags: Sequence[Tags]) -> dict[str, float]:
    """Return the scores that a search reports for validation videos, except the loss, over the labelled frames.

    Unlike a search, it does not cut events at the borders of windows.
    """
    columns = [each.guess_T for each in tags], [each.label_T for each in tags]
    guess_VT, label_VT = (pad_sequence(column, batch_first=True, padding_value=UNLABELLED) for column in columns)
    lab = lab_of([each.lab for each in tags]).get("lab")
    by_lab = lab_scores(guess_VT, label_VT, None if lab is None else torch.from_numpy(lab))
    pairs = {**frame_scores(guess_VT, label_VT), **by_lab, **event_scores(guess_VT, label_VT)}
    scores = {name: float(total) / float(count) for name, (total, count) in pairs.items() if count}
    return {name: value for name, value in {**scores, **derived(scores)}.items() if value is not None}


def told(scores: dict[str, float]) -> str:
    """Format the scores: a line for overall scores, and one for each class."""
    by_class = {name: [key for key in scores if key.endswith(f"_{name}")] for name in CLASSES}
    whole = [key for key in scores if not any(key in keys for keys in by_class.values())]
    lines = [", ".join(f"{key} {scores[key]:.4f}" for key in keys) for keys in (whole, *by_class.values())]
    return "\n".join(line for line in lines if line)


def write(path: Path, tags: Tags) -> None:
    """Write a CSV with a row per frame of the video."""
    names = [CLASSES[number] for number in tags.guess_T.tolist()]
    sure = [f"{value:.6f}" for value in tags.confidence_T.tolist()]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("frame", "behaviour", "confidence"))
        writer.writerows(zip(range(len(names)), names, sure, strict=True))


def write_tags(folder: Path, path: Path, out: Path) -> str:
    """Tag the videos of a file and write a CSV for each; return a message with what was done, and the scores."""
    model = read_model(folder)
    videos = read_videos(path, model.config.data.trust_pickle)
    for video in videos:
        model.seen.check(video)
    files = places(out, videos)
    make_room(files)
    labelled: list[Tags] = []
    for file, tags in zip(files, tagged(model, videos, default_device()), strict=True):
        write(file, tags)
        if (tags.label_T >= 0).any():
            labelled.append(tags)
    done = f"tags of {len(videos)} videos: {out}"
    if not labelled:
        return done
    frames = sum(int((tags.label_T >= 0).sum()) for tags in labelled)
    return f"{done}\n{len(labelled)} of them have labels, {frames} frames:\n{told(scores_of(labelled))}"


def main(arguments: Sequence[str] | None = None) -> int:
    data = "videos", "a file of videos, see above"
    return predict_command(write_tags, data, "mabe", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
