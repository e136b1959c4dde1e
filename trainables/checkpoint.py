"""Checkpoints of the shared loop: their weights, and the settings they were trained with."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainables.contract import State, UserError

# The entry with the settings, by name, that the meaning of the weights depends on but their shapes do not reveal.
SETTINGS = "settings"

Weights = dict[str, Tensor]


def with_settings(state: Callable[[], State], settings: Mapping[str, Any]) -> State:
    return {**state(), SETTINGS: settings}


def first_difference(state: State, settings: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first of `settings` that differs in a checkpoint: name, its value there, and here; None if none."""
    theirs = state.get(SETTINGS, {})
    pairs = ((name, theirs.get(name, ours), ours) for name, ours in settings.items())
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def read_checkpoint(file: Path, what: str) -> State:
    """Load a checkpoint of the shared loop; raises a `UserError` that begins with `what` if the file is none."""
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such file") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{what}: it cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{what}: not a checkpoint of the training loop, it has no entry `model`")
    return state


def weights_of(state: Mapping[str, Any]) -> Weights:
    """Return the network's weights in a training state, with the EMA's values where there are any."""
    return {**state["model"], **state.get("ema", {})}
