"""Checkpoints of the beam family: the training settings in them, and their weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from trainables.beam.config import Data, Model
from trainables.checkpoint import Weights, first_difference, read_checkpoint, weights_of
from trainables.contract import UserError


class HasNetwork(Protocol):
    """Any config with the `data` and `model` settings of fusion training."""

    @property
    def data(self) -> Data: ...

    @property
    def model(self) -> Model: ...


def unseen_settings(config: HasNetwork) -> dict[str, Any]:
    """Return by name the settings on which the weights' meaning and the held-out windows depend.

    Only those that the weights' shapes do not reveal; a checkpoint stores them beside the weights.
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
    wanted += ["augment", "flip"] if data.split == "legacy" else []  # copies are made before this split is drawn
    settings |= {f"data.{name}": getattr(data, name) for name in wanted}
    settings["data.longest_history"] = data.reach  # or data.history: with the steps, this determines the windows
    settings["data.steps"] = data.steps
    settings["data.simulated"] = asdict(data.simulated) if data.root is None else None
    return settings


def given_weights(name: str, path: str, config: HasNetwork) -> Weights:
    """Load the weights of the fusion checkpoint `path`, given in the setting `name`, for networks of `config`.

    Raises `UserError` if it is no such checkpoint, or was trained with other `unseen_settings`.
    """
    what = f"{name} = {path}"
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{what}: it is a folder; give the checkpoint in it, {file / 'checkpoint.pt'} if exported")
    state = read_checkpoint(file, what)
    if (other := first_difference(state, unseen_settings(config))) is not None:
        setting, theirs, ours = other
        raise UserError(
            f"{what}: it was trained with {setting} = {theirs}, and here that is {ours}. Its weights would mean "
            "something else, or windows that are held out here have trained it: set it as it was there"
        )
    weights = weights_of(state)
    if any(name.startswith("fusion.") for name in weights):
        raise UserError(f"{what}: a checkpoint of a rebuild, and not of fusion training")
    if config.model.missing != "token":  # encoded stand-in inputs are used, not tokens that may have been trained
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("absent.")}
    return weights


def load_given(network: nn.Module, name: str, path: str, config: HasNetwork) -> None:
    """Load `given_weights` into a fusion network; raises `UserError` also if the weights do not fit."""
    weights = given_weights(name, path, config)
    try:
        network.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{name} = {path}: {error}") from None
