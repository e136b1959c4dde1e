"""What beam prediction is trained on and judged by. Everything is per sample, so that sums add up exactly over ranks.

Shape suffixes: B samples, K the 64 beams.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

DELTA_BEAMS = 5  # a guess this far off scores nothing
RANKS = 3  # guesses that count


def beam_scores(logits_BK: Tensor, beam_B: Tensor) -> dict[str, Tensor]:
    """Scores of each sample, (B,), by name: dba, y1 to y3, and whether the beam is among the top1 to top3 guesses.

    Y_k scores the best of the first k guesses, 1 - min(|guess - beam| / 5, 1); DBA is the mean of Y_1, Y_2 and Y_3.
    Beams are no circle: 0 and 63 are not neighbours. A row that is not finite scores 0: its order would be that of the
    beams' numbers, which is no guess.
    """
    off_BR = (logits_BK.topk(RANKS, dim=1).indices - beam_B[:, None]).abs()
    best_BR = off_BR.cummin(dim=1).values
    counts_B1 = logits_BK.isfinite().all(dim=1, keepdim=True)
    y_BR = (1 - best_BR / DELTA_BEAMS).clamp(min=0) * counts_B1
    hit_BR = (best_BR == 0) * counts_B1.float()
    scores = {"dba": y_BR.mean(1)}
    for k in range(RANKS):
        scores[f"y{k + 1}"] = y_BR[:, k]
        scores[f"top{k + 1}"] = hit_BR[:, k]
    return scores


def focal_loss(logits_BK: Tensor, target_BK: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of each sample, (B,), the mean over beams; targets may lie anywhere in 0..1.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, as in torchvision, with soft targets.
    """
    p = logits_BK.sigmoid()
    p_t = p * target_BK + (1 - p) * (1 - target_BK)
    alpha_t = alpha * target_BK + (1 - alpha) * (1 - target_BK)
    entropy_BK = F.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none")
    # Rounding can make p_t larger than 1, and a negative number has no broken power.
    return (alpha_t * (1 - p_t).clamp(min=0) ** gamma * entropy_BK).mean(1)


def cross_entropy(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Cross-entropy of each sample, (B,), against the target as a distribution over beams.

    The targets' sum is divided out: it would only weigh beams at the edge, whose targets are cut off, less.
    """
    share_BK = target_BK / target_BK.sum(1, keepdim=True)
    return -(share_BK * logits_BK.log_softmax(1)).sum(1)


def contrast_chance(batch: int) -> float:
    """The contrastive loss of features that tell nothing: one positive among 2 B - 1 vectors that look alike."""
    return math.log(2 * batch - 1)
