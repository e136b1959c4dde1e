"""The fusion network at its full size has as many parameters as the published one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_beam import PUBLISHED
from torch import nn

from trainables.beam.config import Data, Modality, Model
from trainables.beam.encoders import Encoder
from trainables.beam.network import FusionNetwork

SENSOR_TOKENS = 5 * 8 * 8  # of five frames
WIDTHS = 64 + 128 + 256 + 512


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def full_size(model: Model, data: Data) -> int:
    with torch.device("meta"):
        return parameters(FusionNetwork(model, data, gps_width=2))


@pytest.mark.parametrize(
    ("model", "data", "count"),
    [
        (replace(PUBLISHED, block="bi", time_fusion="v1"), Data(), 103_461_888),
        (replace(PUBLISHED, block="cs_bi", time_fusion="v2"), Data(), 103_461_924),
        (replace(PUBLISHED, block="uni", time_fusion="v1"), Data(), 64_846_848),  # the notes say 64.8 M
        (replace(PUBLISHED, block="transformer", time_fusion="sum"), Data(), 78_422_528),
        # 10to5, with a GRU for its five steps: the notes say 119.2 M.
        (replace(PUBLISHED, block="bi", time_fusion="v1"), Data(history=10, steps=5), 119_158_208),
    ],
    ids=["bi", "cs_bi", "uni", "transformer", "10to5"],
)
def test_the_published_network(model: Model, data: Data, count: int) -> None:
    assert full_size(model, data) == count


@pytest.mark.parametrize(
    ("modalities", "count"),
    [
        (("image", "gps"), 81_118_308),
        (("image", "lidar", "gps"), 92_288_548),
        (("image", "radar", "gps"), 92_291_684),
        (("lidar", "radar", "gps"), 82_177_252),
    ],
    ids=["I", "I+L", "I+R", "L+R"],
)
def test_published_networks_of_fewer_sensors_kept_the_tokens_of_all(
    modalities: tuple[Modality, ...], count: int
) -> None:
    """Without these, eight LayerNorms and a position table per stage are smaller."""
    model, data = replace(PUBLISHED, block="bi", time_fusion="v2"), Data(modalities=modalities)
    assert full_size(model, data) == count
    tokens = (4 - len(modalities)) * SENSOR_TOKENS * WIDTHS * (8 * 2 + 1)
    assert full_size(replace(model, tokens="present"), data) == count - tokens


@pytest.mark.parametrize(
    ("sensor", "count"), [("image", 21_284_672), ("lidar", 11_170_240), ("radar", 11_173_376)], ids=str
)
def test_encoders_are_whole_resnets(sensor: Modality, count: int) -> None:
    with torch.device("meta"):
        assert parameters(Encoder(sensor, Data().channels(sensor), Model())) == count


@pytest.mark.parametrize(("history", "tokens"), [(5, 962), (10, 1922), (20, 3842)])
def test_tokens_of_a_fusion_stage(history: int, tokens: int) -> None:
    with torch.device("meta"):
        built = FusionNetwork(Model(), Data(root="published", history=history), gps_width=2)
    tables = [table for name, table in built.named_parameters() if name.endswith("position_TC")]
    assert [len(table) for table in tables] == [tokens] * 4
