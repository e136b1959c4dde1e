"""Fusion stages, which mix the tokens of all sensors, and their kinds of blocks.

Shape suffixes: B batch, T tokens, C width, N heads, W = C / N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.beam.config import HEADS, Model
from trainables.beam.mamba import Mamba
from trainables.optim import mark_undecayed

POSITION_SPREAD = 0.3


class Fusion(nn.Module):
    """One fusion stage, (B, T, C) -> (B, T, C): position table, dropout, blocks, LayerNorm."""

    def __init__(self, tokens: int, width: int, model: Model) -> None:
        super().__init__()
        self.residual = model.residual or model.block == "transformer"
        # The published table starts from zeros. Tokens with distinct positions from the start learn much faster.
        spread = 0.0 if model.mamba_init == "legacy" else POSITION_SPREAD
        self.position_TC = nn.Parameter(spread * torch.randn(tokens, width))
        mark_undecayed(self.position_TC)
        self.dropout = nn.Dropout(model.dropout)
        block = BLOCKS[model.block]
        self.blocks = nn.Sequential(*(block(tokens, width, model) for _ in range(model.n_layer)))
        self.norm = nn.LayerNorm(width)
        if model.mamba_init == "legacy" or model.block == "transformer":
            self.apply(legacy_init)

    def forward(self, x_BTC: Tensor) -> Tensor:
        mixed_BTC: Tensor = self.norm(self.blocks(self.dropout(x_BTC + self.position_TC)))
        return mixed_BTC


class UniBlock(nn.Module):
    """A bare Mamba layer, which scans the tokens in one direction and has no norm.

    Without the residual it is the published block that diverges: its output grows roughly with the fifth power of its
    input, so that large tokens grow doubly exponentially over the blocks and overflow in the forward pass.
    """

    def __init__(self, tokens: int, width: int, model: Model) -> None:
        super().__init__()
        self.residual = model.residual
        self.mamba = Mamba(width, model.d_state, model.d_conv, model.expand)

    def forward(self, x_BTC: Tensor) -> Tensor:
        out_BTC: Tensor = self.mamba(x_BTC)
        return x_BTC + out_BTC if self.residual else out_BTC


class BiBlock(nn.Module):
    """Two Mamba layers that gate each other, one over the tokens and one over the reversed tokens.

    `align_backward` flips the backward branch back into token order. The published block does not: it multiplies token
    i of one branch with token T-1-i of the other.
    """

    def __init__(self, tokens: int, width: int, model: Model) -> None:
        super().__init__()
        self.residual, self.align_backward = model.residual, model.align_backward
        self.norm = nn.LayerNorm((tokens, width) if model.ln_shape == "plane" else width)
        self.input = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.forwards = Mamba(width, model.d_state, model.d_conv, model.expand)
        self.backwards = Mamba(width, model.d_state, model.d_conv, model.expand)

    def forward(self, x_BTC: Tensor) -> Tensor:
        u_BTC = self.input(self.norm(x_BTC))
        reversed_BTC = u_BTC.flip(1)
        backward_BTC = self.backwards(reversed_BTC)
        gate_BTC = F.leaky_relu(self.gate(reversed_BTC), 0.2)
        if self.align_backward:
            backward_BTC, gate_BTC = backward_BTC.flip(1), gate_BTC.flip(1)
        out_BTC: Tensor = backward_BTC * gate_BTC + self.forwards(u_BTC) * backward_BTC
        return x_BTC + out_BTC if self.residual else out_BTC


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: self-attention over all tokens and an MLP, each with a residual.

    The published baseline (TransFuser, Chitta et al., 2022): four heads, a hidden layer of four times the width, ReLU.
    """

    def __init__(self, tokens: int, width: int, model: Model) -> None:
        super().__init__()
        self.dropout = model.dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend = nn.Linear(width, 3 * width)  # queries, keys and values
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        attended_BTC = x_BTC + self._dropped(self.project(self._attention(self.norms[0](x_BTC))))
        return attended_BTC + self._dropped(self.mlp(self.norms[1](attended_BTC)))

    def _attention(self, x_BTC: Tensor) -> Tensor:
        asked = self.attend(x_BTC).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query_BNTW, key_BNTW, value_BNTW = asked.unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed_BNTW = F.scaled_dot_product_attention(query_BNTW, key_BNTW, value_BNTW, dropout_p=dropout)
        return mixed_BNTW.transpose(1, 2).flatten(2)

    def _dropped(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(x_BTC, self.dropout, self.training)


BLOCKS: dict[str, type[UniBlock] | type[BiBlock] | type[TransformerBlock]] = {
    "uni": UniBlock,
    "bi": BiBlock,
    "cs_bi": BiBlock,  # sensors exchange channels beforehand, see `swap_channels`
    "transformer": TransformerBlock,
}


def legacy_init(module: nn.Module) -> None:
    """Apply the published initialiser. It also resets Linears inside Mamba: step sizes become 0.69, not 0.001-0.1."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def swap_channels(tokens: list[Tensor]) -> list[Tensor]:
    """Exchange channels between k sensors: part j of sensor i comes from sensor (i + j) mod k.

    Three sensors exchange thirds, as published, and two halves; a single one is unchanged. Parts have C // k channels,
    the last one the remainder too. All sensors have the same (B, T, C); the exchange is not undone after the fusion.
    """
    sensors = len(tokens)
    if sensors < 2:
        return tokens
    width = tokens[0].shape[2]
    part = width // sensors
    sizes = [part] * (sensors - 1) + [width - part * (sensors - 1)]
    parts = [x_BTC.split(sizes, dim=2) for x_BTC in tokens]
    return [torch.cat([parts[(i + j) % sensors][j] for j in range(sensors)], 2) for i in range(sensors)]
