"""What is measured of memory before a search, and a search whose slots share a simulated GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from spaces import space_of, write_family
from toy_task import CPU, TOY, Config

from search import run as engine
from search.interruption import Interruption
from search.packing import LARGEST, Measurement, cannot_share, large_settings, measure, needs, on_every_machine
from search.plan import MIB, Measured, Node, Unmeasured, make_plan
from search.records.folder import STUDY
from search.space import Space
from search.space.loading import load
from search.study import open_study
from search.workers.ranks import ALLOCATOR_ROOM
from trainables.contract import Trial
from trainables.loop import step_memory
from trainables.optim import Optim

HERE = Path(__file__).parent
SIZES = [2, 8, 24, 48]
CONFIG: dict[str, Any] = {"epochs": 2, "samples": 96, "optim": {"lr": 0.01, "batch_size": {"choice": SIZES}}}
SEARCHED = {
    "lr": {"log": [1e-5, 1e-2]},
    "batch_size": {"int": [1, 256], "log": True},
    "widths": {"choice": [[8, 16], [32, 64], [64, 64]]},
    "block": {"choice": ["uni", "bi"]},
    "heads": {"int": [1, 4], "when": {"block": ["bi"]}},
}
FAMILY = """
import os, time
from toy_task import TOY, Config, memory_need
from trainables.contract import Report
from trainables.loop import fit

def train(trial):
    for report in fit(TOY, trial):
        time.sleep(0.5)  # or the first slot might take a second trial before the others have begun
        yield Report({**report.metrics, "pid": os.getpid(), "limit_mb": trial.memory_limit_mb})
"""


def sharing(folder: Path, family: str = FAMILY, limit_mb: float = 1.0, **sections: Any) -> Space:
    """A search of the toy family's batch size whose slots share a simulated GPU."""
    shutil.copy(HERE / "toy_task.py", folder)
    resources = {"gpus_per_worker": "auto", "memory_limit_mb": limit_mb}
    return space_of(folder, CONFIG, trainable=f"{write_family(folder, family)}:train", resources=resources, **sections)


def need_bytes(batch_size: int) -> int:
    config = Config(Optim(lr=0.01, batch_size=batch_size), epochs=2, samples=96)
    return step_memory(TOY, Trial(config, device=CPU))


class TestTheSettingsThatAreMeasured:
    def test_are_the_known_ones_and_the_largest_draws(self, tmp_path: Path) -> None:
        known = [{"lr": 1e-3, "batch_size": 7, "widths": [8, 16], "block": "uni"}, {"lr": 1e-4, "batch_size": 9}]
        space = space_of(tmp_path, SEARCHED, try_first=known)
        settings = large_settings(space)
        assert settings == large_settings(space)
        assert settings[0] == known[0]
        assert settings[1]["batch_size"] == 9
        assert len(settings) == 2 + LARGEST
        assert all(space.holds(values) for values in settings)
        for values in settings[2:]:
            assert values["batch_size"] > 64
            assert values["widths"] != [8, 16]

    def test_differ_in_more_than_rates(self, tmp_path: Path) -> None:
        known = [{"lr": rate, "batch_size": 8} for rate in (1e-5, 1e-4, 1e-3)]
        space = space_of(tmp_path, {"lr": SEARCHED["lr"], "batch_size": {"choice": [2, 8]}}, try_first=known)
        assert [values["batch_size"] for values in large_settings(space)] == [8, 2]

    def test_are_large_by_their_magnitude(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, {"reach": {"choice": [-9, 1, 2, 3, 4, 5]}})
        assert [values["reach"] for values in large_settings(space)] == [-9, 5, 4, 3, 2]

    def test_are_one_where_nothing_or_only_a_rate_is_searched(self, tmp_path: Path) -> None:
        assert large_settings(space_of(tmp_path, {"lr": 0.1})) == [{}]
        assert len(large_settings(space_of(tmp_path, {"lr": SEARCHED["lr"]}))) == 1


