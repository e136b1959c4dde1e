"""One rank in this process: every way in which a trial can end, and a process that is as good as new after it."""

from __future__ import annotations

import math
import os
import re
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from spaces import write_family

from search.workers.messages import Advance, Answer, Begin, Blew, Broke, Ended, GroupSpec, Leave, RanOut, Reported
from search.workers.ranks import RankLoop, numbers, storages_of
from search.workers.states import load_state
from search.workers.surroundings import Surroundings
from trainables.contract import UserError

FAMILY = """
    import os, random
    import numpy as np
    import torch
    from torch import nn
    from trainables.contract import Diverged, Report, UserError

    def train(trial):
        log = trial.cache.setdefault("log", [])
        try:
            yield {"loss": 1.0, "rank": trial.rank, "ranks": trial.world_size, "seed": trial.seed}
            yield from ENDINGS[trial.config["ending"]](trial)
        finally:
            log.append(trial.config["ending"])

    def more(trial):
        yield Report({"loss": 0.5})

    def diverge(trial):
        raise Diverged("loss_trans is not finite", step=812)
        yield

    class Bare(Diverged):
        def __init__(self, why):
            RuntimeError.__init__(self, why)

    class Thing:
        def __str__(self):
            return "a thing"

    def diverge_in_words_of_its_own(trial):
        raise Diverged("exploded\\nbadly", np.int64(7), {np.int64(3): Thing(), "loss": np.float32("nan"), "step": 99})
        yield

    def diverge_without_details(trial):
        raise Diverged("exploded", 3, "some text")
        yield

    class Mute:
        def __str__(self):
            raise ValueError("no words")

    def diverge_in_things_without_words(trial):
        raise Diverged("exploded", 3, {"grad": torch.eye(2).to_sparse(), "of": Mute(), "at": [1.5]})
        yield

    def diverge_with_a_tensor(trial):
        raise Diverged("exploded", "the third", torch.ones(2))
        yield

    def diverge_as_a_class_of_its_own(trial):
        raise Bare("exploded")
        yield

    def diverge_without_a_word(trial):
        raise Diverged("")
        yield

    def diverge_as_a_bare_class(trial):
        raise Diverged
        yield

    def diverge_at_length(trial):
        raise Diverged("w " * 100_000)
        yield

    def state_is_no_function(trial):
        yield Report({"loss": 0.5}, state={"model": 1})

    def state_with_a_function(trial):
        yield Report({"loss": 0.5}, state=lambda: {"schedule": lambda epoch: 0.5})

    def mistake_without_a_word(trial):
        raise UserError("")
        yield

    def memory(trial):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB\\nand much more to say")
        yield

    def host_memory(trial):
        raise MemoryError
        yield

    def allocator(trial):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory\\nand more")
        yield

    class Mute(Exception):
        def __str__(self):
            return self.lost

    def mute(trial):
        raise Mute
        yield

    def leaves(trial):
        raise SystemExit("no licence")
        yield

    class Own(BaseException):
        pass

    def raises_more_than_an_exception(trial):
        raise Own("no licence")
        yield

    def diverge_at_an_old_file(trial):
        raise Diverged("cannot read caf\\udce9.png")
        yield

    def bug(trial):
        {}["no such batch"]
        yield

    def mistake(trial):
        raise UserError("data.root: there is nothing in /data; name the folder")
        yield

    def stop_iteration(trial):
        next(iter([]))
        yield

    def state_is_none(trial):
        yield Report({"loss": 0.5}, state=lambda: None)

    def more_groups(trial):
        for _ in range(9):
            torch.distributed.new_group([0])
        yield {"loss": 0.5}

    def not_metrics(trial):
        yield 0.5

    def not_numbers(trial):
        yield {"loss": "low"}

    def without(trial):
        yield {"lost": 0.5}

    def nan(trial):
        yield {"loss": float("nan")}

    def infinite(trial):
        yield {"loss": torch.tensor(float("inf"))}

    def other_nan(trial):
        yield {"loss": torch.tensor(0.5), "acc": np.float32("nan"), "steps": 3, "done": True}

    def bad_state(trial):
        yield Report({"loss": 0.5}, state=lambda: 1 / 0)

    def nan_state(trial):
        yield Report({"loss": 0.5}, state=lambda: {"model": {"w": torch.tensor([1.0, float("nan")])}})

    def infinite_state(trial):
        for last in (1.0, float("inf")):
            yield Report({"loss": 0.5}, state=lambda: {"model": {"w": torch.tensor([1.0, last])}})

    def least_so_far(trial):
        for least in (float("inf"), 2.0):
            yield Report({"loss": 0.5}, state=lambda: {"least": torch.tensor(least)})

    def joins(trial):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield {"loss": 0.5}

    def parts(trial):
        yield {"loss": 0.5}
        torch.distributed.destroy_process_group()

    def lines(trial):
        yield {"loss": 0.5}
        raise RuntimeError("Error(s) in loading state_dict:\\n\\tMissing key: " + "w " * 300)

    def bad_end(trial):
        try:
            yield {"lost": 0.5}
        finally:
            raise KeyError("in its clean-up")

    ENDINGS = {name: value for name, value in list(globals().items()) if callable(value) and name != "train"}

    def counting(trial):
        counter = {"epoch": trial.resume["epoch"] if trial.resume else 0}
        while counter["epoch"] < 3:
            counter["epoch"] += 1
            yield Report({"loss": 1.0}, state=lambda: {"epoch": counter["epoch"]})

    def network(trial):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=trial.config["lr"])
        x = torch.from_numpy(np.random.rand(32, 8)).float()
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean() + random.random()
            loss.backward()
            optimizer.step()
            yield Report({"loss": loss.item()}, state=lambda: {"model": model.state_dict()})
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)

    def big(trial):
        import weakref
        model = nn.Linear(8, 8)
        trial.cache["model"] = weakref.ref(model)
        yield {"loss": 1.0}
        try:
            model(torch.zeros(3, 7))
        except RuntimeError as error:
            raise Diverged("it does not matter why") from error

    def frozen(trial):
        import gc, weakref
        model = nn.Linear(8, 8)
        model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.optimizer.model = model
        trial.cache["model"] = weakref.ref(model)
        gc.freeze()
        yield {"loss": 1.0}

    def frozen_for_good(trial):
        import gc
        gc.disable()
        yield from frozen(trial)

    def plain_function(trial):
        return {"loss": 1.0}
"""
CONFIG_FAMILY = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        lr: float
        epochs: int = 2

    def train(trial):
        assert isinstance(trial.config, Config)
        for epoch in range(trial.config.epochs):
            yield {"loss": trial.config.lr}
