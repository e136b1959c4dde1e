"""How a family's parameters are optimised: the settings, the schedules and the optimizer they describe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from trainables.contract import UserError


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise `UserError` with the name, the value and the rule unless `holds`."""
    if not holds:
        raise UserError(f"{name} = {value} must {rule}")


@dataclass(frozen=True)
class Restarts:
    """What the schedule "notes" does after the warm-up. Rates are ratios of `Optim.lr`, so that all of them scale with it.

    The defaults are the lab notes' own numbers at lr 1.0e-4; they warm up over 10 epochs.
    """

    first_epochs: int = 15  # the first decay, from lr to the floor
    every_epochs: int = 10  # each later decay, from restart_ratio * lr to the floor
    restart_ratio: float = 1.25
    floor_ratio: float = 0.025  # where the warm-up starts and every decay ends

    def __post_init__(self) -> None:
        require(self.first_epochs >= 1, "optim.restarts.first_epochs", self.first_epochs, "be at least 1")
        require(self.every_epochs >= 1, "optim.restarts.every_epochs", self.every_epochs, "be at least 1")
        require(
            0 < self.restart_ratio < math.inf, "optim.restarts.restart_ratio", self.restart_ratio, "be a positive number"
        )
        require(0 <= self.floor_ratio < 1, "optim.restarts.floor_ratio", self.floor_ratio, "lie in [0, 1)")


@dataclass(frozen=True)
class Optim:
    """How a trial is optimised: AdamW, with what the searches of every family have in common.

    lr: the highest rate of the schedules "constant" and "cosine"; a parameter's own is `Task.lr_scale` times this.
    clip_norm: largest norm of the whole gradient, over all parameters and ranks; None: no limit.
    batch_size: the EFFECTIVE batch, samples per optimizer step over all ranks and micro-batches.
    micro_batch: most samples that one rank passes through the model at once; None: its whole share of the batch.
    schedule: "constant"; "cosine" to zero at the last epoch; "notes", the lab notes' cosine with `restarts`, one rate
        for a whole epoch. All of them start with a warm-up: linear, or half a cosine in "notes".
    ema: decay per step of a shadow of the parameters. Scores are then those of the shadow; a checkpoint holds both.
    """

    lr: float = 1.0e-4
    clip_norm: float | None = None
    batch_size: int = 24
    micro_batch: int | None = None
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine", "notes"] = "constant"
    warmup_epochs: float = 0.0
    restarts: Restarts = field(default_factory=Restarts)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None

    def __post_init__(self) -> None:
        positive = "be a positive number"
        require(0 < self.lr < math.inf, "optim.lr", self.lr, positive)
        require(self.clip_norm is None or 0 < self.clip_norm < math.inf, "optim.clip_norm", self.clip_norm, positive)
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "be at least 1")
        require(self.micro_batch is None or self.micro_batch >= 1, "optim.micro_batch", self.micro_batch, "be at least 1")
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "be 0 or a positive number")
        schedules = ("constant", "cosine", "notes")
        require(self.schedule in schedules, "optim.schedule", self.schedule, f"be one of {', '.join(schedules)}")
        require(0 <= self.warmup_epochs < math.inf, "optim.warmup_epochs", self.warmup_epochs, "be 0 or a positive number")
        precisions = ("fp32", "bf16", "fp16")
        require(self.precision in precisions, "optim.precision", self.precision, f"be one of {', '.join(precisions)}")
        require(self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "lie between 0 and 1")
