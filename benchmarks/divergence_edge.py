"""A synthetic training run with a stability edge, and the epochs that a search of it may spend.

With u = log10(lr / 1e-3), c = log10(clip_norm) and w = log10(weight), a setting lies

    beyond = u + 0.5 c + 0.5 w + 0.2 w^2 - 0.2

orders of magnitude beyond the edge, which every seed shifts a little for each setting (normal, 0.05). Below the edge
a run is stable. Above it the loss is NaN from some epoch on, the earlier the further above: from the last epoch just
beyond the edge, from the first at 0.8. The loss after an epoch is

    0.1 + 0.15 (beyond + 0.1)^2 + 0.05 (c - 0.3)^2 + 0.05 (w + 0.3)^2 + 0.9 exp(-speed epoch / 1.5)

with noise (normal, 0.003), where speed = 10^(0.2 beyond) below the edge and 1 above it. The optimum, 0.1028 after the
last epoch, lies a tenth of an order of magnitude below the edge; until it turns NaN, a setting just beyond looks nearly
as good.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

EPOCHS = 9  # of a whole trial
GRACE, REDUCTION = 1, 3  # successive halving: a third of the trials goes on after epochs 1 and 3
RANGES = {"lr": (1e-5, 1e-1), "clip_norm": (0.1, 10.0), "weight": (0.01, 10.0)}  # each searched on a log scale

Setting = Mapping[str, float]


def beyond(setting: Setting) -> float:
    """How far a setting lies beyond the edge, in orders of magnitude; negative where training is stable."""
    u, c, w = _logs(setting)
    return u + 0.5 * c + 0.5 * w + 0.2 * w**2 - 0.2


def mean_loss(setting: Setting, epoch: int) -> float:
    """The loss after an epoch, without noise."""
    _, c, w = _logs(setting)
    final = 0.1 + 0.15 * (beyond(setting) + 0.1) ** 2 + 0.05 * (c - 0.3) ** 2 + 0.05 * (w + 0.3) ** 2
    speed = 10 ** (0.2 * min(0.0, beyond(setting)))
    return final + 0.9 * math.exp(-speed * epoch / 1.5)


def first_nan(setting: Setting, seed: int) -> int | None:
    """The epoch after which the loss is NaN; None where training is stable."""
    excess = beyond(setting) + 0.05 * _normal(setting, "edge", seed)
    return None if excess <= 0 else max(1, math.ceil(EPOCHS * (1 - excess / 0.8)))


def loss(setting: Setting, epoch: int, seed: int) -> float:
    """What a trial reports after an epoch."""
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
    """A setting, and the loss after each epoch that was spent on it."""

    setting: Setting
    losses: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return any(math.isnan(value) for value in self.losses)


class Budget:
    """The epochs of one search; every method spends the same number, and halves first after `grace` epochs."""

    def __init__(self, seed: int, epochs: int, grace: int = GRACE) -> None:
        self.seed = seed
        self.left = epochs
        self.grace = grace
        self.trials: list[Trial] = []

    def train(self, setting: Setting) -> Iterator[tuple[int, float]]:
        """A new trial: the number and the loss of each epoch, to its end or to that of the budget."""
        trial = Trial({name: setting[name] for name in RANGES})
        self.trials.append(trial)
        for epoch in range(1, EPOCHS + 1):
            if self.left == 0:
                return
            self.left -= 1
            trial.losses.append(loss(trial.setting, epoch, self.seed))
            yield epoch, trial.losses[-1]

    def compared(self, loss: float) -> float:
        """What this platform's schedulers compare. Nobody can guess here: the loss itself."""
        return loss


@dataclass(frozen=True)
class Outcome:
    """What a search came to."""

    trials: int
    diverged: float  # share of its trials
    later: int  # diverged trials in the second half of its trials
    later_share: float  # of the trials in that half
    epochs_lost: int  # spent on a trial after the epoch that turned NaN
    score: float  # noise-free last loss of the setting it would hand over; lower is better


def outcome(trials: Sequence[Trial]) -> Outcome:
    """The setting handed over has the best last loss of the stable trials that ran to their end, or got furthest."""
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
