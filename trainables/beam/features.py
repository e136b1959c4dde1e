"""First maps of a rebuild's frozen encoders, computed once per data set and shared like the decoded files.

A frozen first stage is in eval mode, so its map of a frame depends only on the frame and the weights. Later maps change
during training, because the fused first maps are fed to the second stages.

Legend: B windows of a batch, H instants of history, C channels, Y X rows and columns of a map; N frames of a data set.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.beam import data as frames
from trainables.beam.config import SENSORS, Data, Modality, Model
from trainables.beam.decode import fill
from trainables.beam.encoders import map_sides
from trainables.beam.network import FusionNetwork, map_key
from trainables.beam.prepare import array_path, check_room, prepare_data
from trainables.beam.table import GROUPS, Table
from trainables.cache import cache_folder, make_once
from trainables.contract import Trial
from trainables.optim import Optim
from trainables.step import autocast

VERSION = 1  # increment it whenever the same weights would make other maps of the same frames
AT_ONCE = 32  # frames per pass through an encoder

Maps = Mapping[Modality, NDArray[np.generic]]  # (N, C, Y, X) of every sensor, memory-mapped; bfloat16 as int16


@dataclass(frozen=True)
class MappedSamples:
    """The windows of one side of the split; a batch holds maps, (B, H, C, Y, X) at `map_key(sensor)`, not frames."""

    samples: frames.Samples  # without frames
    maps: Maps

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: Tensor) -> dict[str, Tensor]:
        batch = self.samples[indices]
        for sensor, maps_NCYX in self.maps.items():
            at_BH = self.samples.at_NH[sensor][batch["index"].numpy()]
            batch[map_key(sensor)] = _as_made(torch.from_numpy(maps_NCYX[at_BH]))
        return batch


def samples(config: frames.HasData, side: str, ranks: object = None, maps: Maps | None = None) -> Any:
    """As `data.samples`, but with `maps`, if given, instead of the frames."""
    found = frames.samples(config, side, ranks)
    return MappedSamples(replace(found, arrays={}), maps) if maps else found


def first_maps(data: Data, network: FusionNetwork, optim: Optim, trial: Trial) -> Maps:
    """Return the first maps of all frames, computed on the first call and kept on disk.

    `network` must be in eval mode and on the trial's device. Several processes may call this at once: one computes the
    maps while the others wait.
    """
    table = prepare_data(data)
    return {sensor: _maps_of(data, table, sensor, network, optim, trial) for sensor in network.sensors}


def _maps_of(
    data: Data, table: Table, sensor: Modality, network: FusionNetwork, optim: Optim, trial: Trial
) -> NDArray[np.generic]:
    decoded, frames_N = array_path(data, table, GROUPS[sensor][0]), frames.frames_of(data, table, sensor)
    weights = hashlib.sha256()
    for name, tensor in network.encoder(sensor).resnet.state_dict().items():
        if name.startswith(("embedder.", "encoder.stages.0.")):
            weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    made_by = (VERSION, torch.__version__, decoded.stem, weights.hexdigest(), optim.precision, trial.device.type)
    digest = hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
    path = cache_folder(data.prepared) / "features" / f"{sensor}-{digest}.npy"

    @torch.no_grad()
    def made(chosen: slice) -> NDArray[np.generic]:
        some = torch.from_numpy(np.array(frames_N[chosen])).unsqueeze(1).to(trial.device)
        with autocast(trial.device, optim):
            return _as_kept(network.first_map(sensor, {str(sensor): some}).cpu())

    def some(kept: NDArray[np.generic], chunk: range) -> Iterator[int]:
        for start in range(chunk.start, chunk.stop, AT_ONCE):
            chosen = slice(start, min(start + AT_ONCE, chunk.stop))
            kept[chosen] = made(chosen)
            yield chosen.stop - start

    def make(unfinished: Path) -> None:
        one = made(slice(0, 1))
        shape = (len(frames_N), *one.shape[1:])
        check_room(path.parent, math.prod(shape) * one.dtype.itemsize, [unfinished])
        fill(unfinished, shape, one.dtype, f"first maps of {sensor}", some)

    make_once(path, make, resumes=True)
    found: NDArray[np.generic] = np.load(path, mmap_mode="r")
    return found


def _as_kept(maps_FCYX: Tensor) -> NDArray[np.generic]:
    """Return maps as a NumPy array; bfloat16, which NumPy lacks, is stored bit for bit as int16."""
    same = maps_FCYX.view(torch.int16) if maps_FCYX.dtype is torch.bfloat16 else maps_FCYX
    kept: NDArray[np.generic] = same.numpy()
    return kept


def _as_made(maps: Tensor) -> Tensor:
    return maps.view(torch.bfloat16) if maps.dtype is torch.int16 else maps


def announce(data: Data, model: Model, optim: Optim) -> None:
    """Print the size of the maps on disk and check the free space; raises `UserError` if there is too little."""
    table, folder = prepare_data(data), cache_folder(data.prepared) / "features"
    files = sum(len(table.groups[GROUPS[sensor][0]].paths) for sensor in SENSORS if sensor in data.modalities)
    size = files * model.channels[0] * map_sides(data.image_size)[0] ** 2 * (4 if optim.precision == "fp32" else 2)
    print(f"beam rebuild: first maps of {files} frames in {folder}, {size / 2**20:.0f} MiB", flush=True)
    check_room(folder, size, list(folder.glob("*.npy")))
