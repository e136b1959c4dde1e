"""Rebuilds a missing sensor's first map from those of other sensors: the modules and their three losses.

Every sensor's features are projected into a part that it shares with the others and a part of its own. The shared
parts of one window are pulled together (contrast), the sensors' own parts pushed apart (distance), and the shared
parts of the sources are translated into the target's features (trans). After SimMMDG (Dong et al., 2023).

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

NO_DIFFERENCE = 1e-4  # features of unit length that differ by less from their mean are noise, and not blown up to unity


def _norm(norm: str, width: int) -> nn.Module:
    return nn.BatchNorm1d(width) if norm == "batch" else nn.GroupNorm(1, width)


class ProjectHead(nn.Module):
    """(F, C, P) -> the shared part, (F, S, P), and the own one, (F, 2 C - S, P); together of unit length everywhere."""

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
    """The shared parts of the sources, (F, S, P) each -> the target's features, (F, C, P)."""

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
    """NT-Xent of each window, (B,): its two shared parts against those of all windows in the batch.

    The parts are averaged over positions. The others are those of the micro-batch: they do not come from other ranks. A
    window on its own has nothing to be told from: 0.

    centred: each sensor's mean over the batch is taken off. Without it (plain, as published) the mean of thousands of
    unit vectors is nearly the same vector in every window, all similarities are close to 1 and the loss is at chance.
    """
    with torch.autocast(a_FCP.device.type, enabled=False):  # a similarity counts 1 / temperature times its error
        a_BV, b_BV = (_per_window_vectors(x, history, form) for x in (a_FCP, b_FCP))
        both_2BV = torch.cat([a_BV, b_BV])
        windows = len(a_BV)
        itself = torch.eye(2 * windows, dtype=torch.bool, device=both_2BV.device)
        similarity = (both_2BV @ both_2BV.T / temperature).masked_fill(itself, -torch.inf)
        partner = torch.arange(2 * windows, device=both_2BV.device).roll(windows)
        return F.cross_entropy(similarity, partner, reduction="none").view(2, windows).mean(0)


def _per_window_vectors(x_FCP: Tensor, history: int, form: Literal["centred", "plain"]) -> Tensor:
    """(B, V), of unit length."""
    x_BV = x_FCP.float().mean(2).reshape(len(x_FCP) // history, -1)
    if form == "centred":
        x_BV = x_BV - x_BV.mean(0)
    return F.normalize(x_BV, dim=1, eps=NO_DIFFERENCE)


def contrast_chance(windows: int, temperature: float, form: Literal["centred", "plain"] = "centred") -> float:
    """The contrastive loss of features that tell nothing about which two belong together.

    plain: all alike, so one partner among 2 B - 1 equals: ln(2 B - 1). centred: a sensor's own B vectors then sum up to
    nothing, so that two of them have a similarity of -1 / (B - 1) on average, and those of two sensors 0. Features
    of few channels begin far above this at a low temperature, because some of them are alike by accident.
    """
    if windows == 1:
        return 0.0
    own = math.exp(-1 / ((windows - 1) * temperature)) if form == "centred" else 1.0
    return math.log(windows + (windows - 1) * own)


def distance_loss(a_FCP: Tensor, b_FCP: Tensor, history: int, form: Literal["mean", "norm", "mse"] = "mean") -> Tensor:
    """Minus the distance of the sensors' own parts, (B,).

    mean: squared, the mean over frames and positions: within -4..0. mse: that over the channels too, as in the earlier
    file. norm: as published later, the norm of the difference over the whole micro-batch, which is every window's; it
    grows with the batch and with the map, and so does the meaning of its weight.
    """
    with torch.autocast(a_FCP.device.type, enabled=False):  # the norm, times the batch's size, is beyond half precision
        apart_FCP = a_FCP.float() - b_FCP.float()
        if form == "norm":
            return -torch.linalg.vector_norm(apart_FCP).expand(len(apart_FCP) // history)
        squared_FCP = apart_FCP.square()
        return -_per_window(squared_FCP.sum(1) if form == "mean" else squared_FCP.mean(1), history)


def trans_loss(
    rebuilt_FCP: Tensor, target_FCP: Tensor, history: int, form: Literal["mse", "l2_normalised"] = "mse"
) -> Tensor:
    """Error of the rebuilt features of each window, (B,).

    mse: squared, the mean over everything. l2_normalised: as in the earlier file, the distance at each position from
    the target's features, which are scaled to unit length there.
    """
    with torch.autocast(target_FCP.device.type, enabled=False):  # half precision cannot tell a map of zeros from 0 / 0
        rebuilt_FCP, target_FCP = rebuilt_FCP.float(), target_FCP.float()
        if form == "mse":
            return _per_window((rebuilt_FCP - target_FCP).square().mean(1), history)
        return _per_window(torch.linalg.vector_norm(rebuilt_FCP - F.normalize(target_FCP, dim=1), dim=1), history)


def _per_window(values_FP: Tensor, history: int) -> Tensor:
    return values_FP.reshape(len(values_FP) // history, -1).mean(1)
