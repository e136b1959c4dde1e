"""Captures what the process of a rank prints, for the trial that it runs.

What goes through Python's sys.stdout and sys.stderr is captured, and still reaches Ray's logs. Only these logs have
what a library writes bypassing Python, and what a subprocess of the trainable prints.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TextIO, cast

from search.text import encodable

LONGEST = 64 * 2**10  # characters kept until they are taken
_MOVES = re.compile(r"(\r*\n|\r|\x1b\[A)")  # cursor moves; the last, upwards, is how tqdm draws several bars


class Printed:
    """What has been printed since the last `take`, as a terminal shows it: only the latest state of a progress bar."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: deque[str] = deque()  # not on the screen yet
        self._new_length = 0
        self._rows, self._row, self._column = [""], 0, 0  # the screen, and the cursor
        self._left_out = 0
        self._continues = False  # the line taken last was not terminated

    def listen(self) -> None:
        """Capture sys.stdout and sys.stderr from here on."""
        sys.stdout, sys.stderr = (cast(TextIO, Tee(stream, self.keep)) for stream in (sys.stdout, sys.stderr))

    def keep(self, text: str) -> None:
        """Append text without blocking: a destructor may print during a `take`, and a fork may inherit a held lock."""
        self._new.append(text)
        self._new_length += len(text)
        if self._new_length > LONGEST and self._lock.acquire(blocking=False):
            try:
                self._show()
            finally:
                self._lock.release()

    def take(self, ends: bool) -> str:
        """Return what has been printed, and forget it. ends: the trial ends, so its last line is terminated."""
        with self._lock:
            self._show()
            rows, at_end = self._rows, (self._row, self._column) == (len(self._rows) - 1, len(self._rows[-1]))
            if not at_end:
                rows[-1] = rows[-1].rstrip()  # a bar that has been blanked with spaces
            text = "\n".join(rows)
            self._continues = bool(rows[-1]) or (self._continues and len(rows) == 1)
            if self._continues and (ends or not at_end):  # what is in a file cannot be overwritten
                text, self._continues = text + "\n", False
            if self._left_out:
                text = f"[{self._left_out} characters are left out here]\n{text}"
            self._rows, self._row, self._column, self._left_out = [""], 0, 0, 0
        return encodable(text)

    def _show(self) -> None:
        """Bring new text onto the screen, of which only the end is kept."""
        self._new_length = 0
        for part in _MOVES.split("".join(self._new.popleft() for _ in range(len(self._new)))):
            if part.endswith("\n") or (part == "\r" and self._continues and self._row == 0):
                self._row, self._column = self._row + 1, 0
                if self._row == len(self._rows):
                    self._rows.append("")
            elif part == "\r":
                self._column = 0
            elif part == "\x1b[A":
                self._row = max(0, self._row - 1)
            else:
                before, after = self._rows[self._row][: self._column], self._rows[self._row][self._column :]
                self._rows[self._row] = before.ljust(self._column) + part + after[len(part) :]
                self._column += len(part)
        shown = "\n".join(self._rows)
        if (over := len(shown) - LONGEST) > 0:
            rows = shown[over:].split("\n")
            gone = len(self._rows) - len(rows)
            if self._row == gone:
                self._column = max(0, self._column - len(self._rows[gone]) + len(rows[0]))
            self._rows, self._row, self._continues = rows, max(0, self._row - gone), False
            self._left_out += over


class Tee:
    """A stream that keeps what it passes on, and otherwise is the original."""

    def __init__(self, original: TextIO, keep: Callable[[str], None]) -> None:
        self._original, self._keep = original, keep

    def write(self, text: str) -> int:
        written = self._original.write(text)
        self._keep(text)
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
