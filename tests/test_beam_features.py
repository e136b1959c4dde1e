"""First maps of frozen encoders that are kept on disk: what they equal, are keyed by, and when they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from small_beam import SMALL, simulated

from trainables.beam import decode, features, fusion, rebuild
from trainables.beam.config import Pretrain, Rebuild
from trainables.beam.data import frames_of, samples
from trainables.beam.network import FusionNetwork
from trainables.beam.prepare import prepare_data
from trainables.contract import Report, Trial, UserError
from trainables.optim import Optim

OPTIM = Optim(lr=1e-3, batch_size=8)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> rebuild.Config:
    data = simulated(tmp_path_factory.mktemp("cache"))
    made = rebuild.Config(data=data, model=SMALL, optim=OPTIM, pretrain=Pretrain(epochs=0), epochs=1)
    rebuild.prepare(made)
    return made


def network(config: rebuild.Config, seed: int = 0) -> FusionNetwork:
    torch.manual_seed(seed)
    built = fusion.build(config.fusion)
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()  # as if trained: no longer what a fresh one has
    return built.eval()


def images_of(config: rebuild.Config) -> Any:
    return np.array(frames_of(config.data, prepare_data(config.data), "image"))


def kept(config: rebuild.Config) -> set[Path]:
    return set((Path(str(config.data.prepared)) / "features").glob("*.npy"))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_kept_maps_are_those_of_the_frames(
    config: rebuild.Config, norm: Literal["batch", "group"], precision: Literal["fp32", "bf16"]
) -> None:
    config = replace(config, model=replace(SMALL, norm=norm), optim=replace(OPTIM, precision=precision))
    built = network(config)
    maps = features.first_maps(config.data, built, config.optim, Trial(config))
    at = torch.tensor([5, 0, 3])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        computed = built.first_maps(samples(config, "val")[at])
        read = built.first_maps(features.samples(config, "val", maps=maps)[at])
    assert read.keys() == computed.keys() == {"image", "lidar", "radar"}
    for sensor, map_FCYX in computed.items():
        # Other numbers of frames may be added up in another order: an error of the last digits, and a bfloat16 has few.
        torch.testing.assert_close(read[sensor], map_FCYX, rtol=1e-5 if precision == "fp32" else 1e-2, atol=1e-5)


def test_the_making_of_the_maps_tells_how_far_it_is(
    config: rebuild.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "QUIET_S", -1.0)
    maps = features.first_maps(config.data, network(config, seed=3), config.optim, Trial(config))
    told = capsys.readouterr().out.splitlines()
    for sensor, maps_NCYX in maps.items():
        last = [line for line in told if f"first maps of {sensor}" in line][-1]
        assert last == f"beam data: first maps of {sensor}: {len(maps_NCYX)} of {len(maps_NCYX)} files"


def test_the_making_of_the_maps_goes_on_where_it_was_interrupted(
    config: rebuild.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CHUNK", 8)
    built, before, passed = network(config, seed=4), kept(config), list[int]()
    first_map = built.first_map

    def counted(sensor: Any, batch: Any) -> Any:
        passed.append(len(batch[sensor]))
        if len(passed) == 4:  # one to see the shape, then two chunks
            raise KeyboardInterrupt
        return first_map(sensor, batch)

    monkeypatch.setattr(built, "first_map", counted)
    with pytest.raises(KeyboardInterrupt):
        features.first_maps(config.data, built, config.optim, Trial(config))
    assert kept(config) == before
    maps = features.first_maps(config.data, built, config.optim, Trial(config))
    frames = len(maps["image"])
    assert sum(passed[4 : 4 + 1 + -(-(frames - 16) // 8)]) == 1 + frames - 16, "of the first sensor what was left"
    with torch.no_grad():
        again = built.first_map("image", {"image": torch.from_numpy(images_of(config)[:20]).unsqueeze(1)})
    torch.testing.assert_close(torch.from_numpy(np.array(maps["image"][:20])), again, rtol=1e-5, atol=1e-5)


def test_a_rebuild_from_kept_maps_is_the_rebuild_from_frames(config: rebuild.Config) -> None:
    """With stand-ins that an encoder makes, which are no maps of frames."""
    config = replace(config, model=replace(SMALL, missing="randlike", norm="batch"), epochs=2)
    with_maps = replace(config, rebuild=Rebuild(cache_features=True, mix="stand_in"))
    without = replace(config, rebuild=Rebuild(mix="stand_in"))
    one, other = (run(each) for each in (with_maps, without))
    for mine, theirs in zip(one, other, strict=True):
        expected = {name: value for name, value in theirs.metrics.items() if name != "samples_per_s"}
        assert {name: mine.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def run(config: rebuild.Config) -> list[Report]:
    return list(rebuild.train(Trial(config, seed=1)))


def test_maps_are_made_once_for_the_same_weights_and_precision(config: rebuild.Config) -> None:
    def made(seed: int, optim: Optim = OPTIM) -> int:
        before = kept(config)
        features.first_maps(config.data, network(config, seed), optim, Trial(config))
        return len(kept(config) - before)

    assert made(seed=7) == 3
    assert made(seed=7) == 0
    assert made(seed=7, optim=replace(OPTIM, lr=1.0)) == 0
    assert made(seed=7, optim=replace(OPTIM, precision="fp16")) == 3
    assert made(seed=8) == 3


def test_the_size_is_told_before_anything_is_made(config: rebuild.Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = kept(config)
    rebuild.prepare(replace(config, rebuild=Rebuild(cache_features=True), model=replace(SMALL, channels=(64, 8, 8, 8))))
    assert kept(config) == before
    frames = sum(len(x) for x in samples(config, "val").arrays.values())
    assert f"first maps of {frames} frames in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"augment": 1}, r"cache_features = true needs data\.augment = 0 and data\.flip = false, not 1 and false"),
        ({"flip": True}, r"cache_features = true needs data\.augment = 0 and data\.flip = false, not 0 and true"),
    ],
)
def test_copies_of_the_frames_are_refused(config: rebuild.Config, change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        replace(config, data=replace(config.data, **change), rebuild=Rebuild(cache_features=True))


def test_trained_encoders_are_refused() -> None:
    with pytest.raises(UserError, match=r"cache_features = true needs rebuild\.encoders = frozen and not trained"):
        Rebuild(cache_features=True, encoders="trained")
