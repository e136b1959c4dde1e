"""Spaces and families written to a folder, for the tests that read them back."""

from __future__ import annotations

import itertools
from pathlib import Path
from textwrap import dedent
from typing import Any

from search import yaml_file
from search.space import Space
from search.space.file import load_space

_NUMBERS = itertools.count()
LOSS = {"metric": "loss", "mode": "min"}


def write_family(folder: Path, code: str) -> str:
    """A module of its own name, so that no test imports what another has imported; returns that name."""
    name = f"family_{next(_NUMBERS)}"
    (folder / f"{name}.py").write_text(dedent(code))
    return name


def write_space(folder: Path, config: dict[str, Any], **sections: Any) -> Path:
    """A space file; its trainable takes any config unless `trainable` names another."""
    document = {"trainable": "toys:descend", "objective": LOSS, "config": config, **sections}
    file = folder / "toy.yaml"
    file.write_text(yaml_file.dump(document))
    return file


def space_of(folder: Path, config: dict[str, Any], **sections: Any) -> Space:
    """The space as it is loaded from such a file."""
    space, _ = load_space(write_space(folder, config, **sections))
    return space
