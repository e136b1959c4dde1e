"""Context shows the network what lies around a window, and counts nothing twice; a whole video's events are not cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import exported
from small_mabe import challenge_csv, rows_of, small_config, two_labs
from torch import Tensor

from trainables.mabe import predict
from trainables.mabe.config import Augment
from trainables.mabe.data import samples, videos_of
from trainables.mabe.metrics import event_scores
from trainables.mabe.prepare import prepare_data
from trainables.mabe.simulator import ATTACK
from trainables.mabe.tagging import Config, build, forward, score, scored
from trainables.mabe.video import UNLABELLED
from trainables.samples import Batch

CONTEXT = 24

root = two_labs()


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return small_config(root, tmp_path / "cache")


@pytest.fixture
def wide(config: Config) -> Config:
    return replace(config, data=replace(config.data, context=CONTEXT))


def all_of(config: Config, split: str) -> Batch:
    side = samples(config, split)
    return side[torch.arange(len(side))]


def held_out(config: Config) -> list[slice]:
    prepared = prepare_data(config.data)
    return [slice(prepared.start[v], prepared.start[v + 1]) for v in videos_of(prepared, config.data, "val")]


def test_every_frame_is_scored_once(wide: Config) -> None:
    batch, labels = all_of(wide, "val"), prepare_data(wide.data).labels()
    _, label_BT = scored(build(wide).eval(), batch, CONTEXT)
    assert label_BT.shape[1] == wide.data.window
    wanted = np.concatenate([labels[video] for video in held_out(wide)]).tolist()
    assert label_BT[label_BT != UNLABELLED].tolist() == wanted
    frames = sum(
        int(count) for name, (_, count) in score(build(wide).eval(), batch, wide).items() if name == "accuracy"
    )
    assert frames == len(wanted)


def test_context_is_the_frames_around_a_window(wide: Config) -> None:
    """Beyond a video's ends its first or last frame is repeated."""
    batch, geometry = all_of(wide, "val"), prepare_data(wide.data).group("geometry")
    for index, seen in zip(batch["index"].tolist(), batch["geometry"], strict=True):
        (video,) = (video for video in held_out(wide) if video.start <= index < video.stop)
        around = np.arange(index - CONTEXT, index + wide.data.window + CONTEXT).clip(video.start, video.stop - 1)
        np.testing.assert_array_equal(seen, geometry[around])


def test_a_frame_at_a_border_is_tagged_by_what_lies_beyond(config: Config, wide: Config) -> None:
    model = build(config).eval()
    with torch.no_grad():
        narrow_BTK, label_BT = scored(model, all_of(config, "val"), 0)
        wide_BTK, same_BT = scored(model, all_of(wide, "val"), CONTEXT)
    assert torch.equal(label_BT, same_BT)
    moved_T = (narrow_BTK - wide_BTK).abs().amax(-1)[label_BT[:, -1] != UNLABELLED].mean(0)  # of whole windows
    assert moved_T[-1] > 2 * moved_T[32]
    assert moved_T[32] < 0.1 * wide_BTK.std()


def test_without_context_all_is_as_it_was(config: Config) -> None:
    batch, model = all_of(config, "val"), build(config).eval()
    with torch.no_grad():
        for cropped, whole in zip(scored(model, batch, 0), forward(model, batch), strict=True):
            assert torch.equal(cropped, whole)
    assert batch["label"].shape[1] == config.data.window


def test_training_windows_have_no_context(config: Config, wide: Config) -> None:
    for jitter in (0, 2):
        narrow, same = (all_of(replace(each, augment=Augment(jitter=jitter)), "train") for each in (config, wide))
        assert narrow.keys() == same.keys()
        assert all(torch.equal(narrow[name], same[name]) for name in narrow)


def as_runs(text: str) -> Tensor:
    return torch.tensor([{".": 0, "3": ATTACK, "-": UNLABELLED}[letter] for letter in text])


def test_the_events_of_a_whole_video_are_not_cut() -> None:
    """Cut after four frames, the event is two, one of which is found; a video's end is an event's end."""
    videos = [("..333333", "...33333"), ("..33", "..3.")]
    tags = [predict.Tags("lab", as_runs(guess), torch.ones(len(guess)), as_runs(label)) for label, guess in videos]
    cut = [torch.cat([each.guess_T, each.label_T]).view(2, -1, 4) for each in tags]
    guess, label = torch.cat(cut, dim=1)
    total, count = event_scores(guess, label)["event_f1_attack"]
    assert (int(total), int(count)) == (2, 6)
    assert predict.scores_of(tags)["event_f1_attack"] == 2 * 1 / (2 + 2)


@pytest.mark.parametrize("context", [0, CONTEXT])
def test_predictions_have_the_searchs_scores_and_whole_events(
    context: int, config: Config, root: Path, tmp_path: Path
) -> None:
    config = replace(config, data=replace(config.data, context=context))
    metrics = exported(tmp_path / "model", config)
    every = rows_of(root)
    rows = [every[v] for v in videos_of(prepare_data(config.data), config.data, "val")]
    model = predict.read_model(tmp_path / "model")
    assert model.config.data.context == context
    videos = predict.read_videos(challenge_csv(root, tmp_path / "others", rows), trust_pickle=False)
    tags = list(predict.tagged(model, videos, torch.device("cpu")))
    for each, video in zip(tags, videos, strict=True):
        assert len(each.guess_T) == len(each.confidence_T) == len(each.label_T) == video.frames
        np.testing.assert_array_equal(each.label_T, video.read()[1])
    scores = predict.scores_of(tags)
    for name in ("accuracy", "macro_f1", "macro_f1_labs", "macro_f1_behaviours"):
        assert scores[name] == pytest.approx(metrics[name], abs=1e-6)
    total, count = torch.tensor(
        [event_scores(each.guess_T[None], each.label_T[None])["event_f1_other"] for each in tags]
    ).sum(0)
    assert scores["event_f1_other"] == pytest.approx(float(total / count))
