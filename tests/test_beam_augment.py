"""Changed and mirrored copies: as many as published, the same for the same seed, and true to the geometry."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from small_beam import DataConfig, raw_files
from torch import Tensor

from trainables.beam import augment, decode, health
from trainables.beam.augment import Change, change_of, changed_pictures, changed_points, changed_radar, mirrored
from trainables.beam.background import FRAMES, background, without
from trainables.beam.config import MODALITIES, Data, Simulated
from trainables.beam.data import samples
from trainables.beam.files import fov_of, lidar_counts, radar_maps
from trainables.beam.gps import gps_features, mirrored_m
from trainables.beam.health import dba_of_guessing
from trainables.beam.metrics import guess_scores
from trainables.beam.prepare import prepare_data
from trainables.beam.split import split
from trainables.beam.table import Table
from trainables.contract import UserError

SIZE = 16


written = raw_files(Simulated(passes=2, frames=10))


@pytest.fixture
def data(written: Path) -> Data:
    return Data(root=str(written), prepared=str(written.parent / "cache"), image_size=SIZE)


def published(augment: int, kind: str = "legacy") -> tuple[Table, Data]:
    """A table of as many rows as the public data have, 100 of them for adaptation, in one pass each."""
    count = 11_143 + 100
    table = Table(
        root=Path("root"),
        csvs=(Path("a.csv"),),
        digest="",
        lines=(),
        scenarios=("scenario31",),
        scenario_N=np.zeros(count, dtype=np.int64),
        beam_NP=np.zeros((count, 1), dtype=np.int64),
        groups={},
        frame_NK=np.arange(count)[:, None],
        passes_N=None,
        adaptation_N=np.arange(count) >= 11_143,
        left_out="",
    )
    return table, Data(split="legacy" if kind == "legacy" else "honest", holdout=0.1, augment=augment)


def test_the_legacy_split_has_the_published_counts() -> None:
    train, val = split(*published(47))
    assert (len(train), len(val)) == (14_348, 1_595)
    copies = np.concatenate([train.copy_S, val.copy_S])
    windows = np.concatenate([train.window_S, val.window_S])
    assert (copies > 0).sum() == 4_700
    assert windows[copies > 0].min() == 11_143
    assert len(set(zip(windows.tolist(), copies.tolist(), strict=True))) == 15_943
    assert set(train.window_S[train.copy_S > 0]) & set(val.window_S[val.copy_S > 0])  # the published leak


def test_copies_of_an_adaptation_set_that_is_not_there_are_a_mistake() -> None:
    table, data = published(47)
    without_it = replace(table, adaptation_N=np.zeros_like(table.adaptation_N))
    with pytest.raises(
        UserError, match=r"data\.augment = 47: .* root has none that can be used; set data\.augment to 0"
    ):
        split(without_it, data)
    split(without_it, replace(data, augment=0))


def test_an_adaptation_set_is_not_enough_to_validate_on() -> None:
    table, data = published(0, "honest")
    with pytest.raises(UserError, match="trains on 11143 windows and validates on 0; it needs two passes"):
        split(replace(table, frame_NK=0 * table.frame_NK), data)


def test_an_honest_split_copies_what_trains_and_nothing_else() -> None:
    table, data = published(3, "honest")
    train, val = split(table, data)
    plain, _ = split(table, replace(data, augment=0))
    assert len(train) == 4 * len(plain)
    np.testing.assert_array_equal(np.bincount(train.copy_S), 4 * [len(plain)])
    assert not val.copy_S.any()
    assert not val.mirrored_S.any()
    assert not (train.holds(len(table.beam_NP)) & val.holds(len(table.beam_NP))).any()
    both, val = split(table, replace(data, flip=True))
    assert len(both) == 8 * len(plain)
    assert both.mirrored_S.sum() == 4 * len(plain)
    assert not val.mirrored_S.any()


def test_47_copies_are_all_changes_there_are_of_three_sensors() -> None:
    every = {change_of(MODALITIES, 5, copy) for copy in range(1, 48)}
    assert len(every) == 47
    assert Change(0, 0, 0) not in every
    assert {change_of(("radar", "gps"), window, 1) for window in range(9)} == {Change(0, 0, 1)}
    assert len({change_of(MODALITIES, window, 1) for window in range(47)}) == 47


def test_copies_change_their_sensors_and_nothing_else(data: Data) -> None:
    side = samples(DataConfig(replace(data, augment=47)), "train")
    copied = np.flatnonzero(side.side.window_S == side.side.window_S[0])
    batch = side[torch.from_numpy(copied)]
    plain = {name: x[0] for name, x in batch.items()}
    assert side.side.copy_S[copied[0]] == 0
    for b in range(1, 48):
        change = change_of(MODALITIES, int(batch["index"][b]), b)
        for name in ("image", "lidar", "radar"):
            if change.image != augment.BLUR or name != "image":  # the blur of a large picture is none of a small one
                assert torch.equal(batch[name][b], plain[name]) == (getattr(change, name) == 0), (name, change)
        for name in ("gps", "beam", "scenario", "index"):
            assert torch.equal(batch[name][b], plain[name])
    assert {name: x.dtype for name, x in batch.items()} == {name: x.dtype for name, x in plain.items()}


def test_a_sample_is_the_same_whenever_and_with_whatever_it_is_drawn(data: Data) -> None:
    chosen = replace(data, augment=5, flip=True)
    first, again, other = (samples(DataConfig(x), "train") for x in (chosen, chosen, replace(chosen, split_seed=101)))
    some = torch.tensor([len(first) - 1, 3, len(first) // 2 + 4])
    together, alone = first[some], [again[i[None]] for i in some]
    for name in together:
        torch.testing.assert_close(together[name], torch.cat([batch[name] for batch in alone]), rtol=0, atol=0)
    assert any(not torch.equal(other[some][name], together[name]) for name in ("image", "radar"))
    val = samples(DataConfig(chosen), "val")
    plain = samples(DataConfig(data), "val")
    everything = torch.arange(len(plain))
    assert all(torch.equal(val[everything][name], plain[everything][name]) for name in val[everything])


def test_a_mirrored_window_is_the_windows_mirror_image(data: Data) -> None:
    side = samples(DataConfig(replace(data, flip=True)), "train")
    half = len(side) // 2
    plain, turned = side[torch.arange(half)], side[torch.arange(half, 2 * half)]
    torch.testing.assert_close(turned["image"], plain["image"].flip(-1))
    torch.testing.assert_close(turned["lidar"], plain["lidar"].flip(-1))
    torch.testing.assert_close(turned["beam"], 63 - plain["beam"])
    torch.testing.assert_close(turned["gps"][..., 8], -plain["gps"][..., 8], atol=1e-4, rtol=0)  # towards the car
    for name in ("index", "scenario"):
        torch.testing.assert_close(turned[name], plain[name])


@pytest.mark.parametrize("per_scenario", [False, True])
@pytest.mark.parametrize("scenario", ["scenario31", "scenario32", "scenario33", "scenario34"])
def test_a_mirrored_lidar_sees_mirrored_points_through_a_mirrored_field_of_view(
    scenario: str, per_scenario: bool
) -> None:
    """Which is the same field of view only where its middle is straight ahead."""
    fov = fov_of(scenario, per_scenario)
    x, (low_m, high_m) = fov
    points = np.random.default_rng(0).uniform((-80, -60, -3), (10, 60, 3), (500, 3))
    other_side = points * (1, -1, 1)
    turned = mirrored("lidar", torch.from_numpy(lidar_counts(points, SIZE, fov)))
    assert turned.sum() > 0
    assert torch.equal(turned, torch.from_numpy(lidar_counts(other_side, SIZE, (x, (-high_m, -low_m)))))
    same_view = torch.equal(turned, torch.from_numpy(lidar_counts(other_side, SIZE, fov)))
    assert same_view == (not per_scenario) == (low_m == -high_m)


@pytest.mark.parametrize("size", [8, 32])
def test_mirrored_radar_maps_are_those_of_antennas_in_reverse_order(size: int) -> None:
    rng = np.random.default_rng(0)
    cube = (rng.standard_normal((4, 32, 32)) + 1j * rng.standard_normal((4, 32, 32))).astype(np.complex64)
    maps, reverse = (torch.from_numpy(radar_maps(x, size)) for x in (cube, cube[::-1]))
    torch.testing.assert_close(mirrored("radar", maps[None])[0].float(), reverse.float(), atol=2e-3, rtol=0)
    torch.testing.assert_close(mirrored("radar", mirrored("radar", maps[None]))[0], maps)


def test_mirroring_positions_turns_their_bearing_round_the_boresight() -> None:
    rng = np.random.default_rng(0)
    bearing = rng.uniform(-0.7, 0.7, (50, 2))
    distance = rng.uniform(8, 30, (50, 2))
    boresight = 2.5
    metres = distance[..., None] * np.stack([np.sin(boresight + bearing), np.cos(boresight + bearing)], axis=-1)
    metres[:, 0] = metres[:, 1]  # a car that stands: no lead to find
    beam = np.round(31.5 + bearing[:, 1] * 63 / (np.pi / 2)).astype(np.int64)
    known = np.ones(50, dtype=bool)
    turned = mirrored_m(metres, beam, known)
    found = np.arctan2(turned[:, 1, 0], turned[:, 1, 1]) - boresight
    np.testing.assert_allclose(np.exp(1j * found), np.exp(-1j * bearing[:, 1]), atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(metres, axis=-1))
    np.testing.assert_allclose(mirrored_m(turned, 63 - beam, known), metres, atol=0.5)
    told = gps_features(Data(), "scenario1", turned, 63 - beam, known)
    np.testing.assert_allclose(31.5 + 16 * told[:, 0, 8], 63 - beam, atol=0.6)


def picture(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(60, 120, (2, 3, 128, 128), generator=generator, dtype=torch.uint8)


def test_changed_pictures_are_what_their_kind_says() -> None:
    image = picture()
    grey = (image.float() * augment.LUMA[:, None, None]).sum(1)
    for seed in range(4):
        changed = {kind: changed_pictures(image, kind, np.random.default_rng(seed)) for kind in range(1, 8)}
        factor = {kind: np.random.default_rng(seed).uniform(*augment.FACTORS[kind]) for kind in range(1, 8)}
        expected = (image.float() * factor[augment.BRIGHTNESS]).round().clamp(max=255)
        torch.testing.assert_close(changed[augment.BRIGHTNESS].float(), expected, atol=1, rtol=0)
        expected = 255 * (image / 255) ** factor[augment.GAMMA]
        torch.testing.assert_close(changed[augment.GAMMA].float(), expected, atol=1, rtol=0)
        spread = changed[augment.CONTRAST].float().std() / image.float().std()
        assert spread == pytest.approx(factor[augment.CONTRAST], rel=0.2) or changed[augment.CONTRAST].max() == 255
        for kind in (augment.HUE, augment.SATURATION):  # leave the brightness, where nothing is clipped
            lightness = (changed[kind].float() * augment.LUMA[:, None, None]).sum(1)
            inside = ((changed[kind] > 0) & (changed[kind] < 255)).all(1)
            torch.testing.assert_close(lightness[inside], grey[inside], atol=1.5, rtol=0)
        assert changed[augment.BLUR].float().std() < 0.8 * image.float().std()
    flat = torch.full_like(image, 100)
    for kind in (augment.CONTRAST, augment.HUE, augment.SATURATION, augment.SHARPNESS, augment.BLUR):
        found = changed_pictures(flat, kind, np.random.default_rng(0))
        torch.testing.assert_close(found.int(), flat.int(), atol=1, rtol=0)


def test_lidar_points_are_thinned_or_shaken() -> None:
    points = np.random.default_rng(1).uniform(-30, 30, (5000, 3))
    fewer = changed_points(points, 1, np.random.default_rng(0))
    assert 0.87 < len(fewer) / len(points) < 0.93
    assert {tuple(x) for x in fewer} <= {tuple(x) for x in points}
    moved = changed_points(points, 2, np.random.default_rng(0)) - points
    assert 0.39 < np.abs(moved).max() <= 0.4
    assert np.abs(moved.mean(axis=0)).max() < 0.02


def test_radar_noise_keeps_the_scale_and_the_strong_cells() -> None:
    maps = torch.rand(3, 2, SIZE, SIZE).half()
    maps[:, :, 4, 5] = 1.2
    noisy = changed_radar(maps, np.random.default_rng(0))
    assert noisy.dtype == torch.float16
    torch.testing.assert_close(noisy.float().amin((2, 3)), torch.zeros(3, 2))
    torch.testing.assert_close(noisy.float().amax((2, 3)), torch.ones(3, 2))
    assert (noisy.flatten(2).argmax(-1) == 4 * SIZE + 5).all()
    scaled = maps.float() / 1.2
    assert (noisy.float() - scaled).abs().max() < 0.08


def test_nothing_but_positions_cannot_be_changed() -> None:
    with pytest.raises(UserError, match=r"data\.augment = 2 changes sensors, and data\.modalities has none"):
        Data(modalities=("gps",), augment=2)
    with pytest.raises(UserError, match=r"data\.augment = -1 must not be negative"):
        Data(augment=-1)


def street(car_m: tuple[float, float] | None, rng: np.random.Generator) -> np.ndarray:
    """A lidar frame: a wall 20 m off, a pole, and perhaps a car; everything shaken by a few centimetres."""
    wall = np.stack([np.full(400, -20.0), np.linspace(-15, 15, 400), rng.uniform(-3, 3, 400)], axis=1)
    pole = np.stack([np.full(20, -8.0), np.full(20, 6.0), np.linspace(-3, 1, 20)], axis=1)
    parts = [wall, pole]
    if car_m is not None:
        parts.append(np.array([*car_m, -2.0]) + rng.uniform(-1, 1, (60, 3)) * (0.9, 2.2, 0.7))
    points = np.concatenate(parts)
    return np.asarray(points + 0.03 * rng.standard_normal(points.shape))


def test_the_wall_goes_and_the_car_stays() -> None:
    rng = np.random.default_rng(0)
    frames = [street((-10.0, y), rng) for y in (-12.0, -6.0, 0.0, 9.0, 13.0)]
    still = background(frames)
    assert len(still) == 420  # of the first frame, all but its car
    for frame in [*frames, street((-10.0, 3.0), rng)]:
        np.testing.assert_array_equal(without(frame, still), frame[420:])
    assert len(without(street(None, rng), still)) == 0


def test_the_filter_reaches_as_far_as_published() -> None:
    still = np.array([[-30.0, 0.0]])
    frame = np.array([[-30.0, 4.9, 0.0], [-30.0, 5.3, 0.0], [-30.0, 5.3, 99.0]])
    np.testing.assert_array_equal(without(frame, still), frame[1:])  # 0.3 + 4.7 (r/30)^4 m, r a little over 30
    near = np.array([[-1.0, 0.0]])
    np.testing.assert_array_equal(without(np.array([[-1.0, 0.29, 0], [-1.0, 0.31, 0]]), near), [[-1.0, 0.31, 0]])
    np.testing.assert_array_equal(without(frame, background([frame, frame[:0]])), frame)  # nothing stands still


def test_filtered_lidar_holds_less_and_is_an_array_of_its_own(data: Data) -> None:
    chosen = replace(data, modalities=("lidar",))
    full, less = (
        samples(DataConfig(x), "train")[torch.arange(4)]["lidar"] for x in (chosen, replace(chosen, lidar="filtered"))
    )
    assert (less <= full).all()
    assert 0 < less.sum() < full.sum() / 2


def test_a_background_tells_how_far_it_is(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "QUIET_S", -1.0)
    data = Data(root=str(written), prepared=str(tmp_path), modalities=("lidar",), image_size=32, lidar="filtered")
    table = prepare_data(data)
    told = [line for line in capsys.readouterr().out.splitlines() if "background of scenario31" in line]
    count = min(len(table.groups["unit1_lidar_"].paths), FRAMES)
    assert told == [f"beam data: background of scenario31: {i} of {count} files" for i in range(1, count + 1)]


def test_the_adaptation_set_is_scored_apart_where_it_only_validates(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "root")
    adaptation = tmp_path / "root" / "Adaptation_dataset_multi_modal"
    shutil.copytree(tmp_path / "root" / "Multi_Modal", adaptation)
    ours = Data(root=str(tmp_path / "root"), prepared=str(tmp_path / "cache"), modalities=("gps",))
    (adaptation / ours.csv).rename(adaptation / "ml_challenge_data_adaptation_multi_modal.csv")
    table = prepare_data(ours)
    val = samples(DataConfig(ours), "val")
    batch = val[torch.arange(len(val))]
    np.testing.assert_array_equal(batch["apart"], table.adaptation_N[val.windows])
    told = [val.scenarios[i] for i in batch["scenario"].tolist()]
    expected = ["adaptation_31" if x else "scenario31" for x in table.adaptation_N[val.windows]]
    assert told == expected
    assert set(told) == {"adaptation_31", "scenario31"}
    legacy = samples(DataConfig(replace(ours, split="legacy")), "val")
    assert legacy.scenarios == ("scenario31",)
    assert not legacy.apart_N.any()
    assert dba_of_guessing(DataConfig(ours)) == dba_of_guessing(DataConfig(replace(ours, root=str(written))))


@pytest.mark.parametrize("kind", ["honest", "legacy"])
def test_what_guessing_reaches_is_counted_on_the_beams_of_mirrored_samples(kind: Literal["honest", "legacy"]) -> None:
    data = Data(modalities=("gps",), split=kind, flip=True, simulated=Simulated(passes=4, frames=40))
    train, val = (samples(DataConfig(data), side) for side in ("train", "val"))
    for side in (train, val):
        assert side.beams(side.side).tolist() == side[torch.arange(len(side))]["beam"].tolist()
    assert val.side.mirrored_S.any() == (kind == "legacy")

    seen, held_out = (side[torch.arange(len(side))]["beam"] for side in (train, val))
    guesses: list[int] = []
    for _ in range(3):
        left = [beam for beam in range(64) if beam not in guesses]
        guesses.append(max(left, key=lambda beam: health._dba([*guesses, beam], seen)))
    scores = guess_scores(torch.tensor(guesses).expand(len(held_out), -1), held_out)
    assert dba_of_guessing(DataConfig(data)) == pytest.approx(float(scores["dba"].mean()), abs=1e-6)
