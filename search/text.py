"""Text for people: what user code says, its errors included, as JSON and tables can hold it, and exact numbers."""

from __future__ import annotations

import contextlib
import math
import re
import traceback
from collections.abc import Mapping
from typing import Any

DEEPEST = 20  # levels of nested containers; one that contains itself would have no end
LONGEST_TEXT = 400  # characters
# ANSI sequences, and control characters but for white space
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0e-\x1b\x7f]")
LONGEST_REASON = 4000  # characters of the reason that a trainable gives; readers of CSV stop at 131072


def plain(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON can hold it.

    Keys become text; scalars and arrays of NumPy and PyTorch become numbers and lists; numbers that are not finite,
    which JSON does not have, become text, and so does any other object.
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
        with contextlib.suppress(Exception):  # a sparse tensor cannot be converted to a list
            return plain(value.tolist(), depth + 1)
    return short_line(said(value), type(value).__name__)


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: lone surrogates, as in the name of an old file, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def said(thing: object) -> str:
    """Return the text of an exception or another object; empty if its class fails to give one."""
    try:
        return str(thing)
    except Exception:
        return ""


def exactly(value: float) -> str:
    """Return a number in as few digits as tell it apart: a limit that is rounded may look as if it were met."""
    return short if float(short := f"{value:g}") == value else repr(value)


def one_line(text: str, otherwise: str) -> str:
    """Return a text on one line, without colours and control characters; `otherwise` if it is empty."""
    return encodable(" ".join(CONTROL.sub("", text).split())) or otherwise


def short_line(text: str, otherwise: str, longest: int = LONGEST_TEXT) -> str:
    """Return a text on one line, cut to `longest` characters; for messages that are kept whole elsewhere."""
    line = one_line(text, otherwise)
    return line if len(line) <= longest else line[: longest - 4].rstrip() + " ..."


def where(error: BaseException) -> str:
    """Describe an error and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file, line = frame.filename, frame.lineno
    if isinstance(error, SyntaxError):
        file, line = error.filename or file, error.lineno
    return f"{type(error).__name__}: {one_line(said(error), 'no message')} ({file}:{line})"
