"""The machines of a cluster, which may go while a search runs."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import ray

ANSWER_S = 3.0  # for a machine to take a connection


def alive() -> dict[str, str]:
    """The address of each machine that is there, by the id of its Ray node."""
    return {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes() if entry["Alive"]}


def gone(nodes: Iterable[str]) -> bool:
    """Whether one of the machines has gone. Ray takes up to a minute to be sure of that, so each machine is asked."""
    wanted = set(nodes)
    there = [entry for entry in ray.nodes() if entry["NodeID"] in wanted]
    return len(there) < len(wanted) or not all(
        entry["Alive"] and answers(entry["NodeManagerAddress"], entry["NodeManagerPort"]) for entry in there
    )


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), ANSWER_S).close()
    except OSError:
        return False
    return True
