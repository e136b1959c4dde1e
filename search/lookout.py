"""Reports what a search waits for on its cluster, machines that have gone and room for its groups, and frees such room.

When a slot or the controller of its group is killed, Ray keeps the group's placement group until the job ends. An actor
of Ray Train's should remove it, but it asks the dashboard, which a cluster may lack, and gives up where several Rays
run on the machine. The slot's next group would then wait for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.util.placement_group import PlacementGroup, remove_placement_group

from search.cluster import alive

LOOK_S = 5.0  # between two looks at the cluster
PATIENCE_S = 20.0  # a longer wait for room is reported; after a trial, one group takes the place of another
ABANDONED_S = 30.0  # room that has been empty for that long is nobody's; ranks take theirs as soon as it is there
SELDOM = 50  # least ratio of the pause between looks to a look's duration: Ray's table keeps what was removed

BLOCKED = "no slot can start: another search runs from this machine; this one waits for it to end"


class Lookout(tune.Callback):
    """Prints a line when machines go or come and when slots wait, which nothing else reports."""

    def __init__(self) -> None:
        self._known = alive()
        self._waiting, self._abandoned = Waiting(), Abandoned()
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
        own = {key: entry for key, entry in ray.util.placement_group_table().items() if key.endswith(job)}
        for line in [*moves(before, self._known), *self._waiting.look(own, began)]:
            print(line, flush=True)
        for key in self._abandoned.look(own, ray.cluster_resources(), ray.available_resources(), began):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(key)))
            print(f"freed what a group that was killed had reserved: {needs(own[key])}", flush=True)
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

    def look(self, own: Mapping[str, Any], now: float) -> list[str]:
        """Return a line when more groups than before have waited for `PATIENCE_S`, and one when no slot can start.

        own: this search's part of Ray's table of placement groups.
        """
        pending = {key: entry for key, entry in own.items() if waits(entry)}
        self._since = {key: self._since.get(key, now) for key in pending}
        long = [entry for key, entry in pending.items() if now - self._since[key] >= PATIENCE_S]
        groups = [entry for entry in long if not is_slot(entry)]
        has_slot = any(is_slot(entry) and entry["state"] == "CREATED" for entry in own.values())
        blocked = len(groups) < len(long) and not has_slot
        (before, knew), self._told = self._told, (len(groups), blocked)
        return ([room(groups)] if len(groups) > before else []) + ([BLOCKED] if blocked and not knew else [])


class Abandoned:
    """Finds the placement groups of killed worker groups: no process is in them."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # by placement group: when it was first seen empty

    def look(
        self, own: Mapping[str, Any], total: Mapping[str, float], free: Mapping[str, float], now: float
    ) -> list[str]:
        """Return those that have been empty for `ABANDONED_S` while a group like them waits for room.

        What a trainable reserves for itself may be empty for as long, and is not like a group. total, free: the
        cluster's resources. Ray lists one for each placement group, of which every process in it takes a little.
        """
        names = {key: f"bundle_group_{key}" for key, entry in own.items() if entry["state"] == "CREATED"}
        empty = [key for key, name in names.items() if name in total and free.get(name) == total[name]]
        self._since = {key: self._since.get(key, now) for key in empty if not is_slot(own[key])}
        waiting = [entry["bundles"] for entry in own.values() if waits(entry) and not is_slot(entry)]
        long = [key for key, since in self._since.items() if now - since >= ABANDONED_S]
        return [key for key in long if own[key]["bundles"] in waiting]


def waits(entry: Mapping[str, Any]) -> bool:
    return entry["state"] in ("PENDING", "RESCHEDULING")


def is_slot(entry: Mapping[str, Any]) -> bool:
    """Return whether a placement group is that of a slot, on the driver's machine, and not of a group's workers."""
    return any(name.startswith("node:") for name in entry["bundles"][0])


def room(groups: Sequence[Mapping[str, Any]]) -> str:
    slots = f"{len(groups)} slot{'s wait' if len(groups) > 1 else ' waits'}"
    return f"{slots} for room in the cluster: {needs(groups[0])}"


def needs(group: Mapping[str, Any]) -> str:
    """Return what the workers of a group need, such as "2 x (4 CPU, 1 GPU)"."""
    one = ", ".join(f"{value:g} {name}" for name, value in group["bundles"][0].items())
    return f"{len(group['bundles'])} x ({one})"
