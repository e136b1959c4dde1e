"""Two ranks, over gloo: they train as one, and leave together when one of them diverges."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from toy_task import TOY, WIDTH, Config, Run, assert_same, order, run, toy_loss

from trainables.contract import UserError
from trainables.loop import Task
from trainables.optim import Optim
from trainables.samples import Batch
from trainables.step import Pairs

pytestmark = pytest.mark.slow  # two processes start, once for all
PAIRED = {
    "plain": Config(Optim(lr=0.01, batch_size=8)),
    "odd share": Config(Optim(lr=0.01, batch_size=7, micro_batch=3, clip_norm=0.1, ema=0.9)),
    "lengths": Config(Optim(lr=0.01, batch_size=9, micro_batch=2), lengths=True),
    "lengths as ints": Config(Optim(lr=0.01, batch_size=9, micro_batch=2), lengths=True),
    "one sample a batch": Config(Optim(lr=0.01, batch_size=1, clip_norm=1.0), samples=4),
    "one sample a batch, lengths": Config(Optim(lr=0.01, batch_size=1, ema=0.9), samples=4, lengths=True),
    "scores": Config(Optim(lr=0.01, batch_size=8, eval_batch=1)),
    "fp16": Config(Optim(lr=0.01, batch_size=8, precision="fp16"), loudness=0.1),  # too quiet to overflow anywhere
}
# Places 0 and 1 of a batch go to ranks 0 and 1.
BAD_LOSS = Config(Optim(lr=0.01, batch_size=8))
BAD_LOSS = replace(BAD_LOSS, nan_loss_of=int(order(BAD_LOSS)[1][1]))
BAD_GRADIENT = replace(BAD_LOSS, nan_loss_of=None, nan_gradient_of=BAD_LOSS.nan_loss_of)
BAD_FP16 = replace(BAD_LOSS, optim=replace(BAD_LOSS.optim, precision="fp16"))
BAD = {"loss": BAD_LOSS, "gradient": BAD_GRADIENT, "loss in fp16": BAD_FP16}
PARTED = replace(TOY, part=lambda name: f"layer_{name[0]}")  # whose gradients are reported one by one
BATCH_NORM = Config(Optim(lr=0.01, batch_size=8), epochs=3)


def loss_of_ints(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    """Whose count differs between ranks, and from step to step."""
    return {name: (total, int(count)) for name, (total, count) in TOY.loss(model, batch, config).items()}


def scores_of_some(model: nn.Module, batch: Batch, config: Config) -> Pairs:
    """Whose names and order depend on the batch. Validation samples have odd places on rank 1."""
    odd = [(f"odd_{index % 4}", (torch.tensor(float(index)), 1)) for index in batch["index"].tolist() if index % 2]
    return {**dict(odd[::-1]), **TOY.score(model, batch, config)}


TASKS = {"lengths as ints": replace(PARTED, loss=loss_of_ints), "scores": replace(PARTED, score=scores_of_some)}


def task_of(name: str) -> Task:
    return TASKS.get(name, PARTED)


def with_batch_norm(config: Config) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Linear(16, WIDTH))


def one_of_two(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    done = {name: run(config, task_of(name), rank=rank, world_size=2) for name, config in (PAIRED | BAD).items()}
    normed = replace(TOY, model=with_batch_norm)
    done["batch norm"] = run(BATCH_NORM, normed, rank=rank, world_size=2)
    state = done["batch norm"].states[0] if rank == 0 else None
    states = [state]
    dist.broadcast_object_list(states, src=0)
    done["batch norm, resumed"] = run(BATCH_NORM, normed, resume=states[0], rank=rank, world_size=2)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    """What each of two ranks saw: all trials in one pair of processes, since these take seconds to start."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(one_of_two, args=(folder,), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]


@pytest.mark.parametrize("name", PAIRED)
def test_two_ranks_train_as_one(name: str, both: list[dict[str, Run]]) -> None:
    alone, (rank0, rank1) = run(PAIRED[name], task_of(name)), (ranks[name] for ranks in both)
    assert_same(rank0.states, rank1.states)
    assert rank0.metrics == rank1.metrics
    loose = 20 if name == "fp16" else 1
    torch.testing.assert_close(rank0.weights[-1], alone.weights[-1], rtol=0, atol=1e-5 * loose)
    for mine, theirs in zip(rank0.metrics, alone.metrics, strict=True):
        theirs["micro_batch"] = mine["micro_batch"]
        assert mine == pytest.approx(theirs, rel=1e-4 * loose)


@pytest.mark.parametrize("name", BAD)
def test_both_ranks_raise_for_the_same_step_when_one_of_them_diverges(name: str, both: list[dict[str, Run]]) -> None:
    what = "the gradient norm is" if name == "gradient" else "loss_square is"
    for ranks in both:
        done = ranks[name]
        assert done.diverged is not None
        assert done.diverged.reason.startswith(f"{what} not finite at lr 0.01; ")
        assert done.diverged.step == 1
        assert done.diverged.details["rank"] == 1, "the sample that does it lies there"
        assert len(done.diverged.details["batch"]) == 4
        assert BAD_LOSS.nan_loss_of in done.diverged.details["batch"]
        assert torch.equal(done.weights[-1], done.weights[1])


