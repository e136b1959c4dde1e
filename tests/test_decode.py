"""A config tree becomes a frozen dataclass, strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal, TypedDict

import pytest

from search.space.decode import decode, did_you_mean
from trainables.contract import UserError


@dataclass(frozen=True)
class Optim:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    name: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if self.betas[0] > self.betas[1]:
            raise ValueError(f"beta 1 ({self.betas[0]}) must not be above beta 2 ({self.betas[1]})")


@dataclass(frozen=True)
class Config:
    optim: Optim
    epochs: int = 3
    amp: bool = False
    sensors: tuple[str, ...] = ("lidar",)
    warmup: float | None = None
    teacher: Optim | None = None
    derived: int = field(init=False, default=0)


def test_a_whole_tree_is_decoded() -> None:
    tree = {
        "optim": {"lr": 1, "betas": [0.8, 0.9]},
        "sensors": ["lidar", "radar"],
        "warmup": None,
        "teacher": {"lr": 0.5},
    }
    assert decode(Config, tree) == Config(
        Optim(1.0, (0.8, 0.9)), sensors=("lidar", "radar"), warmup=None, teacher=Optim(0.5)
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optim": {"lr": 1.0}, "epoch": 3}, r"config\.epoch: no such key in Config; did you mean `epochs`\?"),
        ({"optim": {"lrr": 1.0}}, r"config\.optim\.lrr: no such key in Optim; did you mean `lr`\?"),
        ({"optim": {"lr": 1.0}, "zzz": 3}, "known: optim, epochs, amp, sensors, warmup, teacher$"),
        ({"optim": {"lr": 1.0}, "derived": 1}, "no such key in Config"),
        ({"optim": {}}, r"config\.optim\.lr: a value is needed; Optim has no default for it"),
        ({}, r"config\.optim: a value is needed"),
        ({"optim": 3}, r"config\.optim: expected the keys of Optim, got 3"),
        ({"optim": None}, r"config\.optim: expected the keys of Optim, got None"),
        ({"optim": {"lr": "fast"}}, r"config\.optim\.lr: 'fast' is refused: input should be a valid number"),
        ({"optim": {"lr": True}}, r"config\.optim\.lr: True is refused"),
        ({"optim": {"lr": 1.0}, "epochs": 2.5}, r"config\.epochs: 2\.5 is refused: input should be a valid integer"),
        ({"optim": {"lr": 1.0}, "epochs": 2.0}, r"config\.epochs: 2\.0 is refused"),
        ({"optim": {"lr": 1.0}, "epochs": "2"}, r"config\.epochs: '2' is refused"),
        ({"optim": {"lr": 1.0}, "amp": "yes"}, r"config\.amp: 'yes' is refused: .*; write true or false"),
        ({"optim": {"lr": 1.0, "name": "adm"}}, r"config\.optim\.name: 'adm' is refused: input should be 'adam' or 's"),
        ({"optim": {"lr": 1.0}, "sensors": "lidar"}, r"config\.sensors: 'lidar' is refused"),
        ({"optim": {"lr": 1.0}, "warmup": {"log": 3}}, r"config\.warmup: \{'log': 3\} is refused"),
        ({"optim": {"lr": 1.0, "betas": [0.9, 0.8]}}, r"config\.optim: beta 1 \(0\.9\) must not be above beta 2"),
        ({"optim": {"lr": object()}}, "is not a plain value"),
        ({"optim": {"lr": 1.0, "name": date(2024, 5, 1)}}, r"name: .* is not a plain value; if it is text, quote it"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        decode(Config, tree)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("lrr", "did you mean `lr`?"), ("xyz", "known: lr, clip_norm"), ("clipnorm", "did you mean `clip_norm`?")],
)
def test_the_nearest_known_word_is_named(word: str, hint: str) -> None:
    assert did_you_mean(word, ["lr", "clip_norm"]) == hint


def test_where_nothing_is_known_nothing_is_meant() -> None:
    assert did_you_mean("x", []) == "none are known"


@dataclass(frozen=True)
class Strict:
    lr: float = 0.1

    def __post_init__(self) -> None:
        assert self.lr < 1, "lr below 1"


class Connection:
    """Nothing that YAML could hold."""


@dataclass(frozen=True)
class Odd:
    link: Connection | None = None


def test_whatever_a_class_has_against_a_setting_is_told_in_a_line() -> None:
    with pytest.raises(UserError, match=r"^config: Strict refuses it: AssertionError lr below 1") as caught:
        decode(Strict, {"lr": 2.0})
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Leaves:
    betas: tuple[float, float] = (0.9, 0.999)
    tags: tuple[str, ...] = ()
    code: int = 0

    def __post_init__(self) -> None:
        if self.code:
            raise SystemExit(self.code)


def test_a_class_that_leaves_the_program_refuses_its_setting() -> None:
    with pytest.raises(UserError, match=r"^config: Leaves refuses it: SystemExit 3$"):
        decode(Leaves, {"code": 3})


@pytest.mark.parametrize("betas", [[0.8], [0.8, 0.9, 0.99]])
def test_a_tuple_of_another_length_is_told_by_its_length(betas: list[float]) -> None:
    with pytest.raises(UserError, match=rf"^config\.betas: expected 2 values, got {len(betas)}$"):
        decode(Leaves, {"betas": betas, "tags": ["a", "b", "c"]})


def test_a_field_that_no_space_can_fill_is_named() -> None:
    assert decode(Odd, {}) == Odd()
    with pytest.raises(UserError, match=r"config\.link: nothing in a space file can be a .*Connection"):
        decode(Odd, {"link": 3})


@dataclass(frozen=True)
class Layer:
    width: int = 8
    dropout: float = 0.0


@dataclass(frozen=True)
class Pool:
    size: int = 2


@dataclass(frozen=True)
class Stack:
    layers: tuple[Layer, ...] = ()
    pair: tuple[Layer, Pool] = (Layer(), Pool())
    named: dict[str, Layer] = field(default_factory=dict)
    either: Layer | Pool | None = None
    first: list[Layer | str] = field(default_factory=list)
    wide: Layer = Layer(width=99)
    any_order: Sequence[Layer] = ()
    any_mapping: Mapping[str, Layer] = field(default_factory=dict)


def test_dataclasses_in_lists_mappings_and_unions_are_decoded_as_strictly() -> None:
    tree = {
        "layers": [{"width": 4}, {"dropout": 1}],
        "pair": [{"width": 3}, {"size": 5}],
        "named": {"a": {"width": 1}},
        "either": {"size": 7},
        "first": ["relu", {"width": 2}],
        "wide": {"dropout": 0.5},
        "any_order": [{"width": 5}, {}],
        "any_mapping": {"b": {"width": 6}},
    }
    assert decode(Stack, tree) == Stack(
        (Layer(4), Layer(8, 1.0)),
        (Layer(3), Pool(5)),
        {"a": Layer(1)},
        Pool(7),
        ["relu", Layer(2)],
        Layer(99, 0.5),
        (Layer(5), Layer(8)),
        {"b": Layer(6)},
    )
    assert decode(Stack, {"either": None}) == Stack()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers": [{"dropuot": 0.5}]}, r"config\.layers\.0\.dropuot: no such key in Layer; did you mean `dropout`"),
        ({"layers": {"width": 4}}, r"config\.layers: \{'width': 4\} is refused: a tuple belongs here"),
        ({"pair": [{}]}, r"config\.pair: expected 2 values, got 1"),
        ({"named": {"a": {"size": 1}}}, r"config\.named\.a\.size: no such key in Layer"),
        ({"either": {"widht": 1}}, r"config\.either\.widht: no such key in Layer; did you mean `width`"),
        ({"either": 3}, r"config\.either: 3 is refused"),
        ({"first": [3]}, r"config\.first\.0: 3 is refused"),
        ({"any_order": [{"widht": 4}]}, r"config\.any_order\.0\.widht: no such key in Layer"),
        ({"any_order": {"width": 4}}, r"config\.any_order: \{'width': 4\} is refused: a tuple belongs here"),
        ({"any_mapping": {"b": {"size": 1}}}, r"config\.any_mapping\.b\.size: no such key in Layer"),
    ],
)
def test_a_slip_inside_them_is_named_too(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode(Stack, tree)


class Sizes(TypedDict):
    width: int


def missing() -> str:
    return str(os.environ["A_FOLDER_THAT_NOBODY_NAMES"])


@dataclass(frozen=True)
class Placed:
    root: str = field(default_factory=missing)
    sizes: Sizes | None = None


def test_a_default_is_made_where_it_is_needed_alone() -> None:
    assert decode(Placed, {"root": "/data"}).root == "/data"
    with pytest.raises(UserError, match=r"^config\.root: its default cannot be built: KeyError: .*; give a value$"):
        decode(Placed, {})


def test_a_type_that_pydantic_does_not_take_is_named() -> None:
    with pytest.raises(UserError, match=r"^config\.sizes: nothing in a space file can be a "):
        decode(Placed, {"root": "/data", "sizes": {"width": 3}})
