"""What a call costs, on a machine that has other work to do."""

from __future__ import annotations

import time
from collections.abc import Callable

RUNS = 3


def thread_s(call: Callable[[], object]) -> float:
    """Seconds of this thread's processor time: the least of three runs, as what disturbs a run only adds to it."""
    took = []
    for _ in range(RUNS):
        began = time.thread_time()
        call()
        took.append(time.thread_time() - began)
    return min(took)
