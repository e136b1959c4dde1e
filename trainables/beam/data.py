"""The windows of the beam data in batches for the training loop, split into training and validation.

Legend: B windows of a batch, N of the data set, H instants of history, K instants whose beam is predicted, P pixels per
side, G numbers per position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.beam.augment import change_of, changed_pictures, changed_radar, mirrored
from trainables.beam.config import SENSORS, Data, Modality
from trainables.beam.files import BEAMS
from trainables.beam.gps import (
    WIDTH,
    Scale,
    Timing,
    gps_features,
    mirrored_m,
    offsets_m,
    scale_of,
    scaled_features,
    usual_timing,
)
from trainables.beam.prepare import (
    CHANGED_LIDAR,
    array_path,
    labels,
    picture_folders,
    prepare_arrays,
    prepare_data,
    wanted_arrays,
)
from trainables.beam.split import Side, on_neither_side, scored_apart, split
from trainables.beam.table import GROUPS, POWER, Table, fixed, frame_numbers
from trainables.cache import Stamp, stamp_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class HasData(Protocol):
    """Any config with a `data` field of the beam family's settings."""

    @property
    def data(self) -> Data: ...


@dataclass(frozen=True)
class Samples:
    """The windows of one side of the split, in batches.

    Of the sensors in data.modalities a batch holds: image (B,H,3,P,P) uint8 0..255; lidar (B,H,1,P,P) uint8 counts
    0..5; radar (B,H,2,P,P) float16 0..1, or (B,H,1,P,P) if `data.radar` is angle; gps (B,2,G) float32. It always
    holds: beam (B,) int64 0..63; scenario (B,) int64, an index into `scenarios`; apart (B,) bool, whether only that
    scenario's score counts the window; index (B,) int64, the window's number in the data set. If several steps are
    predicted, beam is (B,K) and `beam_N` is (N,K).
    Conversion to float is left to the device, which quarters the transfer of uint8 data.
    """

    scenarios: tuple[str, ...]
    side: Side
    arrays: dict[Modality, NDArray[np.generic]]  # decoded files, memory-mapped
    at_NH: dict[Modality, Ints]  # each window's rows in `arrays`
    changed_lidar: NDArray[np.generic] | None  # both kinds of changed copies of each lidar file
    gps_2N2G: Floats | None  # as measured, and mirrored
    beam_N: Ints
    scenario_N: Ints
    apart_N: Bools
    seed: int  # of the random changes in copies

    @property
    def windows(self) -> Ints:
        """The samples' window numbers in the data set."""
        return self.side.window_S

    def beams(self, side: Side) -> Ints:
        """Return the best beams of a side's samples, in order; those of mirrored samples count from the other end."""
        beam_S = self.beam_N[side.window_S]
        beam_S[side.mirrored_S] = BEAMS - 1 - beam_S[side.mirrored_S]
        return beam_S

    def __len__(self) -> int:
        return len(self.side)

    def __getitem__(self, indices: Tensor) -> dict[str, Tensor]:
        chosen = self.side.take(indices.numpy())
        window_B, mirrored_B = chosen.window_S, chosen.mirrored_S
        batch = {str(name): torch.from_numpy(x[self.at_NH[name][window_B]]) for name, x in self.arrays.items()}
        for b in np.flatnonzero(chosen.copy_S):
            self._change(batch, int(b), int(window_B[b]), int(chosen.copy_S[b]))
        if mirrored_B.any():
            for name in self.arrays:
                batch[name][mirrored_B] = mirrored(name, batch[name][mirrored_B])
        if self.gps_2N2G is not None:
            batch["gps"] = torch.from_numpy(self.gps_2N2G[mirrored_B.astype(int), window_B])
        batch["beam"] = torch.from_numpy(self.beams(chosen))
        batch["scenario"] = torch.from_numpy(self.scenario_N[window_B])
        batch["apart"] = torch.from_numpy(self.apart_N[window_B])
        batch["index"] = torch.from_numpy(window_B)
        return batch

    def _change(self, batch: dict[str, Tensor], b: int, window: int, copy: int) -> None:
        """Turn the batch's b-th sample into the changed copy number `copy` of its window."""
        change = change_of(tuple(self.arrays), window, copy)
        rng = np.random.default_rng([self.seed, window, copy])
        if change.image:
            batch["image"][b] = changed_pictures(batch["image"][b], change.image, rng)
        if change.lidar:
            assert self.changed_lidar is not None
            points = self.changed_lidar[self.at_NH["lidar"][window], change.lidar - 1]
            batch["lidar"][b] = torch.from_numpy(points)
        if change.radar:
            batch["radar"][b] = changed_radar(batch["radar"][b], rng)


