"""Models that `launch.py --export` wrote: reading their config strictly, and the command that predicts with them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from trainables.checkpoint import first_difference, weights_of
from trainables.contract import State, UserError


class IsDataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=IsDataclass)


def check_settings(folder: Path, state: State, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` if the model in an exported folder was not trained with these settings."""
    if (other := first_difference(state, settings)) is not None:
        name, theirs, ours = other
        raise UserError(
            f"{folder}: it was trained with {name} = {theirs}; by its config.yaml, or by default, it is {ours}"
        )


def load_weights(network: nn.Module, state: State, folder: Path) -> None:
    """Load the weights of an exported folder's checkpoint into its network; raises `UserError` if they do not fit."""
    try:
        network.load_state_dict(weights_of(state))
    except (RuntimeError, UserError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{folder / 'checkpoint.pt'}: not the weights of {folder / 'config.yaml'}: {said}") from None


def trainable_of(folder: Path) -> Any:
    """Return the import path of the trainable that trained the model in an exported folder."""
    return _mapping(folder / "origin.yaml").get("trainable")


def read_config(path: Path, cls: type[Config]) -> Config:
    """Read the config in a file; raises `UserError` for values that this version does not know or reads differently."""
    tree = _mapping(path)
    try:
        config = TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if (lost := _lost(tree, asdict(config))) is not None:
        raise UserError(f"{path}: {lost}: this version of {cls.__module__} does not support it")
    return config


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read: {said}; name a folder that `launch.py --export` wrote") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a mapping; name a folder that `launch.py --export` wrote")
    return found


def _lost(written: Mapping[str, Any], read: Mapping[str, Any]) -> str | None:
    """Return the dotted path of the first written value that was not read as written; None if all were."""
    for key, value in written.items():
        found = read.get(key, math.nan)
        if isinstance(value, dict) and isinstance(found, dict):
            if (below := _lost(value, found)) is not None:
                return f"{key}.{below}"
        elif (list(found) if isinstance(found, tuple) else found) != value:
            return key
    return None


def make_room(files: Iterable[Path]) -> None:
    """Create the folders of these files, before long work begins; raises `UserError` if one of the files exists."""
    for path in files:
        if path.exists():
            raise UserError(f"{path} exists; name another folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent}: cannot make a folder here: {error.strerror}") from None


def predict_command(
    predict: Callable[[Path, Path, Path], str],
    data: tuple[str, str],
    family: str,
    doc: str | None,
    arguments: Sequence[str] | None,
) -> int:
    """Run `predict` on the model, data and output folder that the command line names; return the exit status.

    predict: returns a message to print. data: the name and help of the data argument. doc: the command's help text.
    """
    parser = argparse.ArgumentParser(prog=f"python -m trainables.{family}.predict", description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, help="a folder that `launch.py --export` wrote")
    parser.add_argument(data[0], type=Path, help=data[1])
    parser.add_argument("out", type=Path, help="the folder to write to")
    given = parser.parse_args(arguments)
    try:
        print(predict(given.model, getattr(given, data[0]), given.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
