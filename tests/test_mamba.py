"""The selective scan and the Mamba layer against a rewrite that follows the recurrence one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainables.beam import mamba
from trainables.beam.mamba import Mamba, selective_scan

CHUNK = 4  # tokens at once in these tests
BATCH, WIDTH, STATES = 2, 5, 3


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(mamba, "CHUNK_NUMBERS", CHUNK * BATCH * WIDTH * STATES)


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


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_scan_and_its_gradients_equal_the_recurrence(length: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs, reference = scan_inputs(length, dtype), scan_inputs(length, torch.float64)
    weight = torch.linspace(-1, 1, length, dtype=torch.float64)  # so that every token's gradient differs
    y, y_reference = selective_scan(*inputs), naive_scan(*reference)
    (y * weight).sum().backward()
    (y_reference * weight).sum().backward()

    torch.testing.assert_close(y.double(), y_reference.double(), rtol=tolerance, atol=tolerance)
    for x, x_reference in zip(inputs, reference, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), x_reference.grad, rtol=tolerance, atol=tolerance)


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
