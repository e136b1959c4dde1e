"""A space file becomes one validated, immutable Space; every mistake in it is one clear line."""

from __future__ import annotations

import copy
import datetime
import json
import math
import random
import re
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from spaces import LOSS, space_of, write_family, write_space

import trainables
from search import yaml_file
from search.scheduler import make_scheduler
from search.space import KnownSetting, Space
from search.space.file import load_space
from trainables.contract import UserError

FAMILY = """
    from dataclasses import dataclass, field

    @dataclass(frozen=True)
    class Optim:
        lr: float = 1.0e-3
        momentum: float = 0.9

    @dataclass(frozen=True)
    class Config:
        optim: Optim = field(default_factory=Optim)
        epochs: int = 3
        heads: int = 1
        width: int = 8

        def __post_init__(self):
            if self.width % self.heads:
                raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")

    def train(trial):
        yield {"loss": trial.config.optim.lr}
"""
EVERY_KIND: dict[str, Any] = {
    "epochs": 4,
    "data": {"root": None, "sensors": ["lidar", "radar"]},
    "optim": {
        "lr": {"log": [1e-5, 1e-2]},
        "momentum": {"float": [0.0, 0.9], "step": 0.1},
        "warmup": {"float": [0.0, 1.0]},
        "batch_size": {"choice": [2, 4, 8]},
    },
    "model": {
        "block": {"choice": ["bi", "cs_bi", None]},
        "widths": {"choice": [[8], [8, 16], {"stages": 3}]},
        "depth": {"int": [1, 9], "step": 2},
        "d_state": {"int": [8, 64], "log": True, "when": {"model.block": ["bi", "cs_bi"]}},
    },
}


