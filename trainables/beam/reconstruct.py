"""Rebuilds a missing sensor's first map from those of other sensors: the modules and their three losses.

Every sensor's features are projected into a part shared with the others and a part of its own. The shared parts of one
window are pulled together (contrast), the sensors' own parts pushed apart (distance), and the shared parts of the
sources translated into the target's features (trans). After SimMMDG (Dong et al., 2023).

Shape suffixes: B windows, H history, F = B H frames, C channels of a first map or of a part of its projection, S those
of the shared part, P positions of the map, V = H C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_DIFFERENCE = 1e-4  # centred features shorter than this are noise, and are not scaled up to unit length


def _norm(norm: str, width: int) -> nn.Module:
    return nn.BatchNorm1d(width) if norm == "batch" else nn.GroupNorm(1, width)


class ProjectHead(nn.Module):
    """(F, C, P) -> shared part (F, S, P) and own part (F, 2 C - S, P), jointly of unit length at each position."""

    def __init__(self, width: int, shared: int, norm: str) -> None:
        super().__init__()
        self.shared = shared
        self.layers = nn.Sequential(
            nn.Conv1d(width, width, 1),
            _norm(norm, width),
            nn.ReLU(),
            nn.Conv1d(width, width, 1),
            _norm(norm, width),
            nn.ReLU(),
            nn.Conv1d(width, 2 * width, 1),
        )

    def forward(self, x_FCP: Tensor) -> tuple[Tensor, Tensor]:
        both_FCP = F.normalize(self.layers(x_FCP), dim=1)
        return both_FCP[:, : self.shared], both_FCP[:, self.shared :]


class FeatureTrans(nn.Module):
    """Translates the sources' shared parts, (F, S, P) each, into the target's features, (F, C, P)."""

    def __init__(self, sources: int, shared: int, width: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(sources * shared, 2 * width, 1),
            _norm(norm, 2 * width),
            nn.LeakyReLU(),
            nn.Conv1d(2 * width, 2 * width, 1),
            _norm(norm, 2 * width),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Conv1d(2 * width, width, 1),
        )

    def forward(self, shared: Sequence[Tensor]) -> Tensor:
        rebuilt_FCP: Tensor = self.layers(torch.cat(list(shared), 1))
        return rebuilt_FCP


def contrast_loss(
    a_FCP: Tensor, b_FCP: Tensor, history: int, temperature: float, form: Literal["centred", "plain"] = "centred"
) -> Tensor:
    """Return the NT-Xent loss of each window, (B,): its two shared parts against those of all windows in the batch.

    Parts are averaged over positions. Negatives come only from the same micro-batch, not from other ranks. The loss of
    a single window is 0.

    centred: subtract each sensor's mean over the batch. Without this (plain, as published), the mean of thousands of
    unit vectors is nearly the same in every window, all similarities are close to 1 and the loss stays at chance.
    """
    with torch.autocast(a_FCP.device.type, enabled=False):  # 1 / temperature amplifies a similarity's rounding error
        a_BV, b_BV = (_per_window_vectors(x, history, form) for x in (a_FCP, b_FCP))
        both_2BV = torch.cat([a_BV, b_BV])
        windows = len(a_BV)
        itself = torch.eye(2 * windows, dtype=torch.bool, device=both_2BV.device)
        similarity = (both_2BV @ both_2BV.T / temperature).masked_fill(itself, -torch.inf)
        partner = torch.arange(2 * windows, device=both_2BV.device).roll(windows)
        return F.cross_entropy(similarity, partner, reduction="none").view(2, windows).mean(0)


def _per_window_vectors(x_FCP: Tensor, history: int, form: Literal["centred", "plain"]) -> Tensor:
    """Return one unit vector per window, (B, V), of the features averaged over positions."""
    x_BV = x_FCP.float().mean(2).reshape(len(x_FCP) // history, -1)
    if form == "centred":
        x_BV = x_BV - x_BV.mean(0)
    return F.normalize(x_BV, dim=1, eps=NO_DIFFERENCE)


def contrast_chance(windows: int, temperature: float, form: Literal["centred", "plain"] = "centred") -> float:
    """Return the contrastive loss of features that carry no information on which two belong together.

    plain: all features are alike, one partner among 2 B - 1 equal candidates: ln(2 B - 1). centred: a sensor's B
    vectors sum to zero, so that two of them have a mean similarity of -1 / (B - 1), and vectors of two sensors one of
    0. At low temperature features of few channels start far above this, because some are alike by chance.
    """
    if windows == 1:
        return 0.0
    own = math.exp(-1 / ((windows - 1) * temperature)) if form == "centred" else 1.0
    return math.log(windows + (windows - 1) * own)


def distance_loss(a_FCP: Tensor, b_FCP: Tensor, history: int, form: Literal["mean", "norm", "mse"] = "mean") -> Tensor:
    """Return minus the distance between two sensors' own parts, (B,).

    mean: squared distance, averaged over frames and positions, within -4..0. mse: averaged over channels too, as in the
    earlier published file. norm: as in the later one, the norm of the difference over the whole micro-batch, the same
    for every window; it grows with batch and map size, so that its weight depends on both.
    """
    with torch.autocast(a_FCP.device.type, enabled=False):  # the norm times the batch size overflows half precision
        apart_FCP = a_FCP.float() - b_FCP.float()
        if form == "norm":
            return -torch.linalg.vector_norm(apart_FCP).expand(len(apart_FCP) // history)
        squared_FCP = apart_FCP.square()
        return -_per_window(squared_FCP.sum(1) if form == "mean" else squared_FCP.mean(1), history)


def trans_loss(
    rebuilt_FCP: Tensor, target_FCP: Tensor, history: int, form: Literal["mse", "l2_normalised"] = "mse"
) -> Tensor:
    """Return the error of each window's rebuilt features, (B,).

    mse: mean squared error over channels, positions and frames. l2_normalised: as in the earlier published file, the
    mean over positions and frames of the distance to the target's features, scaled to unit length at each position.
    """
    with torch.autocast(target_FCP.device.type, enabled=False):  # in half precision a map of zeros normalises to 0 / 0
        rebuilt_FCP, target_FCP = rebuilt_FCP.float(), target_FCP.float()
        if form == "mse":
            return _per_window((rebuilt_FCP - target_FCP).square().mean(1), history)
        return _per_window(torch.linalg.vector_norm(rebuilt_FCP - F.normalize(target_FCP, dim=1), dim=1), history)


def _per_window(values_FP: Tensor, history: int) -> Tensor:
    return values_FP.reshape(len(values_FP) // history, -1).mean(1)
