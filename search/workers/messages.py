"""What a slot and the ranks of its group say to each other.

A module of its own, and without PyTorch in it: the process that holds a mailbox starts in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Begin:
    """Run a trial up to its first report. `resume`: a saved state as bytes, or None."""

    config: dict[str, Any]
    seed: int
    resume: bytes | None = None


@dataclass(frozen=True)
class Advance:
    """Run the trial up to its next report."""


@dataclass(frozen=True)
class Leave:
    """Let go of the last trial, wherever it stands; the answer says whether the process may take another."""


@dataclass(frozen=True)
class Quit:
    """Leave the serve loop."""


Command = Begin | Advance | Leave | Quit


@dataclass(frozen=True)
class Answer:
    """What a rank says after a command.

    clean: the process may take another trial. printed: what rank 0 has printed since its last answer.
    """

    clean: bool = True
    ends: bool = True
    printed: str = ""


@dataclass(frozen=True)
class Reported(Answer):
    """An epoch is over. metrics and state (None: the trainable gave none) are rank 0's."""

    metrics: Mapping[str, float] | None = None
    state: bytes | None = None
    ends: bool = False


@dataclass(frozen=True)
class Ended(Answer):
    """The generator is exhausted."""


@dataclass(frozen=True)
class Blew(Answer):
    """The trial diverged. details: what a post-mortem found, as JSON has it."""

    reason: str = ""
    step: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RanOut(Answer):
    """The device's memory did not suffice."""

    reason: str = ""


@dataclass(frozen=True)
class Broke(Answer):
    """Anything else was raised. final: a mistake of a person, which a retry would only repeat."""

    reason: str = ""
    trace: str = ""
    final: bool = False