def message_of(file: Path, *overrides: str, profile: str | None = None, has_gpu: bool = True) -> str:
    """What a person is told about a mistake: one line that begins with the file."""
    with pytest.raises(UserError) as caught:
        load_space(file, overrides, profile, has_gpu)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    return text.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"serach": {}}, "serach: no such key; did you mean `search`?"),
        ({"search": {"trails": 3}}, "search.trails: no such key; did you mean `trials`?"),
        ({"search": {"sampler": "tbe"}}, "search.sampler: 'tbe' is unknown; did you mean `tpe`?"),
        ({"search": {"trials": 0}}, "search.trials: 0 is refused: input should be greater than or equal to 1"),
        ({"search": {"trials": "ten"}}, "search.trials: 'ten' is refused: input should be a valid integer"),
        (
            {"search": {"time_budget": "soon"}},
            "search.time_budget: 'soon' is refused: 'soon' is not a duration; write a",
        ),
        (
            {"search": {"time_budget": 90}},
            "search.time_budget: 90 is refused: '90' is not a duration; write a number and",
        ),
        ({"search": "tpe"}, "search: expected a mapping with the keys sampler, trials, seed, "),
        ({"scheduler": {"name": "ahsa"}}, "scheduler.name: 'ahsa' is unknown; did you mean `asha`?"),
        ({"scheduler": {"reduction": 1}}, "scheduler.reduction: 1 is refused: input should be greater than"),
        ({"resources": {"workers": 1.5}}, "resources.workers: 1.5 is refused"),
        *(
            (
                {"resources": {"gpus_per_worker": wrong}},
                f"resources.gpus_per_worker: {wrong!r} is refused: write a number from 0 upwards, or auto",
            )
            for wrong in ("all", "Auto", "0.5", -1, True, [1])
        ),
        ({"objective": {"metric": "loss"}}, "objective.mode: a value is needed"),
        ({"objective": {"metric": "loss", "mode": "mim"}}, "objective.mode: 'mim' is unknown; did you mean `min`?"),
        ({"objective": []}, "objective: a value is needed"),
        ({"objective": [LOSS, LOSS]}, "objective: names a metric twice: ['loss', 'loss']"),
        ({"objective": [LOSS, {"metric": "b"}]}, "objective.1.mode: a value is needed"),
        ({"constraints": {"acc": {}}}, "constraints.acc: {} is refused: name a `min`, a `max` or both"),
        (
            {"constraints": {"acc": {"min": 0.9, "max": 0.1}}},
            "constraints.acc: {'min': 0.9, 'max': 0.1} is refused: the range is reversed; write {min: 0.1, max: 0.9}",
        ),
        ({"constraints": {"acc": {"min": float("nan")}}}, "constraints.acc.min: nan is refused: input should be a fin"),
        ({"constraints": {"acc": {"max": float("inf")}}}, "constraints.acc.max: inf is refused: input should be a fin"),
        ({"constraints": {1: {"min": 0.5}}}, "constraints.1: 1 is not a metric's name; write it as in the"),
        ({"constraints": {"": {"min": 0.5}}}, "constraints.: '' is not a metric's name"),
        ({"objective": {"metric": "", "mode": "min"}}, "objective.metric: '' is refused: string should have at least"),
        ({"constraints": ["acc"]}, "constraints: expected metric: {min: ..., max: ...}, got ['acc']"),
        (
            {"constraints": {"diverged": {"max": 3}}},
            "constraints.diverged: every search already has a constraint of this name",
        ),
        ({"constraints": {"acc": 3}}, "constraints.acc: expected a mapping with the keys min, max, got 3"),
        ({"objective": "loss"}, "objective: expected a mapping with the keys metric, mode, got 'loss'"),
        (
            {"config": {"name": {"choice": ["p", "q"]}}, "try_first": [{"name": "p"}]},
            "try_first: the key `name` says what a setting is called, and the config searches an entry of that name",
        ),
        ({"config": {"lr": {"log": [0.1, 1], "when": {"b": []}}}}, "config.lr: `when` names no value of b"),
        ({"config": [1]}, "config: expected a mapping, got [1]"),
        ({"config": {"a.b": 1}}, "config.a.b: a key is a word without dots; nest mappings instead"),
        ({"config": {"lr": {"log": [1, 0.1]}}}, "config.lr: the range [1.0, 0.1] is reversed; write [0.1, 1.0]"),
        ({"trainable": 3}, "trainable: 3 is not an import path; write package.module:function"),
        ({"trainable": "toys"}, "trainable: 'toys' is not an import path; write package.module:function"),
        (
            {"trainable": ".toys:descend"},
            "trainable: '.toys:descend' is not an import path; write package.module:function",
        ),
        *(
            (
                {"trainable": f"{path}:descend"},
                f"trainable: {path} is a file; write toys:descend, and put the space beside it or start in its folder",
            )
            for path in ("./toys.py", "tests/toys.py", "toys.py", "../tests/toys")
        ),
        ({"trainable": "toys:descent"}, "trainable: toys has no function 'descent'; did you mean `descend`?"),
        ({"try_first": {"lr": 1}}, "try_first: expected a list of settings, got {'lr': 1}"),
        ({"try_first": ["lr"]}, "try_first.0: expected dotted paths and values, got 'lr'"),
        ({"try_first": 5}, "try_first: expected a list of settings, got 5"),
        ({"try_first": [{3: 1}]}, "try_first.0.3: no such parameter; "),
        *(
            ({"config": {"lr": {"log": [0.1, 1], "when": {3: 1}}}, "try_first": known}, "config.lr: `when` names 3; ")
            for known in ([], [{"lr": 0.1}])
        ),
        ({"ran": 5}, "ran: expected a mapping with the keys space, profile, paths, data, got 5"),
        ({"ran": {"paths": 5}}, "ran.paths: 5 is refused: input should be a valid list"),
        ({"ran": {"space": [1]}}, "ran.space: [1] is refused: input should be a valid string"),
        ({"run": {}}, "run: no such key; known: trainable, objective, "),
        ({"config": {"epochs": 2.5}}, "config.epochs: 2.5: a trial has a whole number of epochs; write 1 or more"),
        ({"config": {"epochs": True}}, "config.epochs: True: a trial has a whole number of epochs; write 1 or more"),
        *(
            (
                {"config": {"epochs": domain}},
                f"config.epochs: {wrong}: a trial has at least one epoch; write 1 or more",
            )
            for domain, wrong in (({"int": [0, 3]}, 0), ({"int": [-4, 8], "step": 4}, -4), ({"choice": [3, -1]}, -1))
        ),
        *(
            (
                {"config": {"epochs": domain}},
                f"config.epochs: {domain}: a trial has a whole number of epochs; write {{int: [low, high]}}",
            )
            for domain in ({"log": [1, 10]}, {"float": [1.0, 3.0], "step": 1.0})
        ),
        *(
            (
                {"config": {"epochs": {"choice": [3, wrong]}}},
                f"config.epochs: {wrong}: a trial has a whole number of epochs; write 1 or more",
            )
            for wrong in (2.5, True, "4", None)
        ),
        (
            {"profiles": {"long": {"config": {"epochs": {"int": [0, 90]}}}}},
            "profiles.long: config.epochs: 0: a trial has at least one epoch; write 1 or more",
        ),
        ({"config": {3: 1}}, "config.3: a key is a word without dots; write it in quotes"),
        *(
            (
                {"config": {"data": {"splits": node}}},
                "config.data.splits.2024-01-01: a key is a word without dots; write it in quotes",
            )
            for node in (
                [{datetime.date(2024, 1, 1): "train"}],
                ["a", [{"b": {datetime.date(2024, 1, 1): "train"}}]],
                {"choice": ["all", {datetime.date(2024, 1, 1): "train"}]},
            )
        ),
        ({"profiles": ["laptop"]}, "profiles: expected a mapping of names, got ['laptop']"),
        ({"profiles": {"laptop": None}}, "profiles.laptop: expected a mapping, got None"),
        ({"resources": {"memory_limit_mb": math.inf}}, "resources.memory_limit_mb: "),
        ({"profiles": {2024: {}}}, "profiles.2024: YAML reads this name as 2024; write it in quotes"),
        ({"tables": {2024: {}}}, "tables.2024: YAML reads this name as 2024; write it in quotes"),
        ({"profiles": {"laptop": {"confg": {}}}}, "profiles.laptop.confg: no such key; did you mean `config`?"),
        ({"profiles": {"big": {"search": {"trals": 3}}}}, "profiles.big: search.trals: no such key; did you mean `tri"),
        (
            {"profiles": {"a": {}, "b": {"config": {"lr": {"log": [1, 0.1]}}}}},
            "profiles.b: config.lr: the range [1.0, 0.1] is reversed; write [0.1, 1.0]",
        ),
        (
            {"profiles": {"big": {"config": {"lr": {"log": [0.1, 1.0], "when": {"lrr": [1]}}}}}},
            "profiles.big: config.lr: `when` names lrr; did you mean `lr`?",
        ),
        ({"profiles": {"laptop": {"profiles": {}}}}, "profiles.laptop.profiles: no such key"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_the_value_and_the_remedy(
    mistake: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sections = {"config": {"lr": 0.1}, **mistake}
    assert message_of(write_space(tmp_path, **sections)).startswith(message)


def test_a_mistake_of_yaml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text("trainable: toys:descend\nconfig:\n  lr: 1e-5\n")
    assert message_of(file) == "line 3: YAML reads 1e-5 as text; write 1.0e-5"
    file.write_text("trainable: toys:descend\ntrainable: toys:descend\n")
    assert message_of(file) == "line 2: the key `trainable` appears twice; keep one of them"
    file.write_text("")
    assert message_of(file).startswith("a space file is a mapping with the keys trainable, objective")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def train(:", "SyntaxError: "),
        ("raise ImportError('two\\nlines')", "ImportError: two lines"),
        ("import sys\nsys.exit(2)", "SystemExit: 2"),
        ("class Own(BaseException):\n    pass\nraise Own('no licence')", "Own: no licence"),
        (
            "class Mute(Exception):\n    def __str__(self):\n        return self.lost\nraise Mute",
            "Mute: no message",
        ),
    ],
)
def test_a_trainable_that_cannot_be_imported_says_why_and_where(code: str, message: str, tmp_path: Path) -> None:
    name = write_family(tmp_path, code)
    told = message_of(write_space(tmp_path, {}, trainable=f"{name}:train"))
    assert told.startswith(f"trainable: {name} cannot be imported: {message}")
    assert f"{name}.py:{len(code.splitlines())}" in told


def test_a_module_that_fails_when_it_is_asked_is_told(tmp_path: Path) -> None:
    name = write_family(tmp_path, "def __getattr__(name):\n    raise RuntimeError(f'lazy {name}')\n")
    told = message_of(write_space(tmp_path, {}, trainable=f"{name}:train"))
    assert told.startswith(f"trainable: looking up 'train' in {name} failed: RuntimeError: lazy train (")


def test_a_module_whose_name_is_taken_already_is_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("def train(trial):\n    yield {}\n")
    told = message_of(write_space(tmp_path, {}, trainable="json:train"))
    assert told == f"trainable: json is another module, {json.__file__}; give {tmp_path / 'json.py'} a name of its own"


def test_a_trainable_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    told = message_of(write_space(tmp_path, {}, trainable="no_such_package.module:train"))
    assert told.startswith("trainable: no module 'no_such_package' in ")
    assert str(tmp_path) in told


def test_a_module_beside_the_space_goes_before_one_of_the_same_name_elsewhere_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a worker Ray puts folders before all others, the command's own among them."""
    for folder in ("cwd", "beside", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "which_one.py").write_text(f"def train(trial):\n    yield {{}}\n\nname = {folder!r}\n")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *sys.path, str(tmp_path / "cwd")])
    _, trainable = load_space(write_space(tmp_path / "beside", {}, trainable="which_one:train"))
    assert trainable.train.__globals__["name"] == "cwd"
    assert sys.path[:3] == [str(tmp_path / "cwd"), str(tmp_path / "beside"), str(tmp_path / "elsewhere")]


