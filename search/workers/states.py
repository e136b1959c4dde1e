"""A trial's state: as bytes, and whether training has blown it up."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from trainables.contract import State


class BlownUp(NamedTuple):
    """Of a state, the keys to a tensor or an array, joined by dots, and what is in it: nan, inf or -inf."""

    where: str
    value: float


class Watch:
    """Looks through the states of one trial for what training has blown up.

    That is a NaN, and an infinity where all was finite in an earlier state. Others may belong where they are: masks,
    the edges of bins and distances hold some, and so does the least of what has not been seen yet.
    """

    def __init__(self) -> None:
        self._finite: set[str] = set()  # where all was, in an earlier state

    def look(self, state: Any) -> BlownUp | None:
        """The first tensor or array, in nested mappings, sequences and modules, that has blown up; None: none has."""
        for where, numbers in numbers_in(state):
            if bool(numbers.isnan().any()):
                return BlownUp(where, math.nan)
            if not numbers.is_floating_point() or numbers.layout != torch.strided:
                continue
            above, below = bool((numbers == math.inf).any()), bool((numbers == -math.inf).any())
            if not above and not below:
                self._finite.add(where)
            elif where in self._finite:
                return BlownUp(where, math.inf if above else -math.inf)
        return None


def numbers_in(state: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor and array of real or complex numbers in a state, as a tensor, with the keys to it."""
    if isinstance(state, torch.Tensor):
        if state.is_floating_point() or state.is_complex():
            yield path, state
        return
    if isinstance(state, np.ndarray):
        if state.dtype.kind in "fc":
            yield path, torch.from_numpy(state.astype(np.float64 if state.dtype.kind == "f" else np.complex128))
        return
    if isinstance(state, torch.nn.Module):
        state = state.state_dict()
    if isinstance(state, Mapping):
        items: Iterable[tuple[Any, Any]] = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return
    for key, item in items:
        yield from numbers_in(item, f"{path}.{key}" if path else str(key))


def save_state(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_state(saved: bytes) -> State:
    """A state on the CPU. It was written by this search, so that any object may be in it."""
    state: State = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=False)
    return state
