"""The machines of a cluster, which may go and come while a search runs."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray import tune

LOOK_S = 5.0  # between two looks
PATIENCE_S = 20.0  # with a group that waits for room; after a trial, one takes the place of another
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


def waiting() -> list[list[dict[str, float]]]:
    """Of each group of this search that waits for room, what its workers need."""
    job = ray.get_runtime_context().get_job_id()  # with which the ids of its placement groups end
    pending = [
        list(entry["bundles"].values())
        for key, entry in ray.util.placement_group_table().items()
        if key.endswith(job) and entry["state"] in ("PENDING", "RESCHEDULING")
    ]
    return [needs for needs in pending if not any(name.startswith("node:") for name in needs[0])]  # those are slots


class Machines(tune.Callback):
    """Tells of machines that go or come, and of slots that wait for room. Nothing else would say so."""

    def __init__(self) -> None:
        self._known = alive()
        self._next_look = time.monotonic() + LOOK_S
        self._waiting_since: float | None = None
        self._told = False

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._look_at_machines()
            self._look_at_groups(now)

    def _look_at_machines(self) -> None:
        before, self._known = self._known, alive()
        for node in before.keys() - self._known.keys():
            left = f"{len(self._known)} of {len(before)} are left"
            print(f"a machine has gone, {before[node]}: {left}; what ran on it goes on where there is room", flush=True)
        for node in self._known.keys() - before.keys():
            print(f"a machine has come, {self._known[node]}", flush=True)

    def _look_at_groups(self, now: float) -> None:
        """Once for each time that some have to wait for long."""
        if not (groups := waiting()):
            self._waiting_since, self._told = None, False
            return
        if self._waiting_since is None:
            self._waiting_since = now
        if not self._told and now - self._waiting_since >= PATIENCE_S:
            self._told = True
            needs = ", ".join(f"{value:g} {name}" for name, value in groups[0][0].items())
            slots = f"{len(groups)} slot{'s wait' if len(groups) > 1 else ' waits'}"
            print(f"{slots} for room in the cluster: {len(groups[0])} x ({needs})", flush=True)
