"""Scores of tagging, as pairs of sums and counts: exact however a split is divided into batches and ranks.

Shape suffixes: B windows, T frames, K classes, L labs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from trainables.mabe.config import CLASSES
from trainables.step import Pairs

OVERLAP = 0.5  # an event and a predicted run match if their intersection over union is above this
IN_LAB = re.compile(r"(f1|share)_lab(\d+)_(\w+)")  # the names of `lab_scores`


def frame_scores(guess_BT: Tensor, label_BT: Tensor) -> Pairs:
    """Return accuracy, and precision, recall, F1 and share of each class, over the frames with a label of 0 or more.

    F1 is 2 tp / (2 tp + fp + fn), a ratio of sums like the others. The count of a class's precision is 0 if it is never
    predicted, of its recall if it never occurs, and of its F1 if neither.
    """
    labelled = label_BT >= 0
    guess, label = guess_BT[labelled], label_BT[labelled]
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


def lab_scores(guess_BT: Tensor, label_BT: Tensor, lab_BL: Tensor | None) -> Pairs:
    """Return F1 and share of each behaviour in each lab, f1_lab0_mount and so on, for `macro_f1_labs`.

    lab_BL: the lab of each window, one of each row; None, for windows of a single lab, gives no scores.
    """
    if lab_BL is None:
        return {}
    labs, labelled = lab_BL.shape[1], label_BT >= 0
    lab = lab_BL.int().argmax(1)[:, None].expand_as(label_BT)[labelled]
    guess, label = guess_BT[labelled], label_BT[labelled]
    right = guess == label
    guessed_LK, there_LK, hit_LK = (
        torch.bincount(of * len(CLASSES) + classes, minlength=labs * len(CLASSES)).view(labs, len(CLASSES))
        for of, classes in ((lab, guess), (lab, label), (lab[right], label[right]))
    )
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for number in range(labs):
        for k, name in enumerate(CLASSES[1:], start=1):
            pairs[f"f1_lab{number}_{name}"] = 2 * hit_LK[number, k], guessed_LK[number, k] + there_LK[number, k]
            pairs[f"share_lab{number}_{name}"] = there_LK[number, k], there_LK[number].sum()
    return pairs


def event_scores(guess_BT: Tensor, label_BT: Tensor) -> Pairs:
    """Return each class's F1 over events: runs of one behaviour, cut at window borders so that windows are independent.

    Whole videos may be given as windows, padded without labels; their events are then not cut.
    A predicted run of the same class matches an event if their intersection over union is above one half; at most one
    run can.
    """
    labelled = label_BT >= 0
    guess, label = torch.where(labelled, guess_BT, -1), torch.where(labelled, label_BT, -1)
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


def derived(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Return `summary`, and None for each of `lab_scores`, which `macro_f1_labs` stands for."""
    return {**dict.fromkeys(filter(IN_LAB.fullmatch, scores)), **summary(scores)}


def summary(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics derived from the whole split's scores, which are not ratios of sums.

    macro_f1: mean over all classes; a class that neither occurs nor is predicted counts as 0. macro_f1_behaviours: the
    same without "other", as in CalMS21. weighted_f1: weighted by the classes' shares. macro_event_f1: mean over the
    behaviours. macro_f1_chance: the macro F1 of always predicting the most common class. macro_f1_labs: see there.
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
        **macro_f1_labs(scores),
    }


def macro_f1_labs(scores: Mapping[str, float]) -> dict[str, float]:
    """Return as "macro_f1_labs" the mean F1 of each lab's behaviours, averaged over labs; empty without `lab_scores`.

    A behaviour counts in a lab if it occurs there, and a lab if any behaviour does, as in the challenge's published
    score, which has the lab's actions where this has classes.
    """
    f1s: defaultdict[str, list[float]] = defaultdict(list)
    for name in scores:
        match = IN_LAB.fullmatch(name)
        if match and match[1] == "share" and scores[name] > 0:
            f1s[match[2]].append(scores[f"f1_lab{match[2]}_{match[3]}"])
    return {"macro_f1_labs": fmean(map(fmean, f1s.values()))} if f1s else {}