def test_a_folder_named_as_our_package_adds_to_it_and_a_package_that_would_hide_ours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainables, "__path__", list(trainables.__path__))
    (tmp_path / "trainables").mkdir()
    (tmp_path / "trainables/brought.py").write_text("def train(trial):\n    yield {}\n")
    file = write_space(tmp_path, {}, trainable="trainables.brought:train")
    assert load_space(file)[1].train.__module__ == "trainables.brought"
    (tmp_path / "trainables/__init__.py").touch()
    load_space(file)
    monkeypatch.chdir(tmp_path)
    told = f"trainable: {tmp_path}/trainables/__init__.py hides a package of this platform; give it another name"
    assert message_of(file) == told


def test_a_config_of_the_module_that_is_no_dataclass_is_refused_and_one_from_elsewhere_is_let_be(
    tmp_path: Path,
) -> None:
    own = "class Config:\n    lr: float = 0.1\n\ndef train(trial):\n    yield {}\n"
    name = write_family(tmp_path, own)
    told = message_of(write_space(tmp_path, {"lrr": 0.1}, trainable=f"{name}:train"))
    assert told.startswith(f"trainable: the class Config of {name} is no dataclass, so that no config can be checked")
    assert "decorate it with @dataclass(frozen=True), or give it another name" in told
    other = write_family(tmp_path, f"from {name} import Config\n\ndef train(trial):\n    yield {{}}\n")
    assert load_space(write_space(tmp_path, {"lrr": 0.1}, trainable=f"{other}:train"))[1].config_class is None


def test_a_trainable_brings_what_stands_beside_it_into_the_module_that_only_imports_it(tmp_path: Path) -> None:
    beside = "def prepare(config):\n    pass\n\ndef memory_need(trial):\n    return 1\n"
    deep = write_family(tmp_path, FAMILY.replace("\n    ", "\n") + beside)
    name = write_family(tmp_path, f"from {deep} import train as fit\n\ndef prepare(config):\n    return 'own'\n")
    _, trainable = load_space(write_space(tmp_path, {"heads": 2}, trainable=f"{name}:fit"))
    assert trainable.config({"heads": 2}).heads == 2
    assert trainable.prepare is not None
    assert trainable.prepare(None) == "own"
    assert trainable.memory_need is not None
    told = message_of(write_space(tmp_path, {"haeds": 2}, trainable=f"{name}:fit"))
    assert told == "config.haeds: no such key in Config; did you mean `heads`?"


def test_a_trainable_that_a_helper_made_has_nothing_of_the_helper_s_module(tmp_path: Path) -> None:
    helper = FAMILY.replace("\n    ", "\n") + "def made():\n    def train(trial):\n        yield {}\n    return train\n"
    name = write_family(tmp_path, f"from {write_family(tmp_path, helper)} import made\n\ntrain = made()\n")
    assert load_space(write_space(tmp_path, {"lr": 0.1}, trainable=f"{name}:train"))[1].config_class is None


def test_a_class_is_no_trainable(tmp_path: Path) -> None:
    name = write_family(tmp_path, "class Net:\n    pass\n")
    told = message_of(write_space(tmp_path, {}, trainable=f"{name}:Net"))
    assert told == f"trainable: {name}:Net is a class; name a function that yields a report after every epoch"


@pytest.mark.parametrize("arguments", ["", "config, trial", "*, trial"])
def test_a_function_that_does_not_take_a_trial_is_no_trainable(arguments: str, tmp_path: Path) -> None:
    name = write_family(tmp_path, f"def train({arguments}):\n    yield {{}}\n")
    told = message_of(write_space(tmp_path, {}, trainable=f"{name}:train"))
    assert told == f"trainable: {name}:train would be called with one argument, the trial; write def train(trial)"


def test_a_decorated_trainable_takes_what_its_decorator_takes(tmp_path: Path) -> None:
    code = """
        import functools

        def with_data(train):
            @functools.wraps(train)
            def wrapped(trial):
                return train(trial, [1, 2])
            return wrapped

        @with_data
        def train(trial, data):
            yield {"loss": sum(data)}
    """
    _, trainable = load_space(write_space(tmp_path, {}, trainable=f"{write_family(tmp_path, code)}:train"))
    assert list(trainable.train(None)) == [{"loss": 3}]


@pytest.mark.parametrize("decorator", ["functools.cache", "anything"])
def test_a_decorated_function_that_only_shares_a_name_is_not_called(decorator: str, tmp_path: Path) -> None:
    code = f"""
        import functools

        def anything(function):
            return functools.wraps(function)(lambda *args, **more: function(*args, **more))

        @{decorator}
        def prepare(root, split):
            return root + split

        def train(trial):
            yield {{"loss": 1.0}}
    """
    _, trainable = load_space(write_space(tmp_path, {}, trainable=f"{write_family(tmp_path, code)}:train"))
    assert trainable.prepare is None


@pytest.mark.parametrize("made", ["functools.partial(fit, width=8)", "Trainer()", "Trainer().train", "Lazy()", "any"])
def test_a_trainable_is_whatever_can_be_called_with_a_trial(made: str, tmp_path: Path) -> None:
    code = f"""
        import functools

        def fit(trial, width, depth=2):
            yield {{"loss": 1.0}}

        class Trainer:
            def __call__(self, trial):
                yield {{"loss": 1.0}}

            train = __call__

        class Lazy(Trainer):
            def __getattr__(self, name):
                return name

        train = {made}
    """
    _, trainable = load_space(write_space(tmp_path, {}, trainable=f"{write_family(tmp_path, code)}:train"))
    assert callable(trainable.train)


def test_a_trainable_may_belong_to_a_class(tmp_path: Path) -> None:
    code = "class Net:\n    @staticmethod\n    def train(trial):\n        yield {}\n"
    name = write_family(tmp_path, code)
    assert load_space(write_space(tmp_path, {}, trainable=f"{name}:Net.train"))[1].train.__name__ == "train"
    assert "has no function 'Net.fit'" in message_of(write_space(tmp_path, {}, trainable=f"{name}:Net.fit"))


