"""The car's two known positions as tokens of every fusion stage.

Shape suffixes: B batch, G numbers per position, W width of a description, C width of a stage.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainables.beam.config import Model

POSITIONS = 2  # instants of a window with a known position
DESCRIPTION = 128  # width of a description


class PositionTokens(nn.Module):
    """Turns positions into tokens for each stage, which also depend on the previous stage's output tokens.

    linear: as published, one Linear before each stage. mlp: an MLP first computes a description of each position, which
    every later stage gets as well.
    """

    def __init__(self, gps_width: int, model: Model) -> None:
        super().__init__()
        mlp = model.gps_embedding == "mlp"
        before = (DESCRIPTION if mlp else gps_width, *model.channels)
        self.describe = _describe(gps_width, model.dropout) if mlp else None
        self.tokens = nn.ModuleList(nn.Linear(*pair) for pair in zip(before, model.channels, strict=False))
        self.reminders = nn.ModuleList(nn.Linear(DESCRIPTION, width) for width in model.channels[1:]) if mlp else None

    def description(self, gps_B2G: Tensor) -> Tensor:
        """Return `forward`'s input: the MLP's descriptions, (B, 2, W), or with `linear` the positions themselves."""
        return gps_B2G if self.describe is None else self.describe(gps_B2G)

    def forward(self, stage: int, description_B2W: Tensor, before_B2C: Tensor | None) -> Tensor:
        """Return a stage's tokens, (B, 2, C); `before_B2C` are the previous stage's outputs, None for the first."""
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