"""


def spec_of(trainable: str, folder: Path, **more: Any) -> GroupSpec:
    return replace(GroupSpec(trainable, (str(folder),), ("loss",), 1, 1, 0.0, None, None, "no scratch"), **more)


def rank_of(folder: Path, function: str, rank: int = 0, family: str = FAMILY, **more: Any) -> RankLoop:
    return RankLoop(spec_of(f"{write_family(folder, family)}:{function}", folder, **more), rank, 2)


def begin(ending: str, seed: int = 3) -> Begin:
    return Begin({"ending": ending}, seed)


def run(loop: RankLoop, command: Begin) -> list[Answer]:
    """All answers of a trial, after which the process is free for the next one."""
    return run_on(loop, loop.handle(command))


def run_on(loop: RankLoop, *answers_before: Answer) -> list[Answer]:
    answers = [*answers_before] or [loop.handle(Advance())]
    while not answers[-1].ends:
        answers.append(loop.handle(Advance()))
    left = loop.handle(Leave())
    return [*answers[:-1], replace(answers[-1], clean=answers[-1].clean and left.clean)]


@pytest.fixture(autouse=True)
def process() -> Iterator[Surroundings]:
    """As it is before the test."""
    before = Surroundings()
    yield before
    before.restore()


@pytest.fixture
def loop(tmp_path: Path) -> RankLoop:
    return rank_of(tmp_path, "train")


@pytest.mark.parametrize(
    ("ending", "answer"),
    [
        ("more", Ended()),
        ("diverge", Blew(reason="loss_trans is not finite", step=812)),
        (
            "diverge_in_words_of_its_own",
            Blew(reason="exploded badly", step=7, details={"3": "a thing", "loss": "nan", "step": 99}),
        ),
        ("diverge_without_details", Blew(reason="exploded", step=3, details={"details": "some text"})),
        ("diverge_with_a_tensor", Blew(reason="exploded", step=None, details={"details": [1.0, 1.0]})),
        ("diverge_as_a_class_of_its_own", Blew(reason="exploded")),
        ("diverge_at_an_old_file", Blew(reason=r"cannot read caf\udce9.png")),
        ("diverge_without_a_word", Blew(reason="diverged without giving a reason")),
        ("diverge_as_a_bare_class", Blew(reason="diverged without giving a reason")),
        (
            "state_is_no_function",
            Broke(
                reason="the state of a report is a dict; it must be a function that returns the state: "
                "state=lambda: {...}",
                final=True,
            ),
        ),
        (
            "state_is_none",
            Broke(
                reason="the state of a report is None; its function must return what trial.resume is to be", final=True
            ),
        ),
        ("mistake_without_a_word", Broke(reason="UserError", final=True)),
        ("nan", Blew(reason="loss is nan")),
        ("infinite", Blew(reason="loss is inf")),
        ("memory", RanOut(reason="tried to allocate 2.00 GiB")),
        ("host_memory", RanOut(reason="MemoryError")),
        ("allocator", RanOut(reason="[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")),
        ("nan_state", Blew(reason="model.w of the state is nan")),
        ("infinite_state", Blew(reason="model.w of the state is inf")),
        ("least_so_far", Ended()),
        ("mistake", Broke(reason="data.root: there is nothing in /data; name the folder", final=True)),
        ("without", Broke(reason="the report has no metric `loss`; it has lost", final=True)),
        (
            "not_numbers",
            Broke(reason="the metric `loss` is 'low'; a metric is a number, leave out what is none", final=True),
        ),
        ("diverge_at_length", Blew(reason=("w " * 2000)[:3995] + " ...")),
        ("not_metrics", Broke(reason="a trainable yields a Report or a dict of metrics, not float", final=True)),
    ],
)
def test_an_ending_is_answered_and_the_next_trial_works(loop: RankLoop, ending: str, answer: Answer) -> None:
    for _ in range(2):
        answers = run(loop, begin(ending))
        assert answers[-1] == answer
        assert answers[-1].clean
        assert isinstance(answers[0], Reported)
    assert run(loop, begin("more"))[-1] == Ended()


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("bug", r"KeyError: 'no such batch' \(family_\d+\.py:\d+\)"),
        ("mute", r"Mute: \(family_\d+\.py:\d+\)"),
        ("leaves", r"SystemExit: no licence \(family_\d+\.py:\d+\)"),
        ("raises_more_than_an_exception", r"Own: no licence \(family_\d+\.py:\d+\)"),
        ("stop_iteration", r"RuntimeError: generator raised StopIteration \(family_\d+\.py:\d+\)"),
        ("bad_state", r"ZeroDivisionError: division by zero \(family_\d+\.py:\d+\)"),
        ("lines", r"RuntimeError: Error\(s\) in loading state_dict: Missing key: w (w )+\.\.\. \(family_\d+\.py:\d+\)"),
    ],
)
def test_a_bug_costs_the_process_its_trust_and_nothing_else(loop: RankLoop, ending: str, reason: str) -> None:
    answer = run(loop, begin(ending))[-1]
    assert isinstance(answer, Broke)
    assert (answer.clean, answer.final) == (False, False)
    assert re.fullmatch(reason, answer.reason)
    assert "Traceback" in answer.trace
    assert run(loop, begin("more"))[-1] == Ended()


def test_a_process_group_that_a_trial_leaves_behind_costs_the_process_its_trust(loop: RankLoop) -> None:
    answer = run(loop, begin("joins"))[-1]
    torch.distributed.destroy_process_group()
    assert answer == Ended(clean=False)


def test_so_does_one_whose_process_group_a_trial_destroys(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    loop = rank_of(tmp_path, "train")
    assert run(loop, begin("more"))[-1].clean
    assert run(loop, begin("parts"))[-1] == Ended(clean=False)


def test_so_do_the_groups_that_its_trials_add_once_they_are_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        loop = rank_of(tmp_path, "train")
        assert [run(loop, begin("more_groups"))[-1].clean for _ in range(2)] == [True, False]
    finally:
        torch.distributed.destroy_process_group()
    assert "the trial is the latest of those that left 18 process groups" in capsys.readouterr().out


def test_a_state_that_cannot_be_saved_is_a_mistake_that_no_retry_mends(loop: RankLoop) -> None:
    answer = run(loop, begin("state_with_a_function"))[-1]
    assert isinstance(answer, Broke)
    assert (answer.clean, answer.final) == (True, True)
    assert re.fullmatch("the state of a report cannot be saved: .*lambda.*; leave that out of it", answer.reason)


def test_what_fails_while_it_is_cleaned_up_is_answered_too(loop: RankLoop) -> None:
    answer = run(loop, begin("bad_end"))[-1]
    assert isinstance(answer, Broke)
    assert answer.reason.startswith("the report has no metric")
    assert not answer.clean
    assert run(loop, begin("more"))[-1] == Ended()


def test_a_metric_that_is_not_required_may_be_anything_finite_or_not(loop: RankLoop) -> None:
    answer = run(loop, begin("other_nan"))[1]
    assert isinstance(answer, Reported)
    assert answer.metrics is not None
    assert {name: str(value) for name, value in answer.metrics.items()} == {
        "loss": "0.5", "acc": "nan", "steps": "3.0", "done": "1.0",
    }  # fmt: skip


def test_a_trial_knows_its_rank_and_seed(loop: RankLoop) -> None:
    answer = loop.handle(begin("more", seed=7))
    assert answer == Reported(metrics={"loss": 1.0, "rank": 0.0, "ranks": 2.0, "seed": 7.0})


def test_another_rank_reports_nothing_and_diverges_as_the_first(tmp_path: Path) -> None:
    loop = rank_of(tmp_path, "train", rank=1)
    assert run(loop, begin("nan")) == [Reported(), Reported(), Ended()]
    assert run(loop, begin("diverge"))[-1] == Blew(reason="loss_trans is not finite", step=812)


def test_a_trial_is_closed_when_it_is_left(loop: RankLoop) -> None:
    assert loop.handle(Leave()).clean, "nothing has been begun"
    loop.handle(begin("more"))
    assert loop.handle(Leave()) == Ended()
    assert loop._cache["log"] == ["more"]
    loop.handle(begin("bad_end"))
    loop.handle(Advance())
    assert not loop.handle(Leave()).clean


def test_a_verdict_of_one_rank_closes_no_trial_before_all_are_told(loop: RankLoop) -> None:
    """What a trainable does in its `finally` may wait for the other ranks, which train on as far as they know."""
    loop.handle(begin("nan"))
    assert loop.handle(Advance()) == Blew(reason="loss is nan")
    assert loop._cache["log"] == []
    loop.handle(Leave())
    assert loop._cache["log"] == ["nan"]


def test_a_rank_that_is_alone_closes_its_trial_at_once(tmp_path: Path) -> None:
    alone = RankLoop(spec_of(f"{write_family(tmp_path, FAMILY)}:train", tmp_path), rank=0, world_size=1)
    alone.handle(begin("nan"))
    assert alone.handle(Advance()) == Blew(reason="loss is nan")
    assert alone._cache["log"] == ["nan"]


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.5, "cuda:0"), (1.0, "cuda:0")])
def test_a_worker_that_was_given_no_gpu_takes_none(
    gpus: float, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(rank_of(tmp_path, "train", gpus_per_worker=gpus)._device) == device


@pytest.mark.parametrize(
    ("left_mib", "told"),
    [
        (200, ""),
        (
            300,
            "the trial left 300 MiB on the GPU, and what stays there has to be in trial.cache: "
            "the processes of its group are replaced\n",
        ),
    ],
)
def test_a_trial_after_which_new_processes_start_is_told_why(
    left_mib: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else every trial may wait for them, and for its data and models, and nobody sees why."""
    loop = RankLoop(spec_of("toy:train", tmp_path, gpus_per_worker=1.0), 0, 1, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: left_mib * 2**20)
    assert loop._is_clean() == (not told)
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(("function", "kind"), [("plain_function", "dict")])
def test_what_is_no_generator_is_refused(function: str, kind: str, tmp_path: Path) -> None:
    answer = rank_of(tmp_path, function).handle(Begin({}, 0))
    assert isinstance(answer, Broke)
    assert answer.final
    assert f"{function} returned {kind}; a trainable is a generator: yield a report after every epoch" in answer.reason


