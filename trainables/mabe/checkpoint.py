"""What a tagger's checkpoint says beside its weights: which settings they need, and which videos it knows."""

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

VIDEOS = "videos"  # the name among the settings in a checkpoint that stands for `Seen`


@dataclass(frozen=True)
class Seen:
    """What the videos of a model's data set have in common.

    parts: the places of a mouse's points. tracked: which of them a video has, each such set once. mice: how many mice
    a video has, each number once; there are places for the most. fps: frames per second, each rate once.
    """

    classes: tuple[str, ...]
    parts: tuple[str, ...]
    tracked: tuple[tuple[str, ...], ...]
    mice: tuple[int, ...]
    fps: tuple[float, ...]

    def check(self, video: Video) -> None:
        """Raise `UserError` unless some video of the data set was tracked like this one."""
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
    """What a checkpoint says, as plain values: the settings that its weights do not show, and what was seen."""
    seen = Seen(
        classes=CLASSES,
        parts=tuple(prepared.parts),
        tracked=tuple(sorted({tuple(parts) for _, parts in prepared.tracked})),
        mice=tuple(sorted({mice for mice, _ in prepared.tracked})),
        fps=tuple(sorted(set(prepared.fps))),
    )
    return {**unseen_settings(data, model), VIDEOS: asdict(seen)}


def unseen_settings(data: Data, model: Model) -> dict[str, Any]:
    """By name what the weights depend on for their meaning, as far as their shapes do not show it."""
    return {"data.features": data.features, "data.window": data.window, "model.pool": model.pool}


def seen_of(state: State, folder: Path) -> Seen:
    """What the model in an exported folder was trained on; raises `UserError` where this version cannot use it."""
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
