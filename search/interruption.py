"""What ends a search early: Ctrl-C, a signal, or an error after which it cannot go on."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune import TuneError

from search.files import says_full
from search.text import said, short_line, where
from trainables.contract import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm sends the last one before the time is over


class Hopeless(Exception):
    """Trials fail one after another; the message says how, and the search ends so that it can be resumed."""


class Interruption:
    """Whether a search must end early, and why.

    pressed: a user or a signal asks for it; within `heeded`, the first of `SIGNALS` sets this and does no more.
    cause: the first exception that occurred within `kept`.
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
        """The cause in one line. Tune passes on the text of a traceback, whose last line is the error."""
        if self.cause is None:
            return None
        told = short_line(said(self.cause).strip().rpartition("\n")[2], type(self.cause).__name__)
        if says_full(told):
            return f"the disk is full ({told})"
        if _is_of_a_file(self.cause):
            return f"the results cannot be written ({told})"
        return told if isinstance(self.cause, Hopeless | TuneError | UserError) else where(self.cause)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an exception raised in this context as the cause, which ends the search; code after it still runs."""
        try:
            yield
        except Exception as error:
            told = isinstance(error, Hopeless | UserError) or says_full(said(error)) or _is_of_a_file(error)
            if not (self.cause or told):
                traceback.print_exc()  # for the person who has to fix it
            self.cause = self.cause or error

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let the first of `SIGNALS` stop cleanly; a second has its usual effect, except SIGUSR1, a warning: none."""

        def stop(signum: int, frame: Any) -> None:
            self.pressed = True
            for known, handler in before.items():
                signal.signal(known, signal.SIG_IGN if known == signal.SIGUSR1 else handler)
            print("\nstopping; press Ctrl-C again to abandon", flush=True)

        before = {known: signal.getsignal(known) for known in SIGNALS}
        try:
            for known in SIGNALS:
                signal.signal(known, stop)
            yield
        finally:
            for known, handler in before.items():
                signal.signal(known, handler)


def _is_of_a_file(error: BaseException) -> bool:
    """Return whether the error names a file, in a results folder that has gone, for example, or become read-only."""
    return isinstance(error, OSError) and error.filename is not None


class OwnHandler(tune.Callback):
    """Puts back the handler of SIGUSR1, for which Tune installs its own, and leaves it, before any trial begins."""

    def __init__(self) -> None:
        self._own = signal.getsignal(signal.SIGUSR1)

    def __reduce__(self) -> tuple[type[OwnHandler], tuple[()]]:
        """Pickle without the handler: Tune keeps a copy of its callbacks, which it never uses."""
        return OwnHandler, ()

    def setup(self, *args: Any, **info: Any) -> None:
        if signal.getsignal(signal.SIGUSR1) not in (self._own, signal.SIG_IGN):
            signal.signal(signal.SIGUSR1, self._own)
