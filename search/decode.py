"""From a config tree to a trainable's frozen `Config`: strict, with messages for people."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from trainables.contract import UserError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A half sentence that names the nearest known word, or all of them."""
    words = [str(item) for item in known]
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known: {', '.join(words)}" if words else "nothing may stand here"


def decode(cls: type, tree: Mapping[str, Any], path: str = "config") -> Any:
    """An instance of the dataclass `cls` made from nested mappings.

    Every key must be a field, every value of the field's type (a whole number will do for a float; nothing else is
    converted); fields without a value keep their default. Raises UserError with the dotted path.
    """
    types = _types(cls)
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for key in tree:
        if key not in fields:
            raise UserError(f"{path}.{key}: no such key in {cls.__name__}; {did_you_mean(str(key), fields)}")
    values = {}
    for name, item in fields.items():
        here = f"{path}.{name}"
        if name in tree:
            values[name] = _value(types[name], tree[name], here)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"{here}: a value is needed; {cls.__name__} has no default for it")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # an `assert`, or a slip in the class's own checks: this setting cannot be built
        told = " ".join([type(error).__name__, *str(error).split()])
        raise UserError(f"{path}: {cls.__name__} refuses it: {told}") from None


def _value(kind: Any, value: Any, path: str) -> Any:
    nested = _dataclass_in(kind)
    if nested is not None:
        if value is None and type(None) in typing.get_args(kind):
            return None
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: expected the keys of {nested.__name__}, got {value!r}")
        return decode(nested, value, path)
    try:
        # As JSON, because strict JSON takes a list for a tuple and a whole number for a float, and nothing else.
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        hint = "; write true or false" if kind is bool else ""
        raise UserError(f"{path}: {value!r} is refused: {first['msg'][:1].lower()}{first['msg'][1:]}{hint}") from None
    except TypeError:
        raise UserError(f"{path}: {value!r} is not a plain value") from None
    except PydanticSchemaGenerationError:
        raise UserError(f"{path}: nothing in a space file can be a {kind!r}; give the field a plain type") from None


def _dataclass_in(kind: Any) -> type | None:
    for option in (kind, *typing.get_args(kind)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option if kind is option or typing.get_origin(kind) in _UNIONS else None
    return None


_UNIONS = (typing.Union, type(int | str))


@cache
def _types(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise UserError(f"{cls.__name__}: {error}; its fields' types must be there when it is used") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
