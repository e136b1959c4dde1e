"""Seeds and states, by which a resumed trial equals an uninterrupted one, and a repeated trial the first.

The global generators are reseeded for every epoch from what identifies it, so a state needs no generator states.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainables.contract import Report, State
from trainables.optim import require


def seed_from(*parts: int | str) -> int:
    """Return a 63-bit seed derived from all parts, the same on every machine."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU and GPU) with `seed_from(*parts)`."""
    seed = seed_from(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Generators(NamedTuple):
    """States of the generators that `seed_everything` seeds; of the GPU generators, one device's."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: Tensor
    cuda: Tensor | None


def generators(device: torch.device) -> Generators:
    """Return the global generators' states. Called in every step: takes 0.06 ms, most of it NumPy's."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return Generators(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)


def set_generators(states: Generators, device: torch.device) -> None:
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.cpu)
    if states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda, device)


def state_of(parts: Mapping[str, Any], epoch: int) -> State:
    """Return the parts' states after an epoch, as CPU copies that `torch.load(weights_only=True)` can read."""
    return {"epoch": epoch, **{name: on_cpu(part.state_dict()) for name, part in parts.items()}}


def restore(parts: Mapping[str, Any], state: State | None) -> int:
    """Load the parts from a state, if there is one, and return the epoch to continue with."""
    if state is None:
        return 0
    for name, part in parts.items():
        saved = state.get(name)
        # The state may be from a trial with other settings: without fp16 its scaler state is empty, without early
        # stopping it has no best epoch.
        if saved is not None and (saved or not isinstance(part, torch.amp.GradScaler)):
            part.load_state_dict(on_cpu(saved))  # a copy: an optimizer would keep writing into the state's tensors
    return int(state["epoch"]) + 1


class StoredModel:
    """The part of a model that a state holds: the parameters and buffers for whose names `saved` is true.

    A loaded state must contain all of these. The others are left unchanged, unless the state contains them too.
    Raises UserError if `saved` is false for a trained parameter.
    """

    def __init__(self, model: nn.Module, saved: Callable[[str], bool]) -> None:
        for name, parameter in model.named_parameters():
            rule = "be true of a parameter that is trained"
            require(saved(name) or not parameter.requires_grad, f"saved({name!r})", False, rule)
        self._model, self._saved = model, saved

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self._model.state_dict().items() if self._saved(name)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = {name: value for name, value in self._model.state_dict().items() if not self._saved(name)}
        self._model.load_state_dict({**own, **state})


class Best:
    """Keeps the metrics and weights of the best epoch, with which a trial with early stopping ends.

    weights: the parts of a state that determine the scores.
    """

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = weights
        self._kept: dict[str, Any] = {}

    def keep(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Keep the epoch just scored as the best so far."""
        weights = {name: on_cpu(part.state_dict()) for name, part in self._weights.items()}
        self._kept = {"metrics": {**metrics, "best_epoch": epoch + 1}, "weights": weights}

    def in_place_of(self, last: Report) -> Report:
        """Return `last` with the best epoch's metrics and weights; the rest of its state stays: the trial is over."""
        state, kept = last.state, self._kept
        if not kept or state is None:  # nothing was kept: the metric was never a number, or there is no early stopping
            return last
        return Report(kept["metrics"], state=lambda: {**state(), **kept["weights"]})

    def state_dict(self) -> dict[str, Any]:
        return self._kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = dict(state)


def on_cpu(tree: Any) -> Any:
    """Return a copy of nested dicts and lists with every tensor copied to the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [on_cpu(value) for value in tree]
    return tree
