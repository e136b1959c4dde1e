"""Runs a PyTorch Lightning module through Lightning's own trainer, as a trainable:

    def train(trial: Trial) -> Iterator[Report]:
        yield from fit(trial, MyModule(trial.config["lr"]), MyDataModule(), max_epochs=10)

`Trainer.fit` returns only when training is over, but a trainable must pause after every epoch. So each epoch is its
own `Trainer.fit`, which continues from the state in which the previous one ended. Resuming a trial does the same, and
so a resumed trial equals an uninterrupted one.

Nothing is imported from Lightning at the top: `pytorch_lightning` and `lightning.pytorch` are two copies of one
library, and the one used is that for which the module was written.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from trainables.contract import Diverged, Report, State, Trial, UserError
from trainables.guard import KEPT, readable
from trainables.resume import seed_everything, seed_from
from trainables.samples import Ranks, everyones

NEEDED = (2, 6)  # Lightning: the trainer attributes used here, partly private, are that version's
SETTLED = ("accelerator", "devices", "num_nodes")  # set by the trial, and so by the space's `resources`
# These change the weights permanently when a training ends, and here each epoch is a training of its own.
AT_THE_END = ("WeightAveraging", "StochasticWeightAveraging", "ModelPruning")
# Progress bar, model summary and sanity check would be repeated in every epoch.
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def fit(trial: Trial, module: Any, *data: Any, **settings: Any) -> Iterator[Report]:
    """Train `module`; after every epoch that ends with a validation, yield a report of the metrics it logged.

    module: a newly built LightningModule. A search seeds the global generators, which initialise it, with `trial.seed`;
        without a search, seed them before building it.
    data: the arguments of `Trainer.fit` after the module: a LightningDataModule, or training and validation loaders.
    settings: arguments of `Trainer`. The trial sets the devices; `strategy` matters with several ranks only, and is
        "ddp" unless given. Without a `logger` the module gets one that stores nothing.

    A report's state is a Lightning checkpoint. Lightning's hooks run as usual, except that those around a whole
    training (`setup`, `on_fit_start`, `on_train_start` and their counterparts) run in every epoch. Raises Diverged on
    all ranks if a step's loss or gradient is not finite on one of them, before a weight changes, and UserError for
    settings that cannot be used.
    """
    library = library_of(module)
    watch, epoch_end = _callback(library, Watch), _callback(library, EpochEnd)
    trainer = _trainer(trial, library, trainer_settings(trial, library, [watch, epoch_end], settings))
    connector = trainer._checkpoint_connector  # does what `save_checkpoint` and `ckpt_path` do, without a file
    state = copy.deepcopy(trial.resume)  # an optimizer would keep writing into its tensors
    while True:
        began = state["epoch"] if state else 0
        seed_everything(trial.seed, began, trial.rank)  # a Lightning checkpoint holds no generator states
        connector._loaded_checkpoint = epoch_end.given = state or {}
        with _no_global_seed():
            trainer.fit(module, *data)
        epoch_end.restore(trainer)
        if trainer.current_epoch == began or trainer.current_epoch % _epochs_per_report(trainer):
            return  # nothing was left to train, or the last epochs ended without a validation
        state = connector.dump_checkpoint(weights_only=False)
        yield Report({name: float(value) for name, value in trainer.callback_metrics.items()}, lambda: state)
        if trainer.fit_loop.done:
            return


def library_of(module: Any) -> Any:
    """Return the package, `pytorch_lightning` or `lightning.pytorch`, that defines the module's LightningModule.

    Raises UserError if `module` is not a LightningModule, or one of a Lightning before `NEEDED`.
    """
    for base in type(module).__mro__:
        package, separator, _ = base.__module__.partition(".core.")  # followed by `module`; until 1.7 by `lightning`
        if separator and base.__name__ == "LightningModule":
            library = importlib.import_module(package)
            if tuple(int(part) for part in re.findall(r"\d+", library.__version__)[:2]) < NEEDED:
                raise UserError(
                    f"{type(module).__name__} is a LightningModule of {package} {library.__version__}, and "
                    f"fit(trial, module, ...) needs {_needed(library)}"
                )
            return library
    raise UserError(f"{type(module).__name__} is not a LightningModule; fit(trial, module, ...) trains one")


def _needed(library: Any) -> str:
    package = "lightning" if library.__name__.startswith("lightning.") else "pytorch-lightning"
    return f'Lightning 2.6: pip install "{package}>=2.6,<2.7"'


def trainer_settings(trial: Trial, library: Any, callbacks: list[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer's arguments: `settings`, the trial's devices, `callbacks`. Raises UserError on conflicts."""
    for name in SETTLED:
        if name in settings:
            raise UserError(f"{name}={settings[name]!r}: leave it out, the space determines it (resources)")
    for name in ("max_steps", "max_time"):
        if settings.get(name) not in (None, -1):
            raise UserError(f"{name}={settings[name]!r}: a trial is as long as its epochs; give max_epochs instead")
    for callback in _listed(settings.get("callbacks")):
        if any(base.__name__ in AT_THE_END for base in type(callback).__mro__):
            raise UserError(
                f"callbacks: {type(callback).__name__} changes the weights when a training ends, and here every epoch "
                "is one; leave it out, and average or prune in the module itself"
            )
    environments = importlib.import_module(f"{library.__name__}.plugins.environments")
    gpu = trial.device.type == "cuda"
    where: dict[str, Any] = {"accelerator": "gpu" if gpu else "cpu", "strategy": "auto"}
    if trial.world_size == 1:
        where["devices"] = [trial.device.index] if gpu else 1
        environment = environments.LightningEnvironment()
    else:
        # The ranks already run, in torchrun's environment: Lightning must not start any, but join their group.
        where["devices"] = int(os.environ.get("LOCAL_WORLD_SIZE", trial.world_size))
        where["num_nodes"] = trial.world_size // where["devices"]
        where["strategy"] = settings.get("strategy", "ddp")
        environment = environments.TorchElasticEnvironment()
        if where["devices"] * where["num_nodes"] != trial.world_size:
            raise UserError(
                f"{trial.world_size} ranks, {where['devices']} of them here: Lightning needs as many on each"
            )
    more = {
        "callbacks": [*_listed(settings.get("callbacks")), *callbacks],  # ours run last
        "plugins": [*_listed(settings.get("plugins")), environment],
        "enable_checkpointing": True,  # needed for `callbacks`, which are Checkpoints: Lightning then adds none itself
    }
    if settings.get("logger") is None:
        more["logger"] = _no_logger(library, settings.get("default_root_dir") or os.getcwd())
    return {**QUIET, **settings, **where, **more}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _no_logger(library: Any, folder: Any) -> Any:
    """Return a logger that stores nothing, for `self.logger` and for callbacks that require one.

    folder: returned as the logger's folder, in which a module may store things itself.
    """
    loggers: Any = importlib.import_module(f"{library.__name__}.loggers.logger")

    class NoLogger(loggers.DummyLogger):
        save_dir = log_dir = os.fspath(folder)

    # Warns of epochs shorter than the logging interval, which is irrelevant without logging.
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    return NoLogger()


