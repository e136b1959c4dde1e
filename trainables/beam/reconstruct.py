"""Rebuilds a missing sensor's first map from those of other sensors: the modules and their three losses.

Every sensor's features are projected into a part that it shares with the others and a part of its own. The shared
parts of one window are pulled together (contrast), the sensors' own parts pushed apart (distance), and the shared
parts of the sources are translated into the target's features (trans). After SimMMDG (Dong et al., 2023).

Shape suffixes: B windows, H history, F = B H frames, C channels of a first map, P positions of it, V = H C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(norm: str, width: int) -> nn.Module:
    return nn.BatchNorm1d(width) if norm == "batch" else nn.GroupNorm(1, width)


class ProjectHead(nn.Module):
    """(F, C, P) -> the shared and the own part, (F, C, P) each; together of unit length at every position."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
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
        shared_FCP, own_FCP = F.normalize(self.layers(x_FCP), dim=1).chunk(2, dim=1)
        return shared_FCP, own_FCP


class FeatureTrans(nn.Module):
    """The shared parts of the sources, (F, C, P) each -> the target's features, (F, C, P)."""

    def __init__(self, sources: int, width: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(sources * width, 2 * width, 1),
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


def contrast_loss(a_FCP: Tensor, b_FCP: Tensor, history: int, temperature: float) -> Tensor:
    """NT-Xent of each window, (B,): its two shared parts against those of all windows in the batch.

    The parts are summed over positions. Among 2 B vectors each has one partner and 2 B - 2 others, so features that
    tell nothing score ln(2 B - 1). The others are those of the micro-batch: they do not come from other ranks.
    """
    a_BV, b_BV = (F.normalize(x.sum(2).reshape(len(x) // history, -1), dim=1) for x in (a_FCP, b_FCP))
    both_2BV = torch.cat([a_BV, b_BV])
    windows = len(a_BV)
    itself = torch.eye(2 * windows, dtype=torch.bool, device=both_2BV.device)
    similarity = (both_2BV @ both_2BV.T / temperature).masked_fill(itself, -torch.inf)
    partner = torch.arange(2 * windows, device=both_2BV.device).roll(windows)
    return F.cross_entropy(similarity, partner, reduction="none").view(2, windows).mean(0)


def distance_loss(a_FCP: Tensor, b_FCP: Tensor, history: int) -> Tensor:
    """Minus the squared distance of the sensors' own parts, (B,), the mean over frames and positions: within -4..0.

    The published form is the norm of the whole batch's difference, which grows with the batch and the map; a mean
    keeps the meaning of its weight.
    """
    return -_per_window((a_FCP - b_FCP).square().sum(1), history)


def trans_loss(rebuilt_FCP: Tensor, target_FCP: Tensor, history: int) -> Tensor:
    """Mean squared error of the rebuilt features of each window, (B,)."""
    return _per_window((rebuilt_FCP - target_FCP).square().mean(1), history)


def _per_window(values_FP: Tensor, history: int) -> Tensor:
    return values_FP.reshape(len(values_FP) // history, -1).mean(1)