def test_a_state_is_saved_before_the_trial_goes_on_and_resumes_it(tmp_path: Path) -> None:
    loop = rank_of(tmp_path, "counting")
    answers = run(loop, Begin({}, 0))
    states = [answer.state for answer in answers if isinstance(answer, Reported)]
    assert [load_state(state) for state in states if state] == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]
    assert len(run(loop, Begin({}, 0, resume=states[1]))) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trial_knows_its_number(rank: int, tmp_path: Path) -> None:
    family = """
        def train(trial):
            assert trial.number == 7
            yield {"loss": 1.0}
    """
    answers = run(rank_of(tmp_path, "train", rank, family), Begin({}, 0, number=7))
    assert [type(answer) for answer in answers] == [Reported, Ended]


def test_a_config_class_is_given_and_checked(tmp_path: Path) -> None:
    loop = rank_of(tmp_path, "train", family=CONFIG_FAMILY)
    assert [answer.ends for answer in run(loop, Begin({"lr": 0.5}, 0))] == [False, False, True]
    answer = loop.handle(Begin({"lrr": 0.5}, 0))
    assert isinstance(answer, Broke)
    assert answer.final
    assert answer.reason == "config.lrr: no such key in Config; did you mean `lr`?"


def test_a_trainable_that_is_missing_on_a_node_is_told(tmp_path: Path) -> None:
    answer = RankLoop(spec_of("no_such_module:train", tmp_path), 0, 1).handle(Begin({}, 0))
    assert isinstance(answer, Broke)
    assert answer.reason.startswith("trainable: no module 'no_such_module' in ")


