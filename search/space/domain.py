"""The values that a searched parameter may take: the `{domain}` values of a space file.

A domain is written `{log: [low, high]}`, `{float: [low, high]}` (with `step: x`), `{int: [low, high]}`
(with `log: true` or `step: n`) or `{choice: [...]}`, each with an optional `when: {other.parameter: [values]}`.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.text import exactly
from search.yaml_file import dump_line
from trainables.contract import UserError

LARGEST_INT = 2**53  # samplers compute in floats, which are exact for whole numbers up to here
KINDS = ("log", "float", "int", "choice")
_OPTIONS = {"log": {"when"}, "float": {"when", "step"}, "int": {"when", "log", "step"}, "choice": {"when"}}


class Domain(Protocol):
    """A set of values with a way to draw from it."""

    def contains(self, value: Any) -> bool:
        """Return whether a value is in the domain; in a choice, 1 is neither 1.0 nor True."""

    def sample(self, rng: random.Random) -> Any: ...

    def distribution(self) -> BaseDistribution: ...

    def encode(self, value: Any) -> Any:
        """Return the value as Optuna stores it."""

    def decode(self, stored: Any) -> Any:
        """Return the value that Optuna stored; the inverse of `encode`."""

    def size(self) -> int | None:
        """Return the number of values; None if there are infinitely many."""

    def grid(self) -> list[Any]:
        """Return all values, as Optuna stores them, of a finite domain."""


@dataclass(frozen=True)
class Real:
    """Numbers from low to high, both included; `log`: every order of magnitude is equally likely."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)
        if math.isinf(self.high - self.low):
            raise UserError(
                f"samplers compute the width of a range, which may be {sys.float_info.max:.2g} at most; narrow the "
                f"range [{self.low}, {self.high}]"
            )
        if self.step is not None:
            _check_step(self.low, self.high, self.step)

    def __str__(self) -> str:
        steps = f" in steps of {exactly(self.step)}" if self.step is not None else ""
        return f"[{exactly(self.low)}, {exactly(self.high)}]{steps}"

    def contains(self, value: Any) -> bool:
        if not _is_number(value) or not self.low <= value <= self.high:
            return False
        # Close to the grid is enough, because a sampler adds up steps in another order.
        return self.step is None or abs(self.nearest(value) - value) < 1e-6 * self.step

    def nearest(self, value: float) -> float:
        """Return the nearest value of this domain: within the range and, with a `step`, on the grid."""
        inside = min(max(value, self.low), self.high)
        if self.step is None:
            return inside
        return min(_stepped(self.low, self.step, round((inside - self.low) / self.step)), self.high)

    def sample(self, rng: random.Random) -> float:
        if self.step is not None:
            return self.nearest(self.low + self.step * rng.randint(0, _steps(self.low, self.high, self.step)))
        return float(at(self, rng.random()))

    def distribution(self) -> BaseDistribution:
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def encode(self, value: Any) -> Any:
        return float(value)

    def decode(self, stored: Any) -> Any:
        # Optuna's third step of 0.1 is 0.30000000000000004.
        return stored if self.step is None else self.nearest(stored)

    def size(self) -> int | None:
        return None if self.step is None else _steps(self.low, self.high, self.step) + 1

    def grid(self) -> list[Any]:
        assert self.step is not None, "a range without a step has no end"
        return [self.nearest(self.low + self.step * i) for i in range(_steps(self.low, self.high, self.step) + 1)]


