"""What in a trial's state says that training has blown it up, and what does not."""

from __future__ import annotations

import math

import numpy as np
import torch

from search.states import blown_up


def test_what_has_blown_up_is_found_wherever_it_is_in_a_state() -> None:
    nan, inf = torch.tensor(math.nan), math.inf
    weights = torch.tensor([1.0, -2.0])
    found = {
        "optimizer.state.0.exp_avg": {"optimizer": {"state": {0: {"exp_avg": nan}}}},
        "ema.1.0": {"ema": [torch.ones(1), (nan.half(),)]},
        "w": {"w": np.array([1.0, np.nan]), "names": np.array(["w"])},
        "phase": {"phase": torch.tensor(complex(0, math.nan))},
    }
    for where, state in found.items():
        told = blown_up(state)
        assert told is not None
        assert (told.where, str(told.value)) == (where, "nan")
    assert blown_up({"model": {"w": torch.tensor([1.0, -2.0, inf])}}) == ("model.w", inf)
    assert blown_up([weights, torch.tensor([-inf, inf]).half()]) == ("1", inf)
    assert blown_up({"w": np.array([3.0, -inf], dtype=np.float32)}) == ("w", -inf)


def test_infinities_that_mean_something_are_no_sign_of_a_blow_up() -> None:
    inf = math.inf
    state = {
        "epoch": 3,
        "name": "x",
        "order": torch.arange(3),
        "w": torch.ones(2).to(torch.float8_e4m3fn),
        "sparse": torch.eye(2).to_sparse(),
        "mask": torch.full((3, 3), -inf).triu(1),
        "bias and mask": torch.tensor([[0.0, -inf], [-0.5, 0.0]]),
        "least so far": torch.full((2,), inf),
        "most so far": np.array([-inf, -inf]),
        "best": inf,
    }
    assert blown_up(state) is None
