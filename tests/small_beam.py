"""A fusion network that trains in milliseconds, the published one, and windows of noise for either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables.beam.config import Data, Model, Simulated
from trainables.beam.simulator import simulate

SMALL = Model(
    channels=(4, 8, 12, 16),
    image_depths=(1, 1, 1, 1),
    sensor_depths=(1, 1, 1, 1),
    norm="group",
    n_layer=1,
    d_state=2,
    anchors=2,
)
PUBLISHED = Model(
    mamba_init="legacy",
    ln_shape="plane",
    align_backward=False,
    residual=False,
    missing="zerolike",
    gps_embedding="linear",
    tokens="all",
)
GPS_WIDTH = 3


@dataclass(frozen=True)
class DataConfig:
    """As much of a config as the data need."""

    data: Data


def raw_files(settings: Simulated) -> Any:
    """A fixture: the folder of simulated files in the public layout, which the tests of a module share."""

    @pytest.fixture(scope="module")
    def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("written") / "root"
        simulate(root, settings)
        return root

    return written


def simulated(folder: Path) -> Data:
    """Simulated passes that are prepared in a moment, in `folder`."""
    return Data(prepared=str(folder), history=2, image_size=32, simulated=Simulated(passes=8, frames=8))


def noise(count: int, data: Data) -> dict[str, Tensor]:
    """A batch of so many windows in the types of the data."""
    history, size = data.history, data.image_size
    whole = {
        "image": torch.randint(256, (count, history, 3, size, size), dtype=torch.uint8),
        "lidar": torch.randint(6, (count, history, 1, size, size), dtype=torch.uint8),
        "radar": torch.rand(count, history, data.channels("radar"), size, size).half(),
        "gps": torch.randn(count, 2, GPS_WIDTH),
    }
    beam = torch.randint(64, (count,) if data.steps == 1 else (count, data.steps))
    labels = {"beam": beam, "scenario": torch.arange(count) % 2}
    return {**{name: whole[name] for name in data.modalities}, **labels}
