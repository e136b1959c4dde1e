"""Converts a config tree to a trainable's frozen `Config`: strict, with readable errors."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter, ValidationError

from search.text import one_line, said
from trainables.contract import UserError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return half a sentence that suggests the nearest known word, or else lists all of them."""
    words = [str(item) for item in known]
    if near := nearest(word, words):
        return f"did you mean `{near}`?"
    return f"known: {', '.join(words)}" if words else "none are known"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word with the most similar spelling; None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def decode(cls: type, tree: Mapping[str, Any], path: str = "config", otherwise: Any = None) -> Any:
    """Return an instance of the dataclass `cls` made from nested mappings.

    Every key must be a field and every value of the field's type (a float may be given as a whole number, a tuple as a
    list; nothing else is converted). Missing fields are taken from the instance `otherwise`, or keep their default.
    Raises UserError with the dotted path.
    """
    types = _types(cls)
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for key in tree:
        if key not in fields:
            raise UserError(f"{path}.{key}: no such key in {cls.__name__}; {did_you_mean(str(key), fields)}")
    values = {}
    for name, item in fields.items():
        here = f"{path}.{name}"
        # A plain value replaces the default, which is then not made: its factory may need something that is missing.
        wanted = name not in tree or _is_dataclass(types[name]) or _nests(types[name])
        default = None if not wanted else _default(item, here) if otherwise is None else getattr(otherwise, name)
        if name in tree:
            values[name] = _value(types[name], tree[name], here, default)
        elif default is dataclasses.MISSING:
            raise UserError(f"{here}: a value is needed; {cls.__name__} has no default for it")
        else:
            values[name] = default
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {one_line(said(error), type(error).__name__)}") from None
    except (Exception, SystemExit) as error:  # an `assert`, or a bug in the class's own checks: it cannot be built
        told = " ".join([type(error).__name__, *said(error).split()])
        raise UserError(f"{path}: {cls.__name__} refuses it: {told}") from None


def _default(item: dataclasses.Field[Any], path: str) -> Any:
    if item.default_factory is dataclasses.MISSING:
        return item.default
    try:
        return item.default_factory()
    except (Exception, SystemExit) as error:
        told = one_line(said(error), "")
        raise UserError(f"{path}: its default cannot be built: {type(error).__name__}: {told}; give a value") from None


def _value(kind: Any, value: Any, path: str, default: Any = None) -> Any:
    if _is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: expected the keys of {kind.__name__}, got {value!r}")
        return decode(kind, value, path, default if type(default) is kind else None)
    if _nests(kind):
        return _nested(typing.get_origin(kind), typing.get_args(kind), value, path, default)
    try:
        # As JSON, since strict JSON accepts a list for a tuple and a whole number for a float, and nothing else.
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first, each = error.errors()[0], typing.get_args(kind)
        if typing.get_origin(kind) is tuple and isinstance(value, list) and ... not in each and len(each) != len(value):
            raise UserError(f"{path}: expected {len(each)} values, got {len(value)}") from None
        hint = "; write true or false" if kind is bool else ""
        raise UserError(f"{path}: {value!r} is refused: {first['msg'][:1].lower()}{first['msg'][1:]}{hint}") from None
    except TypeError:
        raise UserError(f"{path}: {value!r} is not a plain value; if it is text, quote it") from None
    except (PydanticUserError, PydanticUndefinedAnnotation):
        raise UserError(f"{path}: nothing in a space file can be a {kind!r}; give the field a plain type") from None


def _nested(origin: Any, kinds: tuple[Any, ...], value: Any, path: str, default: Any) -> Any:
    """Decode a value that contains dataclasses or is a union: Pydantic would ignore unknown keys of a dataclass."""
    if origin in _UNIONS:
        return _one_of(kinds, value, path, default)
    if origin is collections.abc.Sequence:
        origin, kinds = tuple, (*kinds, ...)
    if origin is collections.abc.Mapping:
        origin = dict
    if origin in (list, tuple) and isinstance(value, list):
        each = kinds * len(value) if origin is list else kinds[:1] * len(value) if kinds[-1] is ... else kinds
        if len(each) != len(value):
            raise UserError(f"{path}: expected {len(each)} values, got {len(value)}")
        return origin(_value(kind, item, f"{path}.{i}") for i, (kind, item) in enumerate(zip(each, value, strict=True)))
    if origin is dict and isinstance(value, Mapping):
        return {_value(kinds[0], key, path): _value(kinds[1], item, f"{path}.{key}") for key, item in value.items()}
    raise UserError(f"{path}: {value!r} is refused: a {getattr(origin, '__name__', origin)} belongs here")


def _one_of(kinds: tuple[Any, ...], value: Any, path: str, default: Any) -> Any:
    """Decode with the first type of a union that accepts the value; raises the error of the first one if none does."""
    if value is None and type(None) in kinds:
        return None
    # The type of the field's default comes first: a mapping then modifies the default.
    fitting = [kind for kind in kinds if isinstance(value, Mapping) or not _is_dataclass(kind)] or list(kinds)
    refusal = None
    for kind in sorted(fitting, key=lambda kind: (not _nests(kind), type(default) is not kind)):
        try:
            return _value(kind, value, path, default)
        except UserError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _nests(kind: Any) -> bool:
    """Return whether a type is, or contains, a dataclass."""
    return _is_dataclass(kind) or any(map(_nests, typing.get_args(kind)))


_UNIONS = (typing.Union, type(int | str))


@cache
def _types(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise UserError(f"{cls.__name__}: {error}; its fields' types must be there when it is used") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
