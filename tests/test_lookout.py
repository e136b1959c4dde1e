"""What is told of machines and of room for groups, from what Ray knows of them."""

from __future__ import annotations

import socket
from typing import Any

from search.cluster import answers
from search.lookout import ABANDONED_S, BLOCKED, PATIENCE_S, Abandoned, Waiting, moves

SLOT = {"CPU": 0.0, "node:10.0.0.1": 0.6667}
RANK = {"CPU": 4.0, "GPU": 1.0}


def placed(state: str, *bundles: dict[str, float]) -> dict[str, Any]:
    """A placement group, as Ray's table has it."""
    return {"state": state, "bundles": dict(enumerate(bundles))}


def test_machines_that_have_gone_and_come_are_told() -> None:
    assert moves({"a": "10.0.0.1", "b": "10.0.0.2"}, {"a": "10.0.0.1", "c": "10.0.0.3"}) == [
        "a machine was lost, 10.0.0.2: its trials go on where there is room",
        "a machine was added, 10.0.0.3",
    ]
    assert moves({"a": "10.0.0.1"}, {"a": "10.0.0.1"}) == []


def test_a_machine_answers_while_something_listens_there() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        there = one.getsockname()
        assert not answers(*there)
        one.listen()
        assert answers(*there)


def test_groups_that_wait_for_long_are_told_once_and_again_when_there_are_more() -> None:
    waiting, slot = Waiting(), {"s01": placed("CREATED", SLOT)}
    one, two = {"a01": placed("PENDING", RANK, RANK)}, {"b01": placed("RESCHEDULING", RANK, RANK)}
    assert waiting.look({**slot, **one}, 0.0) == []
    told = "1 slot waits for room in the cluster: 2 x (4 CPU, 1 GPU)"
    assert waiting.look({**slot, **one}, PATIENCE_S) == [told]
    assert waiting.look({**slot, **one, **two}, PATIENCE_S + 1) == []
    told = "2 slots wait for room in the cluster: 2 x (4 CPU, 1 GPU)"
    assert waiting.look({**slot, **one, **two}, 2 * PATIENCE_S + 1) == [told]
    assert waiting.look(slot, 3 * PATIENCE_S) == []
    assert waiting.look({**slot, **one}, 4 * PATIENCE_S) == [], "it waits anew"


def test_groups_that_take_each_others_place_do_not_wait_for_long() -> None:
    waiting = Waiting()
    for turn in range(10):
        table = {"s01": placed("CREATED", SLOT), f"{turn}01": placed("PENDING", RANK)}
        assert waiting.look(table, turn * PATIENCE_S) == []


def test_what_has_gone_is_not_told() -> None:
    waiting, table = Waiting(), {"b01": placed("REMOVED", RANK)}
    assert [waiting.look(table, at) for at in (0.0, 100.0)] == [[], []]


def test_a_search_without_a_slot_of_its_own_is_told_once() -> None:
    waiting, table = Waiting(), {"s01": placed("PENDING", SLOT)}
    assert [waiting.look(table, at) for at in (0.0, PATIENCE_S, 2 * PATIENCE_S)] == [[], [BLOCKED], []]
    waiting, table = Waiting(), {"s01": placed("PENDING", SLOT), "t01": placed("CREATED", SLOT)}
    assert [waiting.look(table, at) for at in (0.0, PATIENCE_S)] == [[], []], "a paused trial, perhaps"


def of_ray(*groups: str, taken: float = 0.0) -> dict[str, float]:
    """The resources of placement groups of two bundles each, as Ray lists them, with something taken of each."""
    return {f"bundle_group_{key}": 2000.0 - taken for key in groups}


def test_what_a_killed_group_keeps_is_found_while_another_waits_for_room() -> None:
    abandoned, total = Abandoned(), of_ray("s01", "a01", "b01")
    own = {"s01": placed("CREATED", SLOT), "a01": placed("CREATED", RANK, RANK), "b01": placed("CREATED", RANK, RANK)}
    in_use = {**of_ray("s01", "a01"), **of_ray("b01", taken=0.002)}
    assert abandoned.look(own, total, in_use, 0.0) == []
    assert abandoned.look(own, total, in_use, ABANDONED_S) == [], "nobody needs it"
    other = {**own, "t01": placed("PENDING", RANK)}
    assert abandoned.look(other, total, in_use, ABANDONED_S) == [], "a trainable reserves something for itself"
    waits = {**own, "c01": placed("PENDING", RANK, RANK)}
    assert abandoned.look(waits, total, in_use, ABANDONED_S + 1) == ["a01"]


def test_a_group_that_begins_is_not_taken_for_a_killed_one() -> None:
    abandoned, total = Abandoned(), of_ray("a01")
    own = {"a01": placed("CREATED", RANK), "c01": placed("PENDING", RANK)}
    assert abandoned.look(own, total, of_ray("a01"), 0.0) == []
    assert abandoned.look(own, total, of_ray("a01", taken=0.001), 5.0) == []
    assert abandoned.look(own, total, of_ray("a01"), ABANDONED_S) == [], "it was in use a moment ago"
    assert abandoned.look(own, total, {}, 2 * ABANDONED_S) == [], "Ray has not yet told what is free"


def test_slots_do_not_count_as_killed_groups_nor_as_groups_that_wait() -> None:
    abandoned, total = Abandoned(), of_ray("s01", "a01")
    own = {"s01": placed("CREATED", SLOT), "t01": placed("PENDING", SLOT), "a01": placed("CREATED", RANK)}
    assert [abandoned.look(own, total, total, at) for at in (0.0, 2 * ABANDONED_S)] == [[], []]
    waits = {"s01": placed("CREATED", SLOT), "c01": placed("PENDING", RANK)}
    assert [abandoned.look(waits, total, total, at) for at in (0.0, 2 * ABANDONED_S)] == [[], []]
