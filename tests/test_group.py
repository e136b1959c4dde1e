"""What a group makes of its ranks' answers, without Ray."""

from __future__ import annotations

from dataclasses import replace

import pytest

from search.group import worst_of
from search.workers.messages import Answer, Blew, Broke, Ended, RanOut, Reported

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
    assert worst.reason.startswith(f"rank {rank} has come to its end, and others have not; every rank yields equally")


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