class TestConfigClass:
    """A space whose trainable has a Config."""

    @pytest.fixture
    def family(self, tmp_path: Path) -> str:
        return f"{write_family(tmp_path, FAMILY)}:train"

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"optim": {"lrr": {"log": [1e-5, 1e-2]}}}, "config.optim.lrr: no such key in Optim; did you mean `lr`?"),
            ({"epoch": 3}, "config.epoch: no such key in Config; did you mean `epochs`?"),
            ({"heads": {"float": [1, 2]}}, "config.heads: 1.84"),
            ({"epochs": "3"}, "config.epochs: '3' is refused: input should be a valid integer"),
            ({"optim": {"lr": {"lgo": [1e-5, 1e-2]}}}, "config.optim.lr: {'lgo': [1e-05, 0.01]} is refused"),
        ],
    )
    def test_a_wrong_name_or_type_is_found(
        self, config: dict[str, Any], message: str, family: str, tmp_path: Path
    ) -> None:
        assert message_of(write_space(tmp_path, config, trainable=family)).startswith(message)

    @pytest.mark.parametrize("epochs", [{"int": [0, 3]}, {"choice": [1, -1]}, {"log": [1, 10]}])
    def test_a_length_that_no_trial_can_have_is_found(self, epochs: Any, family: str, tmp_path: Path) -> None:
        assert message_of(write_space(tmp_path, {"epochs": epochs}, trainable=family)).startswith("config.epochs: ")

    def test_a_clash_in_a_corner_is_found_and_its_setting_is_told(self, family: str, tmp_path: Path) -> None:
        config = {"width": {"choice": [8, 16, 18]}, "heads": {"choice": [1, 2, 4]}}
        told = message_of(write_space(tmp_path, config, trainable=family))
        setting, remedy = told.split("; ")
        assert setting == "config: width 18 must be a multiple of heads 4 (drawn: width=18, heads=4)"
        assert re.fullmatch(r"\d+ of 200 draws are refused, and none may be: narrow the domains, or .*", remedy)

    def test_a_clash_of_the_first_draw_is_told_with_its_setting_too(self, family: str, tmp_path: Path) -> None:
        config = {"width": {"choice": [18, 22, 26]}, "heads": {"choice": [1, 4]}}
        told = message_of(write_space(tmp_path, config, trainable=family))
        assert re.search(r"config: width (\d+) must be a multiple of heads 4 \(drawn: width=\1, heads=4\);", told)
        fixed = message_of(
            write_space(tmp_path, {"width": 18, "heads": 4, "epochs": {"int": [1, 9]}}, trainable=family)
        )
        assert fixed.endswith("config: width 18 must be a multiple of heads 4"), "whatever is drawn"

    def test_a_clash_in_a_known_setting_names_it(self, family: str, tmp_path: Path) -> None:
        config = {"width": {"choice": [8, *range(9, 90, 3)]}, "heads": {"choice": [1, 3]}}
        told = message_of(write_space(tmp_path, config, trainable=family, try_first=[{"width": 8, "heads": 3}]))
        assert told.startswith("config: width 8 must be a multiple of heads 3 (try_first.0: width=8, heads=3)")

    def test_set_of_an_unknown_key_is_refused_and_of_a_default_is_not(self, family: str, tmp_path: Path) -> None:
        file = write_space(tmp_path, {"optim": {"lr": 0.1}}, trainable=family)
        assert message_of(file, "config.optim.mometum=0.5") == (
            "config.optim.mometum: no such key in Optim; did you mean `momentum`?"
        )
        space, trainable = load_space(file, ["config.optim.momentum=0.5", "config.heads=2"])
        assert trainable.config(space.config({})).optim.momentum == 0.5

    def test_its_default_is_the_length_of_a_trial_where_the_space_says_none(self, family: str, tmp_path: Path) -> None:
        scheduler = {"name": "hyperband"}
        space = space_of(tmp_path, {"heads": 2}, trainable=family, scheduler=scheduler)
        assert (space.epochs, space.document()["config"]) == (3, {"heads": 2, "epochs": 3})
        make_scheduler(space)
        assert space_of(tmp_path, {"epochs": 5}, trainable=family).epochs == 5
        assert space_of(tmp_path, {"epochs": {"int": [1, 9]}}, trainable=family).epochs is None
        hidden = {"heads": {"choice": [1, 2]}, "epochs": {"int": [5, 9], "when": {"heads": 2}}}
        assert space_of(tmp_path, hidden, trainable=family).config({"heads": 1}) == {"heads": 1}

    @pytest.mark.parametrize("field", ["epochs: int = 0", "epochs: int | None = None", "epochs: float = 2.5"])
    def test_a_default_that_is_no_length_is_let_be(self, field: str, tmp_path: Path) -> None:
        code = FAMILY.replace("epochs: int = 3", field)
        assert space_of(tmp_path, {"heads": 2}, trainable=f"{write_family(tmp_path, code)}:train").epochs is None

    def test_a_mapping_that_when_empties_falls_back_on_its_default(self, tmp_path: Path) -> None:
        code = """
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Augmentation:
            strength: float

        @dataclass(frozen=True)
        class Config:
            augment: bool
            augmentation: Augmentation | None = None

        def train(trial):
            yield {"loss": 0.0}
        """
        strength = {"float": [0, 1], "when": {"augment": [True]}}
        config = {"augment": {"choice": [True, False]}, "augmentation": {"strength": strength}}
        file = write_space(tmp_path, config, trainable=f"{write_family(tmp_path, code)}:train")
        space, trainable = load_space(file)
        assert trainable.config(space.config({"augment": False})).augmentation is None
        found = trainable.config(space.config({"augment": True, "augmentation.strength": 0.5}))
        assert found.augmentation.strength == 0.5

    def test_what_when_hides_falls_back_on_its_default(self, family: str, tmp_path: Path) -> None:
        config = {"epochs": {"choice": [1, 2]}, "heads": {"choice": [2, 4], "when": {"epochs": [2]}}}
        space, trainable = load_space(write_space(tmp_path, config, trainable=family))
        assert trainable.config(space.config({"epochs": 1})).heads == 1
        assert trainable.config(space.config({"epochs": 2, "heads": 4})).heads == 4


