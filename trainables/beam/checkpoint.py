"""Checkpoints of the beam family: what they say of their training, and the weights in them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainables.beam.config import Data, Model
from trainables.contract import State, UserError

SETTINGS = "settings"  # the entry of a checkpoint that holds `unseen_settings`

Weights = dict[str, Tensor]


class HasNetwork(Protocol):
    """A config of fusion training, as far as it says what its weights mean."""

    @property
    def data(self) -> Data: ...

    @property
    def model(self) -> Model: ...


def unseen_settings(config: HasNetwork) -> dict[str, Any]:
    """By name what the weights depend on for their meaning, and what was held out of their training.

    As far as the weights' shapes do not show it: a checkpoint has it beside them.
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
    wanted += ["augment", "flip"] if data.split == "legacy" else []  # copies are made before it is drawn
    settings |= {f"data.{name}": getattr(data, name) for name in wanted}
    settings["data.longest_history"] = data.reach  # or data.history: with the steps, which windows there are
    settings["data.steps"] = data.steps
    settings["data.simulated"] = asdict(data.simulated) if data.root is None else None
    return settings


def with_settings(state: Callable[[], State], settings: dict[str, Any]) -> State:
    return {**state(), SETTINGS: settings}


def given_weights(name: str, path: str, config: HasNetwork) -> Weights:
    """The weights in a checkpoint of fusion training that the setting `name` gives for networks of `config`.

    Raises `UserError` where it is none, or was trained with other settings that the weights' shapes do not show.
    """
    what = f"{name} = {path}"
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{what}: it is a folder; give the checkpoint in it, {file / 'checkpoint.pt'} if exported")
    state = read_checkpoint(file, what)
    if (other := first_difference(state, config)) is not None:
        setting, theirs, ours = other
        raise UserError(
            f"{what}: it was trained with {setting} = {theirs}, and here that is {ours}. Its weights would mean "
            "something else, or windows that are held out here have trained it: set it as it was there"
        )
    weights = weights_of(state)
    if any(name.startswith("fusion.") for name in weights):
        raise UserError(f"{what}: a checkpoint of a rebuild, and not of fusion training")
    if config.model.missing != "token":  # an encoder's view of nothing stands in, and no token that may have trained
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("absent.")}
    return weights


def load_given(network: nn.Module, name: str, path: str, config: HasNetwork) -> None:
    """Put the weights of `given_weights` into a fusion network; `UserError` where they are of another one, too."""
    weights = given_weights(name, path, config)
    try:
        network.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{name} = {path}: {error}") from None


def first_difference(state: State, config: HasNetwork) -> tuple[str, Any, Any] | None:
    """A setting with which a checkpoint was trained and that is another here, and its values there and here."""
    theirs = state.get(SETTINGS, {})
    pairs = ((name, theirs.get(name, ours), ours) for name, ours in unseen_settings(config).items())
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def read_checkpoint(file: Path, what: str) -> State:
    """The state in a checkpoint of this family; raises `UserError`, which begins with `what`, where it is none."""
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such file") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{what}: it cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{what}: no checkpoint of fusion training, it has no entry `model`")
    return state


def weights_of(state: Mapping[str, Any]) -> Weights:
    """The network's weights in a state of training: the average over steps where there is one."""
    return {**state["model"], **state.get("ema", {})}
