"""Where a rank is stuck that does not answer in time."""

from __future__ import annotations

import site
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from search.workers.messages import Broke

_PATHS = sysconfig.get_paths()
_LIBRARIES = (*(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), site.getusersitepackages())


SLICES = 10  # that a limit is waited for in: a pause of the whole machine counts as at most one of them


@contextmanager
def answered_within(limit_s: float | None, answer: Callable[[Broke], None]) -> Iterator[None]:
    """Answer for this thread if it is still in this context after `limit_s` seconds; None: wait forever.

    Code that holds the GIL, such as a loop in C, also blocks this.
    """
    if limit_s is None:
        yield
        return
    lock, over, here = threading.Lock(), threading.Event(), threading.get_ident()

    def watch() -> None:
        for _ in range(SLICES):
            if over.wait(limit_s / SLICES):
                return
        with lock:
            if not over.is_set():
                answer(stuck(sys._current_frames()[here], limit_s))

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        with lock:
            over.set()


def stuck(frame: FrameType, limit_s: float) -> Broke:
    """Return the answer of a rank stuck at `frame`: its innermost line outside libraries, and the whole stack."""
    stack = traceback.extract_stack(frame)
    own = [entry for entry in stack if not entry.filename.startswith((*_LIBRARIES, "<"))]
    at = (own or stack)[-1]
    return Broke(
        clean=False,
        reason=f"no report for {limit_s:g} s: it hangs in {at.name} ({Path(at.filename).name}:{at.lineno})",
        trace="".join(traceback.format_list(stack)),
    )