def test_a_warm_process_gives_bit_for_bit_what_a_fresh_one_gives(tmp_path: Path, process: Surroundings) -> None:
    command = Begin({"lr": 0.1}, seed=11)
    fresh = run(rank_of(tmp_path, "network"), command)
    process.restore()
    warm_loop = rank_of(tmp_path, "network")
    run(warm_loop, Begin({"lr": 0.3}, seed=5))
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    warm = run(warm_loop, command)
    assert len(fresh) == len(warm) == 4
    for one, other in zip(fresh, warm, strict=True):
        if isinstance(one, Reported) and isinstance(other, Reported):
            assert one.metrics == other.metrics
            assert one.state is not None
            assert other.state is not None
            theirs = load_state(other.state)["model"]
            assert all(torch.equal(value, theirs[name]) for name, value in load_state(one.state)["model"].items())


def test_the_precision_that_a_module_sets_when_it_is_imported_is_that_of_every_trial(tmp_path: Path) -> None:
    family = """
        import torch

        torch.set_float32_matmul_precision("high")

        def train(trial):
            yield {"loss": float(torch.get_float32_matmul_precision() == "high")}
            torch.set_float32_matmul_precision("medium")
    """
    loop = rank_of(tmp_path, "train", family=family)
    for _ in range(2):
        assert loop.handle(begin("")) == Reported(metrics={"loss": 1.0})
        assert run_on(loop)[-1] == Ended()


