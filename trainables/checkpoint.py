"""Checkpoints of the shared loop: their weights, and the settings that they were trained with."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainables.contract import State, UserError

# The entry that says by name what the weights depend on for their meaning, as far as their shapes do not show it.
SETTINGS = "settings"

Weights = dict[str, Tensor]


def with_settings(state: Callable[[], State], settings: Mapping[str, Any]) -> State:
    return {**state(), SETTINGS: settings}


def first_difference(state: State, settings: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """A setting with which a checkpoint was trained and that is another here, and its values there and here."""
    theirs = state.get(SETTINGS, {})
    pairs = ((name, theirs.get(name, ours), ours) for name, ours in settings.items())
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def read_checkpoint(file: Path, what: str) -> State:
    """The state in a checkpoint of the shared loop; raises `UserError`, which begins with `what`, where it is none."""
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such file") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{what}: it cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{what}: no checkpoint of the training loop, it has no entry `model`")
    return state


def weights_of(state: Mapping[str, Any]) -> Weights:
    """The network's weights in a state of training: the average over steps where there is one."""
    return {**state["model"], **state.get("ema", {})}
