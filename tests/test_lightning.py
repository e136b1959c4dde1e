"""Lightning's own trainer under the contract: an epoch at a time it trains as in one go, on one rank and on two."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import pickle
import re
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from trainables.contract import Diverged, Trial, UserError
from trainables.lightning import QUIET, fit

pytestmark = [
    pytest.mark.slow,  # the import of Lightning takes seconds
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),  # on a machine with Slurm
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]
KINDS = ["steps", "epochs", "plateau", "norm", "by hand"]


@pytest.fixture(scope="module")
def toy() -> Any:
    """The module `toy_lightning`, imported only where a test really runs."""
    return importlib.import_module("toy_lightning")


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_at_a_time_is_lightnings_one_go(toy: Any, kind: str) -> None:
    whole = toy.net(kind)
    off = {**QUIET, "logger": False, "enable_checkpointing": False}
    trainer = toy.pl.Trainer(max_epochs=toy.EPOCHS, accelerator="cpu", devices=1, **off)
    trainer.fit(whole, *toy.loaders())
    parts = toy.net(kind)
    metrics, states = toy.run(parts, toy.loaders())
    assert len(metrics) == toy.EPOCHS
    assert metrics[-1] == {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert states[-1]["global_step"] == trainer.global_step
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_trial_is_the_uninterrupted_one(toy: Any, kind: str) -> None:
    metrics, states = toy.run(toy.net(kind, dropout=0.2), toy.loaders(shuffle=True))
    for _ in range(2):  # the state it is resumed from stays as it was
        again, last = toy.run(toy.net(kind, dropout=0.2), toy.loaders(shuffle=True), resume=states[1])
        assert again == metrics[2:]
    torch.testing.assert_close(last[-1]["state_dict"], states[-1]["state_dict"], rtol=0, atol=0)
    assert len({row["val_loss"] for row in metrics}) == toy.EPOCHS, "the trial learns something"
    assert toy.run(toy.net(kind), toy.loaders(), resume=states[-1]) == ([], []), "nothing is left to do"


def test_a_trial_is_reported_where_lightning_validates_and_ends_where_it_stops(toy: Any) -> None:
    assert len(toy.run(toy.net(), toy.loaders(), check_val_every_n_epoch=2)[0]) == toy.EPOCHS // 2
    for at_the_end in (False, True):
        never_good = toy.pl.callbacks.EarlyStopping(
            "val_loss", min_delta=100.0, patience=1, check_on_train_epoch_end=at_the_end
        )
        assert len(toy.run(toy.net(), toy.loaders(), callbacks=never_good)[0]) == 2
        assert len(toy.run(toy.net(), toy.loaders(), callbacks=[never_good], min_epochs=4)[0]) == 4


def test_divergence_ends_in_its_step_before_a_weight_has_changed(toy: Any) -> None:
    module = toy.net(nan_step=7)
    with pytest.raises(Diverged, match=r"the loss is not finite at lr 0.0\d+ \(step 7\)"):
        toy.run(module, toy.loaders())
    torch.testing.assert_close(module.net.state_dict(), module.before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "step", "settings"),
    [
        ("steps", 7, {}),
        ("steps", 7, {"gradient_clip_val": 1.0}),  # which would make all weights NaN
        ("steps", 3, {"accumulate_grad_batches": 3}),
        ("by hand", 4, {}),
    ],
)
def test_a_gradient_that_is_not_finite_ends_it_before_it_is_clipped(
    toy: Any, kind: str, step: int, settings: dict[str, Any]
) -> None:
    nan_step = step - (kind == "by hand")  # then in the step of the other optimizer, which has no such gradient
    module = toy.net(kind, nan_step=nan_step, nan="gradient")
    error = toy.diverged(module, toy.loaders(), **settings)
    assert re.fullmatch(rf"the gradient of net.0.weight is not finite at lr 0.0\d+ \(step {step}\)", str(error))
    torch.testing.assert_close(module.net.state_dict(), module.before, rtol=0, atol=0)
    assert module.net[0].weight.grad.isnan().all()
    assert module.net[0].bias.grad.isfinite().all()


def test_a_post_mortem_shows_what_went_before(toy: Any) -> None:
    seen: list[float] = []

    class Losses(toy.pl.callbacks.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *batch: Any) -> None:
            seen.append(2 * float(outputs["loss"]))

    module = toy.net(nan_step=3, nan="gradient")
    settings = {"accumulate_grad_batches": 2, "callbacks": Losses()}
    details = toy.diverged(module, toy.loaders(), **settings).details
    assert json.loads(json.dumps(details, allow_nan=False)) == details
    assert details["losses"][:-1] == pytest.approx(seen)
    assert len(details["losses"]) == 2 * len(details["grad_norms"]) == 8
    assert all(norm > 0 for norm in details["grad_norms"][:-1])
    assert details["grad_norms"][-1] == "nan"
    assert (details["epoch"], details["parameter"], details["rank"]) == (1, "net.0.weight", 0)
    assert details["lr"] == module.optimizers().param_groups[0]["lr"]


def fp16(toy: Any, init_scale: float) -> Any:
    """Lightning's plugin for it, which on a CPU it puts in only when told to."""
    plugins = importlib.import_module("pytorch_lightning.plugins")
    return plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