def samples(config: HasData, side: str, ranks: object = None) -> Samples:
    """Open the side "train" or "val" of the split; cheap once the data are prepared, and cached once opened.

    Any rank may call it. `ranks` is ignored: the first process on a machine prepares the data while the others wait.
    """
    data = config.data
    table = prepare_data(data)
    stamps = tuple(stamp_of(array_path(data, table, name)) for name in wanted_arrays(data, table))
    return _sides(data, table, stamps)[side]


def names(config: HasData, indices: Sequence[int]) -> list[str]:
    """Describe the training samples with these indices by the CSV rows they come from."""
    lines, side = prepare_data(config.data).lines, samples(config, "train").side
    found = []
    for i in indices:
        copy = f"copy {side.copy_S[i]} of " if side.copy_S[i] else ""
        found.append(f"{'mirrored ' if side.mirrored_S[i] else ''}{copy}{lines[side.window_S[i]]}")
    return found


@functools.lru_cache(maxsize=4)  # a few MB each, besides their tables; several, as a search may vary `gps_repr`
def _sides(data: Data, table: Table, stamps: tuple[Stamp, ...]) -> dict[str, Samples]:
    """Open both sides of the split. `stamps` of the prepared arrays invalidate the cache when arrays are remade."""
    beam_NK = labels(table, np.load(array_path(data, table, POWER)))[:, : data.steps]
    arrays: dict[Modality, NDArray[np.generic]] = {}
    at_NH: dict[Modality, Ints] = {}
    for name in SENSORS:
        if name in data.modalities:
            group = GROUPS[name][0]
            arrays[name] = frames_of(data, table, name)
            at_NH[name] = table.groups[group].at_NK[:, -data.history :]
    train, val = split(table, data)
    train_N = train.holds(len(beam_NK))
    apart_N = scored_apart(table, data)
    scenarios, scenario_N = _scored_as(table, apart_N)
    changed = array_path(data, table, CHANGED_LIDAR) if CHANGED_LIDAR in wanted_arrays(data, table) else None
    for array in (part for own in (train, val) for part in (own.window_S, own.copy_S, own.mirrored_S)):
        fixed(array)
    opened = functools.partial(
        Samples,
        scenarios=scenarios,
        arrays=arrays,
        at_NH=at_NH,
        changed_lidar=np.load(changed, mmap_mode="r") if changed else None,
        gps_2N2G=fixed(_gps(data, table, beam_NK[:, 0], train_N)) if "gps" in data.modalities else None,
        beam_N=fixed(beam_NK[:, 0] if data.steps == 1 else beam_NK),
        scenario_N=fixed(scenario_N),
        apart_N=fixed(apart_N),
        seed=data.split_seed,
    )
    return {"train": opened(side=train), "val": opened(side=val)}


def frames_of(data: Data, table: Table, sensor: Modality) -> NDArray[np.generic]:
    """Return all prepared frames of a sensor, (files, channels, P, P), memory-mapped."""
    decoded: NDArray[np.generic] = np.load(array_path(data, table, GROUPS[sensor][0]), mmap_mode="r")
    return decoded[:, : data.channels(sensor)]


def _scored_as(table: Table, apart_N: Bools) -> tuple[tuple[str, ...], Ints]:
    """Return the scenario names used in scores, and each window's index into them, (N,)."""
    if not apart_N.any():
        return table.scenarios, table.scenario_N
    apart = tuple(f"adaptation_{name.removeprefix('scenario')}" for name in table.scenarios)
    return table.scenarios + apart, table.scenario_N + len(apart) * apart_N


def gps_width(config: HasData) -> int:
    """Return G, the number of inputs per position."""
    return WIDTH[config.data.gps_repr]


def _gps(data: Data, table: Table, beam_N: Ints, train_N: Bools) -> Floats:
    """Return the positions of all windows, as measured and mirrored, (2, N, 2, G), scaled by training windows only.

    beam_N: best beam at the newest instant. Mirrored positions are scaled separately, as those of another street.
    """
    out = np.empty((2, len(beam_N), 2, WIDTH[data.gps_repr]), dtype=np.float32)
    timing = timing_of(table)
    for number, scenario in enumerate(table.scenarios):
        here = table.scenario_N == number
        metres, beam, known, when = _metres(data, table, here), beam_N[here], train_N[here], timing.of(here)
        turned = mirrored_m(metres, beam, known, when)
        out[0, here] = gps_features(data, scenario, metres, beam, known, when)
        out[1, here] = gps_features(data, scenario, turned, BEAMS - 1 - beam, known, when)
    return out


