"""The car's two known positions as tokens of every fusion stage.

Shape suffixes: B batch, G numbers of a position, W width of a description, C width of a stage.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainables.beam.blocks import legacy_init
from trainables.beam.config import Model

POSITIONS = 2  # instants of a window with a known position
DESCRIPTION = 128


class PositionTokens(nn.Module):
    """Positions -> tokens of each stage, each stage also seeing the tokens of the one before.

    linear: the published way, one Linear before each stage. mlp: a small network describes the position first, and
    every stage sees that description too.
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
        return gps_B2G if self.describe is None else self.describe(gps_B2G)

    def forward(self, stage: int, description_B2W: Tensor, before_B2C: Tensor | None) -> Tensor:
        """Tokens of a stage, (B, 2, C); `before` are those that left the previous stage, None for the first."""
        tokens_B2C: Tensor = self.tokens[stage](description_B2W if before_B2C is None else before_B2C)
        if self.reminders is not None and stage > 0:
            tokens_B2C = tokens_B2C + self.reminders[stage - 1](description_B2W)
        return tokens_B2C


def _describe(gps_width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(gps_width, DESCRIPTION),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(DESCRIPTION, DESCRIPTION),
        nn.GELU(),
        nn.Dropout(dropout),
    )
