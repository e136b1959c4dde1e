"""Checkpoints of the beam family: what training noted in them besides their weights, and the weights.

Legend: N windows, S training windows.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables.beam.config import Data, Model
from trainables.beam.prepare import array_path, prepare_data
from trainables.beam.split import split
from trainables.beam.table import POWER, Table
from trainables.checkpoint import SETTINGS, Weights, first_difference, read_checkpoint, weights_of
from trainables.contract import State, UserError

TRAINED = "trained_on"  # the key of the training windows among a checkpoint's settings


class HasNetwork(Protocol):
    """Any config with the `data` and `model` settings of fusion training."""

    @property
    def data(self) -> Data: ...

    @property
    def model(self) -> Model: ...


def settings_of(config: HasNetwork) -> dict[str, Any]:
    """Return what a checkpoint stores beside the weights, because they do not reveal it.

    These are the settings that must agree, and which windows were trained on: the `sweep_digests` of these, (S,).
    """
    return {**unseen_settings(config), TRAINED: torch.from_numpy(_sides(config.data)[0])}


def _sides(data: Data) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the `sweep_digests` of the windows that are trained on, (S,), and of those that are held out, (S',)."""
    table = prepare_data(data)
    digest_N = sweep_digests(table, np.load(array_path(data, table, POWER)))
    train, val = (digest_N[side.holds(len(digest_N))] for side in split(table, data))
    return train, val


def trained_on(state: State) -> Tensor | None:
    """Return the `sweep_digests` of the windows that a checkpoint trained on; None if it does not say."""
    found: Tensor | None = state.get(SETTINGS, {}).get(TRAINED)
    return found


def sweep_digests(table: Table, power: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return a digest of the powers at each window's newest instant, (N,), given the decoded power files.

    Measured powers are never the same twice: they tell a window wherever its files lie.
    """
    sweeps = power[table.groups[POWER].at_NK[:, 0]]
    digests = (hashlib.blake2b(sweep.tobytes(), digest_size=8).digest() for sweep in sweeps)
    return np.frombuffer(bytearray(b"".join(digests)), dtype=np.int64)


def unseen_settings(config: HasNetwork) -> dict[str, Any]:
    """Return by name the settings on which the weights' meaning and the held-out windows depend.

    Only those that the weights' shapes do not reveal. Whoever uses the weights must use the same.
    """
    model, data = config.model, config.data
    wanted = ["block", "time_fusion"]
    wanted += ["residual"] if model.block != "transformer" else []
    wanted += ["align_backward"] if model.block in ("bi", "cs_bi") else []
    settings = {f"model.{name}": getattr(model, name) for name in wanted}
    wanted = ["image_size", "csv", "split", "holdout", "split_seed"]
    wanted += ["gps_repr"] if "gps" in data.modalities else []
    wanted += ["camera"] if "image" in data.modalities else []
    wanted += ["lidar", "scenario_fov"] if "lidar" in data.modalities else []
    wanted += ["augment", "flip"] if data.split == "legacy" else ["adaptation"]  # copies are made before that is drawn
    settings |= {f"data.{name}": getattr(data, name) for name in wanted}
    settings["data.longest_history"] = data.reach  # or data.history: with the steps, this determines the windows
    settings["data.steps"] = data.steps
    if data.split == "honest" and data.root is not None:  # simulated windows have passes
        settings["data.block"] = data.block_files
    settings["data.simulated"] = asdict(data.simulated) if data.root is None else None
    return settings


def given_weights(name: str, path: str, config: HasNetwork) -> Weights:
    """Load the weights of the fusion checkpoint `path`, given in the setting `name`, for networks of `config`.

    Raises `UserError` if it is no such checkpoint, was trained with other `unseen_settings` (but training may go on
    with the adaptation set), or has seen what is held out here, as when the window file has changed since.
    """
    what = f"{name} = {path}"
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{what}: it is a folder; give the checkpoint in it, {file / 'checkpoint.pt'} if exported")
    state = read_checkpoint(file, what)
    wanted = unseen_settings(config)
    if config.data.adaptation == "train":  # what is held out here has then trained nothing there, either way
        wanted.pop("data.adaptation", None)
    if (other := first_difference(state, wanted)) is not None:
        setting, theirs, ours = other
        raise UserError(
            f"{what}: it was trained with {setting} = {theirs}, and here that is {ours}. Its weights would mean "
            "something else, or windows that are held out here have trained it: set it as it was there"
        )
    if (seen := _seen(state, config.data)) > 0:
        raise UserError(
            f"{what}: {seen} of the windows that are held out here have trained it, so its scores would mean nothing; "
            "the window file, or what is in it, has changed since: train it anew"
        )
    weights = weights_of(state)
    if any(name.startswith("fusion.") for name in weights):
        raise UserError(f"{what}: a checkpoint of a rebuild, and not of fusion training")
    if config.model.missing != "token":  # encoded stand-in inputs are used, not tokens that may have been trained
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("absent.")}
    return weights


def _seen(state: State, data: Data) -> int:
    """Return how many windows that are held out here a checkpoint has trained on; 0 if it does not say.

    In the legacy split a window may be on both sides, so these count only if it was trained on others than are here.
    """
    trained = trained_on(state)
    if trained is None:
        return 0
    train, val = _sides(data)
    if data.split == "legacy" and set(train.tolist()) == set(trained.tolist()):
        return 0
    return int(np.isin(val, trained.numpy()).sum())


def load_given(network: nn.Module, name: str, path: str, config: HasNetwork) -> None:
    """Load `given_weights` into a fusion network; raises `UserError` also if the weights do not fit."""
    weights = given_weights(name, path, config)
    try:
        network.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{name} = {path}: {error}") from None
