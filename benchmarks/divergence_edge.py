"""A synthetic training run with a stability edge, and the budget of epochs for a search of it.

With u = log10(lr / 1e-3), c = log10(clip_norm) and w = log10(weight), a setting lies

    beyond = u + 0.5 c + 0.5 w + 0.2 w^2 - 0.2

orders of magnitude beyond the edge, which each seed shifts slightly for each setting (normal, 0.05). Below the edge a
run is stable. Above it the loss is NaN from some epoch on, earlier the further beyond: from the last epoch just beyond
the edge, from the first at 0.8. The loss after an epoch is

    0.1 + 0.15 (beyond + 0.1)^2 + 0.05 (c - 0.3)^2 + 0.05 (w + 0.3)^2 + 0.9 exp(-speed epoch / 1.5)

plus noise (normal, 0.003), where speed = 10^(0.2 beyond) below the edge and 1 above it. The optimum, 0.1028 after the
last epoch, lies a tenth of an order of magnitude below the edge; a setting just beyond it looks nearly as good until it
turns NaN.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

EPOCHS = 9  # of a complete trial
GRACE, REDUCTION = 1, 3  # successive halving: a third of the trials continues after epochs 1 and 3
RANGES = {"lr": (1e-5, 1e-1), "clip_norm": (0.1, 10.0), "weight": (0.01, 10.0)}  # each searched on a log scale

Setting = Mapping[str, float]


def beyond(setting: Setting) -> float:
    """Return how far a setting lies beyond the edge, in orders of magnitude; negative if training is stable."""
    u, c, w = _logs(setting)
    return u + 0.5 * c + 0.5 * w + 0.2 * w**2 - 0.2


def mean_loss(setting: Setting, epoch: int) -> float:
    """Return the noise-free loss after an epoch."""
    _, c, w = _logs(setting)
    final = 0.1 + 0.15 * (beyond(setting) + 0.1) ** 2 + 0.05 * (c - 0.3) ** 2 + 0.05 * (w + 0.3) ** 2
    speed = 10 ** (0.2 * min(0.0, beyond(setting)))
    return final + 0.9 * math.exp(-speed * epoch / 1.5)


def first_nan(setting: Setting, seed: int) -> int | None:
    """Return the first epoch, from 1, whose loss is NaN; None if training is stable."""
    excess = beyond(setting) + 0.05 * _normal(setting, "edge", seed)
    return None if excess <= 0 else max(1, math.ceil(EPOCHS * (1 - excess / 0.8)))


def loss(setting: Setting, epoch: int, seed: int) -> float:
    """Return the loss that a trial reports after an epoch, with noise."""
    broken = first_nan(setting, seed)
    if broken is not None and epoch >= broken:
        return math.nan
    return mean_loss(setting, epoch) + 0.003 * _normal(setting, str(epoch), seed)


def _logs(setting: Setting) -> tuple[float, float, float]:
    return math.log10(setting["lr"] / 1e-3), math.log10(setting["clip_norm"]), math.log10(setting["weight"])


def _normal(setting: Setting, what: str, seed: int) -> float:
    return random.Random(f"{seed}/{what}/{[setting[name] for name in RANGES]}").gauss(0.0, 1.0)


@dataclass
class Trial:
    """A setting, and the loss after each epoch spent on it."""

    setting: Setting
    losses: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return any(math.isnan(value) for value in self.losses)


class Budget:
    """The epochs of one search, the same number for every method; `grace` is the first epoch to halve trials after."""

    def __init__(self, seed: int, epochs: int, grace: int = GRACE) -> None:
        self.seed = seed
        self.left = epochs
        self.grace = grace
        self.trials: list[Trial] = []

    def train(self, setting: Setting) -> Iterator[tuple[int, float]]:
        """Train a new trial; yield number and loss of each epoch, until the trial or the budget ends."""
        trial = Trial({name: setting[name] for name in RANGES})
        self.trials.append(trial)
        for epoch in range(1, EPOCHS + 1):
            if self.left == 0:
                return
            self.left -= 1
            trial.losses.append(loss(trial.setting, epoch, self.seed))
            yield epoch, trial.losses[-1]

    def compared(self, loss: float) -> float:
        """Return the value that this platform's schedulers compare: the loss, as there is no chance level here."""
        return loss


@dataclass(frozen=True)
class Outcome:
    """The outcome of a search."""

    trials: int
    diverged: float  # share of the trials that diverged
    later: int  # diverged trials in the second half of the trials
    later_share: float  # their share of that half
    epochs_lost: int  # epochs spent on trials after their first NaN
    score: float  # noise-free last loss of the setting the search would return; lower is better


def outcome(trials: Sequence[Trial]) -> Outcome:
    """Return a search's outcome; it returns the setting with the best last loss among the longest stable trials."""
    later = trials[len(trials) // 2 :]
    best = min(trials, key=lambda trial: (trial.diverged, -len(trial.losses), trial.losses[-1]))
    return Outcome(
        trials=len(trials),
        diverged=sum(trial.diverged for trial in trials) / len(trials),
        later=sum(trial.diverged for trial in later),
        later_share=sum(trial.diverged for trial in later) / len(later),
        epochs_lost=sum(max(0, sum(map(math.isnan, trial.losses)) - 1) for trial in trials),
        score=mean_loss(best.setting, EPOCHS),
    )
