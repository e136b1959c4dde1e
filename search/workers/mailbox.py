"""The mailbox between a slot and the ranks of its worker group: a process without PyTorch and Ray Train."""

from __future__ import annotations

import asyncio
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Mailbox:
    """A queue of commands for each rank and one queue of answers."""

    def __init__(self, ranks: int) -> None:
        self._commands: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in range(ranks)]
        self._answers: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._members: list[bytes] = []
        self._nodes: list[str] = []
        self._complete = asyncio.Event()

    async def enlist(self, member: bytes, node: str) -> int:
        """Register a rank, by its actor's pickled handle and its node; returns the machines' number once all have."""
        self._members.append(member)
        self._nodes.append(node)
        if len(self._members) == len(self._commands):
            self._complete.set()
        await self._complete.wait()
        return len(set(self._nodes))

    async def members(self) -> list[bytes]:
        """Return the pickled handles of the ranks' actors, by which a stuck rank can be killed."""
        return self._members

    async def nodes(self) -> list[str]:
        """Return the Ray nodes of the ranks that have registered."""
        return self._nodes

    async def post(self, command: Any) -> None:
        for queue in self._commands:
            queue.put_nowait(command)

    async def take(self, rank: int) -> Any:
        return await self._commands[rank].get()

    async def answer(self, rank: int, answer: Any) -> None:
        self._answers.put_nowait((rank, answer))

    async def wait(self, timeout_s: float) -> tuple[int, Any] | None:
        """Return the next answer with its rank; None if none arrives within `timeout_s`."""
        try:
            return await asyncio.wait_for(self._answers.get(), timeout_s)
        except TimeoutError:
            return None
