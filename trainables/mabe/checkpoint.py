"""What a tagger's checkpoint holds besides its weights: the settings they depend on and the kinds of video it knows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainables.checkpoint import SETTINGS
from trainables.contract import State, UserError
from trainables.mabe.config import CLASSES, Data, Model
from trainables.mabe.prepare import Prepared
from trainables.mabe.video import Video

VIDEOS = "videos"  # the key of `Seen` among a checkpoint's settings


@dataclass(frozen=True)
class Seen:
    """The kinds of video in a model's data set.

    parts: a mouse's points in the order of the model's inputs. tracked: each distinct set of points that a video has.
    mice: each distinct number of mice in a video; the inputs have room for the largest. fps: each distinct frame rate.
    """

    classes: tuple[str, ...]
    parts: tuple[str, ...]
    tracked: tuple[tuple[str, ...], ...]
    mice: tuple[int, ...]
    fps: tuple[float, ...]

    def check(self, video: Video) -> None:
        """Raise `UserError` unless the data set has this video's points, number of mice, and frame rate within 1 %."""
        like = "; tag videos that are tracked as those were, or train on some like this one"
        nearest = min(self.tracked, key=lambda parts: len({*parts} ^ {*video.parts}))
        if {*nearest} != {*video.parts}:
            ours, theirs = ", ".join(video.parts), ", ".join(nearest)
            raise UserError(f"{video.name}: its points are {ours}, the model was trained with {theirs}{like}")
        if video.mice not in self.mice:
            numbers = " or ".join(map(str, self.mice))
            raise UserError(f"{video.name}: it shows {video.mice} mice, the model was trained with {numbers}{like}")
        if not any(math.isclose(video.fps, fps, rel_tol=0.01) for fps in self.fps):  # 29.97 is 30
            rates = " or ".join(f"{fps:g}" for fps in self.fps)
            raise UserError(
                f"{video.name}: it has {video.fps:g} frames per second, the model was trained with {rates}{like}"
            )


def settings_of(data: Data, model: Model, prepared: Prepared) -> dict[str, Any]:
    """Return, as plain values for a checkpoint, the settings that its weights do not reveal and the kinds of video."""
    seen = Seen(
        classes=CLASSES,
        parts=tuple(prepared.parts),
        tracked=tuple(sorted({tuple(parts) for _, parts in prepared.tracked})),
        mice=tuple(sorted({mice for mice, _ in prepared.tracked})),
        fps=tuple(sorted(set(prepared.fps))),
    )
    return {**unseen_settings(data, model), VIDEOS: asdict(seen)}


def unseen_settings(data: Data, model: Model) -> dict[str, Any]:
    """Return by name the settings that the meaning of the weights depends on but their shapes do not reveal."""
    return {"data.features": data.features, "data.window": data.window, "model.pool": model.pool}


def seen_of(state: State, folder: Path) -> Seen:
    """Return the kinds of video an exported model was trained on; raises `UserError` if this version cannot use it."""
    if VIDEOS not in (settings := state.get(SETTINGS, {})):
        raise UserError(
            f"{folder / 'checkpoint.pt'}: it does not say which points and behaviours it was trained on, as those of "
            "an earlier version; search again, and export"
        )
    seen = Seen(**settings[VIDEOS])
    if seen.classes != CLASSES:
        ours, theirs = ", ".join(CLASSES), ", ".join(seen.classes)
        raise UserError(f"{folder}: it was trained to tag {theirs}; this version tags {ours}: train it with this one")
    return seen
