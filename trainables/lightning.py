"""Runs a PyTorch Lightning module through Lightning's own trainer, as a trainable:

    def train(trial: Trial) -> Iterator[Report]:
        yield from fit(trial, MyModule(trial.config["lr"]), MyDataModule(), max_epochs=10)

`Trainer.fit` returns only when training is over, and a trainable must stop after every epoch. So each epoch is a
`Trainer.fit` of its own, which goes on from the state in which the one before it ended. A trial that is resumed does
just that, and therefore is the uninterrupted one.

Nothing is imported from Lightning here: `pytorch_lightning` and `lightning.pytorch` are two copies of one library, and
the one is taken that the module was written for.
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
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from trainables.contract import Diverged, Report, State, Trial, UserError
from trainables.guard import KEPT, readable
from trainables.resume import seed_everything, seed_from

NEEDED = (2, 6)  # Lightning: what is read and set here of its trainer, partly private, is as that version has it
SETTLED = ("accelerator", "devices", "num_nodes")  # by the trial, and so by the space's `resources`
# These change the weights for good when a training ends, and each epoch is one here.
AT_THE_END = ("WeightAveraging", "StochasticWeightAveraging", "ModelPruning")
# A search keeps checkpoints itself, and a sanity check would come before every epoch.
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def fit(trial: Trial, module: Any, *data: Any, **settings: Any) -> Iterator[Report]:
    """Train `module` and yield what it has logged, after every epoch that ends with a validation.

    module: a LightningModule, newly built. Its first weights come from the global generators, which a search has seeded
        with `trial.seed`; where a trial runs without one, seed them before you build it.
    data: as `Trainer.fit` takes it after the module: a LightningDataModule, or loaders of training and validation.
    settings: as `Trainer` takes them. Which devices it uses is settled by the trial; `strategy` counts for several
        ranks only, "ddp" unless given. Without a `logger` the module has one that keeps nothing.

    A report's state is a Lightning checkpoint. Lightning's hooks run as ever, but those around a whole training
    (`setup`, `on_fit_start`, `on_train_start`, their counterparts) in every epoch. Raises Diverged on all ranks for the
    step whose loss or gradient is not finite on one of them, before it changes a weight, and UserError for settings
    that cannot be.
    """
    library = library_of(module)
    watch, epoch_end = _callback(library, Watch), _callback(library, EpochEnd)
    trainer = _trainer(trial, library, trainer_settings(trial, library, [watch, epoch_end], settings))
    connector = trainer._checkpoint_connector  # what `save_checkpoint` and `ckpt_path` go through, without the file
    state = copy.deepcopy(trial.resume)  # an optimizer would go on to write into its tensors
    while True:
        began = state["epoch"] if state else 0
        seed_everything(trial.seed, began, trial.rank)  # a Lightning checkpoint holds no state of the generators
        connector._loaded_checkpoint = epoch_end.given = state or {}
        with _no_global_seed():
            trainer.fit(module, *data)
        epoch_end.restore(trainer)
        if trainer.current_epoch == began or trainer.current_epoch % _epochs_per_report(trainer):
            return  # there was nothing left to do, or the last epochs end without a validation
        state = connector.dump_checkpoint(weights_only=False)
        yield Report({name: float(value) for name, value in trainer.callback_metrics.items()}, lambda: state)
        if trainer.fit_loop.done:
            return


def library_of(module: Any) -> Any:
    """The package, `pytorch_lightning` or `lightning.pytorch`, whose LightningModule a module is."""
    for base in type(module).__mro__:
        package, separator, _ = base.__module__.partition(".core.")  # then `module`; until 1.7 it was `lightning`
        if separator and base.__name__ == "LightningModule":
            library = importlib.import_module(package)
            if tuple(int(part) for part in re.findall(r"\d+", library.__version__)[:2]) < NEEDED:
                raise UserError(
                    f"{type(module).__name__} is a LightningModule of {package} {library.__version__}, and "
                    f"fit(trial, module, ...) needs {_needed(library)}"
                )
            return library
    raise UserError(f"{type(module).__name__} is no LightningModule; fit(trial, module, ...) trains one")


def _needed(library: Any) -> str:
    package = "lightning" if library.__name__.startswith("lightning.") else "pytorch-lightning"
    return f'Lightning 2.6: pip install "{package}>=2.6,<2.7"'


def trainer_settings(trial: Trial, library: Any, callbacks: list[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the Trainer: what was asked for, where the trial runs, and the callbacks that follow it."""
    for name in SETTLED:
        if name in settings:
            raise UserError(f"{name}={settings[name]!r}: leave it out, the space settles it (resources)")
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
        # The ranks are there already, in torchrun's environment: Lightning must start none, and join their group.
        where["devices"] = int(os.environ.get("LOCAL_WORLD_SIZE", trial.world_size))
        where["num_nodes"] = trial.world_size // where["devices"]
        where["strategy"] = settings.get("strategy", "ddp")
        environment = environments.TorchElasticEnvironment()
        if where["devices"] * where["num_nodes"] != trial.world_size:
            raise UserError(f"{trial.world_size} ranks, {where['devices']} of them here: Lightning wants as many each")
    more = {
        "callbacks": [*_listed(settings.get("callbacks")), *callbacks],  # the last of all to run
        "plugins": [*_listed(settings.get("plugins")), environment],
        "enable_checkpointing": True,  # means `callbacks`; of its own, Lightning adds no other then
    }
    if settings.get("logger") is None:
        more["logger"] = _no_logger(library, settings.get("default_root_dir") or os.getcwd())
    return {**QUIET, **settings, **where, **more}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _no_logger(library: Any, folder: Any) -> Any:
    """A logger that keeps nothing, for `self.logger` and for callbacks that will not do without one.

    folder: what the module is told where it asks for the logger's folder, to put things there itself.
    """
    loggers: Any = importlib.import_module(f"{library.__name__}.loggers.logger")

    class NoLogger(loggers.DummyLogger):
        save_dir = log_dir = os.fspath(folder)

    # An epoch shorter than the interval of logging, of which there is none.
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    return NoLogger()


