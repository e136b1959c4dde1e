"""The tagging network: scaled features, convolutions over time, a bidirectional LSTM, and a logit per class and frame.

Shape suffixes: B windows, T frames, D coordinates, Q principal components, F inputs, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.mabe.config import CLASSES, Feature, Model

FAR = 10.0  # standard deviations at which inputs are clipped, such as a track that jumps across the picture


class Inputs(nn.Module):
    """Joins feature groups and scales them to mean 0 and standard deviation 1 over the training frames.

    Scale and principal axes are buffers, so that a checkpoint holds all that is needed to tag other videos.
    """

    def __init__(self, features: Sequence[Feature], centre_D: Tensor, axes_DQ: Tensor, inputs: int) -> None:
        super().__init__()
        self.features = tuple(features)
        self.centre_D: Tensor
        self.axes_DQ: Tensor
        self.mean_F: Tensor
        self.scale_F: Tensor
        self.register_buffer("centre_D", centre_D)
        self.register_buffer("axes_DQ", axes_DQ)
        self.register_buffer("mean_F", torch.zeros(inputs))
        self.register_buffer("scale_F", torch.ones(inputs))

    def joined(self, groups: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the groups, (..., G) each, to (..., F), with coords projected to principal components for pca."""
        return torch.cat(
            [
                (groups["coords"] - self.centre_D) @ self.axes_DQ if name == "pca" else groups[name]
                for name in self.features
            ],
            dim=-1,
        )

    def set_scale(self, groups: Mapping[str, Tensor]) -> None:
        """Set mean and standard deviation from these frames, (N, G) per group; a constant column is only centred."""
        x_NF = self.joined(groups).double()
        deviation_F = x_NF.std(0, correction=0)
        self.mean_F.copy_(x_NF.mean(0))
        self.scale_F.copy_(torch.where(deviation_F > 1e-6, deviation_F, 1.0))

    def forward(self, groups: Mapping[str, Tensor]) -> Tensor:
        # In half precision little would remain of the last components, which are differences of large coordinates.
        with torch.autocast(self.mean_F.device.type, enabled=False):
            return ((self.joined(groups) - self.mean_F) / self.scale_F).clamp(-FAR, FAR)


class Block(nn.Module):
    """Convolution, norm, ReLU, dropout and, in a pooled block, max pooling over pairs of frames."""

    def __init__(self, wide: tuple[int, int], model: Model, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(wide[0], wide[1], model.kernel, padding=model.kernel // 2)
        self.norm = nn.BatchNorm1d(wide[1]) if model.norm == "batch" else nn.GroupNorm(math.gcd(8, wide[1]), wide[1])
        self.dropout = nn.Dropout(model.dropout)
        self.pooled = pooled

    def forward(self, x_BCT: Tensor) -> Tensor:
        x_BCT = self.dropout(F.relu(self.norm(self.conv(x_BCT))))
        return F.max_pool1d(x_BCT, 2) if self.pooled else x_BCT


class FrameTagger(nn.Module):
    """Maps inputs (B, T, F) to logits (B, T, K)."""

    def __init__(self, inputs: int, model: Model) -> None:
        super().__init__()
        wide = [(inputs, model.channels[0]), *zip(model.channels, model.channels[1:], strict=False)]
        self.blocks = nn.Sequential(*[Block(pair, model, i < model.pool) for i, pair in enumerate(wide)])
        last, both = model.channels[-1], 2 * model.hidden
        between = model.dropout if model.layers > 1 else 0.0
        self.lstm = nn.LSTM(last, model.hidden, model.layers, batch_first=True, bidirectional=True, dropout=between)
        if model.head == "mlp":
            self.project: nn.Module = nn.Linear(last, last)
            self.head: nn.Module = nn.Sequential(
                nn.Linear(both, 256), nn.ReLU(), nn.Dropout(model.dropout), nn.Linear(256, len(CLASSES))
            )
        else:
            self.project = nn.Identity()
            self.head = nn.Sequential(nn.Dropout(model.dropout), nn.Linear(both, len(CLASSES)))

    def forward(self, x_BTF: Tensor) -> Tensor:
        x_BCT = self.blocks(x_BTF.transpose(1, 2))
        x_BTC, _ = self.lstm(self.project(x_BCT.transpose(1, 2)))
        if x_BTC.shape[1] != x_BTF.shape[1]:
            stretched_BCT = F.interpolate(x_BTC.transpose(1, 2), size=x_BTF.shape[1], mode="linear")
            x_BTC = stretched_BCT.transpose(1, 2)
        return self.head(x_BTC)


class Tagger(nn.Module):
    """Input scaling, network, and the class weights (K,) of the loss that trains it."""

    def __init__(self, inputs: Inputs, network: FrameTagger, class_weights_K: Tensor) -> None:
        super().__init__()
        self.inputs, self.network = inputs, network
        self.class_weights_K: Tensor
        self.register_buffer("class_weights_K", class_weights_K)

    def forward(self, groups: Mapping[str, Tensor], noise: float = 0.0) -> Tensor:
        """Return logits (B, T, K); `noise` is the standard deviation of noise added to the scaled features."""
        x_BTF = self.inputs(groups)
        if noise:
            x_BTF = x_BTF + noise * torch.randn_like(x_BTF)
        return self.network(x_BTF)
