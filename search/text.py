"""What somebody's code says of a trial, as JSON and a table can hold it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

DEEPEST = 20  # containers inside each other; what holds itself would have no end
LONGEST_TEXT = 400  # characters
LONGEST_REASON = 4000  # of a trial's end, as its trainable gives it; readers of CSV stop at 131072


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it.

    Keys become text; scalars and arrays of NumPy and PyTorch numbers and lists; a number that is not finite, which JSON
    does not know, becomes a word, and so does any other object.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, int):
        return int(value)
    if depth < DEEPEST:
        if isinstance(value, Mapping):
            return {encodable(str(key)): plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item, depth + 1) for item in value]
        with contextlib.suppress(Exception):  # a sparse tensor has no list
            return plain(value.tolist(), depth + 1)
    return short_line(said(value), type(value).__name__)


def encodable(text: str) -> str:
    """A text as UTF-8 can hold it: Python has half characters for what is none, as in the name of an old file."""
    return text.encode("utf-8", "backslashreplace").decode()


def said(thing: object) -> str:
    """What an exception says, or another object; nothing where its class fails at that."""
    try:
        return str(thing)
    except Exception:
        return ""


def one_line(text: str, otherwise: str) -> str:
    """A text in one line; `otherwise` where there is nothing in it."""
    return encodable(" ".join(text.split())) or otherwise


def short_line(text: str, otherwise: str, longest: int = LONGEST_TEXT) -> str:
    """A text in one line, cut to `longest` characters: what a library says, and is kept whole elsewhere."""
    line = one_line(text, otherwise)
    return line if len(line) <= longest else line[: longest - 4].rstrip() + " ..."
