"""The `KEY=VALUE` overrides of a space file, and the known settings that they rule out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search import yaml_file
from search.space import tree as trees
from search.space.decode import did_you_mean
from search.space.domain import is_domain, parse_domain
from search.space.sections import Resources, Scheduler, Search
from trainables.contract import UserError

SECTIONS = (
    "trainable",
    "objective",
    "constraints",
    "config",
    "try_first",
    "search",
    "scheduler",
    "resources",
)
_NULLS = ("null", "Null", "NULL", "~")
_OPTIONS = tuple(
    f"{name}.{field}"
    for name, model in (("search", Search), ("scheduler", Scheduler), ("resources", Resources))
    for field in model.model_fields
)


def apply(document: dict[str, Any], text: str) -> None:
    """Apply one `dotted.key=value`; the value is YAML. Null removes a constraint."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {text}: write KEY=VALUE, such as config.optim.lr=1.0e-4")
    section_of = key.split(".")[0]
    if section_of in ("profiles", "tables"):
        raise UserError(f"--set {key}: {section_of} say what is overridden, and are changed in the file alone")
    if section_of not in SECTIONS:
        raise UserError(f"--set {key}: no such key; {_meant(key, document)}")
    value = yaml_file.parse(value_text, f"--set {key}")
    if value is None and value_text.strip() not in _NULLS:  # empty, as of a variable that is not set, or a comment
        raise UserError(f"--set {key}: {value_text!r} holds no value; write null for none, or quote what begins with #")
    path = _constraint(key, document.get("constraints")) if section_of == "constraints" else key
    if value is None and section_of == "constraints" and trees.get(document, path) is not trees.MISSING:
        trees.drop(document, path)
    else:
        trees.put(document, path, value)


def _constraint(key: str, constraints: Any) -> trees.Path:
    """Return the path that `key` means, in which the longest name of a constraint is one key, dots and all."""
    names = [name for name in constraints if isinstance(name, str)] if isinstance(constraints, dict) else []
    for name in sorted(names, key=len, reverse=True):
        if f"{key}.".startswith(f"constraints.{name}."):
            rest = key.removeprefix(f"constraints.{name}").split(".")[1:]
            return ("constraints", name, *rest)
    return key


def _meant(key: str, document: Mapping[str, Any]) -> str:
    """Return half a sentence that suggests a known key ending in `key`, or else the nearest one."""
    known = dict.fromkeys([*trees.leaves({name: document.get(name) for name in SECTIONS}), *_OPTIONS])
    ends = [name for name in known if name.endswith(f".{key}")]
    return f"did you mean `{ends[0]}`?" if ends else did_you_mean(key, known)


def leave_out(document: dict[str, Any], overrides: Sequence[str]) -> tuple[str, ...]:
    """Remove the known settings that an override rules out; returns a line on each.

    Only an override does this: a space file whose known settings clash with its own ranges is a mistake.
    """
    changed = [override.partition("=")[0].strip() for override in overrides]
    kept, lines = [], []
    given = document.get("try_first")
    for i, entry in enumerate(given if isinstance(given, list) else []):
        items = entry.items() if isinstance(entry, dict) else ()
        settings = [(str(name), value) for name, value in items if name != "name"]
        named = [(name, value) for name, value in settings if _is_under(f"config.{name}", changed)]
        clashes = [(name, value) for name, value in named if not _allows(document, name, value)]
        clashes += [(name, value) for name, value in settings if _is_off(document, name, dict(settings), changed)]
        if clashes:
            name, value = clashes[0]
            lines.append(f"left out: known setting {entry.get('name', i)} has {name} = {value}, which --set rules out")
        else:
            kept.append(entry)
    if lines:
        document["try_first"] = kept
    return tuple(lines)


def _is_under(name: str, changed: Sequence[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in changed)


def _allows(document: Mapping[str, Any], name: str, value: Any) -> bool:
    """Return whether the config's entry `name` may take, or is fixed to, this value."""
    node = trees.get(document.get("config") or {}, name)
    return parse_domain(f"config.{name}", node).domain.contains(value) if is_domain(node) else bool(node == value)


def _is_off(document: Mapping[str, Any], name: str, setting: Mapping[str, Any], changed: Sequence[str]) -> bool:
    """Return whether `name` is not searched in this setting, as an override changed its `when` or what that names."""
    config = document.get("config") or {}
    node = trees.get(config, name)
    when = node.get("when") if is_domain(node) else None
    for other, allowed in when.items() if isinstance(when, dict) else ():
        value = setting.get(str(other), trees.get(config, str(other)))  # it may be a number, and no entry's name
        holds = is_domain(value) or value in (allowed if isinstance(allowed, list) else [allowed])
        if not holds and any(_is_under(f"config.{each}", changed) for each in (name, other)):
            return True
    return False


def check_spelling(written: Sequence[str], overrides: Sequence[str]) -> None:
    """Reject misspelt config keys, which nothing else would notice without a Config class."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.startswith("config.") and not any(leaf == key or leaf.startswith(f"{key}.") for leaf in written):
            typed = "--epochs, which is --set config.epochs" if key == "config.epochs" else f"--set {key}"
            raise UserError(f"{typed}: no such key; {did_you_mean(key, written)}")
