"""Predicts the beams of other windows, with a model that `launch.py --export best MODEL` wrote.

    python -m trainables.beam.predict MODEL WINDOWS.csv OUT

WINDOWS.csv lists windows as the challenge's sets do, with files relative to its folder. OUT/beam_pred.csv has a row
for each, `index, top-1 beam, top-2 beam, top-3 beam`, with beams from 1 to 64, those of several steps joined by `_`;
OUT/beam_confidence.csv has the largest softmax probability of each. A rebuild model rebuilds its targets, whose columns
and files may be missing. If a model's inputs depend on its training data (`gps_repr: local`, `lidar: filtered`,
`camera`), these must still be where MODEL/config.yaml says.

If WINDOWS.csv has labels, `unit1_beam` from 1 to 64 with the powers that it follows from, as for training, the scores
of the beams are printed, computed as a search does for validation windows, and how many of the windows the model was
trained on.

Legend: B windows of a batch, N of the CSV, P steps (no axis if there is one step), H instants, R guesses.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainables.beam import fusion, rebuild
from trainables.beam.checkpoint import sweep_digests, trained_on, unseen_settings
from trainables.beam.config import SENSORS, Data
from trainables.beam.data import frames_of, gps_of_others
from trainables.beam.metrics import RANKS, guess_scores
from trainables.beam.prepare import array_path, find_table, labels, picture_folders, prepare_arrays
from trainables.beam.table import BEAM, GROUPS, POWER, has_labels, read_labelled, read_unlabelled
from trainables.checkpoint import read_checkpoint
from trainables.contract import UserError, default_device
from trainables.exported import check_settings, load_weights, make_room, predict_command, read_config, trainable_of
from trainables.samples import Batch
from trainables.step import autocast

BEAMS_FILE, SURE_FILE = "beam_pred.csv", "beam_confidence.csv"
FAMILIES: dict[str, type[fusion.Config | rebuild.Config]] = {
    "trainables.beam.fusion:train": fusion.Config,
    "trainables.beam.rebuild:train": rebuild.Config,
}


@dataclass(frozen=True)
class Model:
    """A trained network. data: the inputs it needs. logits: computes (B, 64) or (B, P, 64) from a batch.

    trained_on: digests of the windows that it was trained on, see `sweep_digests`; None if its checkpoint has none.
    """

    config: fusion.Config | rebuild.Config
    data: Data
    network: nn.Module
    logits: Callable[[Batch], Tensor]
    trained_on: Tensor | None = None


@dataclass(frozen=True)
class Labels:
    """The labels of a CSV's windows: best beams from 0, (N,) or (N, P); digests as in a model's `trained_on`, (N,)."""

    beam: Tensor
    scenarios: tuple[str, ...]
    scenario_N: Tensor
    digest_N: Tensor


def read_model(folder: Path) -> Model:
    """Load the model in an exported folder; raises `UserError` if it holds none of this family that can predict."""
    trainable = trainable_of(folder)
    if trainable not in FAMILIES:
        raise UserError(f"{folder}: a model of {trainable}; beams are predicted by one of {' or '.join(FAMILIES)}")
    config = read_config(folder / "config.yaml", FAMILIES[trainable])
    state = read_checkpoint(folder / "checkpoint.pt", str(folder / "checkpoint.pt"))
    check_settings(folder, state, unseen_settings(config.fusion if isinstance(config, rebuild.Config) else config))
    config = replace(config, model=replace(config.model, pretrained_encoders=None))  # the exported weights are used
    if isinstance(config, rebuild.Config):
        if "training_mode" in config.rebuild.mistakes:
            raise UserError(
                f"{folder}: it has the mistake training_mode, by which the beam of a window depends on those that are "
                "predicted with it"
            )
        made = rebuild.build(config, rebuild.untrained_weights(config))
        data = replace(
            config.data, modalities=tuple(name for name in config.data.modalities if name not in made.target)
        )
        model = Model(config, data, made, lambda batch: rebuild.logits_without_targets(made, batch))
    else:
        whole = fusion.build(replace(config, pretrained=None))
        model = Model(config, config.data, whole, lambda batch: whole.fuse(whole.first_maps(batch), batch.get("gps")))
    load_weights(model.network, state, folder)
    return replace(model, trained_on=trained_on(state))


def batches(model: Model, windows: Path) -> tuple[tuple[str, ...], Iterator[Batch]]:
    """Return the names of the CSV's windows, and an iterator over the model's inputs in batches, in order.

    A window's input does not depend on the other windows, except in a scenario that the training data lack.
    """
    data = replace(model.data, augment=0)  # no augmented copies in prediction
    try:
        like = find_table(model.config.data) if is_scaled(data) or _has_folder(data) else None
    except UserError as error:
        raise UserError(f"the data that the model was trained on, as its config.yaml names them: {error}") from None
    table, names = read_unlabelled(windows, data, like)
    here = replace(data, root=str(table.root))
    for scenario in table.scenarios:
        if like is not None and is_scaled(data) and scenario not in like.scenarios:
            print(f"{scenario}: the model was not trained on it; what it sees there rests on these windows", flush=True)
    for folder in picture_folders(here, table).values():
        print(f"pictures from {folder}", flush=True)
    gps_N2G = None
    if "gps" in data.modalities:
        prepare_arrays(here, table, GROUPS["gps"])
        gps_N2G = torch.from_numpy(gps_of_others(model.config.data, table))
    prepare_arrays(here, table, list(table.groups))
    sensors = [name for name in SENSORS if name in data.modalities]
    arrays = {name: frames_of(here, table, name) for name in sensors}
    at_NH = {name: table.groups[GROUPS[name][0]].at_NK[:, -data.history :] for name in sensors}

    def gathered() -> Iterator[Batch]:
        for chosen in torch.arange(len(names)).split(model.config.optim.scored_at_once):
            batch: Batch = {name: torch.from_numpy(x[at_NH[name][chosen.numpy()]]) for name, x in arrays.items()}
            yield batch if gps_N2G is None else {**batch, "gps": gps_N2G[chosen]}

    return names, gathered()


def is_scaled(data: Data) -> bool:
    """Whether a model's inputs depend on its training windows: scaled positions or filtered lidar."""
    by_positions = data.gps_repr == "local" and "gps" in data.modalities
    return by_positions or (data.lidar == "filtered" and "lidar" in data.modalities)


