"""The contract between the search engine and whatever it trains.

A trainable is a generator. It receives a `Trial`, trains, and yields once per epoch:

    def train(trial):
        for epoch in range(start, trial.config.epochs):
            ...
            yield Report({"loss": 0.03}, state=lambda: {"epoch": epoch, "model": model.state_dict()})

It also runs without the engine, `for report in train(Trial(config)): ...`, and under plain `torchrun`. The module that
defines a trainable may also define

    Config     a frozen dataclass; `trial.config` is then an instance of it, and otherwise a plain dict
    prepare    a function of the config, called once on the driver before any worker starts: check the data, build
               what all trials share, and raise `UserError` for anything the user must fix. If it returns a line that
               describes the data and their split, every result includes that line
    memory_need
               a function of a trial: the peak device memory of training in bytes, including weights, gradients and
               optimizer state, with no batch split to save memory. Called for some settings, on a GPU of its own,
               before a search whose slots share GPUs (`resources.gpus_per_worker: auto`). `train` must then stay
               within `Trial.memory_limit_mb`, its slot's share
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

State = dict[str, Any]


class UserError(ValueError):
    """A mistake that the user can fix; the message names the place, the value, the rule and the remedy."""


class Diverged(RuntimeError):
    """Training blew up: a loss, a gradient or the objective is no longer finite.

    step: the optimizer step (counted from the start of the trial) that could not be taken; None if unknown.
    details: JSON-serialisable diagnostics, saved in the trial's folder as divergence.json.
    """

    def __init__(self, reason: str = "", step: int | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason, step, details)
        self.reason = reason
        self.step = step
        self.details = {} if details is None else details

    def __str__(self) -> str:
        return self.reason if self.step is None else f"{self.reason} (step {self.step})"


@dataclass(frozen=True)
class Report:
    """What a trainable yields after each epoch.

    metrics: numbers by name. Every rank must yield the same number of reports; only rank 0's metrics are read.
    state: returns what `Trial.resume` needs to continue after this epoch. Called on rank 0 only, if at all, before the
        generator is advanced; a search keeps every trial's last state, and so calls it after each report. A report
        without a state saves nothing, and a trial resumes from the last report that had one.
    """

    metrics: Mapping[str, float]
    state: Callable[[], State] | None = None


# PyTorch has an exception class only for its CUDA allocator; these messages mark other out-of-memory RuntimeErrors.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",  # since cuDNN 9
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",  # the allocator's words, which wrappers raise anew
    "HIP out of memory",
    "MPS backend out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL's words
)


def memory_error(text: str) -> str | None:
    """Return the line of a RuntimeError's message that reports memory exhaustion; None if no line does."""
    return next((line for line in text.splitlines() if any(sign in line for sign in _NO_MEMORY)), None)


def _from_torchrun(name: str, otherwise: int) -> Callable[[], int]:
    return lambda: int(os.environ.get(name, otherwise))


def default_device() -> torch.device:
    """Return this rank's GPU, or the CPU on a machine without GPUs."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


@dataclass(frozen=True)
class Trial:
    """One setting, run to its end, as seen by one rank.

    config: an instance of the trainable module's `Config`, or a plain dict if the module defines none.
    seed: the search's seed, the same for all its trials and on every rank.
    rank, world_size: this process among those that train together; by default from torchrun's environment.
    device: where this rank computes; may be given as text. A CUDA device without an index gets that of PyTorch's
        current GPU.
    resume: the state of the last checkpoint, or None for a fresh start.
    cache: kept for the life of the process, across trials: data sets, compiled kernels, pre-trained encoders. Entries
        must not depend on searched parameters unless they are keyed by them.
    memory_limit_mb: the memory a training step may use on this rank, in MiB; None: all that the device has.
    number: the trial's number in its search, the same on every rank and after a resume; None outside a search. For
        names, as of a run in a tracker.
    """

    config: Any
    seed: int = 0
    rank: int = field(default_factory=_from_torchrun("RANK", 0))
    world_size: int = field(default_factory=_from_torchrun("WORLD_SIZE", 1))
    device: torch.device = field(default_factory=default_device)
    resume: State | None = None
    cache: dict[Any, Any] = field(default_factory=dict)
    memory_limit_mb: float | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is None:  # `torch.cuda.set_device` needs an index
            device = torch.device("cuda", torch.cuda.current_device())
        object.__setattr__(self, "device", device)
