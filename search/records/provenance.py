"""The run information in a results folder's space.yaml: command, data, versions and the URI of its mirror."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search import yaml_file
from search.files import is_there
from search.records.folder import SPACE
from search.space import Space
from trainables.contract import UserError

PACKAGES = ("ray", "optuna", "torch", "numpy")


def write_space(results: Path, space: Space, mirror: str | None = None) -> None:
    """Write the space as it ran, with run information and the mirror's URI; raises UserError if it cannot."""
    document = space.document()
    document["ran"] = {
        "space": space.name,
        "command": shlex.join(["python", *sys.argv]),
        "profile": space.profile,
        "paths": list(space.paths),
        "data": space.data,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "mirror": mirror,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "before": _runs_before(results),
    }
    try:
        yaml_file.write(results / SPACE, document, durable=True)  # no search resumes without it
    except OSError as error:
        raise UserError(f"{results}: cannot be written to: {error.strerror}") from None


def _runs_before(results: Path) -> list[dict[str, Any]]:
    """Return the commands, versions and commits of earlier runs of the search in this folder, the oldest first."""
    last = how_it_ran(results)
    if not last:
        return []
    return [*last.get("before", []), {key: last.get(key) for key in ("command", "versions", "commit", "time")}]


def how_it_ran(results: Path) -> dict[str, Any]:
    """Return the run information in the space of a results folder; empty if there is none, as in a person's own."""
    document = yaml_file.read(results / SPACE) if is_there(results / SPACE) else None
    ran = document.get("ran") if isinstance(document, dict) else None
    return ran if isinstance(ran, dict) else {}


def commit() -> str | None:
    """Return the commit of this checkout, marked if files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        told = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
