"""Windows of the beam data as the training loop takes them: which train, which validate, and batches of them.

Legend: B windows of a batch, N of the data set, H instants of history, K instants whose beam is predicted, P pixels of
a side, G numbers of a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.beam.config import SENSORS, Data
from trainables.beam.files import BEAMS
from trainables.beam.gps import AHEAD, WIDTH, gps_features, offsets_m
from trainables.beam.prepare import array_path, labels, prepare_data
from trainables.beam.table import GROUPS, POWER, Table, frame_numbers
from trainables.contract import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

BLOCK = 50  # frames that stay together where passes are not known
TARGET_SIGMA, TARGET_SCALE, TARGET_REACH = 0.5, 1.25, 5


class HasData(Protocol):
    """Any config with the beam family's data settings."""

    @property
    def data(self) -> Data: ...


@dataclass(frozen=True)
class Samples:
    """The windows of one side of the split, in batches.

    A batch holds, of data.modalities only: image (B,H,3,P,P) uint8 0..255, lidar (B,H,1,P,P) uint8 counts 0..5, radar
    (B,H,2,P,P) float16 0..1, gps (B,2,G) float32. And always: beam (B,) int64 0..63, target (B,64) float32, scenario
    (B,) int64, an index into `scenarios`, and index (B,) int64, the window's number in the data set. Where several
    steps are predicted, beam is (B,K) and target (B,K,64), and so is `beam_N` (N,K).
    Bytes become floats on the device, which moves a quarter of the bytes there.
    """

    scenarios: tuple[str, ...]
    windows: Ints  # numbers in the data set
    arrays: dict[str, NDArray[np.generic]]  # decoded files, memory-mapped
    at_NH: dict[str, Ints]  # which of them each window holds
    gps_N2G: Floats | None
    beam_N: Ints
    scenario_N: Ints

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, indices: Tensor) -> dict[str, Tensor]:
        chosen = self.windows[indices.numpy()]
        batch = {name: torch.from_numpy(array[self.at_NH[name][chosen]]) for name, array in self.arrays.items()}
        if self.gps_N2G is not None:
            batch["gps"] = torch.from_numpy(self.gps_N2G[chosen])
        beam = torch.from_numpy(self.beam_N[chosen])
        batch["beam"] = beam
        batch["target"] = soft_targets()[beam]
        batch["scenario"] = torch.from_numpy(self.scenario_N[chosen])
        batch["index"] = torch.from_numpy(chosen)
        return batch