class TestOverrides:
    CONFIG: ClassVar[dict[str, Any]] = {"optim": {"lr": {"log": [1e-5, 1e-2]}, "clip": 1.0}, "width": 8}

    def test_a_searched_value_is_fixed(self, tmp_path: Path) -> None:
        space, _ = load_space(write_space(tmp_path, self.CONFIG), ["config.optim.lr=1.0e-4"])
        assert space.parameters == ()
        assert space.config({})["optim"] == {"lr": 1e-4, "clip": 1.0}

    def test_a_fixed_value_is_searched(self, tmp_path: Path) -> None:
        space, _ = load_space(write_space(tmp_path, self.CONFIG), ["config.width={choice: [8, 16]}", "search.trials=3"])
        assert [item.name for item in space.parameters] == ["optim.lr", "width"]
        assert space.search.trials == 3

    def test_the_last_one_holds(self, tmp_path: Path) -> None:
        space, _ = load_space(write_space(tmp_path, self.CONFIG), ["config.width=3", "config.width=4"])
        assert space.config({"optim.lr": 1e-3})["width"] == 4

    @pytest.mark.parametrize("null", ["null", " ~ "])
    def test_null_is_written_where_it_is_meant(self, null: str, tmp_path: Path) -> None:
        space, _ = load_space(write_space(tmp_path, self.CONFIG), [f"config.width={null}", "config.optim.clip='#fff'"])
        assert (space.tree["width"], space.tree["optim"]["clip"]) == (None, "#fff")

    def test_null_removes_a_constraint(self, tmp_path: Path) -> None:
        constraints = {"acc": {"min": 0.5}, "size": {"min": 1.0, "max": 2.0}}
        file = write_space(tmp_path, self.CONFIG, constraints=constraints)
        assert list(load_space(file, ["constraints.acc=null"])[0].constraints) == ["size"]
        assert load_space(file, ["constraints.size.min=null"])[0].constraints["size"].min is None
        assert load_space(file, ["constraints=null"])[0].constraints == {}

    def test_a_constraint_is_found_by_its_whole_name_whatever_dots_are_in_it(self, tmp_path: Path) -> None:
        def constraints(*overrides: str) -> dict[str, tuple[float | None, float | None]]:
            limits = {"val": {"max": 3.0}, "val.acc": {"min": 0.5, "max": 0.7}, "val.acc.top": {"min": 0.6}}
            space, _ = load_space(write_space(tmp_path, self.CONFIG, constraints=limits), overrides)
            return {name: (limit.min, limit.max) for name, limit in space.constraints.items()}

        before = {"val": (None, 3.0), "val.acc": (0.5, 0.7), "val.acc.top": (0.6, None)}
        assert constraints() == before
        assert constraints("constraints.val.acc.min=0.1") == {**before, "val.acc": (0.1, 0.7)}
        assert constraints("constraints.val.acc.min=null") == {**before, "val.acc": (None, 0.7)}
        assert constraints("constraints.val.acc={max: 0.9}") == {**before, "val.acc": (None, 0.9)}
        assert constraints("constraints.val.acc.top.min=0.1") == {**before, "val.acc.top": (0.1, None)}
        assert constraints("constraints.val.acc=null", "constraints.val.acc.top.min=null") == {"val": (None, 3.0)}

    def test_an_empty_section_can_be_set_into(self, tmp_path: Path) -> None:
        space, _ = load_space(write_space(tmp_path, self.CONFIG, search=None), ["search.trials=7"])
        assert space.search.trials == 7

    def test_a_config_with_the_key_of_a_domain_is_a_tree_as_any_other(self, tmp_path: Path) -> None:
        config = {"log": ["a", "b"], "epochs": 3, "lr": {"log": [0.1, 1.0]}}
        file = write_space(tmp_path, config, profiles={"small": {"config": {"log": ["c"], "epochs": 1}}})
        space, _ = load_space(file, ["config.lr=0.5"], "small")
        assert space.config({}) == {"log": ["c"], "epochs": 1, "lr": 0.5}
        assert message_of(file, "config.lrr=0.5") == "--set config.lrr: no such key; did you mean `config.lr`?"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("config.optim.lrr=1", "--set config.optim.lrr: no such key; did you mean `config.optim.lr`?"),
            ("config.new.key=1", "--set config.new.key: no such key; "),
            ("confg.width=1", "--set confg.width: no such key; did you mean `config.width`?"),
            ("serach.trials=1", "--set serach.trials: no such key; did you mean `search.trials`?"),
            ("lr=1", "--set lr: no such key; did you mean `config.optim.lr`?"),
            ("trials=1", "--set trials: no such key; did you mean `search.trials`?"),
            ("search.trails=1", "search.trails: no such key; did you mean `trials`?"),
            ("config.width.deep=1", "config.width.deep: config.width is a value, not a mapping of further keys"),
            ("config.optim.lr.low=1", "config.optim.lr.low: config.optim.lr is a value, not a mapping"),
            ("config.width", "--set config.width: write KEY=VALUE, such as config.optim.lr=1.0e-4"),
            ("config.optim.lr=1e-4", "--set config.optim.lr: line 1: YAML reads 1e-4 as text; write 1.0e-4"),
            ("config.optim.lr={log: [1, 0.5]}", "config.optim.lr: the range [1.0, 0.5] is reversed"),
            ("constraints.loss={max: 3, min: 5}", "constraints.loss: {'max': 3, 'min': 5} is refused: the range is re"),
            ("profiles.laptop.config.width=3", "--set profiles.laptop.config.width: profiles say what is overridden, "),
            ("config.width=", "--set config.width: '' holds no value; write null for none, or quote what begins"),
            ("config.width=#fff", "--set config.width: '#fff' holds no value; write null for none, or quote what beg"),
            ("constraints.val.acc.mni=3", "constraints.val.acc.mni: no such key; did you mean `min`?"),
            ("constraints.new=null", "constraints.new: {} is refused: name a `min`, a `max` or both"),
            ("tables.ablation.title=All", "--set tables.ablation.title: tables say what is overridden, "),
            ("title=All", "--set title: no such key; "),
        ],
    )
    def test_a_mistake_is_named(self, override: str, message: str, tmp_path: Path) -> None:
        file = write_space(tmp_path, self.CONFIG, constraints={"val.acc": {"min": 0.5}})
        assert message_of(file, override).startswith(message)