def _trainer(trial: Trial, library: Any, settings: Mapping[str, Any]) -> Any:
    class Trainer(library.Trainer):
        """Whose samplers for several ranks shuffle by the trial's seed, and not by `PL_GLOBAL_SEED`."""

        @property
        def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
            ranks = super().distributed_sampler_kwargs
            return ranks and {**ranks, "seed": seed_from(trial.seed)}

    return Trainer(**settings)


@contextmanager
def _no_global_seed() -> Iterator[None]:
    """Under which DDP would seed all ranks alike in every epoch: Lightning's `seed_everything` leaves one behind."""
    seed = os.environ.pop("PL_GLOBAL_SEED", None)
    try:
        yield
    finally:
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed


def _epochs_per_report(trainer: Any) -> int:
    return trainer.check_val_every_n_epoch or 1


def _callback(library: Any, kind: type) -> Any:
    """One of Lightning's callbacks, of the class that runs after all others, with the methods of `kind`."""
    return type(kind.__name__, (kind, library.callbacks.Checkpoint), {})(library)


class EpochEnd:
    """Ends `Trainer.fit` after an epoch with a validation, and sees to it that it began where the last one ended.

    `max_epochs` is what it was until every other callback has run: schedules are laid out by it.

    given: the state that Lightning was given to go on from; empty: none.
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
                f"{self._library.__name__} {self._library.__version__} has not taken the state in which epoch "
                f"{given['epoch']} ended, and would begin anew; go on with {_needed(self._library)}"
            )

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if (trainer.current_epoch + 1) % _epochs_per_report(trainer) == 0:
            self._max_epochs, trainer.fit_loop.max_epochs = trainer.max_epochs, trainer.current_epoch + 1

    def restore(self, trainer: Any) -> None:
        if self._max_epochs is not None:
            trainer.fit_loop.max_epochs, self._max_epochs = self._max_epochs, None


class Watch:
    """Ends a trial in the step whose loss or gradient is not finite, on all ranks, before a weight has changed.

    It sees what goes through Lightning: each loss before its backward pass; each gradient before it is clipped, with
    all ranks' parts in it and fp16's scale out of it. Ranks agree on every verdict all the same, since strategies other
    than DDP leave each with a part. An overflow is left to fp16's scaler for as long as there is a scale to lower.
    """

    def __init__(self, library: Any) -> None:
        self._losses: deque[float] = deque(maxlen=KEPT)  # of this rank's batches
        self._norms: deque[float] = deque(maxlen=KEPT)

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        value = float(loss.detach().double().mean())
        parts = trainer.accumulate_grad_batches if module.automatic_optimization else 1  # by which Lightning divides it
        self._losses.append(value * parts / _scale(trainer))
        self._agree(trainer, trainer.optimizers, None if math.isfinite(value) else "the loss")

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Optimizer) -> None:
        scale = _scale(trainer)
        is_scaled = getattr(optimizer, "_step_supports_amp_scaling", False)  # a fused one unscales in its step
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
        """Raise Diverged on every rank if something is wrong on one, with what the first such rank knows of it."""
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
        everyones: list[Any] = [wrong and (reason, details)] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(everyones, everyones[0])
        reason, details = next(told for told in everyones if told)
        raise Diverged(reason, trainer.global_step, details)


@torch.no_grad()
def gradient_norm(optimizer: Optimizer) -> float:
    """The norm of all gradients that an optimizer is about to use."""
    found = [_values(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # In half precision the norm of a sound gradient may overflow.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) if g.dtype == torch.float16 else g for g in found]
    return float(get_total_norm(norms))


def culprit(module: Any, optimizer: Optimizer) -> tuple[str | None, bool]:
    """The parameter, by name, whose gradient spoils the norm of all, and whether it is finite itself.

    Of several the last in the module, which as a rule is the first that the backward pass comes to. Where all are
    finite, and too large to be squared for their norm, the one with the largest.
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
    """What scales the loss for fp16, if anything does."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _scale(trainer: Any) -> float:
    scaler = _scaler(trainer)
    return float(scaler.get_scale()) if scaler else 1.0
