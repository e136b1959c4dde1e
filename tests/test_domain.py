"""What every domain promises, and what a domain mapping may say."""

from __future__ import annotations

import math
import random
from datetime import date
from typing import Any

import optuna
import pytest

from search.space.domain import is_domain, parse_domain
from trainables.contract import UserError

DOMAINS: list[dict[str, Any]] = [
    {"log": [1e-5, 1e-2]},
    {"log": [1e-3, 1e-3]},
    {"float": [-1.0, 2]},
    {"float": [0, 0.3], "step": 0.1},
    {"float": [0.1, 0.7], "step": 0.2},
    {"float": [0.0, 1.0e-13], "step": 1.0e-14},
    {"float": [1.0e6, 1000000.3], "step": 0.1},
    {"int": [1, 9]},
    {"int": [2, 14], "step": 4},
    {"int": [8, 64], "log": True},
    {"choice": [2, 2.5, "a", None, True]},
    {"choice": [[1, 2], [1], {"depth": 3}, "x"]},
]


@pytest.mark.parametrize("node", DOMAINS, ids=str)
class TestDomain:
    def test_what_is_drawn_is_contained(self, node: dict[str, Any]) -> None:
        domain, rng = parse_domain("x", node).domain, random.Random(0)
        assert all(domain.contains(domain.sample(rng)) for _ in range(300))

    def test_what_optuna_suggests_is_contained(self, node: dict[str, Any]) -> None:
        parameter = parse_domain("x", node)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        assert all(parameter.domain.contains(parameter.suggest(study.ask())) for _ in range(30))

    def test_a_stored_value_decodes_to_itself(self, node: dict[str, Any]) -> None:
        domain, rng = parse_domain("x", node).domain, random.Random(1)
        for value in (domain.sample(rng) for _ in range(30)):
            assert domain.decode(domain.encode(value)) == value
            assert domain.distribution()._contains(domain.distribution().to_internal_repr(domain.encode(value)))

    def test_its_grid_is_all_of_it(self, node: dict[str, Any]) -> None:
        domain, rng = parse_domain("x", node).domain, random.Random(2)
        if domain.size() is None:
            assert set(node) <= {"log", "float"}
        else:
            grid = domain.grid()
            assert len({str(stored) for stored in grid}) == len(grid) == domain.size()
            assert all(domain.contains(domain.decode(stored)) for stored in grid)
            drawn = [domain.encode(domain.sample(rng)) for _ in range(300)]
            assert {str(stored) for stored in drawn} <= {str(stored) for stored in grid}

    def test_a_stranger_is_not_contained(self, node: dict[str, Any]) -> None:
        domain = parse_domain("x", node).domain
        strangers: list[Any] = [1e9, -7.25, "b", [3], False, float("nan"), 10**400]
        assert not any(domain.contains(stranger) for stranger in strangers)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"log": [1e-2, 1e-5]}, r"x: the range \[0\.01, 1e-05\] is reversed; write \[1\.0e-05, 0\.01\]"),
        ({"int": [9, 1]}, r"the range \[9, 1\] is reversed; write \[1, 9\]"),
        ({"log": [0, 1]}, r"a log range needs low > 0, but got \[0\.0, 1\.0\]"),
        ({"int": [0, 4], "log": True}, "a log range needs low > 0"),
        ({"log": [1, "x"]}, r"`log` takes two numbers \[low, high\], not \[1, 'x'\]"),
        ({"log": [True, 2]}, "`log` takes two numbers"),
        ({"float": [1, 2, 3]}, "`float` takes two numbers"),
        ({"float": [0, float("inf")]}, "`float` takes two numbers"),
        ({"int": [1, 2.5]}, "`int` takes two whole numbers"),
        ({"int": [1, 10], "step": 2}, r"steps of 2 from 1 do not meet 10; write \[1, 9\]"),
        ({"float": [0, 1], "step": 0.3}, r"steps of 0\.3 from 0\.0 do not meet 1\.0; write \[0\.0, 0\.9\]"),
        ({"float": [0.0, 1e-9], "step": 4e-10}, r"of 4e-10 from 0\.0 do not meet 1e-09; write \[0\.0, 8\.0e-10\]"),
        ({"float": [0, 1], "step": 1 / 3}, r"from 0\.0 do not meet 1\.0; write \[0\.0, 0\.9999999999999999\]"),
        ({"int": [1, 9], "step": 0}, "step 0 must be above 0"),
        ({"float": [0, 1], "step": 1e-300}, "step 1e-300 is too small: samplers tell 9007199254740992 steps apart"),
        ({"int": [0, 10**19]}, r"apart up to 9007199254740992; narrow the range \[0, 10{19}\]"),
        ({"int": [-(2**53), 2**53]}, r"narrow the range \[-9007199254740992, 9007199254740992\]"),
        ({"int": [1, 10**400]}, r"narrow the range \[1, 10{400}\]"),
        ({"float": [1, 10**400]}, "`float` takes two numbers"),
        ({"float": [-1.0e308, 1.0e308]}, r"may be 1\.8e\+308 at most; narrow the range \[-1e\+308, 1e\+308\]"),
        ({"float": [-1.0e308, 1.0e308], "step": 1.0e308}, r"narrow the range \[-1e\+308, 1e\+308\]"),
        ({"choice": [1, 10**400]}, r"a choice cannot hold 10{400}: samplers compute in floats, which end at 1\.8e"),
        ({"int": [False, 2]}, "`int` takes two whole numbers"),
        ({"int": [0, 10], "step": True}, "`step` of an int is a whole number, not True"),
        ({"log": [0.1, 1.0], 1: 2, "a": 3}, "`1` cannot be combined with `log`; allowed beside it: when"),
        ({"int": [1, 9], "step": "two"}, "`step` of an int is a whole number, not 'two'"),
        ({"float": [1, 9], "step": "two"}, "`step` is a number, not 'two'"),
        ({"int": [1, 9], "log": "false"}, "`log` is true or false, not 'false'"),
        ({"int": [1, 9], "log": True, "step": 2}, "takes `log` or `step`, not both"),
        ({"choice": []}, "a choice needs at least one value"),
        ({"choice": [1, date(2024, 1, 1)]}, r"a choice cannot hold datetime\.date\(2024, 1, 1\), a date; for the text"),
        ({"choice": [1.0, float("nan")]}, "a choice cannot hold nan: it would be another value when read back"),
        (
            {"choice": [{5: 0.1}, {3: 0.5}]},
            r"a choice cannot hold \{5: 0\.1\}: it would be another value when read back",
        ),
        ({"choice": [1, 2, 1]}, "a choice names a value twice"),
        ({"choice": [1, True]}, "a choice names a value twice"),
        ({"choice": [[1], [1]]}, "a choice names a value twice"),
        ({"float": [1e-5, 0.1], "log": True}, r"`float` draws evenly; write \{log: \[1\.0e-05, 0\.1\]\} for a log sc"),
        ({"choice": [1], "log": True}, "`log` cannot be combined with `choice`; allowed beside it: when"),
        ({"log": [1, 2], "wen": {}}, "`wen` cannot be combined with `log`"),
        ({"log": [1, 2], "int": [1, 2]}, "a domain has one kind, not log and int"),
        ({"log": [1, 2], "when": "model"}, "`when` maps another parameter to the values"),
    ],
)
def test_a_domain_that_cannot_be_is_refused(node: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match="^x: .*" + message.removeprefix("x: ")):
        parse_domain("x", node)


