"""Lightning's own trainer under the contract: an epoch at a time it trains as in one go, on one rank and on two."""

from __future__ import annotations

import gc
import importlib
import pickle
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
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]
KINDS = ["steps", "epochs", "plateau", "norm"]


@pytest.fixture(scope="module")
def toy() -> Any:
    """The module `toy_lightning`, imported only where a test really runs."""
    return importlib.import_module("toy_lightning")


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_at_a_time_is_lightnings_one_go(toy: Any, kind: str) -> None:
    whole = toy.net(kind)
    trainer = toy.pl.Trainer(max_epochs=toy.EPOCHS, accelerator="cpu", devices=1, enable_checkpointing=False, **QUIET)
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


def test_a_checkpoint_is_one_of_lightnings(toy: Any, tmp_path: Path) -> None:
    module = toy.net("norm")
    _, states = toy.run(module, toy.loaders())
    torch.save(states[-1], tmp_path / "state.pt")
    loaded = toy.Net.load_from_checkpoint(tmp_path / "state.pt", kind="norm")
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


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
        ({"devices": 2}, "devices=2: leave it out, the space settles it"),
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
    with pytest.raises(UserError, match="Linear is no LightningModule"):
        next(fit(Trial({}), nn.Linear(2, 2), *toy.loaders(), max_epochs=1))


def test_two_ranks_train_as_one_resume_and_diverge_together(toy: Any, tmp_path: Path) -> None:
    spawn(toy.one_of_two, args=(tmp_path,), nprocs=2)
    both = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    alone, states = toy.run(toy.net(), toy.loaders())
    for told, plain, shuffled, resumed in both:
        assert told.startswith("the loss is not finite at lr ")
        assert told.endswith("(step 4)")
        assert len(plain[0]) == toy.EPOCHS
        for mine, theirs in zip(plain[0], alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        torch.testing.assert_close(plain[1][-1]["state_dict"], states[-1]["state_dict"], rtol=0, atol=1e-5)
        assert resumed[0] == shuffled[0][2:]
        torch.testing.assert_close(resumed[1][-1]["state_dict"], shuffled[1][-1]["state_dict"], rtol=0, atol=0)
