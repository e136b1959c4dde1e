"""What the engine and a trainable may rely on."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from trainables.contract import Diverged, Report, Trial, UserError, default_device


def test_a_trial_takes_its_place_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    trial = Trial({"lr": 0.1})
    assert (trial.rank, trial.world_size) == (3, 8)
    assert (Trial({}, rank=1, world_size=2).rank, Trial({}, rank=1, world_size=2).world_size) == (1, 2)


def test_a_trial_is_alone_without_that_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    trial = Trial({})
    assert (trial.rank, trial.world_size, trial.seed, trial.resume, trial.number) == (0, 1, 0, None, None)


@pytest.mark.parametrize(("local_rank", "index"), [(None, 0), ("1", 1), ("5", 1)])
def test_the_device_is_the_gpu_of_the_local_rank(
    local_rank: str | None, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert default_device() == torch.device("cuda", index)


def test_the_device_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Trial({}).device == torch.device("cpu")


def test_a_gpu_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Trial({}, device=torch.device("cuda")).device == torch.device("cuda", 1)
    assert Trial({}, device=torch.device("cuda", 0)).device == torch.device("cuda", 0)
    assert Trial({}, device=torch.device("cpu")).device == torch.device("cpu")


def test_a_device_may_be_given_as_text() -> None:
    trial = Trial({}, device="cpu")  # type: ignore[arg-type]
    assert trial.device == torch.device("cpu")


def test_each_trial_has_a_cache_of_its_own_unless_it_is_given_one() -> None:
    shared: dict[str, int] = {}
    assert Trial({}).cache is not Trial({}).cache
    assert Trial({}, cache=shared).cache is Trial({}, cache=shared).cache


def test_trials_and_reports_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError, match="seed"):
        Trial({}).seed = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError, match="metrics"):
        Report({}).metrics = {}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("diverged", "text"),
    [
        (Diverged("loss_trans is not finite", 812), "loss_trans is not finite (step 812)"),
        (Diverged("loss_trans is not finite", step=0), "loss_trans is not finite (step 0)"),
        (Diverged("the objective is not finite"), "the objective is not finite"),
    ],
)
def test_a_divergence_says_why_and_when_and_keeps_it_from_process_to_process(diverged: Diverged, text: str) -> None:
    for same in (diverged, pickle.loads(pickle.dumps(diverged)), copy.copy(diverged)):
        assert str(same) == text
        assert (same.reason, same.step) == (diverged.reason, diverged.step)


def test_a_users_mistake_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        raise UserError("optim.lr = -1 must be positive")
