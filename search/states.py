"""A trial's state: as bytes, and whether training has blown it up."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainables.contract import State


class BlownUp(NamedTuple):
    """Of a state, the keys to a tensor or an array, joined by dots, and what is in it: nan, inf or -inf."""

    where: str
    value: float


def blown_up(state: Any, path: str = "") -> BlownUp | None:
    """The first tensor or array in nested mappings and sequences that training has blown up; None where it has none.

    Not every infinity is a sign of that. Masks are made of zeros, or of negative biases, and -inf; a smallest or
    largest value of what has not been seen yet is infinite throughout.
    """
    if isinstance(state, (torch.Tensor, np.ndarray)):
        value = _blown_up_value(state)
        return None if value is None else BlownUp(path, value)
    if isinstance(state, Mapping):
        items: Iterable[tuple[Any, Any]] = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return None
    inside = (blown_up(item, f"{path}.{key}" if path else str(key)) for key, item in items)
    return next((found for found in inside if found is not None), None)


def _blown_up_value(numbers: torch.Tensor | NDArray[Any]) -> float | None:
    if isinstance(numbers, np.ndarray):
        if numbers.dtype.kind not in "fc":
            return None
        numbers = torch.from_numpy(numbers.astype(np.complex128 if numbers.dtype.kind == "c" else np.float64))
    if not (numbers.is_floating_point() or numbers.is_complex()):
        return None
    if bool(numbers.isnan().any()):
        return math.nan
    if numbers.is_complex() or numbers.layout != torch.strided:
        return None
    above, below = numbers == math.inf, numbers == -math.inf
    if bool(above.any()) and not bool(above.all()):
        return math.inf
    return -math.inf if bool(below.any()) and bool((numbers.float() > 0).any()) else None


def save_state(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_state(saved: bytes) -> State:
    """A state on the CPU. It was written by this search, so that any object may be in it."""
    state: State = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=False)
    return state
