"""Lightning's own trainer under the contract: an epoch at a time it trains as in one go, on one rank and on two."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import warnings
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from trainables.contract import Diverged, State, Trial, UserError
from trainables.lightning import QUIET, fit

# Lightning recommends workers to every data loader, and uses a class that PyTorch is about to drop.
OWN_WARNINGS = [".*does not have many workers", r"`isinstance\(treespec, LeafSpec\)` is deprecated"]
pytestmark = [
    pytest.mark.slow,  # the import of Lightning takes seconds
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in OWN_WARNINGS),
]
EPOCHS = 5
SAMPLES = 48


class Net(pl.LightningModule):
    """A small network under the schedules that `kind` names; its loss is NaN in step `nan_step` of rank `nan_rank`."""

    def __init__(self, kind: str = "steps", dropout: float = 0.0, nan_step: int = -1, nan_rank: int = 0) -> None:
        super().__init__()
        self.kind, self.nan_step, self.nan_rank = kind, nan_step, nan_rank
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16) if kind == "norm" else nn.Tanh(), nn.Linear(16, 1)
        )
        self.dropout = nn.Dropout(dropout)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss: Tensor = (self.dropout(self.net(x)) - y).square().mean()
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        if self.global_step == self.nan_step and self.global_rank == self.nan_rank:
            self.before = copy.deepcopy(self.net.state_dict())
            loss = loss * float("nan")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)
        assert self.trainer.max_epochs == EPOCHS, "a schedule may be laid out by it"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        if self.kind == "epochs":
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.7)]
        if self.kind == "plateau":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.02, steps), "interval": "step"}]


def loaders(shuffle: bool = False, rank: int = 0, ranks: int = 1) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation on a rank's share of the same samples."""
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    samples = TensorDataset(x[rank::ranks], x[rank::ranks].sum(1, keepdim=True).sin())
    return DataLoader(samples, 16 // ranks, shuffle), DataLoader(samples, 16 // ranks)


def run(
    module: Net, data: Any, resume: State | None = None, **settings: Any
) -> tuple[list[dict[str, float]], list[State]]:
    """Metrics and states of a trial's epochs."""
    metrics, states = [], []
    for report in fit(Trial({}, seed=3, resume=resume), module, *data, **{"max_epochs": EPOCHS, **settings}):
        assert report.state is not None
        metrics.append(dict(report.metrics))
        states.append(copy.deepcopy(report.state()))
    return metrics, states


def net(*settings: Any, **more: Any) -> Net:
    torch.manual_seed(0)
    return Net(*settings, **more)


@pytest.mark.parametrize("kind", ["steps", "epochs", "plateau", "norm"])
def test_an_epoch_at_a_time_is_lightnings_one_go(kind: str) -> None:
    whole = net(kind)
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, enable_checkpointing=False, **QUIET)
    trainer.fit(whole, *loaders())
    parts = net(kind)
    metrics, states = run(parts, loaders())
    assert len(metrics) == EPOCHS
    assert metrics[-1] == {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert states[-1]["global_step"] == trainer.global_step
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["steps", "epochs", "plateau", "norm"])
def test_a_resumed_trial_is_the_uninterrupted_one(kind: str) -> None:
    metrics, states = run(net(kind, dropout=0.2), loaders(shuffle=True))
    for _ in range(2):  # the state it is resumed from stays as it was
        again, last = run(net(kind, dropout=0.2), loaders(shuffle=True), resume=states[1])
        assert again == metrics[2:]
    torch.testing.assert_close(last[-1]["state_dict"], states[-1]["state_dict"], rtol=0, atol=0)
    assert len({row["val_loss"] for row in metrics}) == EPOCHS, "the trial learns something"
    assert run(net(kind), loaders(), resume=states[-1]) == ([], []), "nothing is left to do"


def test_a_trial_is_reported_where_lightning_validates_and_ends_where_it_stops() -> None:
    assert len(run(net(), loaders(), check_val_every_n_epoch=2)[0]) == EPOCHS // 2
    for at_the_end in (False, True):
        never_good = pl.callbacks.EarlyStopping(
            "val_loss", min_delta=100.0, patience=1, check_on_train_epoch_end=at_the_end
        )
        assert len(run(net(), loaders(), callbacks=never_good)[0]) == 2
        assert len(run(net(), loaders(), callbacks=[never_good], min_epochs=4)[0]) == 4


def test_divergence_ends_in_its_step_before_a_weight_has_changed() -> None:
    module = net(nan_step=7)
    with pytest.raises(Diverged, match=r"the loss is not finite at lr 0.0\d+ \(step 7\)"):
        run(module, loaders())
    torch.testing.assert_close(module.net.state_dict(), module.before, rtol=0, atol=0)


def test_a_checkpoint_is_one_of_lightnings(tmp_path: Path) -> None:
    module = net("norm")
    _, states = run(module, loaders())
    torch.save(states[-1], tmp_path / "state.pt")
    loaded = Net.load_from_checkpoint(tmp_path / "state.pt", kind="norm")
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_a_trial_that_is_stopped_leaves_nothing_behind() -> None:
    module = net()
    held, reports = weakref.ref(module), fit(Trial({}), module, *loaders(), max_epochs=EPOCHS)
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
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        run(net(), loaders(), **settings)


def test_what_is_no_lightning_module_is_refused() -> None:
    with pytest.raises(UserError, match="Linear is no LightningModule"):
        next(fit(Trial({}), nn.Linear(2, 2), *loaders(), max_epochs=1))


def one_of_two(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    for message in OWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    told = ""
    try:
        run(net(nan_step=4, nan_rank=1), loaders())
    except Diverged as error:
        told = str(error)
    # Lightning's own sampler for several ranks shuffles whatever it is given.
    plain = run(net(), loaders(rank=rank, ranks=2), use_distributed_sampler=False)
    shuffled = run(net(dropout=0.2), loaders(shuffle=True))
    resumed = run(net(dropout=0.2), loaders(shuffle=True), resume=shuffled[1][1])
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((told, plain, shuffled, resumed)))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_train_as_one_resume_and_diverge_together(tmp_path: Path) -> None:
    spawn(one_of_two, args=(tmp_path,), nprocs=2)
    both = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    alone, states = run(net(), loaders())
    for told, plain, shuffled, resumed in both:
        assert told.startswith("the loss is not finite at lr ")
        assert told.endswith("(step 4)")
        assert len(plain[0]) == EPOCHS
        for mine, theirs in zip(plain[0], alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        torch.testing.assert_close(plain[1][-1]["state_dict"], states[-1]["state_dict"], rtol=0, atol=1e-5)
        assert resumed[0] == shuffled[0][2:]
        torch.testing.assert_close(resumed[1][-1]["state_dict"], shuffled[1][-1]["state_dict"], rtol=0, atol=0)
