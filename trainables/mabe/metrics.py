"""Scores of tagging, as pairs of sums and counts: exact however a split is divided into batches and ranks.

Shape suffixes: B windows, T frames, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainables.mabe.config import CLASSES
from trainables.step import Pairs

OVERLAP = 0.5  # an event and a predicted run match if their intersection over union is above this


def frame_scores(guess_BT: Tensor, label_BT: Tensor) -> Pairs:
    """Return accuracy, and precision, recall, F1 and share of each class, over the frames with a label of 0 or more.

    F1 is 2 tp / (2 tp + fp + fn), a ratio of sums like the others. The count of a class's precision is 0 if it is never
    predicted, of its recall if it never occurs, and of its F1 if neither.
    """
    known = label_BT >= 0
    guess, label = guess_BT[known], label_BT[known]
    guessed_K, there_K, hit_K = (
        torch.bincount(classes, minlength=len(CLASSES)) for classes in (guess, label, label[guess == label])
    )
    pairs: dict[str, tuple[Tensor, Tensor | int]] = {"accuracy": (hit_K.sum(), len(label))}
    for k, name in enumerate(CLASSES):
        pairs[f"precision_{name}"] = hit_K[k], guessed_K[k]
        pairs[f"recall_{name}"] = hit_K[k], there_K[k]
        pairs[f"f1_{name}"] = 2 * hit_K[k], guessed_K[k] + there_K[k]
        pairs[f"share_{name}"] = there_K[k], len(label)
    return pairs


def event_scores(guess_BT: Tensor, label_BT: Tensor) -> Pairs:
    """Return each class's F1 over events: runs of one behaviour, cut at window borders so that windows are independent.

    A predicted run of the same class matches an event if their intersection over union is above one half; at most one
    run can.
    """
    known = label_BT >= 0
    guess, label = torch.where(known, guess_BT, -1), torch.where(known, label_BT, -1)
    (guess_run, guess_class, guess_size), (label_run, label_class, label_size) = runs(guess), runs(label)
    both, common = torch.unique(guess_run * len(label_size) + label_run, return_counts=True)
    one, other = both // len(label_size), both % len(label_size)
    found = (guess_class[one] == label_class[other]) & (
        common > OVERLAP * (guess_size[one] + label_size[other] - common)
    )
    pairs: dict[str, tuple[Tensor, Tensor | int]] = {}
    for k, name in enumerate(CLASSES):
        hits = (found & (label_class[other] == k)).sum()
        pairs[f"event_f1_{name}"] = 2 * hits, (guess_class == k).sum() + (label_class == k).sum()
    return pairs


def runs(classes_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the run number of every frame, (B T,), and the class and length in frames of every run."""
    starts_BT = torch.ones_like(classes_BT, dtype=torch.bool)
    starts_BT[:, 1:] = classes_BT[:, 1:] != classes_BT[:, :-1]
    run = starts_BT.flatten().cumsum(0) - 1
    return run, classes_BT.flatten()[starts_BT.flatten()], torch.bincount(run)


def summary(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics derived from the whole split's scores, which are not ratios of sums.

    macro_f1: mean over all classes; a class that neither occurs nor is predicted counts as 0. macro_f1_behaviours: the
    same without "other", as in CalMS21. weighted_f1: weighted by the classes' shares. macro_event_f1: mean over the
    behaviours. macro_f1_chance: the macro F1 of always predicting the most common class.
    """
    f1 = [scores.get(f"f1_{name}", 0.0) for name in CLASSES]
    events = [scores.get(f"event_f1_{name}", 0.0) for name in CLASSES]
    share = [scores.get(f"share_{name}", 0.0) for name in CLASSES]
    return {
        "macro_f1": sum(f1) / len(f1),
        "macro_f1_behaviours": sum(f1[1:]) / len(f1[1:]),
        "weighted_f1": sum(a * b for a, b in zip(f1, share, strict=True)),
        "macro_event_f1": sum(events[1:]) / len(events[1:]),
        "macro_f1_chance": 2 * max(share) / (1 + max(share)) / len(CLASSES),
    }