class TestProfiles:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        profiles = {
            "laptop": {"config": {"optim": {"lr": {"float": [0.1, 0.2]}}, "width": 2}, "resources": {"workers": 2}},
            "night": {"search": {"trials": 99}},
        }
        config = {"optim": {"lr": {"log": [1e-5, 1e-2]}, "clip": 1.0}, "width": 8}
        return write_space(tmp_path, config, profiles=profiles)

    def test_laptop_is_taken_without_a_gpu_and_only_then(self, file: Path) -> None:
        assert load_space(file, has_gpu=True)[0].profile is None
        assert load_space(file, has_gpu=False)[0].profile == "laptop"

    def test_one_that_is_named_is_taken_alone(self, file: Path) -> None:
        space, _ = load_space(file, profile="night", has_gpu=False)
        assert (space.profile, space.search.trials, space.tree["width"]) == ("night", 99, 8)

    def test_mappings_are_merged_and_a_domain_is_replaced(self, file: Path) -> None:
        space, _ = load_space(file, profile="laptop")
        assert space.tree == {"optim": {"lr": {"float": [0.1, 0.2]}, "clip": 1.0}, "width": 2}
        assert space.resources.workers == 2

    def test_null_removes_a_constraint(self, tmp_path: Path) -> None:
        profiles = {"laptop": {"constraints": {"acc": None}}, "slip": {"constraints": {"acd": None}}}
        constraints = {"acc": {"min": 0.5}, "size": {"max": 2.0}}
        file = write_space(tmp_path, {"lr": 0.1}, constraints=constraints, profiles={"laptop": profiles["laptop"]})
        assert list(load_space(file)[0].constraints) == ["acc", "size"]
        assert list(load_space(file, profile="laptop")[0].constraints) == ["size"]
        file = write_space(tmp_path, {"lr": 0.1}, constraints=constraints, profiles=profiles)
        assert message_of(file).startswith("profiles.slip: constraints.acd: {} is refused: name a `min`")

    def test_a_section_without_lines_changes_nothing(self, tmp_path: Path) -> None:
        """As one whose lines are all commented out."""
        sections: dict[str, Any] = {"search": {"trials": 40}, "constraints": {"acc": {"min": 0.5}}}
        empty = dict.fromkeys(["config", "search", "constraints", "scheduler", "objective"])
        file = write_space(tmp_path, {"lr": 0.1}, **sections, profiles={"laptop": empty})
        whole, laptop = (load_space(file, has_gpu=has_gpu)[0] for has_gpu in (True, False))
        assert laptop == replace(whole, profile="laptop")
        assert laptop.search.trials == 40

    def test_overrides_come_last(self, file: Path) -> None:
        assert load_space(file, ["config.width=5"], "laptop")[0].tree["width"] == 5

    def test_a_slip_in_one_shows_whichever_is_chosen(self, tmp_path: Path) -> None:
        profiles = {"laptop": {"search": {"trals": 3}}, "night": {"search": {"trials": 99}}}
        file = write_space(tmp_path, {"lr": 0.1}, profiles=profiles)
        told = "search.trals: no such key; did you mean `trials`?"
        assert message_of(file, has_gpu=False) == told
        assert message_of(file, has_gpu=True) == message_of(file, profile="night") == f"profiles.laptop: {told}"

    def test_a_slip_that_a_profile_hides_shows_under_that_profile_too(self, tmp_path: Path) -> None:
        profiles = {"laptop": {"config": {"lr": 0.1}}}
        file = write_space(tmp_path, {"lr": {"log": [1.0, 0.5]}}, profiles=profiles)
        told = "config.lr: the range [1.0, 0.5] is reversed; write [0.5, 1.0]"
        assert message_of(file, has_gpu=True) == told
        assert message_of(file, has_gpu=False) == f"without a profile: {told}"

    def test_a_space_may_be_whole_only_with_a_profile_that_is_named(self, tmp_path: Path) -> None:
        profiles = {name: {"config": {"momentum": {"float": [0.0, 0.9]}}} for name in ("laptop", "night")}
        known = [{"lr": 0.1, "momentum": 0.5}]
        file = write_space(tmp_path, {"lr": {"log": [0.01, 1.0]}}, try_first=known, profiles=profiles)
        space, _ = load_space(file, profile="night")
        assert [item.name for item in space.parameters] == ["lr", "momentum"]
        assert message_of(file, has_gpu=False).startswith("without a profile: try_first.0.momentum: no such parameter")

    def test_an_override_says_nothing_of_the_others(self, tmp_path: Path) -> None:
        profiles = {"laptop": {"try_first": [{"optim.lr": 0.01}]}}
        config = {"optim": {"lr": {"log": [1e-3, 1.0]}, "momentum": {"float": [0.0, 0.9]}}}
        file = write_space(tmp_path, config, profiles=profiles)
        assert load_space(file, ["config.optim.lr=0.1"])[0].tree["optim"]["lr"] == 0.1

    def test_an_unknown_one_is_refused(self, file: Path) -> None:
        assert message_of(file, profile="labtop") == "profile 'labtop' is unknown; did you mean `laptop`?"


class TestKnownSettings:
    CONFIG: ClassVar[dict[str, Any]] = {
        "lr": {"log": [1e-4, 1e-2]},
        "block": {"choice": ["bi", "uni"]},
        "state": {"int": [8, 64], "when": {"block": ["bi"]}},
        "width": 8,
        "optim": {"decay": {"float": [0.0, 1.0]}},
        "share": {"float": [0.0, 1.0], "step": 0.1},
    }

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"lr": 0.1}, "try_first.0.lr: 0.1 lies outside [0.0001, 0.01]; widen the range or change the value"),
            ({"block": "tri"}, "try_first.0.block: 'tri' lies outside ['bi', 'uni']"),
            ({"lrr": 0.1}, "try_first.0.lrr: no such parameter; did you mean `lr`?"),
            ({"width": 16}, "try_first.0.width: 16 cannot be tried, the config fixes it to 8; leave it out"),
            ({"optim": {"decay": 0.5}}, "try_first.0.optim: a section is not tried as a whole; write optim.decay"),
            ({"block": "uni", "state": 8}, "try_first.0.state: is not searched there, its `when` does not hold"),
            ({"state": 8}, "try_first.0.state: depends on block; give block a value there too"),
            ({"block": "bi", "state": 8.0}, "try_first.0.state: 8.0 is none of the whole numbers [8, 64]; change the"),
            ({"block": "bi", "state": True}, "try_first.0.state: True is none of the whole numbers [8, 64]"),
            (
                {"share": 0.55},
                "try_first.0.share: 0.55 is none of the numbers [0, 1] in steps of 0.1; change the value",
            ),
        ],
    )
    def test_one_outside_the_space_is_refused(self, setting: dict[str, Any], message: str, tmp_path: Path) -> None:
        assert message_of(write_space(tmp_path, self.CONFIG, try_first=[setting])).startswith(message)

    def test_one_may_leave_values_to_the_sampler_and_repeat_fixed_ones(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, self.CONFIG, try_first=[{"name": "notes", "lr": 1e-3, "width": 8}])
        assert space.try_first == (KnownSetting("notes", {"lr": 1e-3}),)
        dated = space_of(tmp_path, self.CONFIG, try_first=[{"name": datetime.date(2024, 5, 1), "lr": 1e-3}])
        assert dated.try_first[0].name == "2024-05-01"
        assert space.draw(random.Random(0), space.try_first[0].values)["lr"] == 1e-3


