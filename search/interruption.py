"""What ends a search before its time: Ctrl-C, a signal, or an error after which it cannot go on."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import TuneError

from search.files import says_full
from search.space.loading import where
from search.text import said, short_line

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what Slurm sends before the time is over


class Hopeless(Exception):
    """Whatever is tried fails; the message says how, and the search ends to be resumed."""


class Interruption:
    """`pressed`: somebody wants it to end; while `heeded` is entered, the first of `SIGNALS` only sets it.

    `cause`: the first exception that was `kept`.
    """

    def __init__(self) -> None:
        self.pressed = False
        self.cause: Exception | None = None

    @property
    def came(self) -> bool:
        return self.pressed or self.cause is not None

    @property
    def hopeless(self) -> bool:
        return isinstance(self.cause, Hopeless)

    @property
    def reason(self) -> str | None:
        """The cause in a line. Tune hands on the text of a traceback, which ends in what was raised."""
        if self.cause is None:
            return None
        told = short_line(said(self.cause).strip().rpartition("\n")[2], type(self.cause).__name__)
        if says_full(told):
            return f"the disk is full ({told})"
        return told if self.hopeless or isinstance(self.cause, TuneError) else where(self.cause)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """An exception in here is kept as the cause, and ends the search; what comes after the block still runs."""
        try:
            yield
        except Exception as error:
            if not (self.cause or isinstance(error, Hopeless) or says_full(said(error))):
                traceback.print_exc()  # for whoever has to mend it
            self.cause = self.cause or error

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """The first of `SIGNALS` stops cleanly; a second has its usual effect, but for SIGUSR1, a mere warning."""

        def stop(signum: int, frame: Any) -> None:
            self.pressed = True
            for known, handler in before.items():
                signal.signal(known, signal.SIG_IGN if known == signal.SIGUSR1 else handler)
            print("\nstopping; press Ctrl-C again to abandon", flush=True)

        before = {known: signal.signal(known, stop) for known in SIGNALS}
        try:
            yield
        finally:
            for known, handler in before.items():
                signal.signal(known, handler)
