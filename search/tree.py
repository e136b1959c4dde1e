"""Nested mappings addressed by dotted paths. A domain is a leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from search.domain import is_domain
from trainables.contract import UserError

MISSING: Any = object()


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over`; mappings are merged, all else (a domain too) is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if _is_tree(old) and _is_tree(value) else value
    return merged


def _is_tree(node: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(node, dict) and not is_domain(node)


def get(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return MISSING
        node = node[key]
    return node


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = tree
    for i, key in enumerate(parents):
        if node.get(key) is None:  # a key with nothing behind it yet
            node[key] = {}
        child = node[key]
        if not isinstance(child, dict) or is_domain(child):
            above = ".".join(parents[: i + 1])
            raise UserError(f"{path}: {above} is a value, not a mapping of further keys")
        node = child
    node[last] = value


def drop(tree: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    node: Any = tree
    for key in parents:
        node = node[key]
    del node[last]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, node in tree.items():
        if isinstance(node, dict) and node and not is_domain(node):
            found += leaves(node, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}")
    return found