def test_a_choice_tells_whole_numbers_from_others() -> None:
    domain = parse_domain("x", {"choice": [1, 2]}).domain
    assert domain.contains(1)
    assert not domain.contains(1.0)
    assert not domain.contains(True)


def test_the_widest_range_of_numbers_contains_what_is_drawn_and_suggested() -> None:
    parameter = parse_domain("x", {"float": [-0.8e308, 0.9e308]})
    study, rng = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), random.Random(0)
    drawn = [parameter.domain.sample(rng) for _ in range(300)]
    suggested = [parameter.suggest(study.ask()) for _ in range(30)]
    assert all(map(parameter.domain.contains, [*drawn, *suggested]))


@pytest.mark.parametrize("low", [0, -(2**52)])
def test_the_widest_range_of_whole_numbers_contains_what_is_drawn_and_suggested(low: int) -> None:
    parameter = parse_domain("x", {"int": [low, low + 2**53]})
    study, rng = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), random.Random(0)
    drawn = [parameter.domain.sample(rng) for _ in range(300)]
    suggested = [parameter.suggest(study.ask()) for _ in range(30)]
    assert all(map(parameter.domain.contains, [*drawn, *suggested]))


@pytest.mark.parametrize(
    "node",
    [{"int": [1, 4]}, {"int": [2, 14], "step": 4}, {"int": [1, 4], "log": True}, {"float": [0.0, 0.3], "step": 0.1}],
    ids=str,
)
def test_every_value_of_a_finite_range_is_drawn(node: dict[str, Any]) -> None:
    domain, rng = parse_domain("x", node).domain, random.Random(0)
    assert {domain.sample(rng) for _ in range(300)} == set(domain.grid())