def _trainer(trial: Trial, library: Any, settings: Mapping[str, Any]) -> Any:
    class Trainer(library.Trainer):
        """A Trainer whose distributed samplers shuffle by the trial's seed instead of `PL_GLOBAL_SEED`."""

        @property
        def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
            ranks = super().distributed_sampler_kwargs
            return ranks and {**ranks, "seed": seed_from(trial.seed)}

    return Trainer(**settings)


@contextmanager
def _no_global_seed() -> Iterator[None]:
    """Hide `PL_GLOBAL_SEED`, set by Lightning's `seed_everything`: DDP would seed all ranks alike in every epoch."""
    seed = os.environ.pop("PL_GLOBAL_SEED", None)
    try:
        yield
    finally:
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed


def _epochs_per_report(trainer: Any) -> int:
    return trainer.check_val_every_n_epoch or 1


def _callback(library: Any, kind: type) -> Any:
    """Return a Lightning callback with the methods of `kind`, as a Checkpoint, because those run after all others."""
    return type(kind.__name__, (kind, library.callbacks.Checkpoint), {})(library)


class EpochEnd:
    """Ends `Trainer.fit` after an epoch with a validation, and checks that it started from the state it was given.

    `max_epochs` is lowered only after every other callback has run, because schedules are computed from it.

    given: the state that Lightning was given to continue from; empty: none.
    """

    def __init__(self, library: Any) -> None:
        self.given: State = {}
        self._library = library
        self._max_epochs: int | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        given, self.given = self.given, {}
        if not given:
            return
        pairs = zip(trainer.optimizers, given["optimizer_states"], strict=False)
        if trainer.current_epoch != given["epoch"] or any(saved["state"] and not own.state for own, saved in pairs):
            raise UserError(
                f"{self._library.__name__} {self._library.__version__} did not restore the state in which epoch "
                f"{given['epoch']} ended, and would start over; go on with {_needed(self._library)}"
            )

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if (trainer.current_epoch + 1) % _epochs_per_report(trainer) == 0:
            self._max_epochs, trainer.fit_loop.max_epochs = trainer.max_epochs, trainer.current_epoch + 1

    def restore(self, trainer: Any) -> None:
        if self._max_epochs is not None:
            trainer.fit_loop.max_epochs, self._max_epochs = self._max_epochs, None