def refuse_on(rank: int, refuser: int, folder: Path) -> None:
    """Train on two ranks, of which one has a loss that refuses what is not finite; note what each of them raised."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    bad = int(order(BAD_LOSS)[1][refuser])

    def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        model(batch["x"].masked_fill((batch["index"] == bad)[:, None], torch.inf))
        dist.all_reduce(torch.zeros(1))  # as in a norm over all ranks
        if bad in batch["index"]:
            raise ArithmeticError("not finite")
        return TOY.loss(model, batch, config)

    try:
        outcome = str(run(BATCH_NORM, replace(TOY, loss=loss), rank=rank, world_size=2).diverged)
    except RuntimeError as error:
        outcome = type(error).__name__
    (folder / f"{rank}.txt").write_text(outcome)
    dist.destroy_process_group()  # without a barrier: the other rank may be waiting in the step for this one


@pytest.mark.parametrize("refuser", [0, 1])
def test_a_rank_whose_loss_refuses_explains_it_without_the_others(refuser: int, tmp_path: Path) -> None:
    """They wait in the step, and are told by its leaving."""
    spawn(refuse_on, args=(refuser, tmp_path), nprocs=2)
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in (refuser, 1 - refuser)]
    sentence = "a value that the loss function passed to the model itself (Sequential) was first not finite (step 1)"
    assert told == [f"the loss raised ArithmeticError at lr 0.01; {sentence}", "RuntimeError"]


class Spare(nn.Module):
    """A part for samples of one kind."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.all, self.some = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kind = kind

    def forward(self, x_BC: Tensor, index_B: Tensor) -> Tensor:
        y_BC: Tensor = self.all(x_BC)
        return y_BC + self.some(x_BC) if self.kind in index_B else y_BC


def spare_on(rank: int, folder: Path) -> None:
    """Train on two ranks for one step, on a batch of which only rank 0 has a sample that uses all of the model."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    config = Config(Optim(batch_size=8), epochs=1, samples=8)
    kind = int(order(config)[0][0])

    def loss(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        return {"square": (model(batch["x"], batch["index"]).square().sum(), len(batch["x"]))}

    try:
        run(config, replace(TOY, model=lambda config: Spare(kind), loss=loss), rank=rank, world_size=2)
    except (UserError, RuntimeError) as error:
        (folder / f"{rank}.txt").write_text(str(error) if isinstance(error, UserError) else type(error).__name__)
    dist.destroy_process_group()  # without a barrier: rank 0 waits in the step for the other one


def test_a_parameter_that_a_ranks_batch_does_not_use_is_named(tmp_path: Path) -> None:
    spawn(spare_on, args=(tmp_path,), nprocs=2)
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == "RuntimeError"
    assert told[1].startswith(
        "some.weight and 1 more parameters had no part in the loss of step 0: with several ranks,"
    )


def make_mistakes(rank: int, folder: Path) -> None:
    """Train on two ranks with losses with which one rank would train; write what each is told."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    calls = itertools.count()

    def other_terms(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        return dict(list(toy_loss(model, batch, config).items())[rank:])

    def without_model(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        return {"size": (batch["x"].square().sum(), len(batch["x"]))}

    def without_last(model: nn.Module, batch: Batch, config: Config) -> Pairs:
        """In the second of two micro-batches."""
        used = model if next(calls) % 2 == 0 else cast(nn.Sequential, model)[:-1]
        return {"size": (used(batch["x"]).square().sum(), len(batch["x"]))}

    told = []
    for loss, optim in (
        (other_terms, Optim(batch_size=8)),
        (without_model, Optim(precision="fp16")),
        (without_last, Optim(batch_size=8, micro_batch=2)),
    ):
        with pytest.raises(UserError) as refused:
            run(Config(optim), replace(TOY, loss=loss), rank=rank, world_size=2)
        told.append(str(refused.value))
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def test_a_loss_that_is_none_for_several_ranks_is_told_on_all(tmp_path: Path) -> None:
    spawn(make_mistakes, args=(tmp_path,), nprocs=2)
    unused = "more parameters had no part in the loss of step 0: with several ranks,"
    for rank in (0, 1):
        terms, model, last = json.loads((tmp_path / f"{rank}.json").read_text())
        assert re.search("the loss terms of a batch are size.*, and of another size", terms)
        assert model.startswith(f"0.weight and 5 {unused}")
        assert last.startswith(f"5.weight and 1 {unused}")


def test_all_ranks_hold_the_same_buffers_when_an_epoch_ends(both: list[dict[str, Run]]) -> None:
    rank0, rank1 = (ranks["batch norm"] for ranks in both)
    assert_same(rank0.states, rank1.states)
    assert_same(both[0]["batch norm, resumed"].states, rank0.states[1:])
