"""The mailbox between a slot and the ranks of its worker group, a separate process that does not import PyTorch."""

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
        self._members: list[Any] = []
        self._nodes: list[str] = []
        self._complete = asyncio.Event()

    async def enlist(self, member: Any, node: str) -> int:
        """Register a rank, by its own actor and Ray node; returns the number of machines once all have registered."""
        self._members.append(member)
        self._nodes.append(node)
        if len(self._members) == len(self._commands):
            self._complete.set()
        await self._complete.wait()
        return len(set(self._nodes))

    async def members(self) -> list[Any]:
        """Return the ranks' own actors, by which a stuck rank can be killed."""
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
