"""The selective scan and the Mamba layer against mamba-ssm's own reference, and to the last digits against a rewrite.

mamba-ssm's reference computes in float32, and only where its files are (`make .venv/mamba-ssm`); the rewrite follows
the recurrence one token at a time, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mamba_reference import HOW_TO_GET_IT, Reference, load_reference
from torch import Tensor, nn

from trainables.beam import mamba
from trainables.beam.mamba import Mamba, selective_scan

CHUNK = 4  # tokens at once in these tests
BATCH, WIDTH, STATES = 2, 5, 3


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(mamba, "CHUNK_NUMBERS", CHUNK * BATCH * WIDTH * STATES)


@pytest.fixture(scope="module")
def reference() -> Reference:
    found = load_reference()
    if found is None:
        pytest.skip(HOW_TO_GET_IT)
    return found


def naive_scan(u_BDL: Tensor, delta_BDL: Tensor, a_DN: Tensor, b_BNL: Tensor, c_BNL: Tensor, skip_D: Tensor) -> Tensor:
    h_BDN = u_BDL.new_zeros(*u_BDL.shape[:2], a_DN.shape[1])
    outputs = []
    for t in range(u_BDL.shape[2]):
        delta_BD1 = delta_BDL[:, :, t, None]
        h_BDN = torch.exp(delta_BD1 * a_DN) * h_BDN + delta_BD1 * u_BDL[:, :, t, None] * b_BNL[:, None, :, t]
        outputs.append((h_BDN * c_BNL[:, None, :, t]).sum(2) + skip_D * u_BDL[:, :, t])
    return torch.stack(outputs, 2)


def scan_inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [
        normal(BATCH, WIDTH, length),
        F.softplus(normal(BATCH, WIDTH, length)),
        -normal(WIDTH, STATES).exp(),
        normal(BATCH, STATES, length),
        normal(BATCH, STATES, length),
        normal(WIDTH),
    ]
    return [x.to(dtype).requires_grad_() for x in inputs]


LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 5 * CHUNK + 3]


def values_and_gradients(scan: Any, inputs: list[Tensor]) -> list[Tensor]:
    y = scan(*inputs)
    weight = torch.linspace(-1, 1, y.shape[2], dtype=y.dtype)  # so that every token's gradient differs
    return [y, *torch.autograd.grad((y * weight).sum(), inputs)]


@pytest.mark.parametrize("length", LENGTHS)
def test_scan_and_its_gradients_equal_those_of_mamba_ssm(reference: Reference, length: int) -> None:
    ours, theirs = (
        values_and_gradients(scan, scan_inputs(length, torch.float32)) for scan in (selective_scan, reference.scan)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_scan_and_its_gradients_equal_the_recurrence(length: int) -> None:
    ours, expected = (
        values_and_gradients(scan, scan_inputs(length, torch.float64)) for scan in (selective_scan, naive_scan)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK])
def test_gradients_are_those_of_small_differences(length: int) -> None:
    assert torch.autograd.gradcheck(selective_scan, scan_inputs(length, torch.float64), fast_mode=True)


@pytest.mark.parametrize("length", [CHUNK, 3 * CHUNK])
def test_a_second_backward_pass_gives_the_same_gradients(length: int) -> None:
    inputs = scan_inputs(length, torch.float32)
    y = selective_scan(*inputs).square().sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs), first, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"d_state": 5, "d_conv": 2, "expand": 1}])
def test_layer_and_its_gradients_equal_those_of_mamba_ssm(reference: Reference, settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = Mamba(40, **settings), reference.layer(40, **settings)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 30, 40, requires_grad=True)

    def run(layer: nn.Module) -> list[Tensor]:
        y = layer(x)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return [y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])]

    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-4)


def test_states_that_decay_at_once_stay_finite() -> None:
    """exp(-1e4) underflows; a form that divides by cumulative decay would give inf here."""
    inputs = scan_inputs(3 * CHUNK, torch.float32)
    inputs[1] = (inputs[1] * 1e4).detach().requires_grad_()
    y = selective_scan(*inputs)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(x.grad).all() for x in inputs if x.grad is not None)


def test_autocast_leaves_the_scan_in_float32() -> None:
    layer, x = Mamba(16), torch.randn(2, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.02)


def test_the_bias_of_delta_is_not_rounded_with_what_depends_on_the_input() -> None:
    """Where it begins, near -7, the steps of bfloat16 are larger than what training moves it by."""
    layer, delta = Mamba(16), torch.full((1, 1, 1), 1e-3)
    torch.nn.init.constant_(layer.dt_proj.bias, -6.9)
    torch.nn.init.ones_(layer.dt_proj.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw_BLD = layer._raw_delta(delta.bfloat16())
    torch.testing.assert_close(raw_BLD, torch.full((1, 1, 32), -6.899), rtol=0, atol=1e-5)


def test_layer_has_the_parameters_of_mamba_ssm() -> None:
    width, inner, states, rank = 40, 80, 16, math.ceil(40 / 16)
    assert {name: tuple(p.shape) for name, p in Mamba(width).named_parameters()} == {
        "in_proj.weight": (2 * inner, width),
        "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, states),
        "D": (inner,),
        "out_proj.weight": (width, inner),
    }


def test_initial_steps_lie_between_a_thousandth_and_a_tenth() -> None:
    torch.manual_seed(0)
    layer = Mamba(64, d_state=4)
    delta = F.softplus(layer.dt_proj.bias)
    assert 0.00099 < delta.min() < 0.002
    assert 0.05 < delta.max() < 0.101
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 5).expand(128, 4))
    assert torch.equal(layer.D, torch.ones(128))


def test_no_token_sees_a_later_one() -> None:
    torch.manual_seed(0)
    layer, x = Mamba(8), torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 12:] += 1
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_layer_equals_the_recurrence_written_out() -> None:
    """One pass of mamba_simple.Mamba.forward (its slow path), rewritten from its equations."""
    torch.manual_seed(0)
    layer, x = Mamba(16, d_state=4).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    u, gate = (x @ layer.in_proj.weight.T).chunk(2, -1)
    padded, kernel = F.pad(u, (0, 0, 3, 0)), layer.conv1d.weight[:, 0].T
    shifted = torch.stack([padded[:, k : k + 9] * kernel[k] for k in range(4)]).sum(0)
    u = F.silu(shifted + layer.get_parameter("conv1d.bias"))
    delta, b, c = torch.split(u @ layer.x_proj.weight.T, [1, 4, 4], -1)
    delta = F.softplus(delta @ layer.dt_proj.weight.T + layer.dt_proj.bias)
    y = naive_scan(u.mT, delta.mT, -layer.A_log.exp(), b.mT, c.mT, layer.D).mT
    torch.testing.assert_close(layer(x), (y * F.silu(gate)) @ layer.out_proj.weight.T, rtol=1e-8, atol=1e-8)
