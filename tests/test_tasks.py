"""One contract for the task of every family: what the shared training loop takes for granted."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_beam import SMALL
from torch.multiprocessing.spawn import spawn

from trainables.beam import fusion, rebuild
from trainables.beam.config import Data, Pretrain, Simulated
from trainables.contract import Trial
from trainables.loop import Task, fit
from trainables.mabe import config as mabe
from trainables.mabe import tagging
from trainables.optim import Optim, Plateau
from trainables.resume import seed_everything
from trainables.samples import Ranks

OPTIM = Optim(lr=2e-3, batch_size=8, clip_norm=1.0, schedule="cosine", ema=0.9)


@dataclass(frozen=True)
class Case:
    """A family's task with settings small enough to train in a second."""

    task: Task
    config: Any


def fusion_case(cache: Path) -> Case:
    data = Data(prepared=str(cache), history=1, image_size=32, simulated=Simulated(passes=8, frames=6))
    config = fusion.Config(data=data, model=SMALL, optim=OPTIM, epochs=3, missing_prob=0.3)
    fusion.prepare(config)
    return Case(fusion.task_for(config), config)


def rebuild_case(cache: Path) -> Case:
    base = fusion_case(cache).config
    config = rebuild.Config(data=base.data, model=SMALL, optim=OPTIM, pretrain=Pretrain(1, OPTIM), epochs=3)
    config = replace(config, rebuild=replace(config.rebuild, fusion_lr_ratio=0.5))
    torch.manual_seed(0)
    return Case(rebuild.task_for(config, fusion.build(config.fusion).state_dict(), {}), config)


def published_case(cache: Path) -> Case:
    """The rebuild with encoders that the heads have for themselves, and mistakes that show without batch norm."""
    config = rebuild_case(cache).config
    settings = replace(config.rebuild, encoders="copied", mistakes=("eval_mode", "picture_scale"), mix="stand_in")
    config = replace(config, rebuild=settings)
    torch.manual_seed(0)
    return Case(rebuild.task_for(config, fusion.build(config.fusion).state_dict(), {}), config)


def tagging_case(cache: Path) -> Case:
    data = mabe.Data(
        prepared=str(cache),
        features=("presence", "geometry", "pca"),
        window=16,
        stride=16,
        simulated=mabe.Simulated(videos=4, seconds=3),
    )
    config = tagging.Config(
        data=data,
        model=mabe.Model(channels=(4, 8), hidden=4, layers=1, pool=1, norm="group"),
        loss=mabe.FrameLoss(class_weights=(1.0, 5.0, 8.0, 8.0)),
        optim=replace(OPTIM, plateau=Plateau("accuracy", "max", patience=0)),
        epochs=3,
    )
    tagging.prepare(config)
    return Case(tagging.TASK, config)


CASES: dict[str, Callable[[Path], Case]] = {
    "fusion": fusion_case,
    "rebuild": rebuild_case,
    "published": published_case,
    "tagging": tagging_case,
}
MODULES = {"fusion": fusion, "rebuild": rebuild, "published": rebuild, "tagging": tagging}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def one_of_two(rank: int, name: str, cache: Path, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    case = without_chance(CASES[name](cache))
    last = list(fit(case.task, Trial(case.config, rank=rank, world_size=2)))[-1]
    assert last.state is not None
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((last.metrics, last.state()["model"])))
    dist.barrier()
    dist.destroy_process_group()


def without_chance(case: Case) -> Case:
    """Without dropout and drawn windows: two ranks draw other numbers than one."""
    config = replace(case.config, model=replace(case.config.model, dropout=0.0), epochs=2)
    if isinstance(config, tagging.Config):
        return Case(case.task, replace(config, augment=mabe.Augment(noise=0.0, jitter=0)))
    if isinstance(config, fusion.Config):
        return Case(case.task, replace(config, missing_prob=0.0))
    config = replace(config, rebuild=replace(config.rebuild, dropout=0.0, share=1.0))
    # The contrast compares the windows of a batch with each other, so that a share of the batch has another loss.
    return Case(case.task, replace(config, loss=replace(config.loss, alpha_contrast=0.0)))


