"""The contract between the search engine and whatever it trains.

A trainable is a generator. It receives a `Trial`, trains, and yields once per epoch:

    def train(trial):
        for epoch in range(start, trial.config.epochs):
            ...
            yield Report({"loss": 0.03}, state=lambda: {"epoch": epoch, "model": model.state_dict()})

It runs without the engine, `for report in train(Trial(config)): ...`, and under plain `torchrun`. A module that
holds a trainable may also define

    Config     a frozen dataclass; `trial.config` is then an instance of it, and the plain dict otherwise
    prepare    a function of the config, called once on the driver before any worker starts: look at the data, build
               what all trials share, and raise `UserError` for what a person must mend. A line that it returns, on
               what the data are and how they are split, stands in every result
    memory_need
               a function of a trial: the bytes of its device's memory that training takes at its peak, with weights,
               gradients and the optimizer's state, and with no batch cut up to save memory. Called for some settings
               before a search whose slots share GPUs (`resources.gpus_per_worker: auto`), on a GPU of its own. `train`
               then has to keep within `Trial.memory_limit_mb`, its slot's share
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

State = dict[str, Any]


class UserError(ValueError):
    """A mistake that a person can mend; the message names the place, the value, the rule and the remedy."""


class Diverged(RuntimeError):
    """Training blew up: a loss, a gradient or the objective is no longer finite.

    step: the optimizer step (counted from the start of the trial) that could not be taken; None where unknown.
    details: whatever else tells how it came about, as JSON has it; kept in the trial's folder as divergence.json.
    """

    def __init__(self, reason: str, step: int | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason, step, details)
        self.reason = reason
        self.step = step
        self.details = {} if details is None else details

    def __str__(self) -> str:
        return self.reason if self.step is None else f"{self.reason} (step {self.step})"


@dataclass(frozen=True)
class Report:
    """What a trainable yields after each epoch.

    metrics: numbers by name. Every rank yields, equally often; only those of rank 0 are read.
    state: returns what `Trial.resume` needs to go on after this epoch. Called on rank 0, if at all, before the
        generator runs on; a search keeps the last state of every trial, and so calls it after each report. A report
        without one costs nothing, and a trial goes on from the last that had one.
    """

    metrics: Mapping[str, float]
    state: Callable[[], State] | None = None


# PyTorch has a class for CUDA's own allocator alone.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",  # since cuDNN 9
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL's words
)


def memory_error(text: str) -> str | None:
    """The line of a RuntimeError's text that says that memory ran out; None where none does."""
    return next((line for line in text.splitlines() if any(sign in line for sign in _NO_MEMORY)), None)


def _from_torchrun(name: str, otherwise: int) -> Callable[[], int]:
    return lambda: int(os.environ.get(name, otherwise))


def default_device() -> torch.device:
    """This rank's GPU, or the CPU on a machine without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


@dataclass(frozen=True)
class Trial:
    """One setting, to be run to its end, as one rank sees it.

    config: the trainable module's `Config`, or a plain dict for a module without one.
    seed: the search's seed, the same for all its trials and on every rank.
    rank, world_size: this process among those that train together; torchrun's environment unless given.
    device: where this rank computes. A GPU has its index, also where it was given without one: PyTorch's current GPU.
    resume: the state of the last checkpoint, or None for a fresh start.
    cache: lives as long as the process, from one trial to the next: data sets, compiled kernels, pre-trained encoders.
        What is kept must not depend on the searched parameters, or be keyed by them.
    memory_limit_mb: what a training step may take on this rank, in MiB; None: what the device has.
    """

    config: Any
    seed: int = 0
    rank: int = field(default_factory=_from_torchrun("RANK", 0))
    world_size: int = field(default_factory=_from_torchrun("WORLD_SIZE", 1))
    device: torch.device = field(default_factory=default_device)
    resume: State | None = None
    cache: dict[Any, Any] = field(default_factory=dict)
    memory_limit_mb: float | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.device.index is None:  # which `torch.cuda.set_device` does not take
            object.__setattr__(self, "device", torch.device("cuda", torch.cuda.current_device()))
