"""Trains the tagger, which classifies every frame of a window of tracked points.

Shape suffixes: B windows, S frames with margins, T frames of the window, K classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

from trainables.checkpoint import with_settings
from trainables.contract import Report, Trial
from trainables.loop import Task, fit, step_memory
from trainables.mabe.checkpoint import settings_of
from trainables.mabe.config import CLASSES, Augment, Data, FrameLoss, Model
from trainables.mabe.data import PER_WINDOW, describe, names, samples, training_frames
from trainables.mabe.metrics import derived, event_scores, frame_scores, lab_scores
from trainables.mabe.network import FrameTagger, Inputs, Tagger
from trainables.mabe.prepare import prepare_data
from trainables.mabe.video import UNLABELLED
from trainables.optim import Optim, require
from trainables.samples import Batch
from trainables.step import Pairs


@dataclass(frozen=True)
class Config:
    """One setting of tagger training."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    augment: Augment = field(default_factory=Augment)
    loss: FrameLoss = field(default_factory=FrameLoss)
    optim: Optim = field(default_factory=Optim)
    epochs: int = 100

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", self.epochs, "be at least 1")


def build(config: Config) -> Tagger:
    """Build the network, with scale, principal axes and class weights from the training videos."""
    fitted, label = _fitted(config.data, prepare_data(config.data).folder)
    inputs = copy.deepcopy(fitted)  # the cached one must not be moved to a trial's device
    return Tagger(inputs, FrameTagger(len(inputs.mean_F), config.model), class_weights(config.loss, label))


@functools.lru_cache(maxsize=8)  # about 2 MB each, their labels; several, as a search may vary the features
def _fitted(data: Data, folder: Path) -> tuple[Inputs, Tensor]:
    """Return the inputs with fitted scale and axes, and the labels of the frames they were fitted to.

    Computed once per process. `folder`, of the prepared arrays, has another name once the data have changed.
    """
    groups, label = training_frames(data)
    return make_inputs(data, groups), label


def make_inputs(data: Data, groups: dict[str, Tensor]) -> Inputs:
    centre_D, axes_DQ = torch.zeros(0), torch.zeros(0, 0)
    if "pca" in data.features:
        coords = groups["coords"].numpy()
        components = min(data.pca, *coords.shape)
        fitted = PCA(components, svd_solver="covariance_eigh").fit(coords)
        centre_D, axes_DQ = (torch.from_numpy(part).float() for part in (fitted.mean_, fitted.components_.T.copy()))
    widths = [axes_DQ.shape[1] if name == "pca" else groups[name].shape[1] for name in data.features]
    inputs = Inputs(data.features, centre_D, axes_DQ, sum(widths))
    inputs.set_scale(groups)
    return inputs


def class_weights(settings: FrameLoss, label: Tensor) -> Tensor:
    """Return the loss's class weights, (K,). Only ratios matter: the loss is divided by the sum of frame weights.

    A class's share is of all training frames, even of labs that did not annotate it: `balance` evens out what the
    classes add up to in the loss, and there a class that few labs annotated is rare.
    """
    if settings.class_weights is not None:
        return torch.tensor(settings.class_weights)
    frames_K = torch.bincount(label, minlength=len(CLASSES)).clamp(min=1)
    weights_K = (len(label) / frames_K) ** settings.balance
    return weights_K / weights_K.mean()


def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    assert isinstance(model, Tagger)
    logits_BTK, label_BT = forward(model, shifted(batch, config.data.window), config.augment.noise)
    smoothing = config.loss.smoothing
    return {"ce": weighted_entropy(logits_BTK, label_BT, model.class_weights_K, smoothing, batch.get("known"))}