@pytest.mark.parametrize("kind", ["epochs", "fused"])
def test_an_overflow_of_fp16_is_left_to_its_scaler(toy: Any, kind: str) -> None:
    plugin = fp16(toy, 2.0**20)
    toy.run(toy.net(kind), toy.loaders(), plugins=plugin)
    assert 1 < plugin.scaler.get_scale() < 2.0**20, "it was too high"
    error = toy.diverged(toy.net(kind, nan_step=2, nan="gradient"), toy.loaders(), plugins=fp16(toy, 8.0))
    assert error.step == 5, "8, 4, 2: a scale of 1 is the last"
    assert error.details["grad_norms"][-4:] == ["inf", "inf", "inf", "nan"]
    unscaled = toy.diverged(toy.net(kind, nan_step=2, nan="gradient"), toy.loaders())
    for name in ("losses", "grad_norms"):
        assert error.details[name][:2] == pytest.approx(unscaled.details[name][:2], rel=0.01)
    assert (error.details["loss_scale"], unscaled.details["loss_scale"]) == (1, None)


def test_a_checkpoint_is_one_of_lightnings(toy: Any, tmp_path: Path) -> None:
    module = toy.net("norm")
    _, states = toy.run(module, toy.loaders())
    torch.save(states[-1], tmp_path / "state.pt")
    loaded = toy.Net.load_from_checkpoint(tmp_path / "state.pt", kind="norm")
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("lost", ["_restore_modules_and_callbacks", "restore_optimizers"])
def test_a_state_that_lightning_does_not_take_is_no_new_beginning(
    toy: Any, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """As one would that keeps elsewhere what it has loaded, or restores it elsewhere."""
    _, states = toy.run(toy.net(), toy.loaders())
    checkpoints = importlib.import_module("pytorch_lightning.trainer.connectors.checkpoint_connector")

    def lose(connector: Any, *args: Any) -> None:
        if lost != "restore_optimizers":
            connector._loaded_checkpoint = {}

    monkeypatch.setattr(checkpoints._CheckpointConnector, lost, lose)
    module = toy.net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        UserError, match=r"did not restore the state in which epoch 2 ended, .* Lightning 2.6: pip install"
    ):
        toy.run(module, toy.loaders(), resume=states[1])
    if lost != "restore_optimizers":
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_a_trial_that_is_stopped_leaves_nothing_behind(toy: Any) -> None:
    module = toy.net()
    held, reports = weakref.ref(module), fit(Trial({}), module, *toy.loaders(), max_epochs=toy.EPOCHS)
    next(reports)
    del module, reports
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"devices": 2}, "devices=2: leave it out, the space determines it"),
        ({"max_steps": 100}, "max_steps=100: .* give max_epochs"),
    ],
)
def test_settings_that_cannot_be_are_refused(toy: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        toy.run(toy.net(), toy.loaders(), **settings)


def test_a_callback_that_changes_the_weights_when_training_ends_is_refused(toy: Any) -> None:
    """Every epoch would end so, and the average be what is trained on."""
    for name, arguments in {"EMAWeightAveraging": (), "StochasticWeightAveraging": (0.1,)}.items():
        callback = getattr(toy.pl.callbacks, name)(*arguments)
        with pytest.raises(UserError, match=f"callbacks: {name} changes the weights when a training ends"):
            toy.run(toy.net(), toy.loaders(), callbacks=[toy.pl.callbacks.Callback(), callback])


def test_what_is_no_lightning_module_is_refused(toy: Any) -> None:
    with pytest.raises(UserError, match="Linear is not a LightningModule"):
        next(fit(Trial({}), nn.Linear(2, 2), *toy.loaders(), max_epochs=1))


@pytest.mark.parametrize(
    ("part", "version", "told"),
    [
        ("core.lightning", "1.5.10", 'older 1.5.10, .* needs Lightning 2.6: pip install "pytorch-lightning>=2.6,<2.7"'),
        ("core.module", "2.5.0.post0", "older 2.5.0.post0, .* needs Lightning 2.6"),
        ("models", "1.5.10", "Mine is not a LightningModule"),
    ],
)
def test_an_older_lightning_is_refused_by_its_version(
    toy: Any, monkeypatch: pytest.MonkeyPatch, part: str, version: str, told: str
) -> None:
    library = types.ModuleType("older")
    vars(library)["__version__"] = version
    monkeypatch.setitem(sys.modules, "older", library)
    base = type("LightningModule", (nn.Module,), {"__module__": f"older.{part}"})
    with pytest.raises(UserError, match=told):
        next(fit(Trial({}), type("Mine", (base,), {})(), *toy.loaders(), max_epochs=1))


def test_a_module_may_log_where_no_logger_is_asked_for(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Logging(toy.Net):
        def on_train_start(self) -> None:
            self.logger.log_hyperparams({"lr": 0.02})
            self.logger.experiment.add_scalar("lr", 0.02, self.global_step)
            assert self.logger.save_dir == self.trainer.log_dir == str(tmp_path)

    metrics, _ = toy.run(Logging(), toy.loaders(), callbacks=toy.pl.callbacks.LearningRateMonitor("epoch"))
    assert metrics[-1]["lr-Adam"] > 0
    assert not list(tmp_path.iterdir())


def test_a_logger_that_is_asked_for_is_the_modules(toy: Any, tmp_path: Path) -> None:
    logger = importlib.import_module("pytorch_lightning.loggers").CSVLogger(tmp_path)
    toy.run(toy.net(), toy.loaders(), logger=logger, log_every_n_steps=1)
    assert (Path(logger.log_dir) / "metrics.csv").read_text().count("\n") > toy.EPOCHS
    module = toy.net()
    toy.run(module, toy.loaders(), logger=False)
    assert module.trainer.logger is None


def test_two_ranks_train_as_one_resume_and_diverge_together(toy: Any, tmp_path: Path) -> None:
    spawn(toy.one_of_two, args=(tmp_path,), nprocs=2)
    both = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    alone, states = toy.run(toy.net(), toy.loaders())
    for told, plain, shuffled, resumed, orders, seeded in both:
        assert re.fullmatch(r"the loss is not finite at lr .* \(step 4\)", str(told["loss"]))
        assert re.fullmatch(r"the gradient of net.0.weight is not finite at lr .* \(step 4\)", str(told["gradient"]))
        assert (told["loss"].details["rank"], told["loss"].details["losses"][-1]) == (1, "nan")
        assert len(plain[0]) == toy.EPOCHS
        for mine, theirs in zip(plain[0], alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        torch.testing.assert_close(plain[1][-1]["state_dict"], states[-1]["state_dict"], rtol=0, atol=1e-5)
        assert orders[0] != orders[1], "the order of samples follows the trial's seed"
        assert seeded[0] == shuffled[0], "and nothing that of a script"
        assert resumed[0] == shuffled[0][2:]
        torch.testing.assert_close(resumed[1][-1]["state_dict"], shuffled[1][-1]["state_dict"], rtol=0, atol=0)
