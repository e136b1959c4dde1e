"""How a family's parameters are optimised: settings, learning-rate schedules and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainables.contract import UserError

UNDECAYED = "_no_weight_decay"  # mamba-ssm's name for the mark on a parameter
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise `UserError` with the name, the value and the rule unless `holds`."""
    if not holds:
        raise UserError(f"{name} = {value} must {rule}")


@dataclass(frozen=True)
class Restarts:
    """The warm restarts of the schedule "notes". Rates are ratios of `Optim.lr`, and so scale with it.

    The defaults are the lab notes' own numbers at lr 1.0e-4; the notes warm up over 10 epochs.
    """

    first_epochs: int = 15  # length of the first decay, from lr to the floor
    every_epochs: int = 10  # length of each later decay, from restart_ratio * lr to the floor
    restart_ratio: float = 1.25
    floor_ratio: float = 0.025  # where the warm-up starts and every decay ends

    def __post_init__(self) -> None:
        require(self.first_epochs >= 1, "optim.restarts.first_epochs", self.first_epochs, "be at least 1")
        require(self.every_epochs >= 1, "optim.restarts.every_epochs", self.every_epochs, "be at least 1")
        require(
            0 < self.restart_ratio < math.inf,
            "optim.restarts.restart_ratio",
            self.restart_ratio,
            "be a positive number",
        )
        require(0 <= self.floor_ratio < 1, "optim.restarts.floor_ratio", self.floor_ratio, "lie in [0, 1)")


@dataclass(frozen=True)
class Spike:
    """Ends a trial as diverged if its loss exceeds `factor` times its running median for `patience` steps in a row.

    The median is that of the last 50 steps without these, from ten steps on. The rule is suspended while one of the
    losses is zero or negative.
    """

    factor: float = 10.0
    patience: int = 5

    def __post_init__(self) -> None:
        require(1 < self.factor < math.inf, "optim.spike.factor", self.factor, "be a number above 1")
        require(1 <= self.patience <= 20, "optim.spike.patience", self.patience, "lie in 1..20")


@dataclass(frozen=True)
class Plateau:
    """Lowers the learning rate when a reported metric stalls, on top of any schedule.

    As torch's ReduceLROnPlateau, but with `threshold` 0 instead of 1e-4: any improvement, however small, is a new best.
    After more than `patience` epochs in a row without one, the rate is multiplied by `factor`, but never falls below
    `floor_ratio` times the schedule's, and the count restarts.
    """

    metric: str
    mode: Literal["min", "max"]
    factor: float = 0.5
    patience: int = 5
    floor_ratio: float = 0.0

    def __post_init__(self) -> None:
        require(self.mode in ("min", "max"), "optim.plateau.mode", self.mode, "be one of min, max")
        require(0 < self.factor < 1, "optim.plateau.factor", self.factor, "lie between 0 and 1")
        require(self.patience >= 0, "optim.plateau.patience", self.patience, "not be negative")
        require(0 <= self.floor_ratio < 1, "optim.plateau.floor_ratio", self.floor_ratio, "lie in [0, 1)")


@dataclass(frozen=True)
class EarlyStop:
    """Ends a trial, as finished, after `patience` epochs in a row without a new best of a reported metric.

    The last report and state are then those of the best epoch, even if the trial runs all its epochs.
    """

    metric: str
    mode: Literal["min", "max"]
    patience: int = 15

    def __post_init__(self) -> None:
        require(self.mode in ("min", "max"), "optim.early_stop.mode", self.mode, "be one of min, max")
        require(self.patience >= 1, "optim.early_stop.patience", self.patience, "be at least 1")


