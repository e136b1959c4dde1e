"""Mamba, the selective state-space layer, in plain PyTorch, or on CUDA with mamba-ssm's kernel if it is installed.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t . h_t + skip u_t

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023. Parameter names, shapes
and initial values are those of mamba_ssm.modules.mamba_simple.Mamba, so that state dicts are interchangeable.

Shape suffixes: B batch, L tokens, C width, D inner width (expand * C), N states per inner channel, R rank of delta.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainables.optim import mark_undecayed

_NO_KERNEL = ""  # why there is none
try:  # optional: needs nvcc at build time
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except Exception as error:  # the package imports much else, which may fail in many ways
    selective_scan_fn = None
    _NO_KERNEL = f"{type(error).__name__}: {error}"

# State elements held at once, tokens * B * N * D, so that a chunk stays in the CPU's cache. At B=8, L=962, D=128, N=16
# this is 16 tokens, the fastest of 8 to 128. A scan of up to two chunks runs as one, which saves calls.
CHUNK_NUMBERS = 2**18
CUDA_CHUNK_NUMBERS = 2**25  # a GPU has no such cache, and every operation costs a kernel launch


def selective_scan(
    u_BDL: Tensor, delta_BDL: Tensor, a_DN: Tensor, b_BNL: Tensor, c_BNL: Tensor, skip_D: Tensor
) -> Tensor:
    """Return the selective scan over L, (B, D, L), in u's dtype; computes in at least float32. `delta` is positive."""
    dtype = torch.promote_types(u_BDL.dtype, torch.float32)
    inputs = [x.to(dtype) for x in (u_BDL, delta_BDL, a_DN, b_BNL, c_BNL, skip_D)]
    kernel = selective_scan_fn if u_BDL.is_cuda and dtype is torch.float32 else None  # compiled for float32 only
    if u_BDL.is_cuda and selective_scan_fn is None:
        _warn_of_no_kernel()
    with torch.autocast(u_BDL.device.type, enabled=False):
        y_BDL: Tensor = (kernel or _plain_scan)(*inputs)
    return y_BDL.to(u_BDL.dtype)


@functools.cache
def _never_compiled() -> Callable[..., Tensor]:
    """Return `selective_scan`, to be left as it is by torch.compile.

    It has a Python step per token, and compiling them all takes longer than training. As a decorator, this would import
    the compiler with this module, which takes two seconds also where no network is built.
    """
    scan: Callable[..., Tensor] = torch.compiler.disable(selective_scan)
    return scan


@functools.cache
def _warn_of_no_kernel() -> None:
    print(
        f"beam: the scan runs without mamba-ssm's kernel, far slower ({_NO_KERNEL}); see [gpu] in pyproject.toml",
        flush=True,
    )


def _plain_scan(u_BDL: Tensor, delta_BDL: Tensor, a_DN: Tensor, b_BNL: Tensor, c_BNL: Tensor, skip_D: Tensor) -> Tensor:
    u_LBD, delta_LBD, b_LBN, c_LBN = (x.permute(2, 0, 1).contiguous() for x in (u_BDL, delta_BDL, b_BNL, c_BNL))
    y_LBD: Tensor = _Scan.apply(u_LBD, delta_LBD, a_DN.t().contiguous(), b_LBN, c_LBN) + u_LBD * skip_D
    return y_LBD.permute(1, 2, 0)


class _Scan(torch.autograd.Function):
    """The scan with time as the first axis, so that a step is one operation on a contiguous slice.

    Keeping every state for the backward pass would take N times the input's memory, and autograd over L steps is slower
    than the arithmetic. So only the state at each chunk's start is kept, and the backward pass recomputes the others,
    as the CUDA kernel does. A short scan of one chunk keeps them all: 4 MB at most.
    """

    @staticmethod
    def forward(ctx: Any, u_LBD: Tensor, delta_LBD: Tensor, a_ND: Tensor, b_LBN: Tensor, c_LBN: Tensor) -> Tensor:
        y_LBD = torch.empty_like(u_LBD)
        h_BND = u_LBD.new_zeros(u_LBD.shape[1], *a_ND.shape)
        kept = []
        for piece in _pieces(len(u_LBD), h_BND):
            kept.append(h_BND)
            decay_LBND, h_LBND = _states(u_LBD[piece], delta_LBD[piece], a_ND, b_LBN[piece], h_BND)
            y_LBD[piece] = torch.matmul(c_LBN[piece].unsqueeze(2), h_LBND).squeeze(2)
            h_BND = h_LBND[-1].clone()
        ctx.in_one = len(kept) == 1 and h_LBND.numel() <= 2 * CHUNK_NUMBERS  # a GPU's chunks may be larger
        if ctx.in_one:
            kept += [decay_LBND, h_LBND]
        ctx.save_for_backward(u_LBD, delta_LBD, a_ND, b_LBN, c_LBN, *kept)
        return y_LBD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_LBD: Tensor) -> tuple[Tensor, ...]:
        u_LBD, delta_LBD, a_ND, b_LBN, c_LBN, *kept = ctx.saved_tensors
        starts = kept[:1] if ctx.in_one else kept
        grad_u, grad_delta, grad_b, grad_c = (torch.empty_like(x) for x in (u_LBD, delta_LBD, b_LBN, c_LBN))
        grad_a_ND = torch.zeros_like(a_ND)
        carry_BND = torch.zeros_like(starts[0])  # gradient of this chunk's last state from later tokens
        for piece, start_BND in zip(reversed(_pieces(len(u_LBD), carry_BND)), reversed(starts), strict=True):
            u, delta, b, c, grad_y = (x[piece] for x in (u_LBD, delta_LBD, b_LBN, c_LBN, grad_y_LBD))
            decay_LBND, h_LBND = kept[1:] if ctx.in_one else _states(u, delta, a_ND, b, start_BND)
            grad_c[piece] = torch.matmul(h_LBND, grad_y.unsqueeze(3)).squeeze(3)

            grad_h_LBND = grad_y.unsqueeze(2) * c.unsqueeze(3)
            grad_h_LBND[-1] += carry_BND
            _accumulate(decay_LBND.unbind(0)[:0:-1], grad_h_LBND.unbind(0)[::-1])
            carry_BND = decay_LBND[0] * grad_h_LBND[0]

            grad_in = torch.matmul(b.unsqueeze(2), grad_h_LBND).squeeze(2)  # of delta * u
            grad_b[piece] = torch.matmul(grad_h_LBND, (delta * u).unsqueeze(3)).squeeze(3)
            grad_h_LBND[1:] *= h_LBND[:-1]  # kept factors and states are not modified: backward may run again
            grad_h_LBND[0] *= start_BND
            grad_exponent = grad_h_LBND.mul_(decay_LBND)  # of delta * A
            grad_u[piece] = grad_in * delta
            grad_delta[piece] = grad_in * u + (grad_exponent * a_ND).sum(2)
            grad_a_ND += (grad_exponent * delta.unsqueeze(2)).sum((0, 1))
        return grad_u, grad_delta, grad_a_ND, grad_b, grad_c


