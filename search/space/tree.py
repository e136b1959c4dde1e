"""Nested mappings addressed by dotted paths. A domain is a leaf; a space's `config` never is one.

A path is text, or the keys themselves where one of them has dots of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from search.space.domain import is_domain
from trainables.contract import UserError

MISSING: Any = object()
Path = str | tuple[str, ...]


def merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `base` with the entries of `over`; mappings are merged, all else (domains included) is replaced.

    A constraint that `over` sets to null is removed.
    """
    merged = dict(base)
    for key, value in over.items():
        if prefix == "constraints." and value is None and key in base:
            del merged[key]
            continue
        old, path = merged.get(key), f"{prefix}{key}"
        merged[key] = merge(old, value, f"{path}.") if _is_tree(old, path) and _is_tree(value, path) else value
    return merged


def _is_tree(node: Any, path: str) -> TypeGuard[dict[str, Any]]:
    return isinstance(node, dict) and (path == "config" or not is_domain(node))


def _keys(path: Path) -> tuple[str, ...]:
    return tuple(path.split(".")) if isinstance(path, str) else path


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """Return the entry at a path, or MISSING."""
    node: Any = tree
    for key in _keys(path):
        if not isinstance(node, Mapping) or key not in node:
            return MISSING
        node = node[key]
    return node


def put(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Set an entry, making the mappings around it; raises UserError if one of them is a value."""
    *parents, last = _keys(path)
    node = tree
    for i, key in enumerate(parents):
        if node.get(key) is None:  # a key without a value yet
            node[key] = {}
        child, above = node[key], ".".join(parents[: i + 1])
        if not _is_tree(child, above):
            raise UserError(f"{'.'.join(_keys(path))}: {above} is a value, not a mapping of further keys")
        node = child
    node[last] = value


def drop(tree: dict[str, Any], path: Path) -> None:
    """Remove an entry, along with enclosing mappings that held nothing else."""
    key, *rest = _keys(path)
    if rest:
        drop(tree[key], tuple(rest))
    if not rest or not tree[key]:
        del tree[key]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted paths of all entries that are not mappings; an empty one, and a domain, are leaves."""
    found = []
    for key, node in tree.items():
        path = f"{prefix}{key}"
        if node and _is_tree(node, path):
            found += leaves(node, f"{path}.")
        else:
            found.append(path)
    return found
