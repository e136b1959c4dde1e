"""How many slots a cluster holds, and what a search will cost: hand-computed cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spaces import space_of

from search.plan import Node, Plan, estimate, expected_epochs, make_plan
from search.space import Space
from trainables.contract import UserError


def a_space(folder: Path, workers: int = 1, cpus: int = 1, gpus: float | None = None, **sections: Any) -> Space:
    resources = {"workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus}
    return space_of(folder, {"epochs": 9}, **{"search": {"trials": 100}, "resources": resources, **sections})


GPU_NODE = Node(cpus=32, gpus=8)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "nodes", "slots"),
    [
        (1, 1, 1, [GPU_NODE], 8),
        (2, 4, 1, [GPU_NODE], 4),
        (3, 4, 1, [GPU_NODE], 2),  # floor(8 / 3)
        (1, 8, 1, [GPU_NODE], 4),  # CPUs are the limit
        (1, 1, 0.5, [GPU_NODE], 16),
        (1, 1, 0.4, [GPU_NODE], 16),  # two on each GPU: a worker does not lie across two
        (1, 1, 0.3, [GPU_NODE], 24),
        (1, 1, 4, [GPU_NODE], 2),
        (1, 1, 0, [GPU_NODE], 32),
        (1, 1, None, [GPU_NODE], 8),  # 1 where there are GPUs
        (1, 1, None, [Node(4, 0)], 4),  # and 0 where there are none
        (3, 1, 1, [Node(8, 2), Node(8, 2), Node(8, 2)], 2),  # a group spreads over nodes
        (1, 1, 3, [Node(8, 4), Node(8, 4)], 2),  # a worker does not
        (4, 2, 0, [Node(3, 0), Node(5, 0)], 0),  # 1 + 2 workers
        (1, 3, 0, [Node(2, 0), Node(2, 0)], 0),
        (1, 1, 1, [Node(8, 0)], 0),
        (1, 1, 0, [], 0),
    ],
)
def test_as_many_groups_as_the_nodes_hold(
    workers: int, cpus: int, gpus: float | None, nodes: list[Node], slots: int, tmp_path: Path
) -> None:
    space = a_space(tmp_path, workers, cpus, gpus)
    if slots:
        plan = make_plan(space, nodes)
        assert (plan.slots, plan.workers, plan.cpus_per_worker) == (slots, workers, cpus)
        # What is handed out is there.
        assert plan.gpus <= sum(node.gpus for node in nodes)
        assert slots * workers * cpus <= sum(node.cpus for node in nodes)
    else:
        with pytest.raises(UserError, match="does not fit"):
            make_plan(space, nodes)


def test_a_refusal_says_what_is_wanted_what_is_there_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(a_space(tmp_path, workers=4, cpus=2, gpus=1), [Node(16, 2), Node(8, 1)])
    assert str(caught.value) == (
        "resources: a group of 4 x (2 CPU, 1 GPU) does not fit on the 2 node(s) with 16+8 CPU and 2+1 GPU; "
        "lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
    )


def test_more_than_one_gpu_comes_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gpus_per_worker: 1\.5 must be a whole number or below 1"):
        make_plan(a_space(tmp_path, gpus=1.5), [GPU_NODE])


def test_there_are_no_more_slots_than_trials(tmp_path: Path) -> None:
    plan = make_plan(a_space(tmp_path, gpus=1, search={"trials": 3}), [GPU_NODE])
    assert plan.slots == 3
    assert str(plan) == "3 slots x 1 worker x 1 CPU and 1 GPU (3 trials; 8 groups would fit)"


def test_a_plan_says_what_limits_it(tmp_path: Path) -> None:
    assert str(make_plan(a_space(tmp_path, 2, 4), [Node(9, 0)])) == (
        "1 slot x 2 workers x 4 CPU (all that fits on 9 CPU and 0 GPU)"
    )


@pytest.mark.parametrize(
    ("scheduler", "epochs"),
    [
        ({"name": "none"}, 9),
        ({"name": "median"}, 9),
        ({"name": "asha", "grace_epochs": 1, "reduction": 3}, 1 + 2 / 3 + 6 / 9),
        ({"name": "asha", "grace_epochs": 2, "reduction": 4}, 2 + 6 / 4 + 1 / 16),
        ({"name": "hyperband", "grace_epochs": 5, "reduction": 2}, 5 + 4 / 2),
        ({"name": "asha", "grace_epochs": 9}, 9),
        ({"name": "asha", "grace_epochs": 20}, 9),
    ],
)
def test_a_scheduler_halves_the_epochs_at_each_rung(scheduler: dict[str, Any], epochs: float, tmp_path: Path) -> None:
    assert expected_epochs(a_space(tmp_path, scheduler=scheduler)) == pytest.approx(epochs)


class TestEstimate:
    PLAN = Plan(slots=4, workers=2, cpus_per_worker=1, gpus_per_worker=1, limit="")

    def test_without_a_scheduler(self, tmp_path: Path) -> None:
        # 100 trials x 9 epochs x 40 s = 10 h of one group, with 2 GPUs each, 4 at a time.
        assert estimate(a_space(tmp_path), self.PLAN, 40.0) == (
            "at most 900 epochs; 20 GPU-hours, 2.5 h on the clock (40 s an epoch measured before)"
        )

    def test_with_a_scheduler(self, tmp_path: Path) -> None:
        space = a_space(tmp_path, scheduler={"name": "asha"})
        assert estimate(space, self.PLAN, 3600.0).startswith(
            "at most 900 epochs, about 233 under asha; 466 GPU-hours, 58 h on the clock"
        )

    def test_without_a_gpu(self, tmp_path: Path) -> None:
        plan = Plan(slots=1, workers=2, cpus_per_worker=1, gpus_per_worker=0, limit="")
        assert "; 5 worker-hours without a GPU, 2.5 h on the clock" in estimate(a_space(tmp_path), plan, 10.0)
        assert "; less than 0.01 worker-hours" in estimate(a_space(tmp_path), plan, 0.01)

    def test_where_no_epoch_was_timed(self, tmp_path: Path) -> None:
        assert "GPU-hours follow once an epoch has been timed" in estimate(a_space(tmp_path), self.PLAN, None)

    def test_where_the_length_is_not_known(self, tmp_path: Path) -> None:
        space = space_of(tmp_path, {"epochs": {"int": [1, 9]}})
        assert estimate(space, self.PLAN, 1.0).startswith("20 trials; their length is not known")