def _pieces(tokens: int, state: Tensor) -> list[slice]:
    """Split a scan into chunks that fit the cache, but not too short, because each keeps a state like `state`."""
    fitting = (CUDA_CHUNK_NUMBERS if state.is_cuda else CHUNK_NUMBERS) // state.numel()
    chunk = max(1, fitting, math.isqrt(tokens) // 4)
    if tokens <= 2 * chunk:
        return [slice(0, tokens)]
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _states(u_LBD: Tensor, delta_LBD: Tensor, a_ND: Tensor, b_LBN: Tensor, start_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Return decay factors and states of one chunk, both (L, B, N, D), that follow the state `start_BND`."""
    decay_LBND = (delta_LBD.unsqueeze(2) * a_ND).exp_()
    h_LBND = (delta_LBD * u_LBD).unsqueeze(2) * b_LBN.unsqueeze(3)
    h_LBND[0].addcmul_(decay_LBND[0], start_BND)
    _accumulate(decay_LBND.unbind(0)[1:], h_LBND.unbind(0))
    return decay_LBND, h_LBND


def _accumulate(factors: Sequence[Tensor], terms: Sequence[Tensor]) -> None:
    """Do `terms[t + 1] += factors[t] * terms[t]` in place, for one t after another."""
    for factor, before, term in zip(factors, terms, terms[1:], strict=False):
        term.addcmul_(factor, before)


class Mamba(nn.Module):
    """A causal Mamba layer, (B, L, C) -> (B, L, C): each token sees itself and those before it."""

    def __init__(self, width: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, self.d_state, self.dt_rank = expand * width, d_state, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        mark_undecayed(self.A_log, self.D)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.scan = _never_compiled()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_inverse_softplus(_log_uniform(inner, 0.001, 0.1)))

    def forward(self, x_BLC: Tensor) -> Tensor:
        u_BDL, gate_BDL = self.in_proj(x_BLC).transpose(1, 2).chunk(2, dim=1)
        u_BDL = F.silu(self.conv1d(u_BDL)[..., : x_BLC.shape[1]])  # cut off the right-hand padding, to be causal
        sizes = [self.dt_rank, self.d_state, self.d_state]
        delta_BLR, b_BLN, c_BLN = self.x_proj(u_BDL.transpose(1, 2)).split(sizes, dim=2)
        delta_BDL = F.softplus(self._raw_delta(delta_BLR)).transpose(1, 2)
        a_DN = -self.A_log.exp()
        y_BDL = self.scan(u_BDL, delta_BDL, a_DN, b_BLN.transpose(1, 2), c_BLN.transpose(1, 2), self.D)
        out_BLC: Tensor = self.out_proj((y_BDL * F.silu(gate_BDL)).transpose(1, 2))
        return out_BLC

    def _raw_delta(self, delta_BLR: Tensor) -> Tensor:
        """Return delta before softplus, (B, L, D).

        The bias is added in at least float32, as in mamba-ssm: near -7 bfloat16 has steps of 0.03.
        """
        if delta_BLR.dtype == self.dt_proj.bias.dtype:
            raw_BLD: Tensor = self.dt_proj(delta_BLR)
        else:
            raw_BLD = F.linear(delta_BLR, self.dt_proj.weight).to(self.dt_proj.bias.dtype) + self.dt_proj.bias
        return raw_BLD


def _log_uniform(count: int, low: float, high: float) -> Tensor:
    return (torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low)).exp()


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
