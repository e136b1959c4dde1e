"""The fusion network that a rebuild starts from: given as a checkpoint, or trained once and kept for all trials."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from trainables.beam import fusion
from trainables.cache import cache_folder
from trainables.contract import Diverged, Trial, UserError
from trainables.loop import fit

VERSION = 1  # part of the key: raise it whenever the same settings would train another network
POLL_S = 1.0

Weights = dict[str, Tensor]
Turn = Literal["ready", "train", "wait"]


def load_weights(path: Path) -> Weights:
    """The network's weights in a checkpoint of `fusion.train`: the average over steps where there is one."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"rebuild.pretrained = {path}: there is no such file") from None
    if "model" not in state:
        raise UserError(f"rebuild.pretrained = {path}: no checkpoint of fusion training, it has no entry `model`")
    return {**state["model"], **state.get("ema", {})}


def trained_once(config: fusion.Config, seed: int, trial: Trial) -> Weights:
    """The weights of a network trained as `config` says, by whichever process gets there first.

    All processes that share the cache folder share the result, and each of them keeps it in `trial.cache`.
    """
    kept = cache_folder(config.data.prepared) / f"fusion-{key(config, seed)}.pt"
    if kept not in trial.cache:
        with contextlib.ExitStack() as held:
            while (turn := _agreed(_turn(kept, held) if trial.rank == 0 else "wait", trial)) == "wait":
                if trial.rank == 0:
                    time.sleep(POLL_S)
            if turn == "train":
                _train(config, seed, trial, kept)
        trial.cache[kept] = load_weights(kept)
    weights: Weights = trial.cache[kept]
    return weights


def key(config: fusion.Config, seed: int) -> str:
    """Equal for settings that train the same network from the same data."""
    settings = dataclasses.asdict(config)
    del settings["data"]["prepared"]  # a place, which says nothing about the data
    del settings["score_without"]  # asked of the network, not taught to it
    del settings["model"]["channels_last"]  # a layout, which changes no weight's meaning
    if config.missing_prob == 0 and config.model.missing == "randlike":
        settings["model"]["missing"] = (
            "zerolike"  # both have no tokens to learn, and differ only where a sensor is missing
        )
    text = json.dumps([VERSION, torch.__version__, seed, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _turn(kept: Path, held: contextlib.ExitStack) -> Turn:
    """What to do now; the lock is in `held` when it is to train."""
    if kept.exists():
        return "ready"
    kept.parent.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context(kept.with_suffix(".lock").open("w"))
    try:
        # Polled and never waited for: the other ranks would sit in a collective for as long as another process trains.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return "wait"
    return "ready" if kept.exists() else "train"  # it may have been finished in between


def _agreed(turn: Turn, trial: Trial) -> Turn:
    """Rank 0's decision, on every rank."""
    if trial.world_size == 1:
        return turn
    told: list[Turn] = [turn]
    dist.broadcast_object_list(told, src=0, device=trial.device)
    return told[0]


def _train(config: fusion.Config, seed: int, trial: Trial, kept: Path) -> None:
    if trial.rank == 0:
        print(f"beam rebuild: training the fusion network for {config.epochs} epochs, once for all trials", flush=True)
    began_s = time.monotonic()
    pretraining = dataclasses.replace(trial, config=config, seed=seed, resume=None)
    try:
        for report in fit(fusion.task_for(config), pretraining):
            last = report
    except Diverged as error:
        raise Diverged(f"pre-training: {error.reason}", error.step) from error
    if trial.rank == 0:
        assert last.state is not None
        _save(last.state(), kept)
        took_s = time.monotonic() - began_s
        print(
            f"beam rebuild: DBA {last.metrics['dba']:.3f} with nothing missing, {took_s:.0f} s, kept in {kept}",
            flush=True,
        )
    if trial.world_size > 1:
        dist.barrier()  # nobody reads before it is written


def _save(state: dict[str, Any], kept: Path) -> None:
    unfinished = kept.with_suffix(".unfinished")
    torch.save({name: state[name] for name in ("model", "ema")}, unfinished)
    unfinished.replace(kept)
