"""The command line of a search, and the files and folders that it names."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from search.export import BEST_TRIAL, empty_folder
from search.files import is_there
from search.records.folder import SPACE, STUDY
from search.records.mirror import above, fetch, is_uri, local
from search.space.decode import did_you_mean
from trainables.contract import UserError

DEFAULT_RESULTS = "results"


@dataclass(frozen=True)
class Options:
    """The command line of a search, validated as far as possible without the space."""

    file: Path
    overrides: tuple[str, ...]
    profile: str | None
    results: Path
    uri: str | None  # where the results folder is mirrored to
    name: str | None
    resume: Path | None
    retry_failed: bool
    warm_start: Path | None
    address: str | None
    cold: bool
    export: Path | None  # where the best trial is exported to
    dry_run: bool

    @staticmethod
    def read(given: argparse.Namespace, spaces: Path) -> Options:
        """Return the options for parsed arguments; raises UserError for those that do not go together."""
        if given.why is not None:
            raise UserError("--why needs --report RESULTS_DIR")
        if given.export and given.table:
            raise UserError("--export cannot be combined with --table; export from the folder of a cell, with --report")
        if given.export and given.export[0] != BEST_TRIAL:
            raise UserError(f"--export {given.export[0]}: a search exports its best; write best, or add --report")
        if given.retry_failed and not given.resume:
            raise UserError("--retry-failed needs --resume RESULTS_DIR")
        if bool(given.space) == bool(given.resume):
            raise UserError("name a space with --space, or a results folder with --resume")
        for option in ("profile", "name", "warm_start", "results"):
            if given.resume and getattr(given, option):
                raise UserError(
                    f"--{option.replace('_', '-')} cannot be combined with --resume: the folder determines it"
                )
        if given.name is not None and (given.name in ("", ".", "..") or "/" in given.name):
            raise UserError(f"--name {given.name}: it must be the name of a folder, in the one that --results names")
        if given.epochs is not None and given.epochs < 1:
            raise UserError(f"--epochs {given.epochs}: a trial has at least one epoch; write 1 or more")
        shorthand = {
            "search.trials": given.trials,
            "search.time_budget": given.time_budget,
            "search.seed": given.seed,
            "config.epochs": given.epochs,
        }
        overrides = [*given.set, *(f"{key}={value}" for key, value in shorthand.items() if value is not None)]
        root, uri = results_root(given.results or DEFAULT_RESULTS)
        resume = results_folder(given.resume) if given.resume else None
        if given.resume and is_uri(given.resume):
            uri = above(given.resume)
        for file in (SPACE, STUDY):
            if resume is not None and not is_there(resume / file):
                raise UserError(f"--resume {resume}: there is no {file} here; name the folder of an earlier search")
        return Options(
            file=find_space(given.space, spaces) if resume is None else resume / SPACE,
            overrides=tuple(overrides),
            profile=given.profile,
            results=root,
            uri=uri,
            name=given.name,
            resume=resume,
            retry_failed=given.retry_failed,
            warm_start=results_folder(given.warm_start) if given.warm_start else None,
            address=given.address or os.environ.get("RAY_ADDRESS"),
            cold=given.cold,
            export=empty_folder(given.export[1]) if given.export else None,
            dry_run=given.dry_run,
        )


def results_root(text: str) -> tuple[Path, str | None]:
    """Return the local folder for results folders, and `text` if it is a URI to mirror them to, else None."""
    folder = local(text)
    return (Path(DEFAULT_RESULTS), text) if folder is None else (folder, None)


def results_folder(text: str) -> Path:
    """Return an earlier results folder, fetched first if `text` is a URI."""
    return local(text) or fetch(text, Path(DEFAULT_RESULTS))


def find_space(name: str, spaces: Path) -> Path:
    """Return the file of a space given by path or by name; raises UserError with the nearest known name."""
    for path in (Path(name), spaces / f"{name}.yaml"):
        if is_there(path) and path.is_file():
            return path
    known = [path.stem for path in sorted(spaces.glob("*.yaml"))]
    raise UserError(f"--space {name}: no such file and no such space; {did_you_mean(name, known)}")


def list_spaces(spaces: Path) -> str:
    """List the spaces, each with the comment at its top."""
    lines = []
    for path in sorted(spaces.glob("*.yaml")):
        first = path.read_text("utf-8").split("\n", 1)[0]
        lines.append(f"{path.stem:<12} {first.removeprefix('#').strip() if first.startswith('#') else ''}")
    return "\n".join(lines)
