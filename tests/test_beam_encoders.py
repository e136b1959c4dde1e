"""The sensors' ResNets: run stage by stage, and started from one that was trained on pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_beam import SMALL
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from trainables.beam import encoders, fusion
from trainables.beam.config import SENSORS, Data, Modality, Model
from trainables.beam.encoders import STEM, Encoder, pretrained_weights
from trainables.contract import UserError

RESNET = ResNetConfig(
    layer_type="basic", embedding_size=4, hidden_sizes=list(SMALL.channels), depths=[1, 1, 1, 1], num_labels=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a classifier on top, as on the hub."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in ("resnet-34", "resnet-18"):
        ResNetForImageClassification(RESNET).save_pretrained(folder / name)
    return folder


def model_from(folder: Path) -> Model:
    return replace(SMALL, norm="batch", pretrained_encoders=str(folder))


def config_from(folder: Path, data: Data | None = None) -> fusion.Config:
    return fusion.Config(data=data or Data(history=1, image_size=32), model=model_from(folder))


@pytest.mark.parametrize("sensor", SENSORS)
def test_the_stages_give_what_the_whole_resnet_gives(sensor: Modality) -> None:
    encoder = Encoder(sensor, Data().channels(sensor), SMALL)
    x = torch.randn(2, encoder.resnet.config.num_channels, 64, 64)
    whole = encoder.resnet(x).last_hidden_state
    x = encoder.first(x)
    for number in (1, 2, 3):
        x = encoder.stage(number, x)
    assert torch.equal(x, whole)


def test_every_encoder_starts_from_its_resnet(folder: Path) -> None:
    network = fusion.build(config_from(folder))
    for sensor in SENSORS:
        name = "resnet-34" if sensor == "image" else "resnet-18"
        saved = ResNetModel.from_pretrained(folder / name).state_dict()
        ours = network.encoder(sensor).resnet.state_dict()
        assert ours.keys() == saved.keys()
        assert [name for name in ours if not torch.equal(ours[name], saved[name])] == [STEM] * (sensor != "image")


@pytest.mark.parametrize("sensor", ["lidar", "radar"])
def test_an_input_that_is_alike_on_all_channels_gives_the_map_of_a_grey_picture(sensor: Any, folder: Path) -> None:
    model, channels = model_from(folder), Data().channels(sensor)
    encoder = Encoder(sensor, channels, model).eval()
    encoder.resnet.load_state_dict(pretrained_weights(sensor, channels, model))
    of_pictures = ResNetModel.from_pretrained(folder / "resnet-18").eval()
    grey = torch.randn(2, 1, 32, 32)
    expected = of_pictures(grey.expand(-1, 3, -1, -1)).last_hidden_state
    actual = encoder.resnet(grey.expand(-1, encoder.resnet.config.num_channels, -1, -1)).last_hidden_state
    torch.testing.assert_close(actual, expected)


def test_a_network_is_the_same_whether_its_encoders_were_read_before_or_not(folder: Path) -> None:
    """What is drawn afterwards included: a rebuild's heads, for one."""
    encoders._pretrained_resnet.cache_clear()
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        fusion.build(config_from(folder))
        drawn.append(torch.randn(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (8, 8, 12, 16)}, r"resnet-34 has embedding_size 4, but the image encoder has 8"),
        ({"channels": (4, 8, 12, 20)}, r"resnet-34 has hidden_sizes \[4, 8, 12, 16\], but .*\[4, 8, 12, 20\]"),
        ({"sensor_depths": (1, 2, 1, 1)}, r"resnet-18 has depths \[1, 1, 1, 1\], but the lidar encoder"),
        ({"pretrained_encoders": "/nowhere"}, r"pretrained_encoders = /nowhere: there is no folder /nowhere/resnet-34"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_data_are_looked_at(
    change: dict[str, Any], message: str, folder: Path
) -> None:
    config = config_from(folder, Data(root="/no/data"))
    with pytest.raises(UserError, match=message):
        fusion.prepare(replace(config, model=replace(config.model, **change)))


def test_only_the_sensors_in_use_need_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "resnet-18").symlink_to(folder / "resnet-18")
    data = Data(modalities=("lidar", "gps"), history=1, image_size=32)
    assert fusion.build(config_from(tmp_path, data)).sensors == ["lidar"]


def test_a_folder_without_weights_or_with_too_few_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "resnet-18").mkdir()
    with pytest.raises(UserError, match=r"resnet-18 must be as `save_pretrained` writes it, but .*no file"):
        pretrained_weights("lidar", 1, model_from(tmp_path))
    resnet = ResNetModel(RESNET)
    weights = resnet.state_dict()
    del weights[STEM]
    resnet.save_pretrained(tmp_path / "resnet-18", state_dict=weights)
    with pytest.raises(UserError, match=f"resnet-18 must be .* but it lacks {STEM}"):
        pretrained_weights("lidar", 1, model_from(tmp_path))


def test_a_file_from_before_batches_were_counted_is_taken(tmp_path: Path) -> None:
    resnet = ResNetModel(RESNET)
    weights = {key: value for key, value in resnet.state_dict().items() if not key.endswith("num_batches_tracked")}
    resnet.save_pretrained(tmp_path / "resnet-18", state_dict=weights)
    taken = pretrained_weights("lidar", 1, model_from(tmp_path))[STEM]
    torch.testing.assert_close(taken.sum(1), resnet.state_dict()[STEM].sum(1))


def test_no_encoders_may_be_asked_for_by_a_word() -> None:
    assert not Model(norm="group", pretrained_encoders="none").has_pretrained_encoders
    assert not Model(norm="group").has_pretrained_encoders
    assert Model(pretrained_encoders="imagenet").has_pretrained_encoders


def test_group_norm_and_pretrained_encoders_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"model\.norm = group must be batch with model\.pretrained_encoders"):
        Model(norm="group", pretrained_encoders="imagenet")


@pytest.mark.slow
def test_imagenet_without_a_network_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    code = "from trainables.beam import fusion; from trainables.beam.config import Model; " + (
        "fusion.prepare(fusion.Config(model=Model(pretrained_encoders='imagenet')))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 1
    assert "microsoft/resnet-34 is not in the Hugging Face cache and cannot be downloaded" in ran.stderr
