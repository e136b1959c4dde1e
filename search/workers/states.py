"""A trial's state: to and from bytes, and whether training has blown it up."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from trainables.contract import State


class BlownUp(NamedTuple):
    """A blown-up tensor or array in a state: the keys to it, joined by dots, and the value in it: nan, inf or -inf."""

    where: str
    value: float


class Watch:
    """Checks the states of one trial for values that training has blown up.

    These are a NaN, and an infinity among real numbers that were all finite in an earlier state. Other infinities may
    be legitimate: masks, bin edges and distances contain some, and so does a running minimum before its first value.
    """

    def __init__(self) -> None:
        self._finite: set[str] = set()  # keys to what was all finite in an earlier state

    def look(self, state: Any) -> BlownUp | None:
        """Return the first blown-up tensor or array in `numbers_in` a state; None without one."""
        for where, numbers in numbers_in(state):
            if bool(numbers.isnan().any()):
                return BlownUp(where, math.nan)
            if not numbers.is_floating_point():
                continue
            above, below = bool((numbers == math.inf).any()), bool((numbers == -math.inf).any())
            if not above and not below:
                self._finite.add(where)
            elif where in self._finite:
                return BlownUp(where, math.inf if above else -math.inf)
        return None


def numbers_in(state: Any, path: str = "", around: tuple[int, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the keys to each tensor or array of real or complex numbers in a state, and the numbers as a dense tensor.

    Looks into mappings, sequences, and objects with a `state_dict`, such as modules and optimizers. Plain numbers are
    no weights, and may be NaN: a metric among them, say.

    around: the ids of what contains this state; what contains itself is looked into once.
    """
    if id(state) in around:  # of these only: the id of anything else may be that of an earlier object that is gone
        return
    around = (*around, id(state))
    if isinstance(state, torch.Tensor):
        if (state.is_floating_point() or state.is_complex()) and state.dtype is not torch.float4_e2m1fn_x2:
            yield from ((path, numbers) for numbers in _dense(state))
        return
    if isinstance(state, np.ndarray):
        if state.dtype.kind in "fc":
            yield path, torch.from_numpy(state.astype(np.float64 if state.dtype.kind == "f" else np.complex128))
        return
    if callable(getattr(state, "state_dict", None)) and not isinstance(state, type):
        state = state.state_dict()
    if isinstance(state, Mapping):
        items: Iterable[tuple[Any, Any]] = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return
    for key, item in items:
        yield from numbers_in(item, f"{path}.{key}" if path else str(key), around)


def _dense(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor's numbers in layouts and types that torch can compare; a meta or a lazy tensor has none."""
    if tensor.is_meta or is_lazy(tensor):
        return []
    if tensor.is_mkldnn:
        return _dense(tensor.to_dense())
    if tensor.is_nested:
        return [numbers for part in tensor.unbind() for numbers in _dense(part)]
    if tensor.layout == torch.sparse_coo:
        return [tensor._values()]
    if tensor.layout != torch.strided:
        return [tensor.values()]
    return [tensor if tensor.dtype.itemsize > 1 else tensor.float()]


def save_state(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_state(saved: bytes) -> State:
    """Load a state onto the CPU. This search wrote it itself, so it may contain any object."""
    return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=False)
