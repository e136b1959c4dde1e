"""What a group makes of its ranks' answers and of their silence, without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, count, repeat
from types import SimpleNamespace

import pytest
import ray

from search.group import GRACE_S, LAST_WORK_S, POLL_S, Group, worst_of
from search.workers.messages import Advance, Answer, Blew, Broke, Command, Ended, Leave, RanOut, Reported

REPORTED, ENDED = Reported(metrics={"loss": 0.5}), Ended()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([REPORTED, Reported()], REPORTED),
        ([ENDED, ENDED], ENDED),
        ([REPORTED, Blew(reason="nan")], Blew(reason="nan")),
        ([Blew(reason="nan"), RanOut(reason="2 GiB")], RanOut(reason="2 GiB")),
        ([RanOut(reason="2 GiB"), ENDED, Broke(reason="a bug")], Broke(reason="a bug")),
    ],
)
def test_the_worst_answer_decides_and_else_that_of_rank_0(answers: list[Answer], expected: Answer) -> None:
    assert worst_of(dict(reversed(list(enumerate(answers)))), len(answers)) == expected


@pytest.mark.parametrize("kind", [Ended, RanOut, Blew, Reported])
def test_a_group_is_clean_where_every_rank_is(kind: type[Answer]) -> None:
    assert worst_of({0: kind(), 1: kind()}, 2).clean
    assert not worst_of({0: kind(), 1: kind(clean=False)}, 2).clean


def test_what_was_printed_is_that_of_rank_0_whichever_decides() -> None:
    blew = Blew(reason="nan")
    assert worst_of({1: blew, 0: replace(REPORTED, printed="epoch 3\n")}, 2) == replace(blew, printed="epoch 3\n")
    assert worst_of({1: blew}, 2).printed == "", "rank 0 has not answered"


def test_a_trial_that_one_rank_has_not_ended_is_not_finished() -> None:
    """It waits for the others in a collective, and was given up."""
    worst = worst_of({1: ENDED}, 2)
    assert isinstance(worst, Broke)
    assert (worst.final, worst.clean) == (True, False)


@pytest.mark.parametrize("answers", [[REPORTED, ENDED], [ENDED, Reported()]])
def test_ranks_that_yield_unequally_often_are_a_mistake(answers: list[Answer]) -> None:
    worst = worst_of(dict(enumerate(answers)), 2)
    assert isinstance(worst, Broke)
    assert (worst.final, worst.clean) == (True, False), "those that go on would wait for ever"
    rank = [answer.ends for answer in answers].index(True)
    assert worst.reason.startswith(f"rank {rank} has ended and others have not; every rank must yield the same")


def test_what_all_ranks_say_that_broke_is_kept_and_the_same_words_once() -> None:
    lost = Broke(reason="connection closed", trace="in all_reduce\n")
    worst = worst_of({0: lost, 1: Broke(reason="KeyError", trace="in load\n"), 2: lost, 3: REPORTED}, 4)
    assert isinstance(worst, Broke)
    assert worst.reason == "rank 0, 2: connection closed; rank 1: KeyError"
    assert worst.trace == "rank 0, 2:\nin all_reduce\n\nrank 1:\nin load\n"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_break_alike_are_told_as_one(ranks: int) -> None:
    broke = Broke(reason="KeyError", trace="in load\n")
    assert worst_of(dict.fromkeys(range(ranks), broke), ranks) == broke


def test_a_mistake_of_a_person_on_one_rank_is_not_run_again() -> None:
    lost, mistaken = Broke(clean=False, reason="connection closed"), Broke(reason="no such file", final=True)
    worst = worst_of({0: lost, 1: mistaken}, 2)
    assert isinstance(worst, Broke)
    assert (worst.final, worst.clean) == (True, False)


Poll = tuple[int, Answer] | None


class Polled(Group):
    """A group whose mailbox has in it what each poll brings, in turn."""

    def __init__(self, brings: Iterable[Poll], ranks: int = 2) -> None:
        self._workers, self._ranks, self._error = ranks, [], None
        self._thread = SimpleNamespace(is_alive=lambda: True)  # type: ignore[assignment]
        self.polls, brought = 0, iter(brings)

        def wait(timeout_s: float) -> Poll:
            self.polls += 1
            return next(brought)

        calls = {"post": lambda command: None, "wait": wait, "members": list}
        self._mailbox = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})

    def _has_lost_a_machine(self) -> bool:
        return False


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda reference: reference)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("command", "first", "grace_s"),
    [
        (Advance(), Blew(reason="nan"), GRACE_S),
        (Leave(), ENDED, GRACE_S),
        (Advance(), ENDED, LAST_WORK_S),
    ],
)
def test_who_stays_silent_is_given_up_after_so_many_polls(command: Command, first: Answer, grace_s: float) -> None:
    group = Polled(chain([None] * 1000, [(1, first)], repeat(None)))
    assert not group.ask(command).clean
    assert group.polls == 1000 + 1 + grace_s / POLL_S, "as long as nobody has ended there is no hurry"


@pytest.mark.usefixtures("without_ray")
def test_who_stays_silent_is_not_waited_for_longer_as_a_third_has_ended() -> None:
    group = Polled(chain([(1, Blew(reason="nan")), (2, ENDED)], repeat(None)), ranks=3)
    assert not group.ask(Advance()).clean
    assert group.polls == 1 + GRACE_S / POLL_S + 1


@pytest.mark.usefixtures("without_ray")
def test_an_answer_that_lies_there_after_a_pause_of_the_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(step=1e6)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert Polled([(1, Blew(reason="nan")), None, (0, ENDED)]).ask(Advance()) == Blew(reason="nan")
