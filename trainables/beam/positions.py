"""The car's two known positions as tokens of every fusion stage.

Shape suffixes: B batch, G numbers of a position, W width of a description, C width of a stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainables.beam.blocks import legacy_init
from trainables.beam.config import Model

POSITIONS = 2  # instants of a window with a known position
DESCRIPTION = 128
# Positions are of about unit spread over the street; between two instants a car moves a twentieth to a tenth of that.
DISPLACEMENT_SCALE = 10.0


class PositionTokens(nn.Module):
    """Positions -> tokens of each stage, each stage also seeing the tokens of the one before.

    linear: the published way, two numbers through one Linear. mlp: a description of the position and of the way
    between the two (the beam wanted is that of a later instant, so speed matters), which every stage sees.
    """

    def __init__(self, gps_width: int, model: Model) -> None:
        super().__init__()
        mlp = model.gps_embedding == "mlp"
        before = (DESCRIPTION if mlp else gps_width, *model.channels)
        self.describe = _describe(gps_width, model.dropout) if mlp else None
        self.tokens = nn.ModuleList(nn.Linear(*pair) for pair in zip(before, model.channels, strict=False))
        self.reminders = nn.ModuleList(nn.Linear(DESCRIPTION, width) for width in model.channels[1:]) if mlp else None
        if model.mamba_init == "legacy":
            self.apply(legacy_init)

    def description(self, gps_B2G: Tensor) -> Tensor:
        """What `forward` wants: (B, 2, W), or the positions themselves."""
        if self.describe is None:
            return gps_B2G
        way_B2G = DISPLACEMENT_SCALE * (gps_B2G[:, 1:] - gps_B2G[:, :1]).expand_as(gps_B2G)
        described_B2W: Tensor = self.describe(torch.cat([gps_B2G, way_B2G], 2))
        return described_B2W

    def forward(self, stage: int, description_B2W: Tensor, before_B2C: Tensor | None) -> Tensor:
        """Tokens of a stage, (B, 2, C); `before` are those that left the previous stage, None for the first."""
        tokens_B2C: Tensor = self.tokens[stage](description_B2W if before_B2C is None else before_B2C)
        if self.reminders is not None and stage > 0:
            tokens_B2C = tokens_B2C + self.reminders[stage - 1](description_B2W)
        return tokens_B2C


def _describe(gps_width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * gps_width, DESCRIPTION),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(DESCRIPTION, DESCRIPTION),
        nn.GELU(),
        nn.Dropout(dropout),
    )
