"""What in a trial's state says that training has blown it up, and what does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from search.workers.states import Watch


# torch says so of sparse and of ragged tensors
@pytest.mark.filterwarnings("ignore:.*(beta|prototype).*:UserWarning")
def test_a_nan_is_found_wherever_it_is_in_a_state() -> None:
    nan = torch.tensor(math.nan)
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.bias, math.nan)
    found = {
        "optimizer.state.0.exp_avg": {"optimizer": {"state": {0: {"exp_avg": nan}}}},
        "ema.1.0": {"ema": [torch.ones(1), (nan.half(),)]},
        "w": {"w": np.array([1.0, np.nan]), "names": np.array(["w"])},
        "phase": {"phase": torch.tensor(complex(0, math.nan))},
        "phases.0": {"phases": [np.array([complex(0, math.nan)])]},
        "model.bias": {"model": layer},
        "adam.state.0.exp_avg": {"adam": spoilt_optimizer()},
        "csr": {"csr": torch.tensor([[1.0, math.nan]]).to_sparse_csr()},
        "opaque": {"opaque": torch.tensor([1.0, math.nan]).to_mkldnn()},
        "own.w": within_itself({"w": nan}),
        "ragged": {"ragged": torch.nested.nested_tensor([torch.ones(2), nan[None]], layout=torch.jagged)},
    }
    for where, state in found.items():
        told = Watch().look(state)
        assert told is not None
        assert (told.where, str(told.value)) == (where, "nan")


def within_itself(own: dict[str, Any]) -> dict[str, Any]:
    """A state that holds itself, in a list and by an object of its own, before what else is in it."""
    state: dict[str, Any] = {}

    class Holder:
        def state_dict(self) -> dict[str, Any]:
            return {"holder": self, "state": state}

    state.update(itself=state, parts=[state], holder=Holder(), own=own)
    return state


def spoilt_optimizer() -> torch.optim.Optimizer:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.tensor([1.0, math.nan])
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("spoilt", [torch.tensor(math.inf), torch.tensor([-math.inf, -1.0]).half()])
def test_what_was_finite_and_is_no_more_has_blown_up(spoilt: torch.Tensor) -> None:
    watch, healthy = Watch(), torch.zeros_like(spoilt)
    assert watch.look({"model": {"w": healthy, "v": np.ones(2)}}) is None
    assert watch.look({"model": {"w": spoilt, "v": np.ones(2)}}) == (
        "model.w",
        spoilt.min() if spoilt.dim() else math.inf,
    )
    assert watch.look({"model": {"w": healthy, "v": np.array([1.0, math.inf])}}) == ("model.v", math.inf)


@pytest.mark.filterwarnings("ignore:.*(beta|prototype).*:UserWarning")
def test_infinities_that_were_always_there_are_no_sign_of_it() -> None:
    inf, watch = math.inf, Watch()
    state = {
        "epoch": 3,
        "name": "x",
        "order": torch.arange(3),
        "w": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.eye(2).to_sparse(),
        "rows": torch.eye(2).to_sparse_csr(),
        "blocks": torch.eye(2).to_sparse_bsc((1, 1)),
        "ragged": torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
        "nowhere": torch.ones(2, device="meta"),
        "never run": torch.nn.Sequential(torch.nn.LazyLinear(2), torch.nn.LazyBatchNorm1d()),
        "opaque": torch.ones(2).to_mkldnn(),
        "around": within_itself({"w": torch.ones(2)}),
        "twice": [torch.ones(1)] * 2,
        "class": torch.nn.Linear,
        "four bits": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "last validation": math.nan,
        "mask": torch.full((3, 3), -inf).triu(1),
        "edges": torch.tensor([-inf, -1.0, 1.0, inf]),
        "thresholds": np.array([inf, 0.9, 0.1]),
        "least so far": torch.full((2,), inf),
        "best": inf,
    }
    for _ in range(2):
        assert watch.look(state) is None
    assert watch.look({**state, "least so far": torch.tensor([0.3, inf])}) is None
