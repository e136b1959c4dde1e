"""The fusion network that a rebuild starts from where none is given: trained once and kept for all trials."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist

from trainables.beam import fusion
from trainables.beam.config import Data
from trainables.beam.prepare import array_path, prepare_data, wanted_arrays
from trainables.cache import cache_folder
from trainables.checkpoint import Weights, weights_of
from trainables.contract import Diverged, State, Trial, UserError
from trainables.loop import fit

VERSION = 4  # part of the key: raise it whenever the same settings would train another network
POLL_S = 1.0
MISSING = "dba_missing"  # the only score that depends on `score_without`

Turn = Literal["ready", "train", "wait"]
T = TypeVar("T")


def trained_once(config: fusion.Config, seed: int, trial: Trial) -> Weights:
    """The weights of a network trained as `config` says, by whichever process gets there first.

    All processes that share the cache folder share the result, and each of them keeps it in `trial.cache`. Ranks on
    several machines have a folder each, and that of rank 0 counts. Where that training diverged, all of them raise
    `UserError`: no setting that a trial draws can mend it.
    """
    kept = cache_folder(config.data.prepared) / f"fusion-{key(config, seed, arrays_of(config.data))}.pt"
    if kept not in trial.cache:
        with contextlib.ExitStack() as held:
            while (turn := _agreed(_turn(kept, held) if trial.rank == 0 else "wait", trial)) == "wait":
                if trial.rank == 0:
                    time.sleep(POLL_S)
            if turn == "train":
                _train(config, seed, trial, kept)
        marker = marker_of(kept)
        if reason := _agreed(marker.read_text() if trial.rank == 0 and marker.exists() else "", trial):
            raise UserError(
                f"pre-training: {reason}; lower pretrain.optim.lr or pretrain.optim.clip_norm, give "
                f"rebuild.pretrained, or remove {marker} to try again"
            )
        trial.cache[kept] = _by_rank_0(lambda: weights_of(_load(kept)), trial)
    weights: Weights = trial.cache[kept]
    return weights


def arrays_of(data: Data) -> list[str]:
    """Names of the prepared arrays: they say what the window files hold, where they lie and how files are decoded."""
    table = prepare_data(data)
    return [array_path(data, table, array).name for array in wanted_arrays(data, table)]


def marker_of(kept: Path) -> Path:
    """Where the reason is written down if the training of `kept` diverges."""
    return kept.with_suffix(".diverged")


def key(config: fusion.Config, seed: int, arrays: Sequence[str]) -> str:
    """Equal for settings that train the same network from the same data, whose prepared arrays have these names."""
    settings = dataclasses.asdict(config)
    del settings["data"]["prepared"]  # a place, which says nothing about the data
    watched = {rule.metric for rule in (config.optim.plateau, config.optim.early_stop) if rule is not None}
    if MISSING not in watched:  # or it steers the training
        del settings["score_without"]  # asked of the network, not taught to it
    del settings["score_each"], settings["pretrained"]  # of no pre-training
    del settings["model"]["channels_last"]  # a layout, which changes no weight's meaning
    if config.missing_prob == 0 and config.model.missing == "randlike" and MISSING not in watched:
        settings["model"]["missing"] = (
            "zerolike"  # both have no tokens to learn, and differ only where a sensor is missing
        )
    text = json.dumps([VERSION, torch.__version__, seed, settings, *arrays], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _turn(kept: Path, held: contextlib.ExitStack) -> Turn:
    """What to do now; the lock is in `held` when it is to train."""
    if _over(kept):
        return "ready"
    kept.parent.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context(kept.with_suffix(".lock").open("w"))
    try:
        # Polled and never waited for: the other ranks would sit in a collective for as long as another process trains.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return "wait"
    return "ready" if _over(kept) else "train"  # it may have been finished in between


def _over(kept: Path) -> bool:
    """Whether the training has come to an end, good or bad."""
    return kept.exists() or marker_of(kept).exists()


def _agreed(mine: T, trial: Trial) -> T:
    """What rank 0 says, on every rank."""
    if trial.world_size == 1:
        return mine
    told = [mine]
    dist.broadcast_object_list(told, src=0, device=trial.device)
    return told[0]


def _by_rank_0(load: Callable[[], T], trial: Trial) -> T:
    """What `load` returns, or raises, on rank 0, on every rank: the others would wait for a rank that failed alone."""
    mine: T | Exception | None = None
    if trial.rank == 0:
        try:
            mine = load()
        except Exception as error:
            mine = error
    told = _agreed(mine, trial)
    if isinstance(told, Exception):
        raise told
    return cast(T, told)


def _train(config: fusion.Config, seed: int, trial: Trial, kept: Path) -> None:
    """Leave the network in `kept`, or why there is none in its marker; an interrupted training is gone on with."""
    partial, outcome = kept.with_suffix(".partial"), ""

    state = _by_rank_0(lambda: _load(partial) if partial.exists() else None, trial)
    if trial.rank == 0:
        before = f", {state['epoch'] + 1} of them done before" if state is not None else ""
        print(
            f"beam rebuild: training the fusion network for {config.epochs} epochs{before}, once for all trials",
            flush=True,
        )
    began_s = time.monotonic()
    try:
        for report in fit(fusion.task_for(config), dataclasses.replace(trial, config=config, seed=seed, resume=state)):
            if trial.rank == 0:
                assert report.state is not None
                state, outcome = report.state(), f"DBA {report.metrics['dba']:.3f} with nothing missing, "
                _save(state, partial)
    except Diverged as error:
        if trial.rank == 0:
            unfinished = _unfinished(kept)
            unfinished.write_text(str(error))
            unfinished.replace(marker_of(kept))
            partial.unlink(missing_ok=True)
        return
    if trial.rank == 0:
        assert state is not None
        _save({name: state[name] for name in ("model", "ema")}, kept)
        partial.unlink()
        print(f"beam rebuild: {outcome}{time.monotonic() - began_s:.0f} s, kept in {kept}", flush=True)


def _load(path: Path) -> State:
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _save(state: State, path: Path) -> None:
    torch.save(state, _unfinished(path))
    _unfinished(path).replace(path)


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".unfinished")
