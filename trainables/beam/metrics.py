"""Losses and scores of beam prediction. Everything is per sample, so that sums over ranks are exact.

Shape suffixes: K the 64 beams, R ranks of a guess. `...` is B samples, or B samples of P steps each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.beam.files import BEAMS

DELTA_BEAMS = 5  # a guess this far off scores 0
RANKS = 3  # guesses that count
TARGET_REACH_BEAMS = 5  # targets further from the best beam are 0
ALMOST_SURE = 2**-24  # distance from 1 to the next smaller float32


def beam_scores(logits_K: Tensor, beam: Tensor) -> dict[str, Tensor]:
    """Return `guess_scores` of the likeliest beams, each with the shape of `beam`, (...); `logits_K` is (..., K).

    Logits that are not finite score 0, because their order would be that of beam numbers, which is no guess.
    """
    counts = logits_K.isfinite().all(dim=-1)
    guess_R = logits_K.topk(RANKS, dim=-1).indices
    return {name: values * counts for name, values in guess_scores(guess_R, beam).items()}


def guess_scores(guess_R: Tensor, beam: Tensor) -> dict[str, Tensor]:
    """Return scores by name, each with the shape of `beam`, (...); the guesses, best first, are (..., R).

    Names are dba, y1 to y3, and top1 to top3. top<k> is 100 if the beam is among the first k guesses, else 0: its mean
    is in percent. Y_k scores the best of the first k guesses, 1 - min(|guess - beam| / 5, 1); DBA is the mean of Y_1,
    Y_2 and Y_3. Beams are not circular: 0 and 63 are not neighbours.
    """
    best_R = (guess_R - beam[..., None]).abs().cummin(dim=-1).values
    y_R = (1 - best_R / DELTA_BEAMS).clamp(min=0)
    hit_R = (best_R == 0) * 100.0
    scores = {"dba": y_R.mean(-1)}
    for k in range(RANKS):
        scores[f"y{k + 1}"] = y_R[..., k]
        scores[f"top{k + 1}"] = hit_R[..., k]
    return scores


def soft_targets(sigma: float, scale: float = 1.25, device: torch.device | None = None) -> Tensor:
    """Return the target over all beams for each best beam, (64, 64): a normal density cut at 5 beams, not renormalised.

    For any `sigma` its height is that of the published target, sigma 0.5, times `scale`.
    """
    beams = torch.arange(BEAMS, dtype=torch.float32, device=device)  # created on the device: a copy would sync
    distance = (beams[:, None] - beams[None, :]).abs()
    density = torch.exp(-0.5 * (distance / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)
    return 2 * scale * sigma * density * (distance <= TARGET_REACH_BEAMS)


def focal_loss(logits_K: Tensor, target_K: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the sigmoid focal loss, (...) from (..., K), averaged over beams; targets may be any values in 0..1.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, as in torchvision, with soft targets.
    """
    p = logits_K.sigmoid()
    p_t = p * target_K + (1 - p) * (1 - target_K)
    alpha_t = alpha * target_K + (1 - alpha) * (1 - target_K)
    entropy_K = F.binary_cross_entropy_with_logits(logits_K, target_K, reduction="none")
    # Rounding can make p_t 1 or more: a negative base has no fractional power, and 0 no finite slope if gamma < 1.
    return (alpha_t * (1 - p_t).clamp(min=ALMOST_SURE) ** gamma * entropy_K).mean(-1)


def cross_entropy(logits_K: Tensor, target_K: Tensor) -> Tensor:
    """Return the cross-entropy, (...) from (..., K), against the target normalised to a distribution over beams.

    The published code does not normalise: that weights edge beams, whose targets are cut off, less, and wide targets
    more.
    """
    share_K = target_K / target_K.sum(-1, keepdim=True)
    return -(share_K * logits_K.log_softmax(-1)).sum(-1)
