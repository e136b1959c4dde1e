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
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trainables.contract import Diverged, Report, Trial, UserError
from trainables.resume import seed_everything

SETTLED = ("accelerator", "devices", "num_nodes")  # by the trial, and so by the space's `resources`
# These change the weights for good when a training ends, and each epoch is one here.
AT_THE_END = ("WeightAveraging", "StochasticWeightAveraging", "ModelPruning")
# A search keeps checkpoints and metrics itself, and a sanity check would come before every epoch.
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def fit(trial: Trial, module: Any, *data: Any, **settings: Any) -> Iterator[Report]:
    """Train `module` and yield what it has logged, after every epoch that ends with a validation.

    module: a LightningModule, newly built.
    data: as `Trainer.fit` takes it after the module: a LightningDataModule, or loaders of training and validation.
    settings: as `Trainer` takes them. Which devices it uses is settled by the trial; `strategy` counts for several
        ranks only, "ddp" unless given.

    A report's state is a Lightning checkpoint. Lightning's hooks run as ever, but those around a whole training
    (`setup`, `on_fit_start`, `on_train_start`, their counterparts) in every epoch. Raises Diverged on all ranks for the
    step whose loss is not finite on one of them, before it changes a weight, and UserError for settings that cannot be.
    """
    library = library_of(module)
    epoch_end = _epoch_end(library)
    trainer = library.Trainer(**trainer_settings(trial, library, epoch_end, settings))
    connector = trainer._checkpoint_connector  # what `save_checkpoint` and `ckpt_path` go through, without the file
    state = copy.deepcopy(trial.resume)  # an optimizer would go on to write into its tensors
    while True:
        began = state["epoch"] if state else 0
        seed_everything(trial.seed, began, trial.rank)  # a Lightning checkpoint holds no state of the generators
        connector._loaded_checkpoint = state or {}
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
        package, separator, _ = base.__module__.partition(".core.module")
        if separator and base.__name__ == "LightningModule":
            return importlib.import_module(package)
    raise UserError(f"{type(module).__name__} is no LightningModule; fit(trial, module, ...) trains one")


def trainer_settings(trial: Trial, library: Any, epoch_end: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the Trainer: what was asked for, where the trial runs, and the callback that ends an epoch."""
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
        "callbacks": [*_listed(settings.get("callbacks")), epoch_end],  # the last of all to run
        "plugins": [*_listed(settings.get("plugins")), environment],
        "enable_checkpointing": True,  # means `epoch_end`; of its own, Lightning adds no other then
    }
    return {**QUIET, **settings, **where, **more}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _epochs_per_report(trainer: Any) -> int:
    return trainer.check_val_every_n_epoch or 1


def _epoch_end(library: Any) -> Any:
    """A callback that ends `Trainer.fit` after an epoch with a validation, and any step whose loss is not finite."""

    class EpochEnd(library.callbacks.Checkpoint):  # Lightning runs callbacks of this class after all others
        """`max_epochs` is what it was until every other callback has run: schedules are laid out by it."""

        def __init__(self) -> None:
            self._max_epochs: int | None = None

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if (trainer.current_epoch + 1) % _epochs_per_report(trainer) == 0:
                self._max_epochs, trainer.fit_loop.max_epochs = trainer.max_epochs, trainer.current_epoch + 1

        def restore(self, trainer: Any) -> None:
            if self._max_epochs is not None:
                trainer.fit_loop.max_epochs, self._max_epochs = self._max_epochs, None

        def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
            if not trainer.strategy.reduce_boolean_decision(bool(loss.isfinite().all())):
                lr = trainer.optimizers[0].param_groups[0]["lr"]
                raise Diverged(f"the loss is not finite at lr {lr:.3g}", trainer.global_step)

    return EpochEnd()