def _has_folder(data: Data) -> bool:
    """Whether the training windows determine which pictures a model gets."""
    return data.camera is not None and "image" in data.modalities


@torch.no_grad()
def predict(model: Model, windows: Path, device: torch.device) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Return the windows' names, their likeliest beams (N, ..., R) from 0, and the largest softmax (N, ...)."""
    names, seen = batches(model, windows)
    model.network.to(device).eval()
    beams, confidence = [], []
    for batch in tqdm(seen, desc="predicting", unit=" batches", leave=False, disable=not sys.stderr.isatty()):
        with autocast(device, model.config.optim):
            logits = model.logits({name: x.to(device) for name, x in batch.items()})
        beams.append(logits.topk(RANKS, dim=-1).indices.cpu())
        confidence.append(logits.softmax(-1).amax(-1).cpu())
    return names, torch.cat(beams), torch.cat(confidence)


def read_labels(windows: Path, data: Data) -> Labels | None:
    """Return the labels in a CSV, checked and relabelled as for training; None if it has none.

    Raises `UserError` if training would not read them.
    """
    if not has_labels(windows):
        return None
    try:
        table = read_labelled(windows, data.steps)
        here = replace(data, root=str(table.root))
        prepare_arrays(here, table, [POWER])
        power = np.load(array_path(here, table, POWER))
        beam_NP = torch.from_numpy(labels(table, power)[:, : data.steps])
    except UserError as error:
        raise UserError(f"{error}; or remove the column {BEAM}, to predict without scores") from None
    return Labels(
        beam=beam_NP[:, 0] if data.steps == 1 else beam_NP,
        scenarios=table.scenarios,
        scenario_N=torch.tensor(table.scenario_N),
        digest_N=torch.from_numpy(sweep_digests(table, power)),
    )


def told(beams: Tensor, truth: Labels, trained: Tensor | None) -> str:
    """Say how many of the labelled windows were trained on, and the scores of their guesses, (N, ..., R).

    The scores are a search's: a line for overall scores, and one each for scenarios and steps if there are several.
    """
    found, every = guess_scores(beams, truth.beam), torch.ones(len(beams), dtype=torch.bool)
    groups = (
        {name: fusion.total(found[name], every) for name in fusion.REPORTED},
        fusion.by_scenario(found["dba"], truth.scenario_N, truth.scenarios),
        fusion.by_step(found["dba"], every),
    )
    lines = [
        ", ".join(f"{name} {float(total) / float(count):.4f}" for name, (total, count) in pairs.items())
        for pairs in groups
    ]
    if trained is None:
        seen = "how many of them the model was trained on is unknown, as its checkpoint does not say"
    else:
        seen = f"the model was trained on {int(torch.isin(truth.digest_N, trained).sum())} of them"
    return "\n".join([f"they have labels; {seen}:", *filter(None, lines)])


def write(folder: Path, names: Sequence[str], beams: Tensor, confidence: Tensor) -> None:
    """Write beam_pred.csv and beam_confidence.csv; beams are counted from 1."""

    def joined(steps: Tensor, form: str) -> str:
        return "_".join(format(value, form) for value in steps.reshape(-1).tolist())

    guesses = [f"top-{rank + 1} beam" for rank in range(RANKS)]
    rows = [[joined(guess, "d") for guess in (one + 1).unbind(-1)] for one in beams]
    _write_csv(folder / BEAMS_FILE, ["index", *guesses], names, rows)
    _write_csv(folder / SURE_FILE, ["index", "confidence"], names, [[joined(one, ".6f")] for one in confidence])


def _write_csv(path: Path, header: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *([name, *row] for name, row in zip(names, rows, strict=True))])


def write_beams(model: Path, windows: Path, out: Path) -> str:
    """Predict and write both files; return a message with what was done, and the scores if there are labels."""
    make_room([out / BEAMS_FILE, out / SURE_FILE])
    trained = read_model(model)
    truth = read_labels(windows, trained.config.data)
    names, beams, confidence = predict(trained, windows, default_device())
    write(out, names, beams, confidence)
    done = f"beams of {len(names)} windows: {out / BEAMS_FILE}"
    return done if truth is None else f"{done}\n{told(beams, truth, trained.trained_on)}"


def main(arguments: Sequence[str] | None = None) -> int:
    return predict_command(write_beams, ("windows", "the CSV of the windows"), "beam", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
