"""Exports a trial to use elsewhere: `--export best DIR` writes a folder that needs nothing else of the search.

DIR/checkpoint.pt   the state that the trainable gave with its last report, as torch.save wrote it
DIR/config.yaml     the trial's config as far as the space says it; the rest are defaults of the trainable's Config
DIR/metrics.jsonl   a row per epoch
DIR/space.yaml      a space of this one setting: `--space DIR/space.yaml` trains it again, longer or with another seed
DIR/origin.yaml     its search and trial number, last metrics, and the commit and versions it ran on
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from search import yaml_file
from search.records.folder import SPACE, STUDY, Saved, TrialFolder, is_whole
from search.records.mirror import fetch, local
from search.records.record import Record, best_of
from search.results import by_number, read_results
from search.space import Space
from search.space import tree as trees
from trainables.contract import UserError

BEST_TRIAL = "best"
CHECKPOINT = "checkpoint.pt"  # in an exported folder
COPIES = 5  # times that a checkpoint is copied if its trial, still running, replaces it meanwhile


def export(source: str, what: str, folder: str) -> str:
    """Export from a results folder or its mirror: the best trial, or the one with the number `what`.

    From a mirror, only the space, the study and that trial are fetched, to a temporary folder. Returns a summary in
    words. Raises UserError if there is no such trial or nothing to export, or if `folder` is in use.
    """
    target = empty_folder(folder)
    here = local(source)
    if here is not None:
        return export_trial(here, what, target)
    with tempfile.TemporaryDirectory() as scratch:
        results = fetch(source, Path(scratch), [SPACE, STUDY])
        space, found = read_results(results)
        chosen = choose(found, space, what, source)
        fetch(source, Path(scratch), [str(TrialFolder(results, chosen.number).path.relative_to(results))])
        return export_trial(results, what, target, source)


def export_trial(results: Path, what: str, target: Path, source: str | None = None) -> str:
    """Export a trial of a results folder on this machine. source: the folder's name in messages, if not its path."""
    source = source or str(results)
    space, found = read_results(results)
    chosen = choose(found, space, what, source)
    trial = TrialFolder(results, chosen.number)
    document, config = yaml_file.read(results / SPACE), space.config(chosen.values)
    try:
        with _filled(target) as folder:
            saved = _copy_last(trial, folder / CHECKPOINT)
            if saved is None:
                kept = "its reports have no state, or it was deleted" if chosen.epochs else "it gave no report"
                raise UserError(f"--export {what}: trial {chosen.number} ({chosen.status}) has no checkpoint: {kept}")
            if not is_whole(folder / CHECKPOINT):
                torn = f"{saved.path.name} of trial {chosen.number}"
                raise UserError(f"--export {what}: {torn} is torn and cannot be read")
            plain = is_plain(folder / CHECKPOINT)
            origin = {"search": source, **_origin(document, space, chosen, saved, plain)}
            told = {"config.yaml": config, "space.yaml": _again(document, config, chosen.values), "origin.yaml": origin}
            for name, content in told.items():
                yaml_file.write(folder / name, content)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(trial.path / "metrics.jsonl", folder / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"--export {what} {target}: cannot be written: {error}") from None
    lines = [f"trial {chosen.number}, its checkpoint after epoch {saved.epoch}: {target}"]
    rivals = [record.number for record in best_of(found, space)] if what == BEST_TRIAL else []
    if len(rivals) > 1:
        metric = space.objectives[0].metric
        others = ", ".join(str(number) for number in rivals[1:])
        lines.append(f"it is the best in {metric}; no other beats these either: trials {others}")
    if not plain:
        lines.append("checkpoint.pt holds more than tensors and plain values: torch.load needs weights_only=False")
    return "\n".join(lines)


def choose(found: Sequence[Record], space: Space, what: str, source: str) -> Record:
    """Return the best trial (of a Pareto front, the best in the first objective), or the one with the number `what`.

    Raises UserError if there is no such trial.
    """
    if what == BEST_TRIAL:
        best = best_of(found, space)
        if not best:
            wanted = " within the constraints" if space.constraints else ""
            raise UserError(f"--export best: no trial of {source} finished{wanted}; give a trial's number to export it")
        return best[0]
    if not what.isdigit():
        raise UserError(f"--export {what}: write best, or the number of a trial")
    return by_number(found, what, source)


def empty_folder(text: str) -> Path:
    """Return the folder to export to; raises UserError if it exists and is not an empty folder."""
    folder = Path(text)
    try:
        in_use = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"--export: {folder}: {error.strerror}") from None
    if in_use:
        raise UserError(f"--export: {folder} exists and is not an empty folder; name a new one")
    return folder


def is_plain(checkpoint: Path) -> bool:
    """Return whether `torch.load(weights_only=True)` can read the checkpoint."""
    for place in ("meta", "cpu"):  # some tensors, such as nested ones, have no meta form
        try:
            torch.load(checkpoint, map_location=place, weights_only=True)
            return True
        except pickle.UnpicklingError:
            return False
        except RuntimeError:
            continue
    return False


def _again(document: Mapping[str, Any], config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the space of a search with nothing left to search: one trial, run to its end.

    values: those that were searched. One that is a mapping stays a choice: its keys may have dots, or name domains.
    """
    fixed = copy.deepcopy(dict(config))
    for name, value in values.items():
        if isinstance(value, Mapping):
            trees.put(fixed, name, {"choice": [value]})
    search = {**document["search"], "trials": 1, "sampler": "random", "time_budget": None}
    ran = {key: value for key, value in (document.get("ran") or {}).items() if key in ("space", "paths", "profile")}
    return {**document, "config": fixed, "try_first": [], "search": search, "scheduler": {"name": "none"}, "ran": ran}


def _origin(document: Mapping[str, Any], space: Space, chosen: Record, saved: Saved, plain: bool) -> dict[str, Any]:
    return {
        "trial": chosen.number,
        "name": chosen.name,
        "status": chosen.status,
        "reason": chosen.reason,
        "objective": {item.metric: item.mode for item in space.objectives},
        "metrics": dict(chosen.metrics),
        "searched": dict(chosen.values),
        "checkpoint": {"epoch": saved.epoch, "weights_only": plain},
        "trainable": space.trainable,
        "seed": space.search.seed,
        "ran": document.get("ran"),
        "exported": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _copy_last(trial: TrialFolder, target: Path) -> Saved | None:
    """Copy the trial's last checkpoint; returns which, or None if there is none.

    Raises UserError if the trial keeps deleting the one that is being copied, because it has a newer one.
    """
    for _ in range(COPIES):
        saved = trial.checkpoint()
        if saved is None:
            return None
        try:
            shutil.copyfile(saved.path, target)
            return saved
        except FileNotFoundError:
            if saved.path.exists():
                raise
    raise UserError(
        f"--export: {trial.path}: the trial runs, and deleted its checkpoint {COPIES} times before it was copied; "
        "export it when it has ended"
    )


@contextlib.contextmanager
def _filled(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` to write to; its files are moved then, so that a failure leaves nothing."""
    beside = target.resolve().with_name(f".{target.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        target.mkdir(exist_ok=True)
        for file in beside.iterdir():
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
