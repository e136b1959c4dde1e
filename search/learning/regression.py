"""Gaussian-process regression, for settings and what they scored.

Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, algorithm 2.1 and chapter 5: a squared
exponential with a length for each feature. Lengths, amplitude and noise are the likeliest under a prior, whose length
grows with the root of the features (Hvarfner et al., Vanilla Bayesian Optimization Performs Great in High Dimensions,
2024), so that ten scores in seven dimensions are not taken for noise.

theta holds the logarithms of D lengths, of the amplitude and of the noise.

Shapes: N known rows, M others, D features, T = D + 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from search.learning.features import Array

# Priors of the logarithms, normal, as mean and standard deviation; scores are standardised, a range is 2 wide.
LENGTH = (0.25, 0.5)  # and half the logarithm of D
AMPLITUDE = (0.0, 1.0)
NOISE = (-5.0, 2.0)
FAR = 8.0  # scores further from the median than so many times what lies between it and the best count as that far
HUGE = 1e100  # a score beyond it, whose square would be infinite, counts as this
JITTER = 1e-8


class Regression:
    """Scores, the lower the better, as a smooth function of N rows of features. N is 1 or more."""

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
        """Means and standard deviations of M rows, without the noise of a measurement."""
        k_NM = _covariance(self._theta, self._x_ND, x_MD)
        known_NM = solve_triangular(self._lower_NN, k_NM, lower=True)
        variance_M = np.maximum(1e-12, np.exp(self._theta[-2]) - (known_NM**2).sum(axis=0))
        return self._mean + self._scale * (self._weight_N @ k_NM), self._scale * np.sqrt(variance_M)

    def add(self, x_KD: Array, y_K: Array) -> None:
        """K more rows, without another look at lengths and noise."""
        self._x_ND = np.concatenate([self._x_ND, x_KD])
        self._y_N = np.concatenate([self._y_N, (y_K - self._mean) / self._scale])
        self._solve()


def within_reach(y_N: Array) -> Array:
    """Scores of which none is too far out: a loss of 1e30, finite as it is, would leave no difference to see.

    Where most of them are as far out as that, it stays so.
    """
    y_N = np.clip(y_N, -HUGE, HUGE)
    best = y_N.min()
    others = y_N[y_N > best]  # of many that share the best, the median would be that, too
    if not len(others):
        return y_N
    median = np.median(others)
    return np.minimum(y_N, median + FAR * (median - best))


def _covariance(theta_T: Array, a_ND: Array, b_MD: Array) -> Array:
    """The covariances of two sets of rows."""
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
    """Means and standard deviations of theta."""
    length = LENGTH[0] + 0.5 * np.log(features)
    mean_T = np.array([*[length] * features, AMPLITUDE[0], NOISE[0]])
    return mean_T, np.array([*[LENGTH[1]] * features, AMPLITUDE[1], NOISE[1]])


def loss_of(x_ND: Array, y_N: Array) -> Callable[[Array], tuple[float, Array]]:
    """The negative logarithm of likelihood and prior by theta, and its gradient (equations 5.8 and 5.9)."""
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
