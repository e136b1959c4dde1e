"""The training loop that the families share: `fit(task, trial)`, a generator as `trainables.contract` asks for.

A family describes itself in a `Task` and its trainable is then

    def train(trial: Trial) -> Iterator[Report]:
        yield from fit(TASK, trial)

A family that does not fit writes its own `train(trial)` and takes what it needs from here: there are no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainables.contract import Report, Trial
from trainables.optim import Optim as Optim

Batch = dict[str, Tensor]
# A sum over the samples of a batch, and over how many it was taken.
Pairs = Mapping[str, tuple[Tensor, Tensor | int]]


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1


class Samples(Protocol):
    """A split of a data set, gathered by index. It must not draw from the global random generators.

    On a GPU the next batch is gathered by another thread while the present one computes.
    """

    def __len__(self) -> int:
        """The number of samples, over all ranks."""

    def __getitem__(self, indices: torch.LongTensor) -> Batch:
        """The samples of these indices, as CPU tensors with the samples along the first axis."""


@dataclass(frozen=True)
class Task:
    """A family as the loop sees it: a class of settings and four functions.

    config: the class of `Trial.config`. It has the fields `optim: Optim` and `epochs: int`.
    model: builds the module, on the CPU, from the seeded global generator. A parameter with `requires_grad` False stays
        as it is; a submodule left in eval mode stays in eval mode.
    data: the split "train" or "val".
    loss: the loss terms of a batch by name, already weighted; their sum is minimised. All terms share one count: the same
        int, or the very same tensor. An int promises that every sample counts alike, so that each rank knows the
        total; a tensor (valid tokens, say) is added over the ranks, one small collective per step.
    score: what is reported of the validation split, each with its own count. The names do not depend on the batch; a
        score whose count is zero over the whole split is left out.
    lr_scale: the learning rate of a parameter, by name, as a ratio of `optim.lr`.

    `loss` and `score` get the plain module, on several ranks too; they may call any part of it, any number of times.
    """

    config: type
    model: Callable[[Any], nn.Module]
    data: Callable[[Any, str, Ranks], Samples]
    loss: Callable[[nn.Module, Batch, Any], Pairs]
    score: Callable[[nn.Module, Batch, Any], Pairs]
    lr_scale: Callable[[str], float] = lambda name: 1.0


def fit(task: Task, trial: Trial) -> Iterator[Report]:
    """Train `task` as `trial` says; yield a report per epoch.

    Raises `Diverged` in the step whose loss terms or gradient are not finite, on all ranks alike, before that step
    changes a weight.
    """
    raise NotImplementedError
