"""The machines of a cluster, which may go and come while a search runs."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray import tune

LOOK_S = 5.0  # between two looks
ANSWER_S = 3.0  # for a machine to take a connection


def alive() -> dict[str, str]:
    """The address of each machine that is there, by the id of its Ray node."""
    return {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes() if entry["Alive"]}


def gone(nodes: Iterable[str]) -> bool:
    """Whether one of the machines has gone. Ray itself takes half a minute to be sure of that, so they are asked."""
    wanted = set(nodes)
    there = [entry for entry in ray.nodes() if entry["NodeID"] in wanted]
    return len(there) < len(wanted) or not all(entry["Alive"] and _answers(entry) for entry in there)


def _answers(entry: dict[str, Any]) -> bool:
    try:
        socket.create_connection((entry["NodeManagerAddress"], entry["NodeManagerPort"]), ANSWER_S).close()
    except OSError:
        return False
    return True


class Machines(tune.Callback):
    """Tells of machines that go or come: slots without one wait, and nothing else would say so."""

    def __init__(self) -> None:
        self._known = alive()
        self._next_look = time.monotonic() + LOOK_S

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() < self._next_look:
            return
        before, self._known = self._known, alive()
        self._next_look = time.monotonic() + LOOK_S
        for node in before.keys() - self._known.keys():
            left = f"{len(self._known)} of {len(before)} are left"
            print(f"a machine has gone, {before[node]}: {left}; what ran on it goes on where there is room", flush=True)
        for node in self._known.keys() - before.keys():
            print(f"a machine has come, {self._known[node]}", flush=True)
