"""The losses of the rebuild, in every form, against hand-computed cases and their chance levels."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.beam.reconstruct import contrast_chance, contrast_loss, distance_loss, trans_loss

Form = Literal["centred", "plain"]
FORMS: tuple[Form, ...] = ("centred", "plain")


def features(windows: int, history: int = 2, width: int = 8, positions: int = 6) -> Tensor:
    return torch.randn(windows * history, width, positions)


def one_position(rows: list[list[float]]) -> Tensor:
    """Windows of one frame with one position, (B, C, 1)."""
    return torch.tensor(rows)[:, :, None]


@pytest.mark.parametrize("batch", [2, 24])
def test_plain_contrast_of_features_that_are_alike_is_at_chance(batch: int) -> None:
    alike = torch.ones(2 * batch, 8, 6)
    losses = contrast_loss(alike, alike, 2, 0.1, "plain")
    assert contrast_chance(batch, 0.1, "plain") == pytest.approx({2: 1.0986, 24: 3.8501}[batch], abs=1e-4)
    torch.testing.assert_close(losses, torch.full((batch,), contrast_chance(batch, 0.1, "plain")))


@pytest.mark.parametrize("batch", [2, 3, 24])
def test_centred_contrast_of_windows_told_apart_but_not_paired_is_at_chance(batch: int) -> None:
    """Corners of two simplices that are orthogonal to each other: centred, corners of one meet at -1 / (B - 1)."""
    a, b = torch.eye(2 * batch)[:, :, None].split(batch)
    losses = contrast_loss(a, b, 1, 0.1, "centred")
    torch.testing.assert_close(losses, torch.full((batch,), contrast_chance(batch, 0.1, "centred")))
    assert contrast_chance(2, 0.1) == pytest.approx(math.log(2 + math.exp(-10)))


@pytest.mark.parametrize("form", FORMS)
def test_contrast_of_wide_random_features_is_near_chance(form: Form) -> None:
    a, b = (x - x.mean(0) for x in (features(16, width=4000), features(16, width=4000)))
    losses = contrast_loss(a, b, 2, 1.0, form)
    assert losses.mean().item() == pytest.approx(contrast_chance(16, 1.0, form), rel=0.02)


def test_plain_contrast_by_hand() -> None:
    """Two windows: partners agree (1), others are orthogonal (0), temperature 1."""
    a = one_position([[1.0, 0.0], [0.0, 1.0]])
    expected = -math.log(math.e / (math.e + 2))  # itself excluded: one partner at 1, two others at 0
    torch.testing.assert_close(contrast_loss(a, a, 1, 1.0, "plain"), torch.full((2,), expected))


def test_centred_contrast_by_hand() -> None:
    """The same two windows: without their mean they are opposite, so both others are at -1."""
    a = one_position([[1.0, 0.0], [0.0, 1.0]])
    expected = -math.log(math.e / (math.e + 2 / math.e))
    torch.testing.assert_close(contrast_loss(a, a, 1, 1.0, "centred"), torch.full((2,), expected))


def test_what_all_windows_share_hides_the_pairs_from_the_plain_contrast_only() -> None:
    a, common = features(16), 100 * torch.randn(8, 1)
    clear, hidden = (contrast_loss(a + offset, a - offset, 2, 0.1, "centred") for offset in (0.0, common))
    torch.testing.assert_close(clear, hidden, rtol=1e-3, atol=1e-3)
    assert clear.mean() < 0.1 * contrast_chance(16, 0.1)
    drowned = contrast_loss(a + common, a + common, 2, 0.1, "plain")
    assert drowned.mean().item() == pytest.approx(contrast_chance(16, 0.1, "plain"), rel=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_contrast_falls_when_partners_agree(form: Form) -> None:
    a, b = features(16), features(16)
    apart, together = (contrast_loss(a, other, 2, 0.1, form) for other in (b, a + 0.1 * b))
    assert together.mean() < 0.1 * apart.mean()


@pytest.mark.parametrize("form", FORMS)
def test_a_window_on_its_own_has_no_contrast(form: Form) -> None:
    a = features(1).requires_grad_()
    loss = contrast_loss(a, features(1), 2, 0.1, form)
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    assert loss.tolist() == [0.0]
    assert contrast_chance(1, 0.1, form) == 0.0
    assert not gradient.any()


def test_noise_below_the_precision_is_not_taken_for_contrast() -> None:
    a = torch.full((8, 8, 6), 0.3) + 1e-7 * features(4)
    a.requires_grad_()
    loss = contrast_loss(a, torch.full_like(a, 0.3), 2, 0.1, "centred")
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    torch.testing.assert_close(loss, torch.full((4,), math.log(7)), rtol=1e-3, atol=0)  # all similarities are 0
    assert gradient.abs().max() < 10


def test_mean_distance_by_hand_and_its_bounds() -> None:
    a = torch.zeros(2, 2, 3)
    a[:, 0] = 1.0
    torch.testing.assert_close(distance_loss(a, -a, history=1), torch.tensor([-4.0, -4.0]))  # opposite unit vectors
    torch.testing.assert_close(distance_loss(a, a, history=1), torch.zeros(2))


def test_published_distances_by_hand() -> None:
    a, b = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
    a[0, 0], a[1, 1] = 2.0, 1.0  # squares: 3 positions of 4, 3 of 1
    norm = -math.sqrt(3 * 4.0 + 3 * 1.0)
    torch.testing.assert_close(distance_loss(a, b, 1, "norm"), torch.tensor([norm, norm]))
    torch.testing.assert_close(distance_loss(a, b, 1, "mse"), torch.tensor([-4.0 / 2, -1.0 / 2]))  # over 2 channels
    assert distance_loss(a, b, 1, "mse").mean().item() == pytest.approx(-F.mse_loss(a, b).item())


def test_only_the_published_norm_grows_with_the_batch() -> None:
    a, b = features(6), features(6)
    losses, norm = distance_loss(a, b, history=2), distance_loss(a, b, 2, "norm")
    torch.testing.assert_close(losses[:3], distance_loss(a[:6], b[:6], history=2))
    twice = torch.cat([a, a]), torch.cat([b, b])
    torch.testing.assert_close(distance_loss(*twice, history=2), torch.cat([losses, losses]))
    torch.testing.assert_close(distance_loss(*twice, 2, "norm")[:6], math.sqrt(2) * norm)


def test_trans_is_the_mean_squared_error_of_each_window() -> None:
    target = features(3)
    rebuilt = target.clone()
    rebuilt[2:4] += 2.0  # the second window's two frames
    torch.testing.assert_close(trans_loss(rebuilt, target, history=2), torch.tensor([0.0, 4.0, 0.0]))


def test_the_earlier_trans_is_the_distance_from_the_target_of_unit_length() -> None:
    target = one_position([[3.0, 4.0], [0.0, 2.0]])
    rebuilt = one_position([[0.6, 0.8], [3.0, 5.0]])  # on the unit vector (0.6, 0.8); from (0, 1) by (3, 4)
    torch.testing.assert_close(trans_loss(rebuilt, target, 1, "l2_normalised"), torch.tensor([0.0, 5.0]))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_the_losses_are_those_of_single_precision_under_autocast(precision: torch.dtype) -> None:
    """A norm of 300 times 256 windows is beyond half precision, and it takes a map of zeros for 0 / 0."""
    a, b = torch.ones(256, 64, 16) * 0.5, torch.zeros(256, 64, 16)
    a, b = a.to(precision), b.to(precision)
    with torch.autocast("cpu", precision):
        apart, rebuilt = distance_loss(a, b, 1, "norm").sum(), trans_loss(a, b, 1, "l2_normalised").sum()
    assert apart.item() == pytest.approx(-256 * 0.5 * math.sqrt(a.numel()))
    assert rebuilt.item() == pytest.approx(256 * 0.5 * math.sqrt(64))
