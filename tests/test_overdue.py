"""A rank that hangs is answered for, with the line that it hangs in."""

from __future__ import annotations

import time
from concurrent import futures

import pytest

from search.workers.messages import Broke
from search.workers.watchdog import answered_within


def wait_for_nobody(seconds: float) -> None:
    time.sleep(seconds)  # the line that is told


def within(limit_s: float | None, seconds: float) -> list[Broke]:
    told = list[Broke]()
    with answered_within(limit_s, told.append):
        wait_for_nobody(seconds)
    return told


def test_what_takes_too_long_is_told_with_its_own_line_and_the_whole_stack() -> None:
    [broke] = within(0.05, 1.0)
    line = wait_for_nobody.__code__.co_firstlineno + 1
    assert broke.reason == f"no report for 0.05 s: it hangs in wait_for_nobody (test_overdue.py:{line})"
    assert not broke.clean
    assert not broke.final, "another attempt may do better"
    assert broke.trace.splitlines()[-1].strip() == "time.sleep(seconds)  # the line that is told"


def test_a_library_that_waits_is_told_by_who_called_it() -> None:
    told = list[Broke]()
    with answered_within(0.05, told.append):
        futures.wait([futures.Future[None]()], timeout=1.0)
    assert "it hangs in test_a_library_that_waits_is_told_by_who_called_it (test_overdue.py:" in told[0].reason
    assert "threading.py" in told[0].trace


@pytest.mark.parametrize("limit_s", [None, 60.0])
def test_what_is_in_time_is_not_told(limit_s: float | None) -> None:
    assert within(limit_s, 0.05) == []


def test_nobody_is_answered_for_who_has_answered() -> None:
    told = list[Broke]()
    for _ in range(50):
        with answered_within(0.02, told.append):
            pass
    time.sleep(0.1)
    assert told == []