@pytest.mark.parametrize(
    ("function", "ending"),
    [("big", Blew(reason="it does not matter why")), ("frozen", Ended()), ("frozen_for_good", Ended())],
)
def test_a_trial_is_gone_when_its_memory_is_counted(function: str, ending: Answer, tmp_path: Path) -> None:
    """An exception holds the frames it passed through, and they hold the model: it must be let go first.

    And what Python was told never to look for is looked for.
    """
    alive: list[bool] = []

    class Watched(RankLoop):
        def _is_clean(self) -> bool:
            model: weakref.ref[torch.nn.Module] = self._cache["model"]
            alive.append(model() is not None)
            return True

    loop = Watched(spec_of(f"{write_family(tmp_path, FAMILY)}:{function}", tmp_path), 0, 1)
    assert run(loop, Begin({}, 0))[-1] == ending
    assert alive
    assert not any(alive)


def test_metrics_are_numbers_by_name() -> None:
    some: dict[Any, Any] = {"a": 1, 2: torch.tensor(0.5), "b": np.array([[0.25]]), "c": np.float32(2), "d": True}
    assert numbers(some) == {"a": 1.0, "2": 0.5, "b": 0.25, "c": 2.0, "d": 1.0}
    assert math.isnan(numbers({"a": np.ma.mean(np.ma.masked_all(3))})["a"])
    text: tuple[Any, ...] = ("0.5", b"1", np.array("0.5"))
    values: tuple[Any, ...] = ([1], torch.ones(2), np.ones(2), 10**400, None, {}, *text, torch.tensor(1j), 1j)
    for value in values:
        with pytest.raises(
            UserError, match=rf"the metric `a` is {re.escape(repr(value))[:50]}.*; a metric is a number"
        ):
            numbers({"a": value})
    with pytest.raises(UserError) as told:
        numbers({"a": [0.1] * 100_000})
    assert len(str(told.value)) < 1000


