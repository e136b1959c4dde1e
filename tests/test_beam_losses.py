"""The beam family's metrics and losses against hand-computed cases and slow rewrites."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from trainables.beam.config import BeamLoss, RebuildLoss
from trainables.beam.fusion import beam_loss
from trainables.beam.metrics import beam_scores, cross_entropy, focal_loss, soft_targets
from trainables.contract import UserError


def brute_force_dba(logits: list[list[float]], beams: list[int]) -> dict[str, float]:
    """The published definition with loops, and with top-k accuracy in percent."""
    names = ("y1", "y2", "y3", "top1", "top2", "top3")
    sums = dict.fromkeys(names, 0.0)
    for row, beam in zip(logits, beams, strict=True):
        ranked = sorted(range(len(row)), key=lambda k: -row[k])
        for k in (1, 2, 3):
            sums[f"y{k}"] += 1 - min(min(abs(guess - beam) / 5, 1) for guess in ranked[:k])
            sums[f"top{k}"] += 100 * (beam in ranked[:k])
    means = {name: total / len(beams) for name, total in sums.items()}
    return means | {"dba": (means["y1"] + means["y2"] + means["y3"]) / 3}


def test_scores_equal_the_definition_written_with_loops() -> None:
    logits, beam = torch.randn(200, 64), torch.randint(64, (200,))
    near = beam + torch.randint(-6, 7, (200,))  # most guesses come close, or most scores would be 0
    logits += 3 * F.one_hot(near.clamp(0, 63), 64)
    means = {name: values.mean().item() for name, values in beam_scores(logits, beam).items()}
    assert means == pytest.approx(brute_force_dba(logits.tolist(), beam.tolist()), abs=1e-6)


@pytest.mark.parametrize(
    ("ranked", "beam", "expected"),
    [
        ((10, 40, 50), 10, 1.0),
        ((40, 10, 50), 10, 2 / 3),  # found by the second guess: (0 + 1 + 1) / 3
        ((12, 40, 10), 10, (0.6 + 0.6 + 1) / 3),
        ((0, 1, 2), 63, 0.0),  # the first and the last beam are no neighbours
    ],
)
def test_dba_by_hand(ranked: tuple[int, int, int], beam: int, expected: float) -> None:
    logits = torch.zeros(1, 64)
    logits[0, list(ranked)] = torch.tensor([3.0, 2.0, 1.0])
    assert beam_scores(logits, torch.tensor([beam]))["dba"].item() == pytest.approx(expected)


def test_logits_that_are_not_finite_score_nothing() -> None:
    logits = torch.zeros(1, 64)
    logits[0, 3] = torch.nan
    assert all(values.item() == 0 for values in beam_scores(logits, torch.tensor([0])).values())


def test_focal_loss_by_hand() -> None:
    """Two beams at logit 0, so p = 1/2: alpha 0.25 for the wanted one, 0.75 for the other; (1/2)^2 ln 2 each."""
    loss = focal_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx((0.25 + 0.75) / 2 * 0.25 * math.log(2))


def test_focal_loss_of_a_soft_target_by_hand() -> None:
    """One beam, p = 3/4, target 0.6: p_t = .75 x .6 + .25 x .4 = .55, alpha_t = .2 x .6 + .8 x .4 = .44."""
    loss = focal_loss(torch.tensor([[math.log(3)]]), torch.tensor([[0.6]]), alpha=0.2, gamma=3.0)
    assert loss.item() == pytest.approx(0.44 * 0.45**3 * -(0.6 * math.log(0.75) + 0.4 * math.log(0.25)))


def test_focal_loss_without_focus_is_half_the_binary_cross_entropy() -> None:
    logits, target = torch.randn(5, 64), torch.rand(5, 64)
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1) / 2
    torch.testing.assert_close(focal_loss(logits, target, alpha=0.5, gamma=0.0), expected)


def test_cross_entropy_by_hand() -> None:
    """Shares 1/4 and 3/4 by the logits, the other way round by the target, whose sum is 2."""
    loss = cross_entropy(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.5, 0.5]]))
    assert loss.item() == pytest.approx(-(0.75 * math.log(0.25) + 0.25 * math.log(0.75)))


def test_cross_entropy_takes_a_target_of_any_sum() -> None:
    logits, beam = torch.randn(5, 64), torch.randint(64, (5,))
    one_hot = F.one_hot(beam, 64).float()
    torch.testing.assert_close(cross_entropy(logits, 3 * one_hot), F.cross_entropy(logits, beam, reduction="none"))


def test_soft_targets_are_the_published_ones() -> None:
    target = soft_targets(0.5)
    assert target.shape == (64, 64)
    torch.testing.assert_close(
        target[10, 8:13], torch.tensor([3.3e-4, 0.1350, 0.9974, 0.1350, 3.3e-4]), atol=1e-4, rtol=0
    )
    assert target[0, 63] == target[10, 4] == target[10, 16] == 0  # beams 0 and 63 are not neighbours


def test_a_scale_lowers_the_whole_target() -> None:
    torch.testing.assert_close(soft_targets(0.7, scale=0.5), soft_targets(0.7) * 0.5 / 1.25)
    logits, beam = torch.zeros(1, 64), torch.tensor([20])
    expected = focal_loss(logits, soft_targets(0.5)[beam] * 0.4)
    torch.testing.assert_close(beam_loss(logits, beam, BeamLoss(scale=0.5)), expected)


@pytest.mark.parametrize("scale", [0.0, 1.3])
def test_a_scale_leaves_a_target_between_0_and_1(scale: float) -> None:
    with pytest.raises(UserError, match=f"loss.scale = {scale} must be above 0 and at most 1.25"):
        BeamLoss(scale=scale)
    assert soft_targets(0.3, scale=1.25).max() < 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *((BeamLoss, name) for name in ("alpha", "gamma", "sigma", "scale")),
        *((RebuildLoss, name) for name in ("alpha_trans", "alpha_contrast", "alpha_distance", "temperature")),
    ],
)
def test_what_is_not_a_finite_number_is_no_setting_of_a_loss(settings: type, name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"loss.{name} = {value} must "):
        settings(**{name: value})


def test_the_target_is_the_published_one_by_default_and_only_wider_otherwise() -> None:
    logits, beam = torch.zeros(1, 64), torch.tensor([20])
    published = torch.zeros(1, 64)
    published[0, [19, 20, 21]] = torch.tensor([0.13499, 0.99736, 0.13499])
    published[0, [18, 22]] = 3.3462e-4
    torch.testing.assert_close(beam_loss(logits, beam, BeamLoss()), focal_loss(logits, published), rtol=1e-4, atol=0)
    assert soft_targets(2.0)[20, 20].item() == pytest.approx(0.99736, abs=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 1.5, 3.0])
def test_focal_loss_stays_finite_where_it_is_sure_and_its_power_is_broken(gamma: float) -> None:
    logits = torch.linspace(-200, 200, 64)[None].requires_grad_()
    target = (logits.detach() > 0).float()
    loss = focal_loss(logits, target, gamma=gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
