"""A fusion network that trains in milliseconds."""

from __future__ import annotations

from trainables.beam.config import Model

SMALL = Model(
    channels=(4, 8, 12, 16),
    image_depths=(1, 1, 1, 1),
    sensor_depths=(1, 1, 1, 1),
    norm="group",
    n_layer=1,
    d_state=2,
    anchors=2,
)
