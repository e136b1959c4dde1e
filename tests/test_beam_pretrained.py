"""The network that a rebuild starts from: what it is keyed by, that it is trained once, and what interrupts that."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_beam import SMALL, simulated

from trainables.beam import fusion, pretrained, rebuild
from trainables.beam.config import BeamLoss, Data, Pretrain, RebuildLoss, Simulated
from trainables.beam.simulator import simulate
from trainables.cache import write_whole
from trainables.checkpoint import Weights
from trainables.contract import Diverged, Report, Trial, UserError
from trainables.loop import Task, fit
from trainables.optim import EarlyStop, Optim

OPTIM = Optim(lr=1e-3, batch_size=8)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> rebuild.Config:
    data = simulated(tmp_path_factory.mktemp("cache"))
    made = rebuild.Config(data=data, model=SMALL, optim=OPTIM, pretrain=Pretrain(epochs=1, optim=OPTIM))
    rebuild.prepare(made)
    return made


def test_the_key_of_a_network_is_what_it_was_trained_by(config: rebuild.Config) -> None:
    base, arrays = config.fusion, ["image-1.npy"]
    key = pretrained.key(base, 0, arrays)
    assert key == pretrained.key(replace(base, score_without=(), score_each=True), 0, arrays)
    assert key == pretrained.key(replace(base, data=replace(base.data, prepared="/else")), 0, arrays)
    wide, last = (replace(base.model, channels=(8, 8, 12, 16), channels_last=last) for last in (False, True))
    assert pretrained.key(replace(base, model=wide), 0, arrays) == pretrained.key(replace(base, model=last), 0, arrays)
    stopping = replace(base, optim=replace(base.optim, early_stop=EarlyStop("dba_missing", "max")))
    without = [replace(stopping, score_without=(sensor,)) for sensor in ("image", "radar")]
    assert len({pretrained.key(made, 0, arrays) for made in without}) == 2, "that score ends the training"
    assert key != pretrained.key(base, 1, arrays)
    assert key != pretrained.key(base, 0, ["image-2.npy"])
    assert key != pretrained.key(replace(base, loss=BeamLoss(kind="ce")), 0, arrays)
    none, *others = (
        replace(base.model, norm="batch", pretrained_encoders=x) for x in ("none", "enc", "imagenet", None)
    )
    keys = [pretrained.key(replace(base, model=model), 0, arrays) for model in (none, *others)]
    assert len(set(keys)) == 3
    assert keys[0] == keys[-1]
    assert base == replace(config, loss=RebuildLoss(alpha_trans=7.0), optim=Optim(lr=1.0)).fusion


def test_a_network_is_not_that_of_changed_encoders(config: rebuild.Config, tmp_path: Path) -> None:
    weights = tmp_path / "resnet-34/model.safetensors"
    weights.parent.mkdir()
    model = replace(config.model, norm="batch", pretrained_encoders=str(tmp_path))
    keys = []
    for content in (b"first", b"better"):
        weights.write_bytes(content)
        pretrained._digest.cache_clear()
        keys.append(pretrained.key(replace(config.fusion, model=model), 0, []))
    assert keys[0] != keys[1]
    assert keys[1] == pretrained.key(replace(config.fusion, model=model), 0, [])


def test_a_process_keeps_the_last_network_alone(config: rebuild.Config) -> None:
    cache: dict[Any, Any] = {"else": 1}
    for seed in (1, 2, 1):
        untrained = replace(config.fusion, epochs=1)
        pretrained.trained_once(untrained, seed, Trial(untrained, cache=cache))
        assert len(cache) == 2


def test_a_network_is_not_that_of_a_changed_window_file(tmp_path: Path) -> None:
    simulate(tmp_path / "root", Simulated(passes=2, frames=6))
    data = Data(root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"), modalities=("gps",))

    def key() -> str:
        return pretrained.key(fusion.Config(data=data), 0, pretrained.arrays_of(data))

    whole = key()
    assert key() == whole
    windows = tmp_path / "root/Multi_Modal" / data.csv
    windows.write_text("".join(windows.read_text().splitlines(keepends=True)[:-1]))
    assert key() != whole


def test_a_network_is_the_same_however_its_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(tmp_path / "root", Simulated(passes=2, frames=6))
    monkeypatch.chdir(tmp_path)
    named = [Data(root=root, prepared="cache", modalities=("gps",)) for root in ("root", f"{tmp_path}/root")]
    one, other = (pretrained.key(fusion.Config(data=data), 0, pretrained.arrays_of(data)) for data in named)
    assert one == other


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"fusion\.lock cannot be made and locked: .*; set data\.prepared to a folder"):
        pretrained._turn(tmp_path / "cache/fusion.pt", contextlib.ExitStack())


def test_one_process_trains_while_others_wait(
    config: rebuild.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def slow_training(config: fusion.Config, seed: int, trial: Trial, kept: Path) -> None:
        trained.append(seed)
        time.sleep(0.2)
        write_whole(kept, functools.partial(torch.save, {"model": {"x": torch.ones(1)}}))

    monkeypatch.setattr(pretrained, "_train", slow_training)
    monkeypatch.setattr(pretrained, "POLL_S", 0.01)
    wanted = replace(config.fusion, data=replace(config.data, prepared=str(tmp_path)))
    fusion.prepare(wanted)
    got: list[Weights] = []
    threads = [
        threading.Thread(target=lambda: got.append(pretrained.trained_once(wanted, 0, Trial(wanted)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    assert len(trained) == 1
    assert [weights["x"].item() for weights in got] == [1.0, 1.0, 1.0]


def test_a_pretraining_that_was_interrupted_is_gone_on_with(
    config: rebuild.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = replace(config.fusion, epochs=2)
    folder = Path(str(wanted.data.prepared))
    whole = pretrained.trained_once(wanted, 7, Trial(wanted))
    (kept,) = folder.glob(f"fusion-{pretrained.key(wanted, 7, pretrained.arrays_of(wanted.data))}.pt")
    kept.rename(tmp_path / "whole.pt")

    def interrupted(task: Task, trial: Trial) -> Iterator[Report]:
        yield next(fit(task, trial))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretrained, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrained.trained_once(wanted, 7, Trial(wanted))
    assert not kept.exists()
    capsys.readouterr()
    gone_on = pretrained.trained_once(wanted, 7, Trial(wanted))
    assert "for 2 epochs, 1 of them done before" in capsys.readouterr().out
    assert gone_on.keys() == whole.keys()
    assert all(torch.equal(gone_on[name], tensor) for name, tensor in whole.items())
    assert not list(folder.glob("*.partial"))


def test_a_pretraining_that_diverges_is_a_mistake_of_the_user_and_not_tried_again(
    config: rebuild.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def diverge(*_: object) -> Iterator[Report]:
        tried.append(1)
        raise Diverged("loss_focal is not finite", 3)
        yield

    monkeypatch.setattr(pretrained, "fit", diverge)
    wanted = replace(config.fusion, data=replace(config.data, prepared=str(tmp_path)))
    expected = (
        r"pre-training: loss_focal is not finite \(step 3\); lower pretrain\.optim\.lr or .*, or remove .*diverged to"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=expected):
            pretrained.trained_once(wanted, 0, Trial(wanted))
    assert len(tried) == 1
    (lock,) = tmp_path.glob("fusion-*.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (marker,) = tmp_path.glob("fusion-*.diverged")
    marker.unlink()
    with pytest.raises(UserError, match=expected):
        pretrained.trained_once(wanted, 0, Trial(wanted))
    assert len(tried) == 2


def on_two_machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each of two ranks, threads with a cache folder of their own, gets of `trained_once`, or is told by it."""
    meet, told = threading.Barrier(2, timeout=300), list[bytes]()

    def broadcast(objects: list[Any], src: int, device: torch.device) -> None:
        if threading.current_thread().name == str(src):
            told[:] = [pickle.dumps(objects)]
        meet.wait()
        objects[:] = pickle.loads(told[0])
        meet.wait()

    outcomes: list[Any] = [None, None]

    def rank(number: int) -> None:
        data = Data(prepared=str(folder / str(number)), modalities=("gps",), simulated=Simulated(passes=2, frames=6))
        config = fusion.Config(data=data, model=SMALL, epochs=2)
        fusion.prepare(config)
        try:
            outcomes[number] = pretrained.trained_once(config, 0, Trial(config, rank=number, world_size=2))
        except Exception as error:
            outcomes[number] = f"{type(error).__name__}: {error}"

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    ranks = [threading.Thread(target=rank, args=(number,), name=str(number)) for number in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(timeout=600)
    assert not any(thread.is_alive() for thread in ranks)
    return outcomes


def test_ranks_on_two_machines_start_from_the_network_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[Any] = []

    def one_epoch(task: Task, trial: Trial) -> Iterator[Report]:
        resumed.append(trial.resume)
        done = -1 if trial.resume is None else trial.resume["epoch"]
        state = {"epoch": done + 1, "model": {"x": torch.full((1,), done + 2.0)}, "ema": {}}
        yield Report({"dba": 0.5}, state=lambda: state)

    monkeypatch.setattr(pretrained, "fit", one_epoch)
    first, second = on_two_machines(tmp_path, monkeypatch)
    assert resumed == [None, None]
    assert first["x"].item() == second["x"].item() == 1.0
    (kept,) = tmp_path.rglob("fusion-*.pt")
    torch.save({"epoch": 0, **torch.load(kept)}, kept.with_suffix(".partial"))  # as an interrupted training leaves it
    kept.unlink()
    first, second = on_two_machines(tmp_path, monkeypatch)
    assert [state["epoch"] for state in resumed[2:]] == [0, 0]
    assert first["x"].item() == second["x"].item() == 2.0


def test_ranks_on_two_machines_fail_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: fusion.Config, seed: int, trial: Trial, kept: Path) -> None:
        if trial.rank == 0:
            torch.save({"optimizer": {}}, kept)

    monkeypatch.setattr(pretrained, "_train", broken)
    first, second = on_two_machines(tmp_path, monkeypatch)
    assert first == "KeyError: 'model'"
    assert second == first