@dataclass(frozen=True)
class Optim:
    """The AdamW settings of a trial, which all families share.

    lr: the peak rate of the schedules "constant" and "cosine"; a parameter's own rate is `Task.lr_scale` times this.
    clip_norm: largest norm of the whole gradient, over all parameters and ranks; None: no clipping.
    batch_size: the EFFECTIVE batch: samples per optimizer step over all ranks and micro-batches.
    micro_batch: most samples that one rank passes through the model at once; None: its whole share of the batch.
    eval_batch: the same in validation, where scores do not depend on it; None: as many as in training. Memory is
        probed for training alone: if too large, it makes a trial run out of memory.
    epoch_samples: training samples in an epoch, drawn anew for each; None: the whole split. For a split so large that
        the search should not wait for all of it between two reports.
    schedule: "constant"; "cosine", to zero at the last epoch; "notes", the lab notes' cosine with `restarts`, constant
        within each epoch. All start with a warm-up: linear, or half a cosine in "notes".
    decayed: what weight decay applies to. "all": every parameter, as torch's AdamW does. "weights": not vectors, such
        as biases, the parameters of norms, and others that their module marks (`mark_undecayed`).
    compile: run the training step through torch.compile, anew for every trial; pays off in long trials.
    ema: decay per step of an exponential moving average (EMA) of the parameters; None: no EMA. Scores are then the
        EMA's; a checkpoint holds both.
    ema_warmup: after n steps let the decay be at most (1 + n) / (10 + n), so that the first epochs are not scored by
        the initial weights.
    spike: ends a trial as diverged while its loss is still finite; None: only values that are not finite do.
    plateau: lowers the rate when a metric stalls; None: only the schedule sets the rate.
    early_stop: ends a trial when a metric stalls, with its best epoch; None: run all epochs.
    """

    lr: float = 1.0e-4
    clip_norm: float | None = None
    batch_size: int = 24
    micro_batch: int | None = None
    eval_batch: int | None = None
    epoch_samples: int | None = None
    weight_decay: float = 0.01
    decayed: Literal["all", "weights"] = "all"
    schedule: Literal["constant", "cosine", "notes"] = "constant"
    warmup_epochs: float = 0.0
    restarts: Restarts = field(default_factory=Restarts)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    ema: float | None = None
    ema_warmup: bool = False
    spike: Spike | None = None
    plateau: Plateau | None = None
    early_stop: EarlyStop | None = None

    def __post_init__(self) -> None:
        positive = "be a positive number"
        require(0 < self.lr < math.inf, "optim.lr", self.lr, positive)
        require(self.clip_norm is None or 0 < self.clip_norm < math.inf, "optim.clip_norm", self.clip_norm, positive)
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "be at least 1")
        for name in ("micro_batch", "eval_batch", "epoch_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"optim.{name}", value, "be at least 1")
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "be 0 or a positive number")
        require(self.decayed in ("all", "weights"), "optim.decayed", self.decayed, "be one of all, weights")
        schedules = ("constant", "cosine", "notes")
        require(self.schedule in schedules, "optim.schedule", self.schedule, f"be one of {', '.join(schedules)}")
        require(
            0 <= self.warmup_epochs < math.inf, "optim.warmup_epochs", self.warmup_epochs, "be 0 or a positive number"
        )
        precisions = ("fp32", "bf16", "fp16")
        require(self.precision in precisions, "optim.precision", self.precision, f"be one of {', '.join(precisions)}")
        require(self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "lie between 0 and 1")

    @property
    def scored_at_once(self) -> int:
        """The samples that a single process passes through the model at once to score or predict them."""
        return self.eval_batch or self.micro_batch or self.batch_size

    def largest_batch(self, samples: int) -> int:
        """Return the size of the largest effective batch from a training split of so many samples."""
        return min(self.batch_size, self.epoch_samples or samples, samples)


def lr_factor(optim: Optim, epoch: float, epochs: int) -> float:
    """Return the learning rate as a ratio of `optim.lr`, after `epoch` (fractional) of a trial's `epochs` epochs."""
    warmup = optim.warmup_epochs
    if optim.schedule == "notes":
        return _notes_factor(optim.restarts, warmup, math.floor(epoch))
    if epoch < warmup:
        return epoch / warmup
    if optim.schedule == "constant":
        return 1.0
    return _half_cosine(1.0, 0.0, (epoch - warmup) / (epochs - warmup))


