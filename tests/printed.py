"""What a process prints, followed while it runs."""

from __future__ import annotations

import re
import subprocess
import threading

LONGEST_S = 400.0


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read the output of a process up to a line that matches; returns all that was read. It is killed if none comes."""
    assert process.stdout is not None
    told, timer = "", threading.Timer(LONGEST_S, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            told += line
            if re.search(pattern, line):
                return told
    finally:
        timer.cancel()
    raise AssertionError(f"{pattern!r} was never printed:\n{told}")
