"""What tagging is judged by, as pairs of sums and counts: exact however a split is divided into batches and ranks.

Shape suffixes: B windows, T frames, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainables.mabe.config import CLASSES
from trainables.step import Pairs

OVERLAP = 0.5  # of an event and its guess: more than this share of the frames that either has


def frame_scores(guess_BT: Tensor, label_BT: Tensor) -> Pairs:
    """Accuracy, and precision, recall, F1 and share of each class, over the frames with a label of 0 or more.

    F1 is 2 tp / (2 tp + fp + fn), a ratio of sums like the others. A score of a class that is neither guessed nor
    there has a count of 0.
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
    """F1 over events: runs of one behaviour, cut at the window's borders so that windows stay apart.

    An event is found by a run of guesses of its class when the frames of both are more than half of the frames of
    either; at most one run can be that.
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
    """The number of every frame's run, (B T,), and of every run its class and how many frames it has."""
    starts_BT = torch.ones_like(classes_BT, dtype=torch.bool)
    starts_BT[:, 1:] = classes_BT[:, 1:] != classes_BT[:, :-1]
    run = starts_BT.flatten().cumsum(0) - 1
    return run, classes_BT.flatten()[starts_BT.flatten()], torch.bincount(run)


def summary(scores: Mapping[str, float]) -> dict[str, float]:
    """What follows from the scores of the whole split and is no ratio of sums.

    macro_f1: the mean over the classes; 0 for one that is neither there nor guessed. macro_f1_behaviours: without
    "other", as CalMS21 has it. weighted_f1: by the classes' shares. macro_event_f1: over the behaviours.
    macro_f1_chance: the macro F1 of always guessing the most common class.
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