def _notes_factor(restarts: Restarts, warmup: float, epoch: int) -> float:
    if epoch < warmup:
        return _half_cosine(restarts.floor_ratio, 1.0, epoch / warmup)
    if epoch < warmup + restarts.first_epochs:
        return _half_cosine(1.0, restarts.floor_ratio, (epoch - warmup) / restarts.first_epochs)
    since_restart = (epoch - warmup - restarts.first_epochs) % restarts.every_epochs
    return _half_cosine(restarts.restart_ratio, restarts.floor_ratio, since_restart / restarts.every_epochs)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose `load_state_dict` matches state by parameter name.

    It keeps its own groups and hyperparameters, because a trial may continue from another trial's checkpoint
    (population-based training).
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each parameter's state by name; a parameter without saved state starts afresh."""
        known = {name: state_dict["state"].get(i) for i, name in enumerate(_names(state_dict))}
        own = self.state_dict()
        taken = {i: known[name] for i, name in enumerate(_names(own)) if known.get(name) is not None}
        super().load_state_dict({"state": taken, "param_groups": own["param_groups"]})
        for parameter, held in self.state.items():  # saved with another memory layout, perhaps (channels last)
            for key, value in held.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    held[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _names(state_dict: Mapping[str, Any]) -> list[str]:
    """Return the parameter names in the order in which the state dict numbers them."""
    return [name for group in state_dict["param_groups"] for name in group["param_names"]]


def adamw(model: nn.Module, lr_scale: Callable[[str], float], optim: Optim) -> AdamW:
    """Return fused AdamW over a model's parameters that require gradients.

    There is one group for each learning-rate ratio (its "lr_scale") and weight decay.
    """
    spared = undecayed(model) if optim.decayed == "weights" else frozenset()
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = float(lr_scale(name))
            require(0 <= ratio < math.inf, f"lr_scale({name!r})", ratio, "be 0 or a positive number")
            decay = 0.0 if parameter in spared else optim.weight_decay
            groups.setdefault((ratio, decay), []).append((name, parameter))
    return AdamW(
        [{"params": named, "lr_scale": ratio, "weight_decay": decay} for (ratio, decay), named in groups.items()],
        lr=optim.lr,
        fused=True,
    )


def undecayed(model: nn.Module) -> frozenset[nn.Parameter]:
    """Return the parameters that weight decay only harms: vectors, those of norms, and those marked by their module."""
    of_norms = {
        parameter for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    marked = {parameter for parameter in model.parameters() if getattr(parameter, UNDECAYED, False)}
    return frozenset(of_norms | marked | {parameter for parameter in model.parameters() if parameter.ndim < 2})


def mark_undecayed(*parameters: nn.Parameter) -> None:
    """Mark parameters that are no vectors and yet to be left without weight decay by `Optim.decayed` "weights".

    Embeddings, say. A deep copy of a parameter has no mark.
    """
    for parameter in parameters:
        setattr(parameter, UNDECAYED, True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to its "lr_scale" times `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_divisor(norm: Tensor, clip_norm: float | None) -> Tensor:
    """Return the divisor that clips a gradient of this norm, as `torch.nn.utils.clip_grad_norm_` does."""
    if clip_norm is None:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / clip_norm).clamp(min=1.0)


def fused_step(optimizer: torch.optim.AdamW, divisor: Tensor, skip: Tensor) -> None:
    """Step with the gradients divided by `divisor`, or change nothing if `skip` is true.

    Both stay on the device: the fused kernel reads them from the attributes that `GradScaler` uses.
    """
    optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


class Ema:
    """An exponential moving average (the shadow) of a model's trained parameters, by `Optim.ema`, `Optim.ema_warmup`.

    Without `Optim.ema` it keeps no shadow. A parameter that a model has under several names has one shadow, which a
    state holds under all of them, as the model's own state does.
    """

    def __init__(self, model: nn.Module, optim: Optim) -> None:
        named = model.named_parameters(remove_duplicate=False) if optim.ema is not None else ()
        self._trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._shadow = {parameter: parameter.detach().clone() for parameter in self._trained.values()}
        self._decay, self._warms_up = optim.ema or 0.0, optim.ema_warmup

    def update(self, step: int) -> None:
        """Move the shadow towards the current parameters, after the step with this number (from 0)."""
        if self._shadow:
            decay = min(self._decay, (2 + step) / (11 + step)) if self._warms_up else self._decay
            follow = get_ema_multi_avg_fn(decay)
            follow(list(self._shadow.values()), list(self._shadow), 0)  # 0: a count that is not used

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their shadow; a second call restores both."""
        for parameter, shadow in self._shadow.items():
            kept = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self._shadow[parameter] for name, parameter in self._trained.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the shadow; call after loading the parameters, whose values stand in for a missing shadow."""
        for name, parameter in self._trained.items():
            self._shadow[parameter].copy_(state.get(name, parameter.detach()))


class Patience:
    """Counts the epochs without a new best for `Optim.plateau` and `Optim.early_stop`.

    Its state is part of a checkpoint. All ranks decide alike, because validation scores are the same on every rank.
    """

    def __init__(self, optim: Optim) -> None:
        self._plateau, self._early_stop = optim.plateau, optim.early_stop
        self._best = {"plateau": -math.inf, "early_stop": -math.inf}
        self._waited = {"plateau": 0, "early_stop": 0}
        self.lr_ratio = 1.0  # factor on the schedule's rate

    @property
    def over(self) -> bool:
        """Whether early stopping ends the trial."""
        return self._early_stop is not None and self._waited["early_stop"] >= self._early_stop.patience

    @property
    def improved(self) -> bool:
        """Whether the last report is early stopping's best so far."""
        return self._early_stop is not None and self._waited["early_stop"] == 0

    def look(self, metrics: Mapping[str, float]) -> None:
        """Record an epoch's metrics; raises `UserError` if they lack the metric of a rule."""
        for name, rule in (("plateau", self._plateau), ("early_stop", self._early_stop)):
            if rule is None:
                continue
            if rule.metric not in metrics:
                raise UserError(f"optim.{name}.metric = {rule.metric} must be one of {', '.join(sorted(metrics))}")
            value = metrics[rule.metric] * (1 if rule.mode == "max" else -1)
            better = value > self._best[name]
            self._best[name] = value if better else self._best[name]
            self._waited[name] = 0 if better else self._waited[name] + 1
        if self._plateau is not None and self._waited["plateau"] > self._plateau.patience:
            self.lr_ratio = max(self.lr_ratio * self._plateau.factor, self._plateau.floor_ratio)
            self._waited["plateau"] = 0

    def state_dict(self) -> dict[str, object]:
        return {"best": dict(self._best), "waited": dict(self._waited), "lr_ratio": self.lr_ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited = dict(state["best"]), dict(state["waited"])
        self.lr_ratio = state["lr_ratio"]