class TestWhen:
    def test_on_a_searched_entry(self, tmp_path: Path) -> None:
        config = {"state": {"int": [8, 64], "when": {"block": "bi"}}, "block": {"choice": ["bi", "uni"]}}
        space = space_of(tmp_path, config)
        assert [item.name for item in space.parameters] == ["block", "state"]
        draws = [space.draw(random.Random(seed)) for seed in range(30)]
        assert {frozenset(values) for values in draws} == {frozenset(["block"]), frozenset(["block", "state"])}
        for values in draws:
            assert ("state" in values) == (values["block"] == "bi")
            assert ("state" in space.config(values)) == (values["block"] == "bi")

    def test_on_a_fixed_entry(self, tmp_path: Path) -> None:
        config = {"block": "bi", "deep": {"state": {"int": [8, 64], "when": {"block": ["bi", "cs"]}}}}
        file = write_space(tmp_path, config)
        assert load_space(file)[0].draw(random.Random(0)).keys() == {"deep.state"}
        fixed, _ = load_space(file, ["config.block=uni"])
        assert fixed.draw(random.Random(0)) == {}
        assert fixed.config({}) == {"block": "uni"}

    def test_a_mapping_is_left_out_with_all_that_it_holds_and_not_before(self, tmp_path: Path) -> None:
        when = {"augment": [True]}
        inner = {"strength": {"float": [0, 1], "when": when}, "times": {"int": [1, 3], "when": when}}
        augment: dict[str, Any] = {"augment": {"choice": [True, False]}}
        assert space_of(tmp_path, {**augment, "data": {"crop": inner}}).config({"augment": False}) == {"augment": False}
        for node in ({"kind": "crop", **inner}, {"empty": {}, **inner}):
            kept = space_of(tmp_path, {**augment, "data": node}).config({"augment": False})
            assert kept["data"] == {key: value for key, value in node.items() if key not in inner}

    def test_what_depends_on_the_hidden_is_hidden(self, tmp_path: Path) -> None:
        config = {
            "c": {"choice": [1, 2], "when": {"b": [1, 2]}},
            "b": {"choice": [1, 2], "when": {"a": [1]}},
            "a": {"choice": [2]},
        }
        assert space_of(tmp_path, config).draw(random.Random(0)) == {"a": 2}

    @pytest.mark.parametrize(
        ("when", "message"),
        [
            ({"b": {"a": [1]}, "a": {"b": [1]}}, "config: the `when` of a, b form a cycle"),
            ({"a": {"a": [1]}}, "config: the `when` of a form a cycle"),
            ({"a": {"bb": [1]}}, "config.a: `when` names bb; did you mean `b`?"),
        ],
    )
    def test_a_circle_and_a_stranger_are_refused(
        self, when: dict[str, dict[str, Any]], message: str, tmp_path: Path
    ) -> None:
        config = {name: {"choice": [1, 2], **({"when": when[name]} if name in when else {})} for name in ("a", "b")}
        assert message_of(write_space(tmp_path, config)) == message

    def test_one_that_never_holds_is_told(self, tmp_path: Path) -> None:
        """It may be meant, in a profile or by an override; or it is misspelt."""

        def file_of(*blocks: str) -> Path:
            state = {"int": [8, 64], "when": {"block": list(blocks)}}
            return write_space(tmp_path, {"block": {"choice": ["bi", "uni"]}, "state": state})

        assert load_space(file_of("bii", "b"))[0].left_out == ("never searched: state, as block is never bii or b",)
        assert load_space(file_of("bi", "b"))[0].left_out == ("never searched: state at block = b",)
        depth = {"depth": {"int": [1, 3]}, "x": {"int": [8, 64], "when": {"depth": [1.0]}}}
        assert load_space(write_space(tmp_path, depth))[0].left_out == ()
        file = file_of("bi")
        assert load_space(file)[0].left_out == ()
        assert load_space(file, ["config.block=bi"])[0].left_out == ()
        told = load_space(file, ["config.block=uni"])[0].left_out
        assert told == ("never searched: state, as block is never bi",)

    def test_a_condition_on_a_number_of_another_type_can_hold(self, tmp_path: Path) -> None:
        config = {"x": {"choice": [1.0, 2.0]}, "y": {"int": [1, 9], "when": {"x": [1]}}}
        space = load_space(write_space(tmp_path, config))[0]
        assert space.left_out == ()
        assert {("y" in values, values["x"]) for values in map(space.draw, map(random.Random, range(20)))} == {
            (True, 1.0),
            (False, 2.0),
        }


class TestWithoutAConfigClass:
    def test_a_search_of_nothing_is_told(self, tmp_path: Path) -> None:
        """A misspelt domain is a value like any other here."""
        several = space_of(tmp_path, {"lr": {"logg": [1e-5, 1e-2]}}, search={"trials": 3})
        assert several.left_out == ("nothing is searched: all 3 trials would be the same",)
        assert space_of(tmp_path, {"lr": 1e-3}, search={"trials": 1}).left_out == ()

    """Nothing but its own words says what a config tree means."""

    @pytest.mark.parametrize(
        ("node", "kind"),
        [
            ({"lgo": [1.0e-5, 1.0e-2]}, "log"),
            ({"uniform": [0.0, 1.0]}, "float"),
            ({"loguniform": [1.0e-5, 1.0e-2]}, "log"),
            ({"choices": ["adam", "sgd"]}, "choice"),
            ({"choise": ["adam", "sgd"]}, "choice"),
            ({"integer": [1, 4], "when": {"block": ["bi"]}}, "int"),
            ({"lg": [1.0e-5, 1.0e-2]}, "log"),
            ({"quniform": [0.0, 1.0]}, "float"),
            ({"choice": "adam"}, "choice"),
            ({"choice": 3, "when": {"block": ["bi"]}}, "choice"),
            ({"choice": "adam", "sgd": None}, "choice"),  # YAML for {choice: adam, sgd}
            ({"float": 3}, "float"),
            ({"log": 1.0e-5}, "log"),
            ({"int": 5, "log": True}, "int"),
        ],
    )
    def test_a_misspelt_domain_is_refused(self, node: dict[str, Any], kind: str, tmp_path: Path) -> None:
        told = message_of(write_space(tmp_path, {"optim": {"lr": node}, "block": "bi"}))
        remedy = f"write {{{kind}: [...]}}, or rename the key of a fixed value"
        assert told == f"config.optim.lr: {node} is not a domain; {remedy}"

    @pytest.mark.parametrize(
        "node",
        [
            [{"float": [0.8, 0.95]}, 0.999],
            {"choice": [{"name": "adam", "betas": {"float": [0.8, 0.95]}}, {"name": "sgd"}]},
        ],
        ids=["list", "choice"],
    )
    def test_a_domain_where_nothing_is_searched_is_refused(self, node: Any, tmp_path: Path) -> None:
        any_config = """
        from dataclasses import dataclass
        from typing import Any

        @dataclass(frozen=True)
        class Config:
            optim: Any

        def train(trial):
            yield {"loss": 0.0}
        """
        for trainable in ("toys:descend", f"{write_family(tmp_path, any_config)}:train"):
            told = message_of(write_space(tmp_path, {"optim": {"betas": node}}, trainable=trainable))
            assert told == (
                "config.optim.betas: {'float': [0.8, 0.95]} would not be searched here; give it a key of its own, with "
                "`when` perhaps"
            )

    @pytest.mark.parametrize(
        "node",
        [
            *({"betas": [0.9, 0.99]}, {"init": [0, 1]}, {"layers": [1, 2], "width": 8}, {"log": True}, {}),
            *({"log": "wandb"}, {"log": {"level": 3}}, {"log": 3, "level": "info"}, {"float": "bf16"}, {"min": 0}),
        ],
        ids=str,
    )
    def test_other_mappings_are_fixed_values(self, node: dict[str, Any], tmp_path: Path) -> None:
        space = space_of(tmp_path, {"optim": node}, search={"trials": 1})
        assert (space.config({}), space.left_out) == ({"optim": node}, ())

    @pytest.mark.parametrize(
        "node",
        [{"values": [1, 2]}, {"range": [0, 1]}, {"min": 0, "max": 1}, {"distribution": "uniform", "min": 0, "max": 1}],
        ids=str,
    )
    def test_what_another_library_would_search_is_fixed_and_told(self, node: dict[str, Any], tmp_path: Path) -> None:
        space = space_of(tmp_path, {"optim": {"lr": node}}, search={"trials": 1})
        assert space.config({}) == {"optim": {"lr": node}}
        told = f"not searched: config.optim.lr, as {node} is not a domain; {{float: [low, high]}} would be one"
        assert space.left_out == (told,)


