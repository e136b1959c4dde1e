"""Samples, gathered by index, and the division of batches over ranks and micro-batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainables.contract import Trial, UserError

Batch = dict[str, Tensor]
T = TypeVar("T")
READING = threading.Lock()  # a post-mortem reads a step's samples while another thread may be gathering a later batch


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of processes that train together."""

    rank: int = 0
    size: int = 1


def ranks_of(trial: Trial) -> Ranks:
    if trial.world_size > 1 and not dist.is_initialized():
        raise UserError(
            f"world_size = {trial.world_size} must come with a process group: "
            "call torch.distributed.init_process_group before the trial"
        )
    return Ranks(trial.rank, trial.world_size)


def everyones(own: T, ranks: Ranks) -> list[T]:
    """Return every rank's value, in rank order. A collective: every rank must call it."""
    if ranks.size == 1:
        return [own]
    everyone: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyone, own)
    return everyone


class Samples(Protocol):
    """A split of a data set, gathered by index. The same indices always give the same samples.

    It must not draw from the global random generators. When training on a GPU, another thread gathers the next batch
    during the current step; no two threads do at once.
    """

    def __len__(self) -> int:
        """Return the number of samples, over all ranks."""

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return the samples with these indices (int64), as CPU tensors with the samples along the first axis."""


@dataclass(frozen=True)
class TensorSamples:
    """Samples held in memory: CPU tensors by name, with the samples along the first axis.

    Raises UserError if there is no tensor or if they hold different numbers of samples.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            told = ", ".join(f"{name} holds {len(tensor)}" for name, tensor in self.tensors.items())
            raise UserError(f"all tensors of a split must hold the same number of samples: {told or 'there are none'}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, indices: Tensor) -> Batch:
        return {name: tensor[indices] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Share:
    """One rank's part of an effective batch."""

    micros: tuple[Tensor, ...]  # indices of the rank's samples, one tensor per micro-batch
    effective: int  # samples in the batch over all ranks
    weight: float  # 0 for a rank without samples: it runs another rank's, because collectives need every rank; else 1

    @property
    def size(self) -> int:
        return sum(len(micro) for micro in self.micros)


def share_of(batch: Tensor, ranks: Ranks, micro_batch: int | None) -> Share:
    """Return this rank's share of the sample indices `batch`: every `ranks.size`-th one.

    The share is split into the fewest micro-batches of at most `micro_batch` samples, of even sizes: batch norm, and a
    loss that compares samples, would give a lone leftover sample as much weight as a whole micro-batch.
    """
    mine = batch[ranks.rank :: ranks.size]
    weight = 1.0 if len(mine) else 0.0
    mine = mine if len(mine) else batch[:1]
    parts = -(-len(mine) // (micro_batch or len(mine)))
    return Share(mine.tensor_split(parts), len(batch), weight)


def epoch_shares(
    samples: int, batch_size: int, micro_batch: int | None, ranks: Ranks, seed: int, drawn: int | None = None
) -> list[Share]:
    """Return this rank's shares of an epoch's batches; a ragged last batch is dropped unless it is the only one.

    drawn: how many of the samples the epoch has; None: all.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:drawn]
    batches = order.split(batch_size)
    whole = [batch for batch in batches if len(batch) == batch_size] or batches
    return [share_of(batch, ranks, micro_batch) for batch in whole]


def gathered(samples: Samples, indices: Tensor) -> Batch:
    """Return the samples with these indices; raises UserError unless they are a flat dict of tensors."""
    with READING:
        batch: Any = samples[indices]
    rule = "samples[indices] must return a flat dict of tensors"
    if not isinstance(batch, Mapping):
        raise UserError(f"{rule}, not a {type(batch).__name__}")
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{rule}: {name!r} is a {type(tensor).__name__}; make tensors of it, or leave it out")
    return dict(batch)


def on_device(samples: Samples, micros: Sequence[Tensor], device: torch.device) -> Iterator[Batch]:
    """Yield these micro-batches on the device; for a GPU, another thread gathers one batch ahead."""
    if device.type != "cuda":
        for micro in micros:
            yield {name: tensor.to(device) for name, tensor in gathered(samples, micro).items()}
        return

    def gather(micro: Tensor) -> Batch:
        return {name: tensor.pin_memory() for name, tensor in gathered(samples, micro).items()}

    # The thread pins memory for this device: without set_device it would also create a context on the first GPU.
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,)) as thread:
        ahead = thread.submit(gather, micros[0])
        for following in [*micros[1:], None]:
            batch = ahead.result()
            if following is not None:
                ahead = thread.submit(gather, following)
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