@pytest.mark.parametrize("name", CASES)
class TestEveryTask:
    @pytest.fixture
    def case(self, name: str, cache: Path) -> Case:
        return CASES[name](cache)

    def test_splits_share_no_window(self, case: Case) -> None:
        train, val = (case.task.data(case.config, split, Ranks()) for split in ("train", "val"))
        taken = [set(split[torch.arange(len(split))]["index"].tolist()) for split in (train, val)]
        assert taken[0]
        assert taken[1]
        assert not taken[0] & taken[1]

    def test_every_training_sample_has_a_name_of_its_own(self, case: Case) -> None:
        train = case.task.data(case.config, "train", Ranks())
        assert len(set(case.task.names(case.config, range(len(train))))) == len(train)

    def test_gathering_draws_no_random_number(self, case: Case) -> None:
        train = case.task.data(case.config, "train", Ranks())
        drawn = []
        for samples in (0, 4):
            seed_everything(0)
            _ = train[torch.arange(samples)]
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        assert drawn[0] == drawn[1]

    def test_the_seed_alone_decides_the_model(self, case: Case) -> None:
        models = []
        for _ in range(2):
            seed_everything(0, "model")
            models.append(case.task.model(case.config).state_dict())
        assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])

    def test_every_trained_parameter_takes_part(self, case: Case) -> None:
        model = case.task.model(case.config)
        batch = case.task.data(case.config, "train", Ranks())[torch.arange(8)]
        pairs = case.task.loss(model, batch, case.config)
        total = torch.stack([summed for summed, _ in pairs.values()]).sum()
        total.backward()
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        assert trained
        assert not [key for key, value in trained.items() if value.grad is None]
        assert total.isfinite()
        assert len({int(count) for _, count in pairs.values()}) == 1

    def test_scores_of_parts_add_up(self, case: Case) -> None:
        model = case.task.model(case.config).eval()
        val = case.task.data(case.config, "val", Ranks())
        everything, half = torch.arange(len(val)), len(val) // 2
        with torch.no_grad():
            whole, *parts = (
                case.task.score(model, val[indices], case.config)
                for indices in (everything, everything[:half], everything[half:])
            )
        for key, (summed, count) in whole.items():
            assert sum(float(part[key][0]) for part in parts) == pytest.approx(float(summed), rel=1e-4)
            assert sum(int(part[key][1]) for part in parts) == int(count)

    def test_its_module_says_what_a_step_takes(self, case: Case, name: str) -> None:
        need = MODULES[name].memory_need
        smaller = replace(case.config, optim=replace(case.config.optim, batch_size=4))
        assert need(Trial(smaller)) < need(Trial(case.config))

    def test_resumed_equals_uninterrupted_after_every_epoch(self, case: Case) -> None:
        whole = [(report.metrics, report.state()) for report in fit(case.task, Trial(case.config)) if report.state]
        for epoch in range(len(whole) - 1):
            *_, last = fit(case.task, Trial(case.config, resume=whole[epoch][1]))
            assert last.state is not None
            weights = last.state()["model"]
            assert all(torch.equal(weights[key], whole[-1][1]["model"][key]) for key in weights)
            assert without_time(last.metrics) == without_time(whole[-1][0])

    @pytest.mark.slow
    def test_two_ranks_train_as_one(self, case: Case, name: str, cache: Path, tmp_path: Path) -> None:
        spawn(one_of_two, args=(name, cache, tmp_path), nprocs=2)
        (metrics, weights), (_, other) = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1))
        assert all(torch.equal(weights[key], other[key]) for key in weights)
        alone = without_chance(case)
        *_, last = fit(alone.task, Trial(alone.config))
        assert last.state is not None
        for key, value in last.state()["model"].items():
            # A quarter of a step of Adam's, which a gradient that is next to nothing may turn, added up otherwise.
            torch.testing.assert_close(weights[key], value, rtol=0, atol=5e-4)
        assert metrics["loss"] == pytest.approx(last.metrics["loss"], rel=1e-3)
        signs = {key: last.metrics[key] for key in last.metrics if key.startswith(("grad_norm_", "std_"))}
        assert {key: metrics.get(key) for key in signs} == pytest.approx(signs, rel=1e-2)
        assert bool(signs) == (name != "tagging")


def without_time(metrics: Any) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key != "samples_per_s"}
