"""Gaussian-process regression of scores on settings.

Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, algorithm 2.1 and chapter 5: a squared
exponential kernel with a length scale for each feature. Length scales, amplitude and noise are the most probable ones
under a prior whose length scale grows with the square root of the number of features (Hvarfner et al., Vanilla Bayesian
Optimization Performs Great in High Dimensions, 2024), so that ten scores in seven dimensions are not taken for noise.

theta holds the logarithms of D length scales, of the amplitude and of the noise.

Shapes: N known rows, K new ones, M others, D features, T = D + 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from search.learning.features import Array

# Normal priors of the logarithms, as mean and standard deviation; scores are standardised, a range is 2 wide.
LENGTH = (-0.5, 0.75)  # the mean, plus half the logarithm of D; with less doubt, narrow valleys are taken for noise
AMPLITUDE = (0.0, 1.0)
NOISE = (-5.0, 2.0)
FAR = 8.0  # scores worse than the median by more than this many times its distance from the best are clipped
HUGE = 1e100  # scores are clipped to this magnitude: the square of a larger one would be infinite
JITTER = 1e-8


class Regression:
    """Models scores, lower being better, as a smooth function of N rows of features. N is 1 or more."""

    def __init__(self, x_ND: Array, y_N: Array) -> None:
        y_N = within_reach(y_N)
        self._x_ND, self._mean, self._scale = x_ND, y_N.mean(), y_N.std() or 1.0
        self._y_N = (y_N - self._mean) / self._scale
        self._theta = _likeliest(x_ND, self._y_N)
        self._solve()

    def _solve(self) -> None:
        k_NN = _covariance(self._theta, self._x_ND, self._x_ND)
        self._lower_NN = cholesky(k_NN + _noise(self._theta) * np.eye(len(k_NN)), lower=True)
        self._weight_N = cho_solve((self._lower_NN, True), self._y_N)

    def predict(self, x_MD: Array) -> tuple[Array, Array]:
        """Return means and standard deviations of M rows, without measurement noise."""
        k_NM = _covariance(self._theta, self._x_ND, x_MD)
        known_NM = solve_triangular(self._lower_NN, k_NM, lower=True)
        variance_M = np.maximum(1e-12, np.exp(self._theta[-2]) - (known_NM**2).sum(axis=0))
        return self._mean + self._scale * (self._weight_N @ k_NM), self._scale * np.sqrt(variance_M)

    def add(self, x_KD: Array, y_K: Array) -> None:
        """Add K rows without refitting theta."""
        self._x_ND = np.concatenate([self._x_ND, x_KD])
        self._y_N = np.concatenate([self._y_N, (y_K - self._mean) / self._scale])
        self._solve()


def within_reach(y_N: Array) -> Array:
    """Return scores with bad outliers clipped: a loss of 1e30, though finite, would make all others look alike.

    If most scores are that far out, they stay so.
    """
    y_N = np.clip(y_N, -HUGE, HUGE)
    best = y_N.min()
    others = y_N[y_N > best]  # if many share the best, the median of all would be the best
    if not len(others):
        return y_N
    median = np.median(others)
    return np.minimum(y_N, median + FAR * (median - best))


def _covariance(theta_T: Array, a_ND: Array, b_MD: Array) -> Array:
    """Return the covariances between two sets of rows."""
    a_ND, b_MD = a_ND * np.exp(-theta_T[:-2]), b_MD * np.exp(-theta_T[:-2])
    squares_NM = (a_ND**2).sum(axis=1)[:, None] + (b_MD**2).sum(axis=1) - 2 * a_ND @ b_MD.T
    k_NM: Array = np.exp(theta_T[-2] - 0.5 * np.maximum(0.0, squares_NM))
    return k_NM


def _noise(theta_T: Array) -> float:
    return float(np.exp(theta_T[-1])) + JITTER


def _likeliest(x_ND: Array, y_N: Array) -> Array:
    mean_T, deviation_T = _prior(x_ND.shape[1])
    reach = list(zip(mean_T - 4 * deviation_T, mean_T + 4 * deviation_T, strict=True))
    options = {"maxiter": 50}
    found: Any = minimize(loss_of(x_ND, y_N), mean_T, jac=True, method="L-BFGS-B", bounds=reach, options=options)
    theta_T: Array = found.x
    return theta_T


def _prior(features: int) -> tuple[Array, Array]:
    """Return means and standard deviations of theta under the prior."""
    length = LENGTH[0] + 0.5 * np.log(features)
    mean_T = np.array([*[length] * features, AMPLITUDE[0], NOISE[0]])
    return mean_T, np.array([*[LENGTH[1]] * features, AMPLITUDE[1], NOISE[1]])


def loss_of(x_ND: Array, y_N: Array) -> Callable[[Array], tuple[float, Array]]:
    """Return the function from theta to the negative log of likelihood times prior and its gradient (eqs. 5.8, 5.9)."""
    squares_DNN: Array = (x_ND.T[:, :, None] - x_ND.T[:, None, :]) ** 2
    mean_T, deviation_T = _prior(x_ND.shape[1])

    def loss(theta_T: Array) -> tuple[float, Array]:
        k_NN = _covariance(theta_T, x_ND, x_ND)
        lower_NN = cholesky(k_NN + _noise(theta_T) * np.eye(len(y_N)), lower=True)
        weight_N = cho_solve((lower_NN, True), y_N)
        off_T = (theta_T - mean_T) / deviation_T
        value = 0.5 * y_N @ weight_N + np.log(np.diag(lower_NN)).sum() + 0.5 * off_T @ off_T
        slope_NN = cho_solve((lower_NN, True), np.eye(len(y_N))) - np.outer(weight_N, weight_N)
        by_length_D = np.exp(-2 * theta_T[:-2]) * np.tensordot(squares_DNN, slope_NN * k_NN, axes=2)
        by_noise = np.exp(theta_T[-1]) * np.trace(slope_NN)
        gradient_T = 0.5 * np.array([*by_length_D, (slope_NN * k_NN).sum(), by_noise]) + off_T / deviation_T
        return float(value), gradient_T

    return loss