@dataclass(frozen=True)
class Integer:
    """Whole numbers from low to high, both included."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)
        if max(-self.low, self.high, self.high - self.low) > LARGEST_INT:
            raise UserError(
                f"samplers tell whole numbers, and distances between them, apart up to {LARGEST_INT}; narrow the range "
                f"[{self.low}, {self.high}]"
            )
        _check_step(self.low, self.high, self.step)
        if self.log and self.step != 1:
            raise UserError("an int domain takes `log` or `step`, not both")

    def __str__(self) -> str:
        return f"[{self.low}, {self.high}]" + (f" in steps of {self.step}" if self.step > 1 else "")

    def contains(self, value: Any) -> bool:
        return _is_whole(value) and self.nearest(value) == value

    def nearest(self, value: float) -> int:
        """Return the nearest value of this domain."""
        inside = min(max(value, self.low), self.high)
        return self.low + self.step * round((inside - self.low) / self.step)

    def sample(self, rng: random.Random) -> int:
        if self.log:  # as Optuna draws, so that both ends get their full share
            return self.nearest(math.exp(rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5))))
        return rng.randrange(self.low, self.high + 1, self.step)

    def distribution(self) -> BaseDistribution:
        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def encode(self, value: Any) -> Any:
        return value

    def decode(self, stored: Any) -> Any:
        return stored

    def size(self) -> int:
        return len(range(self.low, self.high + 1, self.step))

    def grid(self) -> list[Any]:
        return list(range(self.low, self.high + 1, self.step))


@dataclass(frozen=True)
class Choice:
    """One of several values; lists and mappings among them are stored in Optuna as JSON text, others unchanged."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise UserError("a choice needs at least one value")
        for value in self.values:
            if not _is_plain(value):
                raise UserError(f"a choice cannot hold {value!r}, a {type(value).__name__}; for the text, quote it")
            if _is_whole(value) and not _is_number(value):
                raise UserError(
                    f"a choice cannot hold {value}: samplers compute in floats, which end at {sys.float_info.max:.2g}; "
                    "write a smaller number"
                )
            if json.loads(json.dumps(value)) != value:  # a NaN, or a mapping with numbers as keys
                raise UserError(
                    f"a choice cannot hold {value!r}: it would be another value when read back from the study"
                )
        stored = [self.encode(value) for value in self.values]
        if any(a == b for i, a in enumerate(stored) for b in stored[:i]):  # to Optuna 1, 1.0 and True are the same
            raise UserError(f"a choice names a value twice: {list(self.values)}")

    def __str__(self) -> str:
        return str(list(self.values))

    def contains(self, value: Any) -> bool:
        return any(_same(value, other) for other in self.values)

    def sample(self, rng: random.Random) -> Any:
        return rng.choice(self.values)

    def distribution(self) -> BaseDistribution:
        return CategoricalDistribution([self.encode(value) for value in self.values])

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        # As the choice writes it: [1] equals [1.0], and the key order of a mapping does not matter.
        return json.dumps(next((own for own in self.values if own == value), value))

    def decode(self, stored: Any) -> Any:
        return next(value for value in self.values if _same(self.encode(value), stored))

    def size(self) -> int:
        return len(self.values)

    def grid(self) -> list[Any]:
        return [self.encode(value) for value in self.values]


@dataclass(frozen=True)
class Parameter:
    """A searched value: its dotted path in the config, its domain, and the conditions under which it exists.

    when: maps the dotted path of another entry to the values for which this one is searched. Otherwise the entry is
    left out of the config, along with enclosing mappings that hold nothing else, so that a `Config` class uses its
    default.
    """

    name: str
    domain: Domain
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def suggest(self, trial: optuna.trial.Trial) -> Any:
        """Return the sampler's next value."""
        of = self.domain.distribution()
        if isinstance(of, CategoricalDistribution):
            return self.domain.decode(trial.suggest_categorical(self.name, of.choices))
        assert isinstance(of, FloatDistribution | IntDistribution)
        draw: Any = trial.suggest_float if isinstance(of, FloatDistribution) else trial.suggest_int
        return self.domain.decode(draw(self.name, of.low, of.high, log=of.log, step=of.step))


def nearly_domain(node: Any) -> str | None:
    """Return the kind of domain that a mapping was surely meant to be; None if it is one, or may mean something else.

    It has one key with a list as its value, and that key has the letters of a kind or is another library's word for
    one; or the brackets of the list are forgotten, as in `{int: 5}` and `{choice: a, b}`, where YAML gives b no value.
    """
    if not isinstance(node, dict) or is_domain(node):
        return None
    keys = [key for key, value in node.items() if isinstance(value, list) or _is_bare(key, value)]
    others = {key for key, value in node.items() if key not in keys and (value is not None or keys != ["choice"])}
    if len(keys) != 1 or not others <= {"when", "step", "log"}:
        return None
    word = str(keys[0]).lower()
    swapped = [kind for kind in KINDS if sorted(kind) == sorted(word)]
    return swapped[0] if swapped else _ELSEWHERE.get(word)


def _is_bare(key: Any, value: Any) -> bool:
    """Return whether a kind has a value where its list belongs; `{log: true}` and `{float: bf16}` are no search."""
    return key in KINDS and (_is_number(value) or (key == "choice" and isinstance(value, str)))


_ELSEWHERE = {
    **dict.fromkeys(("uniform", "quniform"), "float"),
    **dict.fromkeys(("loguniform", "log_uniform", "qloguniform", "lg"), "log"),
    **dict.fromkeys(("randint", "qrandint", "lograndint", "integer"), "int"),
    **dict.fromkeys(("choices", "choise", "categorical", "grid_search"), "choice"),
}


def resembles_domain(node: Any) -> bool:
    """Return whether a mapping is a search to other libraries, in words that may as well mean what they say."""
    return isinstance(node, dict) and set(node) - {"distribution"} in ({"values"}, {"range"}, {"min", "max"})


