"""The messages between a slot and the ranks of its group.

A separate module without PyTorch, so that the mailbox process starts in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GroupSpec:
    """What a group consists of and what it runs.

    required: metrics that every report must contain with finite values; others may be missing or NaN.
    report_timeout_s: after this long without a report, a rank is considered hung; None: never.
    """

    trainable: str
    paths: tuple[str, ...]
    required: tuple[str, ...]
    workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    memory_limit_mb: float | None
    report_timeout_s: float | None
    scratch: str


@dataclass(frozen=True)
class Begin:
    """Run a trial up to its first report. resume: a saved state as bytes, or None. number: the trial's."""

    config: dict[str, Any]
    seed: int
    resume: bytes | None = None
    number: int | None = None


@dataclass(frozen=True)
class Advance:
    """Run the trial up to its next report."""


@dataclass(frozen=True)
class Leave:
    """Let go of the last trial, wherever it stands; the answer says whether the process can take another."""


@dataclass(frozen=True)
class Quit:
    """Leave the serve loop."""


Command = Begin | Advance | Leave | Quit


@dataclass(frozen=True)
class Answer:
    """A rank's answer to a command.

    clean: the process can take another trial. ends: the trial is over. printed: what rank 0 has printed since its last
    answer.
    """

    clean: bool = True
    ends: bool = True
    printed: str = ""


@dataclass(frozen=True)
class Reported(Answer):
    """An epoch is over. metrics and state are rank 0's; state is None if the trainable gave none."""

    metrics: Mapping[str, float] | None = None
    state: bytes | None = None
    ends: bool = False


@dataclass(frozen=True)
class Ended(Answer):
    """The generator is exhausted, or the trial was closed."""


@dataclass(frozen=True)
class Blew(Answer):
    """The trial diverged. details: the JSON-compatible findings of a post-mortem."""

    reason: str = ""
    step: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RanOut(Answer):
    """The trial ran out of memory."""

    reason: str = ""


@dataclass(frozen=True)
class Broke(Answer):
    """Anything else was raised. final: a user's mistake, which a retry would only repeat."""

    reason: str = ""
    trace: str = ""
    final: bool = False
