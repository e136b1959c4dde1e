"""The fusion network that a rebuild starts from if none is given: trained once and kept for all trials."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from trainables.cache import cache_folder, locked, write_whole
from trainables.checkpoint import Weights, weights_of
from trainables.contract import Diverged, State, Trial, UserError
from trainables.loop import fit

VERSION = 6  # part of the key: increment it whenever the same settings would train another network
POLL_S = 1.0
MISSING = "dba_missing"  # the only score that depends on `score_without`

Turn = Literal["ready", "train", "wait"]
T = TypeVar("T")


def trained_once(config: fusion.Config, seed: int, trial: Trial) -> Weights:
    """Return the weights of a network trained with `config`, by whichever process comes first.

    Processes that share the cache folder share the result, and each keeps it in `trial.cache`. With ranks on several
    machines, rank 0's folder counts. If the training diverged, all ranks raise `UserError`, because no setting that a
    trial draws could help.
    """
    name = _by_rank_0(lambda: f"fusion-{key(config, seed, arrays_of(config.data))}.pt", trial)
    kept = cache_folder(config.data.prepared) / name
    if kept not in trial.cache:
        for other in [path for path in trial.cache if isinstance(path, Path) and path.match("fusion-*.pt")]:
            del trial.cache[other]  # of a search whose trials differ in it: each is hundreds of MB
        with contextlib.ExitStack() as held:
            while (turn := _by_rank_0(lambda: _turn(kept, held), trial)) == "wait":
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
    """Return the prepared arrays' file names, which identify the window files, their paths and the decoding."""
    table = prepare_data(data)
    return [array_path(data, table, array).name for array in wanted_arrays(data, table)]


def marker_of(kept: Path) -> Path:
    """Return the file that records the reason if the training of `kept` diverges."""
    return kept.with_suffix(".diverged")


def key(config: fusion.Config, seed: int, arrays: Sequence[str]) -> str:
    """Return a key that is equal for settings that train the same network from the same data.

    arrays: names of the prepared arrays, which identify the data.
    """
    settings = dataclasses.asdict(config)
    del settings["data"]["root"], settings["data"]["prepared"]  # may be written in several ways; `arrays` tell the data
    watched = {rule.metric for rule in (config.optim.plateau, config.optim.early_stop) if rule is not None}
    if MISSING not in watched:  # otherwise it steers the training
        del settings["score_without"]  # affects scores only, not training
    del settings["score_each"], settings["pretrained"]  # have no effect on pre-training
    del settings["model"]["channels_last"]  # a memory layout, which changes no weight's meaning
    settings["model"]["pretrained_encoders"] = _encoders(config)
    del settings["optim"]["eval_batch"]  # affects the time of scoring only
    if config.missing_prob == 0 and config.model.missing == "randlike" and MISSING not in watched:
        settings["model"]["missing"] = (
            "zerolike"  # neither has tokens to learn, and they differ only where a sensor is missing
        )
    text = json.dumps([VERSION, torch.__version__, seed, settings, *arrays], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _encoders(config: fusion.Config) -> str | None:
    """Return which encoder weights are taken: a folder by what is in it, and one name for having none."""
    source = config.model.pretrained_encoders
    if source is None or not config.model.has_pretrained_encoders:
        return None
    return source if source == "imagenet" else _digest(source)


@functools.cache  # as long as the weights are, which each process reads once
def _digest(source: str) -> str:
    found = hashlib.sha256()
    for name in ("resnet-18", "resnet-34"):
        for path in sorted((Path(source).expanduser() / name).glob("*.*")):
            with path.open("rb") as file:
                found.update(f"{name}/{path.name}".encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _turn(kept: Path, held: contextlib.ExitStack) -> Turn:
    """Return what to do now; for "train", `held` holds the lock."""
    if _over(kept):
        return "ready"
    with contextlib.ExitStack() as trying:
        # Polled, never waited for: the other ranks would be stuck in a collective while another process trains.
        if not trying.enter_context(locked(kept.with_suffix(".lock"), wait=False)):
            return "wait"
        if _over(kept):  # another process may have finished in between
            return "ready"
        held.enter_context(trying.pop_all())
        return "train"


def _over(kept: Path) -> bool:
    """Whether the training has ended, successfully or not."""
    return kept.exists() or marker_of(kept).exists()


def _agreed(mine: T, trial: Trial) -> T:
    """Return rank 0's value on every rank."""
    if trial.world_size == 1:
        return mine
    told = [mine]
    dist.broadcast_object_list(told, src=0, device=trial.device)
    return told[0]


def _by_rank_0(load: Callable[[], T], trial: Trial) -> T:
    """Call `load` on rank 0; return its result or raise its error on every rank, so that none waits in vain."""
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
    """Train, resuming an interrupted training, and write the network to `kept`, or a divergence to its marker."""
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
                write_whole(partial, functools.partial(torch.save, state))
    except Diverged as error:
        if trial.rank == 0:
            write_whole(marker_of(kept), functools.partial(Path.write_text, data=str(error)))
            partial.unlink(missing_ok=True)
        return
    if trial.rank == 0:
        assert state is not None
        write_whole(kept, functools.partial(torch.save, {name: state[name] for name in ("model", "ema")}))
        partial.unlink()
        print(f"beam rebuild: {outcome}{time.monotonic() - began_s:.0f} s, kept in {kept}", flush=True)


def _load(path: Path) -> State:
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    return state