class TestHolds:
    """Which settings are whole settings of a space."""

    @pytest.fixture
    def space(self, tmp_path: Path) -> Space:
        return space_of(tmp_path, EVERY_KIND)

    def test_every_draw(self, space: Space) -> None:
        rng = random.Random(0)
        assert all(space.holds(space.draw(rng)) for _ in range(100))

    def test_nothing_less_more_or_outside(self, space: Space) -> None:
        values = next(values for seed in range(9) if "model.d_state" in (values := space.draw(random.Random(seed))))
        assert space.holds(values)
        assert not space.holds({name: value for name, value in values.items() if name != "optim.lr"})
        assert not space.holds({**values, "model.more": 1})
        assert not space.holds({**values, "optim.lr": 1.0})
        assert not space.holds({**values, "model.block": None})  # d_state is not searched there


class TestDocument:
    """The resolved space that a results folder keeps."""

    @pytest.mark.parametrize(
        "sections",
        [
            {},
            {"objective": [LOSS, {"metric": "size", "mode": "max"}]},
            {"constraints": {"acc": {"min": 0.5}, "size": {"min": 1.0, "max": 2.5e6}}},
            {"try_first": [{"name": "notes", "optim.lr": 1e-5, "model.widths": [8, 16]}, {"optim.batch_size": 2}]},
            {"search": {"sampler": "gp", "trials": 3, "time_budget": "1.5h"}, "scheduler": {"name": "asha"}},
            {"resources": {"workers": 2, "gpus_per_worker": 0.5}},
            {"resources": {"gpus_per_worker": "auto", "memory_limit_mb": 100.0}},
        ],
        ids=str,
    )
    def test_it_loads_back_to_the_same_space(self, sections: dict[str, Any], tmp_path: Path) -> None:
        space = space_of(tmp_path, EVERY_KIND, **sections)
        yaml_file.write(tmp_path / "toy.yaml", space.document())
        assert load_space(tmp_path / "toy.yaml")[0] == space

    def test_it_remembers_profile_overrides_and_where_the_trainable_is(self, tmp_path: Path) -> None:
        name = write_family(tmp_path, "def train(trial):\n    yield {}\n")
        profiles = {"small": {"config": {"width": 2}}}
        file = write_space(tmp_path, {"width": 8, "lr": 0.1}, trainable=f"{name}:train", profiles=profiles)
        space, _ = load_space(file, ["config.lr={log: [0.1, 1.0]}"], "small")
        results = tmp_path / "results" / "toy"
        results.mkdir(parents=True)
        ran = {"space": space.name, "profile": space.profile, "paths": list(space.paths)}
        yaml_file.write(results / "space.yaml", {**space.document(), "ran": ran})
        again, _ = load_space(results / "space.yaml")
        assert str(tmp_path) in again.paths
        assert replace(again, paths=space.paths) == space


def test_a_search_goes_on_with_its_own_code_wherever_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a job's copy of the code belongs to that job: the next one brings another."""
    began, job, gone, cwd, results = (
        tmp_path / name for name in ("began", "working_dir_files/_ray_pkg_1", "gone", "cwd", "results")
    )
    for folder in (began, job, cwd, results):
        folder.mkdir(parents=True)
    monkeypatch.chdir(cwd)
    file = write_space(results, {"lr": 0.1}, ran={"paths": [str(gone), str(job), str(began)]})
    assert load_space(file)[0].paths == tuple(map(str, (began, cwd, results, gone, job)))


def test_a_space_cannot_be_changed(tmp_path: Path) -> None:
    space = space_of(tmp_path, EVERY_KIND)
    before = copy.deepcopy(space)
    with pytest.raises(FrozenInstanceError):
        space.trainable = "other:train"  # type: ignore[misc]
    config = space.config(space.draw(random.Random(0)))
    config["data"]["sensors"].append("image")
    config["optim"]["lr"] = None
    space.document()["config"]["optim"]["lr"] = None
    assert space == before
    assert space.with_trials(3) != space
    assert space == before


def test_a_trial_cannot_change_what_a_choice_holds(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"optimizer": {"choice": [{"name": "adam"}, {"name": "sgd"}]}})
    values = space.draw(random.Random(0))
    space.config(values)["optimizer"].pop("name")
    assert space.config(values)["optimizer"]["name"] in ("adam", "sgd")


@pytest.mark.parametrize(
    "override", ["config.use_aux=false", "config.aux={log: [0.01, 1.0], when: {use_aux: [never]}}"]
)
def test_an_override_that_switches_an_entry_off_leaves_out_the_known_settings_that_have_it(
    tmp_path: Path, override: str
) -> None:
    config = {"use_aux": True, "aux": {"log": [0.01, 1.0], "when": {"use_aux": True}}, "lr": {"log": [0.01, 1.0]}}
    file = write_space(tmp_path, config, try_first=[{"name": "with it", "aux": 0.1}, {"name": "without", "lr": 0.1}])
    space, _ = load_space(file, [override])
    assert [setting.name for setting in space.try_first] == ["without"]
    assert space.left_out[0] == "left out: known setting with it has aux = 0.1, which --set rules out"


@pytest.mark.parametrize("override", ["config.lr=0.5", "config.lr={log: [0.2, 1.0]}", "config={lr: 0.5}"])
def test_an_override_leaves_out_the_known_settings_it_rules_out(tmp_path: Path, override: str) -> None:
    known = [{"name": "slow", "lr": 0.1}, {"name": "fast", "lr": 0.5}]
    file = write_space(tmp_path, {"lr": {"log": [0.01, 1.0]}}, try_first=known)
    space, _ = load_space(file, [override])
    assert [setting.name for setting in space.try_first] == ["fast"]
    assert space.left_out[0] == "left out: known setting slow has lr = 0.1, which --set rules out"
    assert len(space.left_out) == 1 + (not space.parameters), "and that nothing is searched, where nothing is"