def soft_targets(sigma: float = TARGET_SIGMA, scale: float = TARGET_SCALE) -> Tensor:
    """Target over all beams for each best beam, (64, 64): a scaled normal density, cut at 5 beams, not renormalised."""
    beams = torch.arange(BEAMS, dtype=torch.float32)
    distance = (beams[:, None] - beams[None, :]).abs()
    density = torch.exp(-0.5 * (distance / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)
    return scale * density * (distance <= TARGET_REACH)


def samples(config: HasData, split: str, ranks: object = None) -> Samples:
    """Open the side "train" or "val" of the split; cheap once the data are prepared.

    Every rank may call it: `ranks` is not needed, because the first process on a machine prepares while others wait.
    """
    data = config.data
    table = prepare_data(data)
    beam_NK = labels(table, np.load(array_path(data, table, POWER)))[:, : data.steps]
    arrays: dict[str, NDArray[np.generic]] = {}
    at_NH: dict[str, Ints] = {}
    for name in SENSORS:
        if name in data.modalities:
            group = GROUPS[name][0]
            arrays[name] = np.load(array_path(data, table, group), mmap_mode="r")
            at_NH[name] = table.groups[group].at_NK[:, -data.history :]
    train_N, val_N = split_windows(table, data)
    sides = {"train": train_N, "val": val_N}
    return Samples(
        scenarios=table.scenarios,
        windows=np.flatnonzero(sides[split]),
        arrays=arrays,
        at_NH=at_NH,
        gps_N2G=_gps(data, table, beam_NK[:, 0], train_N) if "gps" in data.modalities else None,
        beam_N=beam_NK[:, 0] if data.steps == 1 else beam_NK,
        scenario_N=table.scenario_N,
    )


def split_windows(table: Table, data: Data) -> tuple[Bools, Bools]:
    """Which windows train and which validate, (N,) each; the same ones for the same settings.

    honest: whole passes are held out or, where the CSV does not name them, whole blocks of frames; a window that
    straddles a border is on neither side, so that no frame is on both. The adaptation set only validates.
    legacy: random windows of everything, though neighbours are near copies. Comparable with published numbers only.
    """
    rng = np.random.default_rng(data.split_seed)
    count = len(table.beam_NP)
    if data.split == "legacy":
        val = np.zeros(count, dtype=bool)
        val[rng.permutation(count)[: round(data.holdout * count)]] = True
        train = ~val
    else:
        held_NK = _held_out(table, data.holdout, rng)
        train, val = ~held_NK.any(axis=1) & ~table.adaptation_N, held_NK.all(axis=1) | table.adaptation_N
    if not train.any() or not val.any():
        raise UserError(
            f"{table.csvs[0]}: a {data.split} split with data.holdout = {data.holdout} trains on {train.sum()} windows "
            f"and validates on {val.sum()}; it needs two passes, or {2 * BLOCK} frames, of one scenario"
        )
    return train, val


def _held_out(table: Table, holdout: float, rng: np.random.Generator) -> Bools:
    """Whether each frame (or the pass) of every window is held out: a share of each scenario, at least one."""
    if table.passes_N is not None:
        unit_NK = np.unique(np.array(table.passes_N), return_inverse=True)[1][:, None]
    else:
        unit_NK = table.frame_NK // BLOCK
    held_NK = np.zeros(unit_NK.shape, dtype=bool)
    for number in range(len(table.scenarios)):
        here = (table.scenario_N == number) & ~table.adaptation_N
        units = np.unique(unit_NK[here])
        count = min(max(1, round(holdout * len(units))), len(units) - 1)  # never all of them
        if count > 0:
            held_NK[here] = np.isin(unit_NK[here], rng.permutation(units)[:count])
    return held_NK


def gps_width(config: HasData) -> int:
    """How many numbers a position becomes."""
    return WIDTH[config.data.gps_repr]


def _gps(data: Data, table: Table, beam_N: Ints, train_N: Bools) -> Floats:
    """Positions of all windows, (N, 2, G), scaled by train windows only. `beam_N`: at the newest instant."""
    station_N2 = np.load(array_path(data, table, "unit1_loc"))[table.groups["unit1_loc"].at_NK[:, 0]]
    car_N22 = np.load(array_path(data, table, "unit2_loc_"))[table.groups["unit2_loc_"].at_NK[:, :2]]
    ahead = _ahead(table)
    out = np.empty((*car_N22.shape[:2], WIDTH[data.gps_repr]), dtype=np.float32)
    for number, scenario in enumerate(table.scenarios):
        here = table.scenario_N == number
        metres = np.stack([offsets_m(station_N2[here], car_N22[here, k]) for k in range(2)], axis=1)
        out[here] = gps_features(data, scenario, metres, beam_N[here], train_N[here], ahead)
    return out


def _ahead(table: Table) -> float:
    """How long after the second position the newest instant is, in intervals between the two positions."""
    places_N2, label_NP = (frame_numbers(table.groups[name]) for name in ("unit2_loc_", POWER))
    if places_N2 is None or label_NP is None:
        return AHEAD
    interval_N = places_N2[:, 1] - places_N2[:, 0]
    moved = interval_N > 0
    return float(np.median((label_NP[:, 0] - places_N2[:, 1])[moved] / interval_N[moved])) if moved.any() else AHEAD


def describe(config: HasData) -> str:
    """One line on the data: real or simulated, how many windows of which scenarios, how they are split."""
    data = config.data
    table = prepare_data(data)
    train_N, val_N = split_windows(table, data)
    kind = "simulated" if data.root is None else "real"
    numbers = ", ".join(name.removeprefix("scenario") for name in table.scenarios)
    counts = f"{train_N.sum()} windows to train and {val_N.sum()} to validate"
    return f"{kind} beam data in {table.root}: {counts} ({data.split} split), scenarios {numbers}"
