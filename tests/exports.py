"""A trained model in a folder, as `launch.py --export` writes it, without a search."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from search import yaml_file
from trainables.contract import Trial


def exported(folder: Path, config: Any) -> dict[str, float]:
    """Train by the module of this config, and write what `launch.py --export` does; returns the last metrics."""
    family = sys.modules[type(config).__module__]
    *_, report = family.train(Trial(config))
    folder.mkdir()
    torch.save(report.state(), folder / "checkpoint.pt")
    yaml_file.write(folder / "config.yaml", said(asdict(config), asdict(type(config)())))
    yaml_file.write(folder / "origin.yaml", {"trainable": f"{family.__name__}:train"})
    return dict(report.metrics)


def said(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """As much of a config as a space says, which leaves out what is as it is by default."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = said(value, defaults.get(key) or {})
        elif value != defaults.get(key):
            found[key] = list(value) if isinstance(value, tuple) else value
    return found