class TestWhatOneMachineSays:
    def job(self, folder: Path, family: str, limit_mb: float | None = 1.0) -> Measurement:
        configs = [{"optim": {"lr": 0.01, "batch_size": size}, "samples": 96} for size in SIZES]
        return Measurement(f"{write_family(folder, family)}:train", (str(folder),), configs, 0, 1, limit_mb)

    def test_is_the_largest_need_beside_the_limit(self, tmp_path: Path) -> None:
        assert needs(self.job(tmp_path, FAMILY)) == Measured(4, need_bytes(48), 0, MIB)

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ("raise KeyError('no such file')", "memory could not be measured: KeyError: 'no such file'"),
            ("raise MemoryError", "memory could not be measured: MemoryError: no reason given"),
            ("return 'much'", "memory could not be measured: TypeError: "),
        ],
    )
    def test_is_the_reason_where_measuring_failed(self, body: str, reason: str, tmp_path: Path) -> None:
        found = needs(self.job(tmp_path, f"def train(trial):\n    yield {{}}\ndef memory_need(trial):\n    {body}\n"))
        assert isinstance(found, Unmeasured)
        assert found.reason.startswith(reason)

    def test_is_measured_each_time_in_the_surroundings_in_which_a_trial_begins(self, tmp_path: Path) -> None:
        family = """
            import torch

            def train(trial):
                yield {}

            def memory_need(trial):
                needed = torch.empty(2**20).nbytes + torch.initial_seed()
                torch.set_default_dtype(torch.float64)
                torch.manual_seed(2**30)
                return needed
        """
        try:
            assert needs(self.job(tmp_path, family)) == Measured(4, 4 * 2**20, 0, MIB)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_is_that_there_is_no_gpu_and_no_limit_to_simulate_one(self, tmp_path: Path) -> None:
        found = needs(self.job(tmp_path, FAMILY, limit_mb=None))
        assert found == Unmeasured("PyTorch finds no GPU on a machine where Ray counts one")

    def test_goes_for_all_where_it_is_the_worst(self) -> None:
        large, small = Measured(3, 50, 9, 240), Measured(3, 60, 0, 80)
        assert on_every_machine([large, small]) == Measured(3, 60, 9, 80)
        assert on_every_machine([large, Unmeasured("no data here"), small]) == Unmeasured("no data here")


def test_there_is_a_reason_before_anything_is_measured(tmp_path: Path) -> None:
    space = sharing(tmp_path)
    trainable = load(space.trainable, space.paths)
    assert cannot_share(space, trainable, [Node(4, 0)]) is None
    silent = cannot_share(space, replace(trainable, memory_need=None), [Node(4, 1)])
    assert silent == Unmeasured(f"the module of {space.trainable} has no function memory_need")
    pair = replace(space, resources=space.resources.model_copy(update={"workers": 2}))
    assert cannot_share(pair, trainable, [Node(4, 2)]) == Unmeasured(
        "NCCL does not allow two ranks of a group on one GPU"
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def test_three_slots_keep_within_their_shares_of_a_simulated_gpu(self, tmp_path: Path) -> None:
        known = [{"optim.batch_size": size} for size in (*SIZES, *SIZES)]
        space, nodes = sharing(tmp_path, try_first=known, search={"trials": 8}), [Node(3, 0)]
        measured = measure(space, nodes, Interruption())
        assert measured == Measured(4, need_bytes(48), 0, MIB)
        # A GPU in a share of which eight samples fit, and not twice as many: as if only they had been measured.
        room = int(3.2 * ALLOCATOR_ROOM * need_bytes(8))
        plan = make_plan(space, nodes, replace(measured, need_bytes=need_bytes(8), device_bytes=room))
        assert plan.slots == 3
        assert plan.memory_limit_mb is not None
        assert need_bytes(8) <= plan.memory_limit_mb * MIB < need_bytes(16)
        results = tmp_path / "results"
        open_study_in(results, space)
        outcome = engine.run(space, plan, results)
        assert [record.status for record in outcome.records] == ["finished"] * 8, outcome.records
        assert {record.metrics["limit_mb"] for record in outcome.records} == {plan.memory_limit_mb}
        assert [record.metrics["micro_batch"] for record in outcome.records] == [2, 8, 8, 8] * 2
        assert len({record.metrics["pid"] for record in outcome.records}) == 3

    def test_a_process_that_dies_or_takes_too_long_is_a_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family = "import os\ndef train(trial):\n    yield {}\ndef memory_need(trial):\n    os._exit(1)\n"
        space = sharing(tmp_path, family)
        assert measure(space, [Node(4, 0)], Interruption()) == Unmeasured(
            "the measuring process died: WorkerCrashedError"
        )
        family = "import time\ndef train(trial):\n    yield {}\ndef memory_need(trial):\n    time.sleep(500)\n"
        space = sharing(tmp_path, family)
        monkeypatch.setattr("search.packing.WAIT_S", 0.01)
        late = Unmeasured("1 machine(s) had not measured a training step within 0.01 s")
        assert measure(space, [Node(4, 0)], Interruption()) == late


def open_study_in(results: Path, space: Space) -> None:
    results.mkdir()
    open_study(results / STUDY, space, create=True)
