"""What a process prints, followed while it runs."""

from __future__ import annotations

import re
import subprocess


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read the output of a process up to a line that matches; returns all that was read."""
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if re.search(pattern, line):
            return told
    raise AssertionError(f"{pattern!r} was never printed:\n{told}")