def gps_of_others(data: Data, others: Table) -> Floats:
    """Return the positions of unlabelled windows, (N, 2, G), in the form used in training on `others.like`.

    `gps_repr: local` scales them as in training; a scenario that training did not see, by its windows in `others`.
    """
    out = np.empty((len(others.lines), 2, WIDTH[data.gps_repr]), dtype=np.float32)
    scales, timing = _learnt(data, others.like) if others.like is not None else {}, timing_of(others)
    for number, scenario in enumerate(others.scenarios):
        here = others.scenario_N == number
        metres, when = _metres(data, others, here), timing.of(here)
        unknown = np.zeros(len(metres), dtype=bool)
        scale = scales.get(scenario) or scale_of(metres, unknown.astype(np.int64), unknown, when)
        out[here] = scaled_features(data, scenario, metres, scale, when)
    return out


def _learnt(data: Data, table: Table) -> dict[str, Scale]:
    """Return the scale of positions that training learns in each scenario; empty unless `gps_repr` is local."""
    if data.gps_repr != "local":
        return {}
    prepare_arrays(data, table, [POWER, *GROUPS["gps"]])
    beam_N = labels(table, np.load(array_path(data, table, POWER)))[:, 0]
    train_N = split(table, data)[0].holds(len(beam_N))
    scales, timing = {}, timing_of(table)
    for number, scenario in enumerate(table.scenarios):
        here = table.scenario_N == number
        scales[scenario] = scale_of(_metres(data, table, here), beam_N[here], train_N[here], timing.of(here))
    return scales


def _metres(data: Data, table: Table, here: Bools) -> NDArray[np.float64]:
    """Return the chosen windows' two positions in metres from the station, (N, 2, 2)."""
    station_N2 = np.load(array_path(data, table, "unit1_loc"))[table.groups["unit1_loc"].at_NK[here, 0]]
    car_N22 = np.load(array_path(data, table, "unit2_loc_"))[table.groups["unit2_loc_"].at_NK[here, :2]]
    return np.stack([offsets_m(station_N2, car_N22[:, k]) for k in range(2)], axis=1)


def timing_of(table: Table) -> Timing:
    """Return the windows' timing from their file numbers: the adaptation set, for one, has twice the usual rate.

    The unit is the usual interval between positions in the table or, for windows given to a model, in its training
    table.
    """
    frames, usual = _frames_between(table), _usual_interval(table.like or table)
    if frames is not None and usual is not None:
        interval_N, ahead_N = frames
        return Timing(np.where(interval_N > 0, interval_N, usual) / usual, ahead_N / usual)
    windows = len(table.lines)
    if table.like is None:
        return usual_timing(windows)
    return Timing(np.ones(windows), np.full(windows, np.median(timing_of(table.like).ahead_N)))


def _usual_interval(table: Table) -> float | None:
    """Return the median interval between a window's positions, in file numbers; None if these do not show it."""
    frames = _frames_between(table)
    told_N = None if frames is None else frames[0][frames[0] > 0]
    return float(np.median(told_N)) if told_N is not None and len(told_N) else None


def _frames_between(table: Table) -> tuple[Ints, Ints] | None:
    """Return for each window the steps in file numbers between its positions, and from the second to the label's.

    None if the files have no numbers.
    """
    places_N2 = frame_numbers(table.groups["unit2_loc_"])
    if places_N2 is None or table.label_frame_N is None:
        return None
    return places_N2[:, 1] - places_N2[:, 0], table.label_frame_N - places_N2[:, 1]


def describe(config: HasData) -> str:
    """Return one line on the data: real or simulated, windows per side, kind of split, scenarios, peculiarities."""
    data = config.data
    table = prepare_data(data)
    train, val = split(table, data)
    kind = "simulated" if data.root is None else "real"
    numbers = ", ".join(name.removeprefix("scenario") for name in table.scenarios)
    counts = f"{len(train)} windows to train and {len(val)} to validate"
    windows = len(table.beam_NP)
    astride = on_neither_side(train, val, windows)
    notes = [f"{astride} of {windows} windows straddle a border between blocks and are left out"] if astride else []
    notes += [table.left_out] if table.left_out else []
    notes += [f"pictures from {folder.relative_to(table.root)}" for folder in picture_folders(data, table).values()]
    told = [f"{counts} ({data.split} split), scenarios {numbers}", *notes]
    return f"{kind} beam data in {table.root}: {'; '.join(told)}"
