"""A rank that hangs is answered for, with the line that it hangs in."""

from __future__ import annotations

import threading
from concurrent import futures

import pytest

from search.workers.messages import Broke
from search.workers.watchdog import SLICES, answered_within


def wait_for(answered: threading.Lock) -> None:
    answered.acquire(timeout=60.0)  # the line that is told


def test_what_takes_too_long_is_told_with_its_own_line_and_the_whole_stack() -> None:
    told, answered = list[Broke](), threading.Lock()

    def tell(broke: Broke) -> None:
        told.append(broke)
        answered.release()

    with answered, answered_within(0.5, tell):
        wait_for(answered)
    [broke] = told
    line = wait_for.__code__.co_firstlineno + 1
    assert broke.reason == f"no report for 0.5 s: it hangs in wait_for (test_overdue.py:{line})"
    assert not broke.clean
    assert not broke.final, "another attempt may do better"
    assert broke.trace.splitlines()[-1].strip() == "answered.acquire(timeout=60.0)  # the line that is told"


def test_a_library_that_waits_is_told_by_who_called_it() -> None:
    told = futures.Future[Broke]()
    with answered_within(0.5, told.set_result):
        futures.wait([told], timeout=60.0)
    broke = told.result(timeout=0)
    assert "it hangs in test_a_library_that_waits_is_told_by_who_called_it (test_overdue.py:" in broke.reason
    assert "threading.py" in broke.trace


@pytest.mark.parametrize("limit_s", [None, 60.0])
def test_what_is_in_time_is_not_told(limit_s: float | None) -> None:
    told = list[Broke]()
    with answered_within(limit_s, told.append):
        pass
    assert told == []


class Held(threading.Thread):
    """A thread that runs where the test calls it, in which no time passes: waiting for an event ends in vain."""

    begun: list[Held]
    waited: list[float | None]

    def start(self) -> None:
        self.begun.append(self)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> type[Held]:
    Held.begun, Held.waited = [], []

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        Held.waited.append(timeout)
        return False

    monkeypatch.setattr(threading, "Thread", Held)
    monkeypatch.setattr(threading.Event, "wait", wait)
    return Held


def test_nobody_is_answered_for_who_has_answered(held: type[Held]) -> None:
    """Not even where the time was over at that moment."""
    told = list[Broke]()
    with answered_within(60.0, told.append):
        pass
    held.begun[0].run()
    assert told == []


def test_a_pause_of_the_whole_machine_is_not_taken_for_a_rank_that_hangs(held: type[Held]) -> None:
    """Which may make one of the waits too long, and does not make them fewer."""
    told = list[Broke]()
    with answered_within(60.0, told.append):
        held.begun[0].run()
    assert len(told) == 1
    assert held.waited == [60.0 / SLICES] * SLICES
