"""The settings of the behaviour-tagging family, as its space files write them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from trainables.optim import require

# Feature groups, see `trainables.mabe.features`; pca is computed in the model, from coords.
Feature = Literal["coords", "presence", "geometry", "rolling", "motion", "pca"]
FEATURES: tuple[Feature, ...] = ("coords", "presence", "geometry", "rolling", "motion", "pca")
CLASSES = ("other", "investigation", "mount", "attack")


@dataclass(frozen=True)
class Simulated:
    """Size of the simulated data set, which is used when `root` is None."""

    videos: int = 32
    seconds: int = 60  # length of a video; every eighth is shorter than a window
    labels: Literal["behaviour", "random"] = "behaviour"  # random: independent in each frame, so nothing can be learnt
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.videos >= 4, "data.simulated.videos", self.videos, "be at least 4: two of each lab")
        require(self.seconds >= 1, "data.simulated.seconds", self.seconds, "be at least 1")
        require(self.seed >= 0, "data.simulated.seed", self.seed, "not be negative")


@dataclass(frozen=True)
class Data:
    """Which videos are read, and in what form the network gets them."""

    root: str | None = None  # folder of a MABe challenge or CalMS21 data set; None: simulated data
    prepared: str | None = None  # folder for prepared arrays; None: the user's cache folder
    trust_pickle: bool = False  # allow CalMS21's .npy files, pickles that can run any code; JSON cannot
    features: tuple[Feature, ...] = ("geometry", "rolling", "pca")  # the 131 inputs of version V4, for 2 x 7 points
    pca: int = 16  # principal components of the coordinates
    window: int = 100  # frames
    stride: int = 25  # frames from one training window's start to the next; validation windows do not overlap
    context: int = 0  # frames before and after each validation window that the network sees too, unscored
    # Classes that a video's lab did not annotate. mask: neither learnt nor tagged in this video; other: seen as other.
    unlabelled: Literal["mask", "other"] = "mask"
    holdout: float = 0.2  # share of each lab's videos held out (CalMS21: of the animals; an .npz: of its sequences)
    split_seed: int = 42
    simulated: Simulated = field(default_factory=Simulated)

    def __post_init__(self) -> None:
        require(len(self.features) > 0, "data.features", [], f"name at least one of {', '.join(FEATURES)}")
        require(len(set(self.features)) == len(self.features), "data.features", list(self.features), "name each once")
        require(self.pca >= 1, "data.pca", self.pca, "be at least 1")
        require(self.window >= 8, "data.window", self.window, "be at least 8 frames")
        require(1 <= self.stride <= self.window, "data.stride", self.stride, f"lie in 1..{self.window}, the window")
        require(self.context >= 0, "data.context", self.context, "be 0 or a positive number of frames")
        require(0 < self.holdout < 1, "data.holdout", self.holdout, "lie between 0 and 1")
        require(self.split_seed >= 0, "data.split_seed", self.split_seed, "not be negative")


@dataclass(frozen=True)
class Model:
    """Convolutions over time, a bidirectional LSTM and a classifier for every frame."""

    channels: tuple[int, ...] = (64, 128, 256)  # of the convolutions
    kernel: int = 3  # frames
    pool: int = 0  # the first `pool` convolutions halve the frames; LSTM outputs are interpolated back to all frames
    hidden: int = 256  # LSTM units in each direction
    layers: int = 2  # of the LSTM
    # mlp: an extra linear layer before the LSTM and one after it, as in the public code (which pools 3 times).
    head: Literal["linear", "mlp"] = "linear"
    norm: Literal["batch", "group"] = "batch"  # group: exact under accumulation and over ranks
    dropout: float = 0.3

    def __post_init__(self) -> None:
        require(len(self.channels) > 0, "model.channels", [], "name at least one width")
        require(min(self.channels, default=1) >= 1, "model.channels", list(self.channels), "be at least 1 each")
        require(self.kernel >= 1 and self.kernel % 2 == 1, "model.kernel", self.kernel, "be an odd number of frames")
        stages = len(self.channels)
        require(
            0 <= self.pool <= min(stages, 3), "model.pool", self.pool, f"lie in 0..{min(stages, 3)}, the convolutions"
        )
        require(self.hidden >= 1, "model.hidden", self.hidden, "be at least 1")
        require(self.layers >= 1, "model.layers", self.layers, "be at least 1")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "lie in [0, 1)")


@dataclass(frozen=True)
class Augment:
    """How training windows are augmented."""

    noise: float = 0.01  # standard deviation of noise added to the scaled features, whose own is 1
    jitter: int = 2  # a window and its labels start up to this many frames earlier or later

    def __post_init__(self) -> None:
        require(0 <= self.noise < math.inf, "augment.noise", self.noise, "be 0 or a positive number")
        require(self.jitter >= 0, "augment.jitter", self.jitter, "be 0 or a positive number of frames")


@dataclass(frozen=True)
class FrameLoss:
    """Cross-entropy, as a class-weighted mean over frames."""

    class_weights: tuple[float, float, float, float] | None = (0.5, 10.0, 15.0, 15.0)  # None: by `balance`
    balance: float = 0.5  # a class's weight is (1 / its share of the training frames) to this power
    smoothing: float = 0.0  # label smoothing

    def __post_init__(self) -> None:
        if self.class_weights is not None:
            positive = all(0 < weight < math.inf for weight in self.class_weights)
            require(positive, "loss.class_weights", list(self.class_weights), "be positive numbers")
        require(0 <= self.balance <= 1, "loss.balance", self.balance, "lie in 0..1")
        require(0 <= self.smoothing < 1, "loss.smoothing", self.smoothing, "lie in [0, 1)")
