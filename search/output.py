"""Standard output and error of a search: what cannot be written is dropped without raising an error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _Lossy:
    """A stream whose reader may have left, as `tee` does at Ctrl-C, or whose disk may be full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(Exception):  # also if a signal handler prints in the middle of a print
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(Exception):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Make printing never raise in this context, and Python's flush at exit not fail for unwritten output."""
    out, err = sys.stdout, sys.stderr
    lossy = [cast(TextIO, _Lossy(stream)) for stream in (out, err)]
    try:
        with contextlib.redirect_stdout(lossy[0]), contextlib.redirect_stderr(lossy[1]):
            yield
    finally:
        for stream in filter(None, (out, err)):  # None: it was closed before we were started
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
