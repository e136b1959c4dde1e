"""The tagger has the published size, gives every frame its scores, and takes its scale from the training frames."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.contract import UserError
from trainables.mabe.config import Augment, Data, FrameLoss, Model, Simulated
from trainables.mabe.network import FAR, FrameTagger, Inputs
from trainables.mabe.tagging import class_weights, make_inputs, shifted, weighted_entropy
from trainables.mabe.video import UNLABELLED

NOTES = Model()
REPOSITORY = Model(head="mlp", pool=3)
SMALL = Model(channels=(8, 16), hidden=4, layers=1, pool=2)


@pytest.mark.parametrize(
    ("inputs", "notes", "repository"),  # specified for 28, 144 and 288 inputs; for 131 of the notes' model only
    [(28, 2_761_284, 2_957_380), (131, 2_781_060, None), (144, 2_783_556, 2_979_652), (288, 2_811_204, 3_007_300)],
)
def test_the_published_networks(inputs: int, notes: int, repository: int | None) -> None:
    for model, count in ((NOTES, notes), (REPOSITORY, repository)):
        with torch.device("meta"):
            tagger = FrameTagger(inputs, model)
        assert count is None or sum(parameter.numel() for parameter in tagger.parameters()) == count


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("pool", [0, 1, 2])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_frame_gets_its_scores(head: Any, pool: int, norm: Any) -> None:
    tagger = FrameTagger(5, replace(SMALL, head=head, pool=pool, norm=norm))
    assert tagger(torch.randn(3, 21, 5)).shape == (3, 21, 4)


def test_a_score_stays_with_its_frame_when_frames_are_pooled() -> None:
    tagger = FrameTagger(2, replace(SMALL, dropout=0.0)).eval()
    x_BTF = torch.zeros(1, 64, 2)
    changed = x_BTF.clone()
    changed[:, 40] = 3.0
    moved_T = (tagger(changed) - tagger(x_BTF)).abs().sum(-1)[0]
    assert abs(int(moved_T.argmax()) - 40) <= 6  # two poolings see four frames as one, and the kernels their neighbours


def test_inputs_are_scaled_by_the_training_frames_and_cut_off_far_away() -> None:
    x = torch.randn(500, 3) * torch.tensor([1.0, 20.0, 0.0]) + torch.tensor([0.0, 5.0, 7.0])
    inputs = Inputs(["coords"], torch.zeros(0), torch.zeros(0, 0), 3)
    inputs.set_scale({"coords": x})
    scaled = inputs({"coords": x})
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=1e-4)
    assert inputs({"coords": x + 1e6}).max() == FAR


def test_principal_components_are_those_of_the_covariance() -> None:
    mix = torch.randn(6, 6)
    coords = torch.randn(400, 6) @ mix + 3
    data = Data(features=("motion", "pca"), pca=2)
    inputs = make_inputs(data, {"coords": coords, "motion": torch.randn(400, 4)})
    values, vectors = torch.linalg.eigh(torch.cov(coords.T))
    wanted = (coords - coords.mean(0)) @ vectors.flip(1)[:, :2] / values.flip(0)[:2].sqrt()
    got = inputs({"coords": coords, "motion": torch.zeros(400, 4)})[:, 4:]
    torch.testing.assert_close(got.abs(), wanted.abs(), rtol=0.01, atol=0.01)  # a component may point either way
    assert inputs.state_dict().keys() == {"centre_D", "axes_DQ", "mean_F", "scale_F"}


def test_half_precision_begins_behind_the_inputs() -> None:
    """The last components, scaled to a deviation of 1, are small differences of coordinates that are not small."""
    coords = 0.5 + torch.randn(400, 6) * torch.logspace(-1, -4, 6)
    groups = {"coords": coords, "motion": torch.randn(400, 4)}
    inputs = make_inputs(Data(features=("motion", "pca"), pca=6), groups)
    whole = inputs(groups)
    with torch.autocast("cpu", torch.bfloat16):
        half = inputs(groups)
    assert torch.equal(half, whole)


def test_the_loss_is_torchs_weighted_mean_over_the_labelled_frames() -> None:
    logits, label = torch.randn(3, 10, 4), torch.randint(4, (3, 10))
    label[1, 6:] = UNLABELLED
    weights = torch.tensor([0.5, 10.0, 15.0, 15.0])
    for smoothing, weights_K in ((0.0, weights), (0.1, torch.ones(4))):
        summed, count = weighted_entropy(logits, label, weights_K, smoothing)
        mean = F.cross_entropy(
            logits.flatten(0, 1), label.flatten(), weights_K, ignore_index=UNLABELLED, label_smoothing=smoothing
        )
        torch.testing.assert_close(summed / count, mean)


@pytest.mark.parametrize("known", [None, [True, True, False, True]])
def test_a_smoothed_frame_s_best_guess_is_its_label_whatever_the_classes_weigh(known: list[bool] | None) -> None:
    known_14 = None if known is None else torch.tensor([known])
    classes = torch.ones(4, dtype=torch.bool) if known is None else torch.tensor(known)
    best_4 = torch.where(classes, 0.2 / classes.sum(), 0.0)
    best_4[0] += 0.8
    logits = best_4.log()[None, None].requires_grad_()
    summed, _ = weighted_entropy(logits, torch.tensor([[0]]), torch.tensor([0.5, 10.0, 15.0, 15.0]), 0.2, known_14)
    summed.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(1, 1, 4))  # the loss is convex


@pytest.mark.parametrize(("balance", "ratio"), [(0.0, 1.0), (0.5, 3.0), (1.0, 9.0)])
def test_class_weights_balance_what_is_rare(balance: float, ratio: float) -> None:
    label = torch.tensor([0] * 90 + [1] * 10 + [2] * 10 + [3] * 10)
    weights = class_weights(FrameLoss(class_weights=None, balance=balance), label)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0, ratio, ratio, ratio]))
    assert weights.mean() == pytest.approx(1)
    assert class_weights(FrameLoss(class_weights=None), torch.zeros(5, dtype=torch.int64)).isfinite().all()


def test_jitter_moves_a_window_with_its_labels() -> None:
    frame = torch.arange(14).repeat(50, 1)
    batch: dict[str, Tensor] = {"coords": frame[..., None].float(), "label": frame, "index": torch.arange(50)}
    moved = shifted(batch, window=10)
    assert torch.equal(moved["coords"][..., 0].long(), moved["label"])
    assert torch.equal(moved["label"] - moved["label"][:, :1], torch.arange(10).repeat(50, 1))
    assert set(moved["label"][:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(moved["index"], batch["index"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Data(features=()), "data.features = .* must name at least one of coords"),
        (lambda: Data(features=("coords", "coords")), "data.features = .* must name each once"),
        (lambda: Data(stride=101), r"data.stride = 101 must lie in 1\.\.100, the window"),
        (lambda: Data(context=-1), "data.context = -1 must be 0 or a positive number of frames"),
        (lambda: Data(holdout=0.0), "data.holdout = 0.0 must lie between 0 and 1"),
        (lambda: Model(kernel=4), "model.kernel = 4 must be an odd number of frames"),
        (lambda: Model(channels=(8,), pool=2), r"model.pool = 2 must lie in 0\.\.1, the convolutions"),
        (lambda: Augment(jitter=-1), "augment.jitter = -1 must be 0 or a positive number of frames"),
        (lambda: Augment(noise=math.inf), "augment.noise = inf must be 0 or a positive number"),
        *(
            (lambda x=x: FrameLoss(class_weights=(1, 1, x, 1)), "loss.class_weights = .* must be positive numbers")
            for x in (0, math.nan, math.inf)
        ),
        (lambda: Simulated(videos=3), "data.simulated.videos = 3 must be at least 4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(UserError, match=message):
        make()
