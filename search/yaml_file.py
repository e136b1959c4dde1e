"""YAML as its author meant it: the safe loader, without its silent traps.

PyYAML reads `1e-5` as text and `on` as True, and keeps the last of two equal keys. Here each is an error. PyYAML turns
an alias into the same object; here it is a copy, so that a change in one place does not appear in the other.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from search.files import replace_text
from trainables.contract import UserError

_EXPONENT_WITHOUT_POINT = re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\d[\d_]*\.\d*[eE]\d+")
_POINT_FIRST = re.compile(r"[-+]?\.\d[\d_]*([eE][-+]?\d+)?")
_OTHER_BASE = re.compile(r"[-+]?(0[\d_]+|[\d_]+(:[0-5]?\d)+(\.[\d_]*)?)")  # octal and sexagesimal
_NEARLY_OCTAL = re.compile(r"[-+]?0(o[0-7]+|\d*[89]\d*)")
_WORDS_FOR_BOOL = {"yes", "no", "on", "off"}


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise UserError(
                    f"line {key.start_mark.line + 1}: the key `{key.value}` appears twice; keep one of them"
                )
            seen.add((key.tag, str(key.value)))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except UserError:
            raise
        except (ValueError, LookupError, AttributeError) as error:  # as of 2024-13-01, !!bool maybe, !!timestamp abc
            why = f": {error}" if isinstance(error, ValueError) else ""
            kind = node.tag.rpartition(":")[2]
            raise UserError(
                f'line {node.start_mark.line + 1}: {node.value} is no {kind}{why}; write "{node.value}" for the text'
            ) from None


def _plain_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    if node.style is None and (mended := _mended(node.value)):
        raise UserError(f"line {node.start_mark.line + 1}: YAML reads {node.value} as text; write {mended}")
    return str(loader.construct_scalar(node))


def _mended(text: str) -> str | None:
    """Return how to write the number that `text` looks like, and YAML takes for text; None for any other text."""
    if _EXPONENT_WITHOUT_POINT.fullmatch(text):
        return _with_point(text)
    if _POINT_FIRST.fullmatch(text):
        sign, digits = re.fullmatch(r"([-+]?)(.*)", text).groups()  # type: ignore[union-attr]
        mended = f"{sign}0{digits}"
        return _with_point(mended) if "e" in mended.lower() else mended
    if _NEARLY_OCTAL.fullmatch(text):
        return f'{int(text, 0 if "o" in text else 10)}, or "{text}" for the text'
    return None


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    is_whole = node.tag.endswith(":int")
    number: int | float = loader.construct_yaml_int(node) if is_whole else loader.construct_yaml_float(node)
    if _OTHER_BASE.fullmatch(node.value):
        raise UserError(
            f"line {node.start_mark.line + 1}: YAML reads {node.value} as {number}; write that, or "
            f'"{node.value}" for the text'
        )
    return number


def _strict_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    if node.value.lower() in _WORDS_FOR_BOOL:
        raise UserError(
            f"line {node.start_mark.line + 1}: YAML reads {node.value} as a truth value; write true or false, "
            f'or "{node.value}" for the text'
        )
    return bool(loader.construct_yaml_bool(node))


_Loader.add_constructor("tag:yaml.org,2002:str", _plain_text)
_Loader.add_constructor("tag:yaml.org,2002:bool", _strict_bool)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)


def _with_point(text: str) -> str:
    mantissa, exponent = re.split("[eE]", text)
    sign = "" if exponent[0] in "+-" else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}"


def parse(text: str, where: str) -> Any:
    """Return the value that the YAML `text` holds; raises UserError with `where` and the line."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply to be read; close some brackets earlier") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{where}: {line}{getattr(error, 'problem', None) or 'not YAML'}") from None
    except (ValueError, OverflowError) as error:  # such as "\UFFFFFFFF", which is no character
        raise UserError(f"{where}: not YAML: {error}") from None
    try:
        return _copied(value)
    except RecursionError:
        raise UserError(f"{where}: an alias refers to something that contains it; write the values out") from None


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def read(path: Path) -> Any:
    try:
        return parse(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


class _Dumper(yaml.SafeDumper):
    """Keeps short lists on one line, and writes each value, without anchors, so that `parse` reads it back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text:
        text = _with_point(text)
    if text in ("inf", "-inf", "nan"):
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}[text]
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if _mended(value) else None)


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)
_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", list(value), flow_style=True)
)
_Dumper.add_representer(
    list,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", value, flow_style=not any(isinstance(item, (dict, list)) for item in value)
    ),
)


def dump(value: Any) -> str:
    """Return `value` as YAML that `parse` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _LineDumper(_Dumper):
    """Writes everything on one line."""


_LineDumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def dump_line(value: Any) -> str:
    """Return `value` as YAML on one line that `parse` reads back equal."""
    text = yaml.dump(
        value, Dumper=_LineDumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("...\n").strip()


def write(path: Path, value: Any, durable: bool = False) -> None:
    """Write a YAML file whole or not at all, if `durable` also when the machine loses its power."""
    replace_text(path, dump(value), durable)