def test_both_ends_of_whole_numbers_on_a_log_scale_have_their_full_share() -> None:
    domain, rng = parse_domain("x", {"int": [1, 2], "log": True}).domain, random.Random(0)
    twos = sum(domain.sample(rng) == 2 for _ in range(3000))
    assert twos / 3000 == pytest.approx(math.log(2.5 / 1.5) / math.log(2.5 / 0.5), abs=0.03)


def test_a_stepped_range_contains_its_steps_alone() -> None:
    domain = parse_domain("x", {"float": [0.1, 0.7], "step": 0.2}).domain
    assert domain.contains(0.3)
    assert domain.contains(0.1 + 0.2)  # 0.30000000000000004, as a sampler adds it up
    assert not domain.contains(0.4)


def test_a_small_step_is_as_exact_as_a_large_one() -> None:
    domain = parse_domain("x", {"float": [0.0, 1.0e-13], "step": 1.0e-14}).domain
    tiny = [0.0, 1e-14, 2e-14, 3e-14, 4e-14, 5e-14, 6e-14, 7e-14, 8e-14, 9e-14, 1e-13]
    assert domain.grid() == tiny
    assert not domain.contains(1.5e-14)
    offset = parse_domain("x", {"float": [1000.0, 1000.5], "step": 0.1}).domain
    assert offset.grid() == [1000.0, 1000.1, 1000.2, 1000.3, 1000.4, 1000.5]


def test_a_mapping_is_a_domain_when_a_list_stands_behind_its_kind() -> None:
    assert is_domain({"log": [1, 2]})
    assert not is_domain({"log": True, "level": 3})  # a config may well have such keys
    assert not is_domain([1, 2])


@pytest.mark.parametrize(
    ("written", "meant"), [([0.5, 10, 15], [0.5, 10.0, 15.0]), ({"b": 2, "a": 1}, {"a": 1, "b": 2})]
)
def test_a_value_that_equals_one_of_a_choice_is_stored_as_that_one(written: Any, meant: Any) -> None:
    domain = parse_domain("x", {"choice": ["none", meant]}).domain
    stored = domain.encode(written)
    assert isinstance(domain.distribution(), optuna.distributions.CategoricalDistribution)
    assert stored in domain.grid()
    assert domain.decode(stored) == meant


def test_a_step_is_what_a_person_would_write_whoever_suggests_it() -> None:
    parameter = parse_domain("x", {"float": [0.0, 0.5], "step": 0.1})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert {parameter.suggest(study.ask()) for _ in range(60)} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