def test_a_process_is_where_it_was_whatever_a_trial_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "as it was")
    family = """
        import os
        os.environ["OF_THE_MODULE"] = "set when it was imported"

        def train(trial):
            yield {"loss": float(len(os.environ.get("LEFT", ""))), "same": float(os.environ["KEPT"] == "as it was")}
            os.environ.update(LEFT="behind", KEPT="no more")
            os.mkdir("work")
            os.chdir("work")
            yield {"loss": 1.0}
        """
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    loop = rank_of(tmp_path, "train", family=family)
    for _ in range(2):
        assert loop.handle(begin("")) == Reported(metrics={"loss": 0.0, "same": 1.0})
        assert run_on(loop)[-1] == Ended()
        os.chdir(tmp_path / "home")
        os.rmdir("work")
    assert os.environ["OF_THE_MODULE"] == "set when it was imported"


def test_what_a_post_mortem_cannot_put_in_words_does_not_hide_it(loop: RankLoop) -> None:
    answer = run(loop, begin("diverge_in_things_without_words"))[-1]
    assert isinstance(answer, Blew)
    assert (answer.reason, answer.details["of"], answer.details["at"]) == ("exploded", "Mute", [1.5])


def test_a_trial_prints_where_its_process_does_whatever_the_trial_before_did(tmp_path: Path) -> None:
    family = """
        import io, sys

        def train(trial):
            print("an epoch")
            sys.stdout = log = io.StringIO()
            yield {"loss": 1.0}
            log.close()
        """
    loop = rank_of(tmp_path, "train", family=family)
    before = sys.stdout
    for _ in range(2):
        assert loop.handle(begin("")) == Reported(metrics={"loss": 1.0})
        assert run_on(loop)[-1] == Ended()
    assert loop._loaded is not None
    loop._loaded[1].restore()
    assert sys.stdout is before


@pytest.mark.filterwarnings("ignore:Sparse")
def test_memory_that_tensors_share_counts_once_and_a_sparse_one_has_some() -> None:
    whole = torch.zeros(100)
    assert storages_of(whole) == storages_of(whole[3:7])
    dense = torch.eye(4)
    for sparse in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((2, 2))):
        assert sum(storage.nbytes() for storage in storages_of(sparse)) >= 4 * 4


@pytest.mark.parametrize(("limit_mb", "share"), [(100, 0.11), (950, 1.0)])
def test_the_allocator_has_the_room_that_the_plan_counts_on(
    limit_mb: float, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[Any] = []
    gpu, device = SimpleNamespace(total_memory=1000 * 2**20), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *bound: bounds.append(bound))
    RankLoop(spec_of("toy:train", tmp_path, gpus_per_worker=0.1, memory_limit_mb=limit_mb), 0, 1, device)
    assert bounds == [(pytest.approx(share), device)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_process_runs_out_at_its_own_limit(tmp_path: Path) -> None:
    try:
        rank_of(tmp_path, "train", memory_limit_mb=64)
        assert torch.empty(60 * 2**20, dtype=torch.uint8, device="cuda").is_cuda
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(80 * 2**20, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