def forward(model: Tagger, batch: Batch, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return logits (B, S, K), -inf for classes that a window's lab did not annotate, and labels (B, S)."""
    logits_BSK = model(batch, noise)
    if (known_BK := batch.get("known")) is not None:
        logits_BSK = logits_BSK.masked_fill(~known_BK[:, None], -torch.inf)
    return logits_BSK, batch["label"]


def scored(model: Tagger, batch: Batch, context: int) -> tuple[Tensor, Tensor]:
    """Return the logits (B, T, K) and labels (B, T) of windows that have `context` more frames on each side.

    Where a lab annotated no behaviour, "other" is the only guess, and no merit: such windows count as unlabelled.
    """
    logits_BSK, label_BS = forward(model, batch)
    if (known_BK := batch.get("known")) is not None:
        label_BS = label_BS.masked_fill(known_BK.sum(-1, keepdim=True) == 1, UNLABELLED)
    window = slice(context, label_BS.shape[1] - context)
    return logits_BSK[:, window], label_BS[:, window]


def shifted(batch: Batch, window: int) -> Batch:
    """Crop the batch to windows without margins, each with its labels shifted at random within the margins."""
    label_BS = batch["label"]
    windows, frames = label_BS.shape
    if frames == window:
        return batch
    first_B = torch.randint(frames - window + 1, (windows,), device=label_BS.device)
    at_BT = first_B[:, None] + torch.arange(window, device=label_BS.device)
    row_B1 = torch.arange(windows, device=label_BS.device)[:, None]
    return {name: x if name in PER_WINDOW else x[row_B1, at_BT] for name, x in batch.items()}


def weighted_entropy(
    logits_BTK: Tensor, label_BT: Tensor, weights_K: Tensor, smoothing: float, known_BK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the class-weighted cross-entropy summed over the labelled frames, and the sum of their weights.

    A frame's weight is that of its label, for its smoothed part too. torch's `label_smoothing` weights that part by the
    classes it is spread over: of a common class's frame, smoothed by 0.15, a rare class would be the best guess.

    known_BK: the classes that `smoothing` is spread over, the others having logits of -inf; None: all.
    """
    logits_BTK = logits_BTK.float()
    summed = F.cross_entropy(
        logits_BTK.flatten(0, 1), label_BT.flatten(), weights_K, ignore_index=UNLABELLED, reduction="sum"
    )
    # No boolean indexing: the host would wait for the number of selected frames.
    weight_BT = weights_K[label_BT.clamp(min=0)] * (label_BT != UNLABELLED)
    if smoothing:
        log_p_BTK = logits_BTK.log_softmax(-1)
        if known_BK is None:
            even_BT = log_p_BTK.mean(-1)
        else:  # -inf * 0 is NaN
            even_BT = log_p_BTK.masked_fill(~known_BK[:, None], 0.0).sum(-1) / known_BK.sum(-1, keepdim=True)
        summed = (1 - smoothing) * summed - smoothing * (weight_BT * even_BT).sum()
    return summed, weight_BT.sum()


def score(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    """Return the loss as val_ce, and the frame, lab and event scores of `trainables.mabe.metrics`.

    A guess is the best of the classes that the window's lab annotated, so that none is wrong because nobody looked.
    """
    assert isinstance(model, Tagger)
    logits_BTK, label_BT = scored(model, batch, config.data.context)
    guess_BT, smoothing = logits_BTK.argmax(-1), config.loss.smoothing
    return {
        "val_ce": weighted_entropy(logits_BTK, label_BT, model.class_weights_K, smoothing, batch.get("known")),
        **frame_scores(guess_BT, label_BT),
        **lab_scores(guess_BT, label_BT, batch.get("lab")),
        **event_scores(guess_BT, label_BT),
    }


TASK = Task(config=Config, model=build, data=samples, loss=loss, score=score, derived=derived, names=names)


def prepare(config: Config) -> str:
    """Check and read the data before any worker starts; return a line that describes them."""
    return describe(config)


def memory_need(trial: Trial) -> int:
    return step_memory(TASK, trial)


def train(trial: Trial) -> Iterator[Report]:
    config: Config = trial.config
    settings = settings_of(config.data, config.model, prepare_data(config.data))
    for report in fit(TASK, trial):
        assert report.state is not None
        yield replace(report, state=functools.partial(with_settings, report.state, settings))
