"""How many slots a cluster holds, and what a search will cost: hand-computed cases."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from spaces import space_of

from search.plan import (
    AT_THE_START,
    MIB,
    MOST_ON_ONE_GPU,
    Measured,
    Node,
    Plan,
    Unmeasured,
    estimate,
    expected_epochs,
    make_plan,
    share_of_gpu,
)
from search.space import Space
from search.workers.ranks import ALLOCATOR_ROOM
from trainables.contract import UserError


def a_space(folder: Path, workers: int = 1, cpus: int = 1, gpus: Any = None, **sections: Any) -> Space:
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
        (1, 1, None, [Node(4, 0), GPU_NODE], 8),  # somewhere
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
        assert plan.slots * plan.workers * plan.gpus_per_worker <= sum(node.gpus for node in nodes)
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


@pytest.mark.parametrize(("trials", "told"), [(100, "; 1 of the slots over several machines"), (2, "")])
def test_slots_over_several_machines_are_told(trials: int, told: str, tmp_path: Path) -> None:
    plan = str(make_plan(a_space(tmp_path, 3, gpus=1, search={"trials": trials}), [Node(8, 4), Node(8, 5)]))
    assert plan.endswith(f"{told})")
    assert ("several machines" in plan) == bool(told)


def test_gpus_that_stay_idle_for_want_of_cpus_are_told(tmp_path: Path) -> None:
    assert str(make_plan(a_space(tmp_path, 1, 4, gpus=1), [Node(16, 6)])) == (
        "4 slots x 1 worker x 4 CPU and 1 GPU (all that fits on 16 CPU and 6 GPU; the GPUs would suffice for 6 with "
        "fewer CPUs each: lower resources.cpus_per_worker)"
    )


GIB = 1024 * MIB


def auto(folder: Path, limit_mb: float | None = None, workers: int = 1, **sections: Any) -> Space:
    resources = {"gpus_per_worker": "auto", "memory_limit_mb": limit_mb, "workers": workers}
    return a_space(folder, **{"resources": resources, **sections})


def took(need_gib: float, besides_gib: float = 0.0, device_gib: float = 24.0) -> Measured:
    return Measured(9, *(int(part * GIB) for part in (need_gib, besides_gib, device_gib)))


class TestSlotsThatShareAGpu:
    @pytest.mark.parametrize(
        ("memory", "nodes", "slots", "on_one", "limit_gib"),
        [
            (took(5), [Node(32, 1)], 4, 4, 24 / 4 / 1.1),  # 4 x 5.5 fit into 24
            (took(5), [Node(32, 3)], 12, 4, 24 / 4 / 1.1),
            (took(5, 0.6), [Node(32, 1)], 3, 3, (24 / 3 - 0.6) / 1.1),  # 4 x 6.1 do not
            (took(13), [Node(32, 1)], 1, 1, None),
            (took(30), [Node(32, 2)], 2, 1, None),  # each trial is cut to a whole GPU, as without `auto`
            (took(5), [Node(2, 1)], 2, 2, 24 / 2 / 1.1),  # CPUs are the limit, and each slot gets more memory
            (took(5), [Node(8, 4)], 8, 2, 24 / 2 / 1.1),  # two on each of four GPUs, not four on each of two
            (took(5), [Node(1, 1), Node(8, 1)], 5, 4, 24 / 4 / 1.1),
            (took(0), [Node(100, 1)], 64, 64, 24 / 64 / 1.1),
        ],
    )
    def test_are_as_many_as_have_room(
        self,
        memory: Measured,
        nodes: list[Node],
        slots: int,
        on_one: int,
        limit_gib: float | None,
        tmp_path: Path,
    ) -> None:
        plan = make_plan(auto(tmp_path), nodes, memory)
        assert (plan.slots, plan.gpus_per_worker) == (slots, share_of_gpu(on_one))
        assert plan.memory_limit_mb == (None if limit_gib is None else pytest.approx(limit_gib * 1024))

    def test_never_take_more_than_there_is_and_leave_no_room_for_one_more(self, tmp_path: Path) -> None:
        rng, space = random.Random(0), auto(tmp_path)
        for _ in range(500):
            memory = took(rng.uniform(0.1, 30), rng.choice([0.0, rng.uniform(0, 2)]), rng.choice([8, 24, 80]))
            nodes = [Node(rng.randint(1, 40), rng.randint(1, 8)) for _ in range(rng.randint(1, 3))]
            space = space.with_trials(rng.randint(1, 60))
            plan = make_plan(space, nodes, memory)
            on_one = round(1 / plan.gpus_per_worker)
            each = ALLOCATOR_ROOM * memory.need_bytes + memory.besides_bytes
            if plan.memory_limit_mb is not None:
                share = ALLOCATOR_ROOM * plan.memory_limit_mb * MIB + memory.besides_bytes
                assert on_one * share <= memory.device_bytes * (1 + 1e-9)
                assert memory.need_bytes <= plan.memory_limit_mb * MIB
            places = sum(min(node.cpus, node.gpus * on_one) for node in nodes)
            assert plan.slots == min(places, space.search.trials)
            cpus = sum(node.cpus for node in nodes)
            assert plan.slots in (space.search.trials, cpus) or (
                (on_one + 1) * each > memory.device_bytes or any(node.cpus < node.gpus * on_one for node in nodes)
            )

    def test_the_plan_says_why_there_are_so_many(self, tmp_path: Path) -> None:
        assert str(make_plan(auto(tmp_path), [Node(8, 1)], took(5.1))) == (
            "4 slots x 1 worker x 1 CPU and 0.25 GPU (4 slots on one GPU: the largest of 9 settings took 5.1 of "
            "24.0 GiB; all that fits on 8 CPU and 1 GPU)"
        )
        few = auto(tmp_path, search={"trials": 3})
        assert make_plan(few, [Node(8, 1)], took(5.1, 0.3)).limit == (
            "3 slots on one GPU, where 4 have room: the largest of 9 settings took 5.1 and its process 0.3 besides of "
            "24.0 GiB; 3 trials; 4 groups would fit"
        )
        assert make_plan(auto(tmp_path), [Node(8, 1)], Measured(1, 15 * GIB, 0, 24 * GIB)).limit == (
            "1 slot on one GPU: the only setting took 15.0 of 24.0 GiB; all that fits on 8 CPU and 1 GPU"
        )

    def test_are_one_on_each_gpu_while_nothing_is_known(self, tmp_path: Path) -> None:
        assert str(make_plan(auto(tmp_path, limit_mb=9000), [Node(8, 2)], Unmeasured("memory_need broke"))) == (
            "2 slots x 1 worker x 1 CPU and 1 GPU (a whole GPU for each worker: memory_need broke; "
            "all that fits on 8 CPU and 2 GPU)"
        )
        plan = make_plan(auto(tmp_path, limit_mb=9000), [Node(8, 2)])
        assert (plan.slots, plan.memory_limit_mb, AT_THE_START.reason in plan.limit) == (2, 9000, True)

    def test_are_not_several_where_a_group_has_several_workers(self, tmp_path: Path) -> None:
        plan = make_plan(auto(tmp_path, workers=2), [Node(8, 4)], took(1))
        assert (plan.slots, plan.gpus_per_worker) == (2, 1)
        assert "a whole GPU for each worker: NCCL does not allow two ranks of a group on one GPU" in plan.limit

    def test_share_no_gpu_where_there_is_none(self, tmp_path: Path) -> None:
        assert str(make_plan(auto(tmp_path), [Node(4, 0)])) == (
            "4 slots x 1 worker x 1 CPU (there is no GPU to share; all that fits on 4 CPU and 0 GPU)"
        )

    def test_share_a_simulated_gpu_of_the_limit_on_each_machine(self, tmp_path: Path) -> None:
        space = auto(tmp_path, limit_mb=400)
        memory = Measured(7, 78 * MIB, 0, 400 * MIB)
        plan = make_plan(space, [Node(8, 0), Node(2, 0)], memory)
        assert (plan.slots, plan.gpus_per_worker) == (6, 0)
        assert plan.memory_limit_mb == pytest.approx(400 / 4 / 1.1)
        assert plan.limit == (
            "4 slots on one simulated GPU: the largest of 7 settings took 78.0 of 400.0 MiB; "
            "all that fits on 10 CPU and 2 simulated GPU"
        )
        whole = make_plan(space, [Node(8, 0)])
        assert (whole.slots, whole.gpus_per_worker, whole.memory_limit_mb) == (1, 0, 400)
        with pytest.raises(UserError, match=r"2 x \(1 CPU, 1 simulated GPU\) does not fit on the 1 node"):
            make_plan(auto(tmp_path, limit_mb=400, workers=2), [Node(8, 0)], memory)


@pytest.mark.parametrize(
    ("scheduler", "epochs"),
    [
        ({"name": "none"}, 9),
        ({"name": "median"}, 9),
        ({"name": "asha", "grace_epochs": 1, "reduction": 3}, 1 + 2 / 3 + 6 / 9),
        ({"name": "asha", "grace_epochs": 2, "reduction": 4}, 2 + 6 / 4 + 1 / 16),
        ({"name": "hyperband", "reduction": 2}, 9),
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


@pytest.mark.parametrize("slots", range(1, MOST_ON_ONE_GPU + 1))
def test_as_many_shares_of_a_gpu_fit_on_it_as_ray_counts_them(slots: int) -> None:
    in_units = round(share_of_gpu(slots) * 10_000)
    assert 10_000 // in_units == slots
