"""Processes of this machine, any of which may end at any moment, and ports for those to come."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

PORTS = range(20_000, 32_000)  # below those that the kernel hands out to whoever asks for any


def started_by(pid: int) -> list[int]:
    """A process and all that it has started, and these; the last first."""
    started: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                started += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return [*(found for child in started for found in started_by(child)), pid]


def living_in(setting: str) -> list[int]:
    """The processes with `NAME=VALUE` in their environment."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if f"{setting}\0".encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
    return found


def named(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").replace("\0", " ")
    return ""


def kill_all(setting: str) -> None:
    """Kill the processes with `NAME=VALUE` in their environment, and those that they start meanwhile."""
    while found := living_in(setting):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """So many ports that nobody uses; others than those that tests in another process get."""

    def free() -> Iterator[int]:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # tests have one seed
            with socket.socket() as one, contextlib.suppress(OSError):
                one.bind(("", port))
                yield port

    return list(islice(free(), count))
