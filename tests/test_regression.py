"""Gaussian-process regression: as the textbook has it, and unmoved by what would blind it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from search.learning import regression
from search.learning.features import Array
from search.learning.regression import Regression


def rows(number: int, features: int = 2, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (number, features))


def bowl(x_ND: Array) -> Array:
    scores: Array = 3.0 + ((x_ND - 0.3) ** 2).sum(axis=1)
    return scores


def test_a_smooth_score_is_predicted_where_it_was_not_measured() -> None:
    known, unseen = rows(25), rows(200, seed=1)
    mean, deviation = Regression(known, bowl(known)).predict(unseen)
    assert np.abs(mean - bowl(unseen)).max() < 0.05
    assert (deviation < 0.1).all()


def test_it_is_the_posterior_of_the_textbook() -> None:
    """Equations 2.23 and 2.24, by inverting the covariance."""
    known, unseen = rows(12), rows(5, seed=1)
    scores = bowl(known) + np.random.default_rng(2).normal(0, 0.1, 12)
    model = Regression(known, scores)
    theta = model._theta
    standard = (scores - scores.mean()) / scores.std()

    def covariance(a: Array, b: Array) -> Array:
        lengths = np.exp(theta[:2])
        return np.array([[np.exp(theta[2] - 0.5 * (((p - q) / lengths) ** 2).sum()) for q in b] for p in a])

    inverse = np.linalg.inv(covariance(known, known) + (np.exp(theta[3]) + regression.JITTER) * np.eye(12))
    cross = covariance(unseen, known)
    mean, deviation = model.predict(unseen)
    assert mean == pytest.approx(scores.mean() + scores.std() * cross @ inverse @ standard, abs=1e-6)
    variance = np.exp(theta[2]) - np.einsum("mn,nk,mk->m", cross, inverse, cross)
    assert deviation**2 == pytest.approx(scores.std() ** 2 * variance, abs=1e-6)


def test_the_gradient_is_that_of_the_loss() -> None:
    known = rows(15, features=3)
    scores = bowl(known) - bowl(known).mean()
    loss = regression.loss_of(known, scores)
    for seed in range(5):
        theta = np.random.default_rng(seed).normal(0, 1, 5)
        assert check_grad(lambda t: loss(t)[0], lambda t: loss(t)[1], theta) < 1e-4 * (1 + abs(loss(theta)[0]))


def test_noise_is_told_from_shape() -> None:
    known = rows(60)
    noisy = bowl(known) + np.random.default_rng(3).normal(0, 0.2, 60)
    mean, _ = Regression(known, noisy).predict(known)
    assert np.abs(mean - bowl(known)).mean() < 0.6 * np.abs(noisy - bowl(known)).mean()


def test_a_score_beyond_all_bounds_hides_no_difference() -> None:
    known, unseen = rows(25), rows(50, seed=1)
    scores = bowl(known)
    scores[np.argmax(scores)] = 1e30
    mean, _ = Regression(known, scores).predict(unseen)
    assert np.corrcoef(mean, bowl(unseen))[0, 1] > 0.9


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5]])
def test_where_no_difference_was_seen_none_is_predicted(scores: list[float]) -> None:
    mean, deviation = Regression(rows(len(scores)), np.array(scores)).predict(rows(5, seed=1))
    assert mean == pytest.approx([0.5] * 5)
    assert np.isfinite(deviation).all()


def test_what_is_added_is_known_from_then_on() -> None:
    known, more = rows(8), rows(2, seed=5)
    model = Regression(known, bowl(known))
    _, before = model.predict(more)
    model.add(more, bowl(more))
    mean, after = model.predict(more)
    assert mean == pytest.approx(bowl(more), abs=0.05)
    assert (after < before).all()