def is_domain(node: Any) -> bool:
    """Return whether a mapping of the config tree is a domain: one of its keys names a kind and has a list."""
    return isinstance(node, dict) and bool(_kinds(node))


def _kinds(node: Mapping[str, Any]) -> list[str]:
    return [key for key in node if key in KINDS and isinstance(node[key], list)]


def parse_domain(name: str, node: Mapping[str, Any]) -> Parameter:
    """Return the parameter that a domain mapping describes; raises UserError for what is wrong with it."""
    kinds = _kinds(node)
    if len(kinds) > 1:
        raise UserError(f"{name}: a domain has one kind, not {' and '.join(kinds)}")
    kind = kinds[0]
    unknown = set(node) - {kind} - _OPTIONS[kind]
    if kind == "float" and "log" in unknown:
        raise UserError(f"{name}: `float` draws evenly; write {{log: {dump_line(node[kind])}}} for a log scale")
    if unknown:
        allowed = ", ".join(sorted(_OPTIONS[kind]))
        raise UserError(
            f"{name}: `{sorted(unknown, key=str)[0]}` cannot be combined with `{kind}`; allowed beside it: {allowed}"
        )
    try:
        return Parameter(name, _build(kind, node), _conditions(node.get("when", {})))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _build(kind: str, node: Mapping[str, Any]) -> Domain:
    values, log, step = node[kind], node.get("log", False), node.get("step")
    if kind == "choice":
        return Choice(tuple(values))
    if kind == "int":
        if len(values) != 2 or not all(map(_is_whole, values)):
            raise UserError(f"`int` takes two whole numbers [low, high], not {values}")
        if not isinstance(log, bool):
            raise UserError(f"`log` is true or false, not {log!r}")
        if step is not None and not _is_whole(step):
            raise UserError(f"`step` of an int is a whole number, not {step!r}")
        low, high = values
        return Integer(low, high, log=log, step=1 if step is None else step)
    if len(values) != 2 or not all(map(_is_number, values)):
        raise UserError(f"`{kind}` takes two numbers [low, high], not {values}")
    low, high = values
    if step is not None and not _is_number(step):
        raise UserError(f"`step` is a number, not {step!r}")
    return Real(float(low), float(high), log=kind == "log", step=step)


def _conditions(when: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, dict):
        raise UserError(f"`when` maps another parameter to the values under which this one is searched, not {when!r}")
    if empty := [name for name, values in when.items() if values == []]:
        raise UserError(f"`when` names no value of {empty[0]}, so this parameter would never be searched")
    return {str(name): tuple(values) if isinstance(values, list) else (values,) for name, values in when.items()}


def _is_plain(value: Any) -> bool:
    """Return whether JSON, and so Optuna's journal, can hold the value."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    """Return whether the value is a finite number, even when converted to float."""
    return (_is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal and of the same type: a choice of 1 does not contain 1.0 or True."""
    return type(a) is type(b) and a == b


def part(domain: Real | Integer, value: float) -> float:
    """Return the position of a value in a range, from 0 at the low end to 1 at the high end."""
    if domain.low == domain.high:
        return 0.0
    low, high = float(domain.low), float(domain.high)
    if domain.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def at(domain: Real | Integer, part: float) -> float | int:
    """Return the value of a domain nearest to that position in its range."""
    low, high = float(domain.low), float(domain.high)
    if domain.log:
        return domain.nearest(math.exp(math.log(low) + (math.log(high) - math.log(low)) * part))
    return domain.nearest(low + (high - low) * part)


def _check_range(low: float, high: float, log: bool) -> None:
    if low > high:
        raise UserError(f"the range [{low}, {high}] is reversed; write {dump_line([high, low])}")
    if log and low <= 0:
        raise UserError(f"a log range needs low > 0, but got [{low}, {high}]")


def _stepped(low: float, step: float, steps: int) -> float:
    """Return low plus so many steps, in decimals, so that 0.1 + 2 * 0.1 is the 0.3 that a person would write."""
    return float(Decimal(str(low)) + steps * Decimal(str(step)))


def _steps(low: float, high: float, step: float) -> int:
    """Return how many whole steps fit between low and high."""
    return math.floor((Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step)))


def _check_step(low: float, high: float, step: float) -> None:
    if step <= 0:
        raise UserError(f"step {step} must be above 0")
    if (steps := _steps(low, high, step)) > LARGEST_INT:
        raise UserError(f"step {step} is too small: samplers tell {LARGEST_INT} steps apart; write a larger one")
    if (last := type(low)(_stepped(low, step, steps))) != high:
        raise UserError(f"steps of {step} from {low} do not meet {high}; write {dump_line([low, last])}")