class Watch:
    """Ends a trial on all ranks in the step whose loss or gradient is not finite, before a weight changes.

    It checks each loss before its backward pass, and each gradient before clipping, reduced over the ranks and without
    the fp16 loss scale. The ranks still agree on every verdict, because under strategies other than DDP each may hold a
    part. An overflow is left to the fp16 scaler as long as its scale can be lowered.
    """

    def __init__(self, library: Any) -> None:
        self._losses: deque[float] = deque(maxlen=KEPT)  # this rank's own, one per batch
        self._norms: deque[float] = deque(maxlen=KEPT)

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        value = float(loss.detach().double().mean())
        parts = trainer.accumulate_grad_batches if module.automatic_optimization else 1  # Lightning's divisor of a loss
        self._losses.append(value * parts / _scale(trainer))
        self._agree(trainer, trainer.optimizers, None if math.isfinite(value) else "the loss")

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Optimizer) -> None:
        scale = _scale(trainer)
        is_scaled = getattr(optimizer, "_step_supports_amp_scaling", False)  # a fused optimizer unscales in its step
        norm = gradient_norm(optimizer) / (scale if is_scaled else 1)
        overflow = not math.isfinite(norm) and scale > 1
        self._norms.append(math.inf if overflow else norm)
        if math.isfinite(norm) or overflow:
            self._agree(trainer, [optimizer], None)
        else:
            parameter, is_finite = culprit(module, optimizer)
            wrong = "the gradient norm" if is_finite else f"the gradient of {parameter}"
            self._agree(trainer, [optimizer], wrong, parameter)

    def _agree(self, trainer: Any, optimizers: list[Any], wrong: str | None, parameter: str | None = None) -> None:
        """Raise Diverged on every rank if `wrong` is set on any, with the reason and details of the first such rank."""
        if trainer.strategy.reduce_boolean_decision(wrong is None):
            return
        rates = [group.get("lr") for optimizer in optimizers for group in optimizer.param_groups]
        lr = next((float(rate) for rate in rates if rate is not None), None)
        reason = f"{wrong} is not finite" + ("" if lr is None else f" at lr {lr:.3g}")
        details = {
            "epoch": trainer.current_epoch,
            "lr": lr,
            "losses": [readable(value) for value in self._losses],
            "grad_norms": [readable(value) for value in self._norms],
            "parameter": parameter,
            "rank": trainer.global_rank,
            "loss_scale": _scale(trainer) if _scaler(trainer) else None,
        }
        mine = (reason, details) if wrong is not None else None
        everyone = everyones(mine, Ranks(trainer.global_rank, trainer.world_size))
        reason, details = next(told for told in everyone if told is not None)
        raise Diverged(reason, trainer.global_step, details)


@torch.no_grad()
def gradient_norm(optimizer: Optimizer) -> float:
    """Return the norm of all gradients that an optimizer is about to use."""
    found = [_values(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # In half precision the norm of a finite gradient may overflow.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) if g.dtype == torch.float16 else g for g in found]
    return float(get_total_norm(norms))


def culprit(module: Any, optimizer: Optimizer) -> tuple[str | None, bool]:
    """Return the name of the parameter whose gradient makes the total norm not finite, and whether it is itself finite.

    Of several that are not finite, the last in the module, usually the first that the backward pass reaches. If all are
    finite and only their norm overflows, the one with the largest gradient.
    """
    its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = [(name, p) for name, p in module.named_parameters() if id(p) in its and p.grad is not None]
    for name, parameter in reversed(named):
        if not _values(parameter.grad).isfinite().all():
            return name, False
    norms = {name: float(torch.linalg.vector_norm(_values(p.grad).double())) for name, p in named}
    return max(norms, key=norms.__getitem__, default=None), True


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _scaler(trainer: Any) -> Any:
    """Return the fp16 loss scaler, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _scale(trainer: Any) -> float:
    scaler = _scaler(trainer)
    return float(scaler.get_scale()) if scaler else 1.0
