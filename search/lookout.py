"""Reports what a search waits for on its cluster: machines that have gone, and room for its groups."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from search.cluster import alive

LOOK_S = 5.0  # between two looks at the cluster
PATIENCE_S = 20.0  # a longer wait for room is reported; after a trial, one group takes the place of another
SELDOM = 50  # least ratio of the pause between looks to a look's duration: Ray's table keeps what was removed

BLOCKED = "no slot can start: another search runs from this machine; this one waits for it to end"
Needs = list[dict[str, float]]  # resources of each worker of a group


class Lookout(tune.Callback):
    """Prints a line when machines go or come and when slots wait, which nothing else reports."""

    def __init__(self) -> None:
        self._known = alive()
        self._waiting = Waiting()
        self._next_look = time.monotonic() + LOOK_S

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() >= self._next_look:
            try:
                self._look()
            except Exception as error:  # failing to report a wait must not end a search
                print(f"no longer reporting what the search waits for: {error!r}", flush=True)
                self._next_look = math.inf

    def _look(self) -> None:
        began = time.monotonic()
        before, self._known = self._known, alive()
        job = ray.get_runtime_context().get_job_id()
        told = [*moves(before, self._known), *self._waiting.look(ray.util.placement_group_table(), job, began)]
        for line in told:
            print(line, flush=True)
        now = time.monotonic()
        self._next_look = now + max(LOOK_S, SELDOM * (now - began))


def moves(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a line for each machine that has gone or come."""
    return [
        *(f"a machine was lost, {before[node]}: its trials go on where there is room" for node in before.keys() - now),
        *(f"a machine was added, {now[node]}" for node in now.keys() - before),
    ]


class Waiting:
    """Keeps track of what in a search waits for room, and since when."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # by placement group
        self._told = 0, False

    def look(self, table: Mapping[str, Any], job: str, now: float) -> list[str]:
        """Return a line when more groups than before have waited for `PATIENCE_S`, and one when no slot can start.

        table: Ray's table of all placement groups; the ids of this search's end with its job id.
        """
        own = {key: entry for key, entry in table.items() if key.endswith(job)}
        pending = {key: entry for key, entry in own.items() if entry["state"] in ("PENDING", "RESCHEDULING")}
        self._since = {key: self._since.get(key, now) for key in pending}
        long = [entry for key, entry in pending.items() if now - self._since[key] >= PATIENCE_S]
        groups = [list(entry["bundles"].values()) for entry in long if not is_slot(entry)]
        has_slot = any(is_slot(entry) and entry["state"] == "CREATED" for entry in own.values())
        blocked = len(groups) < len(long) and not has_slot
        (before, knew), self._told = self._told, (len(groups), blocked)
        return ([room(groups)] if len(groups) > before else []) + ([BLOCKED] if blocked and not knew else [])


def is_slot(entry: Mapping[str, Any]) -> bool:
    """Return whether a placement group is that of a slot, on the driver's machine, and not of a group's workers."""
    return any(name.startswith("node:") for name in entry["bundles"][0])


def room(groups: list[Needs]) -> str:
    needs = ", ".join(f"{value:g} {name}" for name, value in groups[0][0].items())
    slots = f"{len(groups)} slot{'s wait' if len(groups) > 1 else ' waits'}"
    return f"{slots} for room in the cluster: {len(groups[0])} x ({needs})"
