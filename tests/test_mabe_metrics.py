"""Scores are scikit-learn's, events are counted as by hand, and both add up over any division of the windows."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch import Tensor

from trainables.mabe.config import CLASSES
from trainables.mabe.metrics import event_scores, frame_scores, runs, summary
from trainables.mabe.video import UNLABELLED
from trainables.step import Pairs


def ratios(pairs: Pairs) -> dict[str, float]:
    return {name: float(total) / float(count) for name, (total, count) in pairs.items() if count}


def drawn(windows: int = 6, frames: int = 40) -> tuple[Tensor, Tensor]:
    label = torch.randint(4, (windows, frames // 5)).repeat_interleave(5, 1)
    guess = torch.where(torch.rand(windows, frames) < 0.7, label, torch.randint(4, (windows, frames)))
    label[-1, frames // 2 :] = UNLABELLED
    return guess, label


def test_frame_scores_are_scikit_learns() -> None:
    guess, label = drawn()
    known = label != UNLABELLED
    y_true, y_pred = label[known].numpy(), guess[known].numpy()
    scores = ratios(frame_scores(guess, label))
    scores |= summary(scores)
    columns = precision_recall_fscore_support(y_true, y_pred)
    for k, name in enumerate(CLASSES):
        for metric, column in zip(("precision", "recall", "f1", "share"), columns, strict=True):
            wanted = column[k] / len(y_true) if metric == "share" else column[k]
            assert scores[f"{metric}_{name}"] == pytest.approx(wanted)
    assert scores["accuracy"] == pytest.approx(accuracy_score(y_true, y_pred))
    assert scores["macro_f1"] == pytest.approx(f1_score(y_true, y_pred, average="macro"))
    assert scores["weighted_f1"] == pytest.approx(f1_score(y_true, y_pred, average="weighted"))
    behaviours = f1_score(y_true, y_pred, average="macro", labels=[1, 2, 3])
    assert scores["macro_f1_behaviours"] == pytest.approx(behaviours)


def test_the_chance_is_what_the_constant_guess_gets() -> None:
    label = torch.tensor([[0] * 70 + [1] * 15 + [2] * 10 + [3] * 5])
    scores = ratios(frame_scores(torch.zeros_like(label), label))
    assert summary(scores)["macro_f1"] == pytest.approx(0.206, abs=5e-4)  # the specified figure
    assert summary(scores)["macro_f1_chance"] == pytest.approx(summary(scores)["macro_f1"])


def test_a_class_that_is_neither_there_nor_guessed_counts_nothing() -> None:
    label = torch.tensor([[0, 0, 1, 1]])
    pairs = frame_scores(label, label)
    assert pairs["f1_attack"][1] == 0
    assert summary(ratios(pairs))["macro_f1"] == 0.5


def test_runs_break_at_windows_borders() -> None:
    run, kind, size = runs(torch.tensor([[1, 1, 2], [2, 2, 0]]))
    assert run.tolist() == [0, 0, 1, 2, 2, 3]
    assert kind.tolist() == [1, 2, 2, 0]
    assert size.tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("label", "guess", "hits", "events"),  # of attacks
    [
        ("..3333..", "..3333..", 1, 2),
        ("..3333..", "...3333.", 1, 2),  # 3 of 5 frames
        ("..3333..", "....3333", 0, 2),  # 2 of 6
        ("..3333..", "..33.33.", 0, 3),  # 2 of 4 is half, not more
        ("..3333..", "..1111..", 0, 1),
        ("33....33", "33333333", 0, 3),
        ("33....33", "33....3.", 1, 4),
        ("........", "..3.3.3.", 0, 3),
        ("3333----", "33333333", 1, 2),  # without a label beyond the video's end
    ],
)
def test_events_are_found_by_more_than_half(label: str, guess: str, hits: int, events: int) -> None:
    numbers = {".": 0, "1": 1, "3": 3, "-": UNLABELLED}
    label_1T, guess_1T = (torch.tensor([[numbers[letter] for letter in text]]) for text in (label, guess))
    total, count = event_scores(guess_1T, label_1T)["event_f1_attack"]
    assert (int(total), int(count)) == (2 * hits, events)


def test_scores_of_single_windows_add_up() -> None:
    guess, label = drawn()
    for scores in (frame_scores, event_scores):
        whole = scores(guess, label)
        parts = [scores(guess[i : i + 1], label[i : i + 1]) for i in range(len(guess))]
        for name, pair in whole.items():
            assert [sum(int(part[name][i]) for part in parts) for i in (0, 1)] == [int(value) for value in pair]
