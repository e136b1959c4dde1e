"""A Lightning module small enough to train in milliseconds, and how its tests run it, on one rank or on two."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from trainables.contract import Diverged, State, Trial
from trainables.lightning import fit

# Lightning recommends workers to every data loader, and Slurm where there is one; and it uses a class that PyTorch is
# about to drop.
OWN_WARNINGS = [
    ".*does not have many workers",
    "The `srun` command is available",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
]
EPOCHS = 5
SAMPLES, BATCH = 48, 12


class Net(pl.LightningModule):
    """A small network under the schedules that `kind` names.

    nan: what is NaN from step `nan_step` of rank `nan_rank` on: the loss, or the gradient of net.0.weight alone.
    """

    def __init__(
        self, kind: str = "steps", dropout: float = 0.0, nan_step: int = 10**9, nan_rank: int = 0, nan: str = "loss"
    ) -> None:
        super().__init__()
        self.kind, self.nan_step, self.nan_rank, self.nan = kind, nan_step, nan_rank, nan
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16) if kind == "norm" else nn.Tanh(), nn.Linear(16, 1)
        )
        self.dropout = nn.Dropout(dropout)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss: Tensor = (self.dropout(self.net(x)) - y).square().mean()
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return self.spoil(loss)

    def spoil(self, loss: Tensor) -> Tensor:
        if self.global_step < self.nan_step or self.global_rank != self.nan_rank:
            return loss
        self.before = copy.deepcopy(self.net.state_dict())
        if self.nan == "loss":
            return loss * float("nan")
        weight = self.get_parameter("net.0.weight")
        return loss + (weight - weight.detach()).square().sum().sqrt()  # 0, where a root is infinitely steep

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)
        assert self.trainer.max_epochs == EPOCHS, "a schedule may be laid out by it"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02, fused=self.kind == "fused")
        if self.kind in ("epochs", "fused"):
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.7)]
        if self.kind == "plateau":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.02, steps), "interval": "step"}]


class ByHand(Net):
    """Takes its steps itself: after every second batch, with one of two optimizers in turn."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx // 2 % 2]
        self.manual_backward(self.spoil(self.loss(batch)))
        if batch_idx % 2:
            optimizer.step()
            self.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net[i].parameters(), lr=lr) for i, lr in ((0, 0.02), (2, 0.01))]


def loaders(shuffle: bool = False, rank: int = 0, ranks: int = 1) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation on a rank's share of the same samples."""
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    samples = TensorDataset(x[rank::ranks], x[rank::ranks].sum(1, keepdim=True).sin())
    return DataLoader(samples, BATCH // ranks, shuffle), DataLoader(samples, BATCH // ranks)


def run(
    module: Net, data: Any, resume: State | None = None, seed: int = 3, **settings: Any
) -> tuple[list[dict[str, float]], list[State]]:
    """Metrics and states of a trial's epochs."""
    metrics, states = [], []
    for report in fit(Trial({}, seed=seed, resume=resume), module, *data, **{"max_epochs": EPOCHS, **settings}):
        assert report.state is not None
        metrics.append(dict(report.metrics))
        states.append(copy.deepcopy(report.state()))
    return metrics, states


def diverged(module: Net, data: Any, **settings: Any) -> Diverged:
    """How a trial diverges."""
    try:
        run(module, data, **settings)
    except Diverged as error:
        return error
    raise AssertionError("it did not diverge")


def net(kind: str = "steps", **settings: Any) -> Net:
    torch.manual_seed(0)
    return (ByHand if kind == "by hand" else Net)(kind, **settings)


def one_of_two(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    for message in OWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {nan: diverged(net(nan_step=4, nan_rank=1, nan=nan), loaders()) for nan in ("loss", "gradient")}
    # Lightning's own sampler for several ranks shuffles whatever it is given.
    plain = run(net(), loaders(rank=rank, ranks=2), use_distributed_sampler=False)
    shuffled = run(net(dropout=0.2), loaders(shuffle=True))
    resumed = run(net(dropout=0.2), loaders(shuffle=True), resume=shuffled[1][1])
    orders = [run(net(), loaders(shuffle=True), seed=seed)[0] for seed in (3, 4)]
    pl.seed_everything(7, verbose=False)  # as a script may do; it stays in the environment
    seeded = run(net(dropout=0.2), loaders(shuffle=True))
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((told, plain, shuffled, resumed, orders, seeded)))
    dist.barrier()
    dist.destroy_process_group()
