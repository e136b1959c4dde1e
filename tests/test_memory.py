"""The micro-batch probe: the largest that fits, the same on every rank, and no trace of having looked."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from toy_task import CPU, assert_same

from trainables.memory import LiveBytes, Memory, Tried, fitting_micro_batch, leaving_no_trace, shape_key, try_step
from trainables.resume import seed_everything
from trainables.samples import Ranks

FLOAT = 4  # bytes
PLENTY = 2**40
ALONE = Ranks()
MEMORY = Memory(CPU, PLENTY)
SHARES = {2: 2, 3: 3, 4: 4, 5: 4, 8: 4, 24: 4, 48: 4}  # by share, what it is cut to where four samples fit


def normed() -> nn.Module:
    """A model that draws random numbers and keeps statistics."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 64, 4),
    )


@dataclass
class Step:
    """Forward and backward of so many samples, drawing from every generator; remembers what it was asked for."""

    model: nn.Module
    device: torch.device = CPU
    ran_out_from: int = PLENTY  # samples for which it raises `error`, as a GPU does whose memory is used up
    error: type[Exception] = torch.OutOfMemoryError
    asked: list[int] = field(default_factory=list)

    def __call__(self, samples: int) -> None:
        self.asked.append(samples)
        loudness = 1 + random.random() + np.random.rand()
        output = self.model(loudness * torch.randn(samples, 3, 8, 8, device=self.device))
        if samples >= self.ran_out_from:
            raise self.error("CUDA out of memory")
        output.square().sum().backward()


def need_bytes(samples: int, reserve_bytes: int = 0) -> int:
    """The peak of a step, and so a limit that it meets to the byte."""
    model = normed()
    return try_step(model, Step(model), samples, Memory(CPU, PLENTY, reserve_bytes)).need_bytes


def probe(share: int, limit_bytes: int | None, tried: dict[int, Tried] | None = None) -> tuple[int, list[int]]:
    """What a fresh model's probe answers, and the steps it took."""
    model = normed()
    step = Step(model)
    fits = fitting_micro_batch(model, step, share, Memory(CPU, limit_bytes), ALONE, {} if tried is None else tried)
    return fits, step.asked


def everything(model: nn.Module) -> dict[str, Any]:
    """The model and the global generators, as copies."""
    return {
        "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": pickle.dumps(np.random.get_state()),
        "python": random.getstate(),
    }


@pytest.mark.parametrize(("share", "fits"), SHARES.items())
def test_the_answer_is_the_largest_size_that_fits(share: int, fits: int) -> None:
    limit_bytes = need_bytes(4)
    answer, asked = probe(share, limit_bytes)
    assert answer == fits
    assert asked[-1] == fits
    assert need_bytes(fits) <= limit_bytes
    if fits < share:
        assert need_bytes(2 * fits) > limit_bytes
    assert probe(share, limit_bytes - 1)[0] == (share if share < 4 else 2)


def test_the_answer_grows_with_the_limit_and_every_size_needs_more_than_the_one_below() -> None:
    needs = [need_bytes(samples) for samples in range(1, 10)]
    assert needs == sorted(set(needs))
    answers = [probe(9, need)[0] for need in needs]
    assert answers == [1, 2, 2, 4, 4, 4, 4, 8, 9]


def test_every_run_counts_the_same_bytes() -> None:
    assert len({need_bytes(8) for _ in range(5)}) == 1


def test_the_bytes_are_those_of_a_count_by_hand() -> None:
    model = nn.Linear(10, 10, bias=False)
    model.register_buffer("mean", torch.zeros(10))
    x_BC = torch.randn(5, 10)

    def step(samples: int) -> None:
        # Kept for backward: both sines' arguments. Views and what is written in place are no new memory.
        y_BC = model(x_BC[:samples]).sin().T.sin().add_(1)
        y_BC.backward(torch.ones_like(y_BC))

    # At its peak, backward holds the linear output and the first sine (both saved), the sum, the gradient of it, the
    # cosine of what was saved, and their product; weights, gradients and the buffer beside them.
    by_hand = (2 * 10 * 10 + 10 + 6 * 5 * 10) * FLOAT
    tried = try_step(model, step, 5, MEMORY)
    assert tried.need_bytes == by_hand
    assert try_step(model, step, 5, Memory(CPU, by_hand)).fits
    assert not try_step(model, step, 5, Memory(CPU, by_hand - 1)).fits


def test_memory_that_only_backward_takes_is_counted() -> None:
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient + torch.zeros(1_000_000).sum()

    with LiveBytes(nn.Identity()) as live:
        x = torch.ones(3, requires_grad=True)
        y = Wasteful.apply(x).sum()
        assert live.peak < 1_000
        y.backward()
    assert 4_000_000 < live.peak < 4_001_000
    del x, y
    assert live.now == 0


def test_what_training_will_hold_is_set_aside() -> None:
    assert need_bytes(4, reserve_bytes=1_000) == need_bytes(4) + 1_000


def test_what_is_frozen_takes_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False).requires_grad_(False), nn.Linear(100, 1, bias=False))
    tried = try_step(model, lambda samples: model(torch.ones(samples, 100)).sum().backward(), 1, MEMORY)
    assert 100 * 100 * FLOAT < tried.need_bytes < 1.1 * 100 * 100 * FLOAT


def test_on_a_cpu_without_a_limit_no_step_is_run() -> None:
    assert probe(48, None) == (48, [])


@pytest.mark.parametrize("limit_bytes", [PLENTY, need_bytes(2)])
def test_a_probe_leaves_no_trace(limit_bytes: int) -> None:
    model = normed()
    Step(model)(4)  # batch norm's statistics are no longer the initial ones
    model.zero_grad()
    twin, step = copy.deepcopy(model), Step(model)

    seed_everything("probed")
    before = everything(model)
    fitting_micro_batch(model, step, 8, Memory(CPU, limit_bytes), ALONE, {})
    assert step.asked
    assert_same(everything(model), before)
    step(6)
    seed_everything("probed")
    Step(twin)(6)
    assert_same(everything(model), everything(twin))
    assert all(gradient is not None for gradient in everything(twin)["gradients"])


class Counter(nn.Module):
    """Counts its calls in place, and in a buffer that is a new tensor every time."""

    def __init__(self) -> None:
        super().__init__()
        self.in_place: Tensor
        self.register_buffer("in_place", torch.zeros(1))
        self.anew: Tensor | None
        self.register_buffer("anew", None)

    def forward(self, samples: int) -> None:
        self.in_place += 1
        self.anew = self.in_place + 1
        raise ZeroDivisionError(f"after {random.random()}")


def test_no_trace_is_left_where_a_buffer_is_replaced_and_the_step_breaks() -> None:
    model = Counter()
    before = everything(model)
    with pytest.raises(ZeroDivisionError), leaving_no_trace(model, CPU):
        model(3)
    assert_same(everything(model), before)
    assert model.anew is None
    with pytest.raises(ZeroDivisionError):
        model(3)
    assert everything(model)["model"] != before["model"]


def test_a_sample_that_does_not_fit_is_out_of_memory_in_numbers() -> None:
    need = need_bytes(1)
    limit_bytes = need - 1_000
    message = f"a single sample .* needs at least {need / 2**20:.2f} MiB, the limit is {limit_bytes / 2**20:.2f} MiB"
    tried: dict[int, Tried] = {}
    for steps in ([5, 4, 2, 1], []):
        model = normed()
        step = Step(model)
        with pytest.raises(torch.OutOfMemoryError, match=message):
            fitting_micro_batch(model, step, 5, Memory(CPU, limit_bytes), ALONE, tried)
        assert step.asked == steps


def test_what_is_known_is_not_tried_again() -> None:
    tried: dict[int, Tried] = {}
    limit_bytes = need_bytes(7)
    assert probe(24, limit_bytes, tried) == (4, [24, 16, 8, 4])
    for share, fits in {24: 4, 48: 4, 4: 4, 3: 3, 1: 1, 16: 4}.items():
        assert probe(share, limit_bytes, tried) == (fits, [])
    assert probe(6, limit_bytes, tried) == (6, [6])
    assert probe(7, limit_bytes, tried) == (7, [7])
    assert probe(5, limit_bytes, tried) == (5, [])


def test_a_larger_share_tries_only_what_is_undecided() -> None:
    tried: dict[int, Tried] = {}
    limit_bytes = need_bytes(20)
    assert probe(3, limit_bytes, tried) == (3, [3])
    assert probe(24, limit_bytes, tried) == (16, [24, 16])
    assert probe(100, limit_bytes, tried) == (16, [])
    assert probe(20, limit_bytes, tried) == (20, [20])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_step_that_runs_out_of_memory_does_not_fit(error: type[Exception]) -> None:
    model = normed()
    step = Step(model, ran_out_from=4, error=error)
    before = everything(model)
    assert fitting_micro_batch(model, step, 12, MEMORY, ALONE, {}) == 2
    assert step.asked == [12, 8, 4, 2]
    assert_same(everything(model), before)


def test_any_other_error_passes_through_and_teaches_nothing() -> None:
    def broken(samples: int) -> None:
        raise RuntimeError(f"no kernel for {samples} samples")

    tried: dict[int, Tried] = {}
    with pytest.raises(RuntimeError, match="no kernel for 8 samples") as caught:
        fitting_micro_batch(normed(), broken, 8, MEMORY, ALONE, tried)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    assert tried == {}


def test_the_key_is_that_of_the_shape() -> None:
    def key(
        change: Callable[[Any], object] = lambda model: None,
        shape: tuple[int, ...] = (5, 3, 8, 8),
        dtype: torch.dtype = torch.float32,
        precision: str = "fp32",
        memory: Memory = MEMORY,
        ranks: Ranks = ALONE,
    ) -> Any:
        model = normed()
        change(model)
        return shape_key(model, {"x": torch.zeros(shape, dtype=dtype)}, precision, memory, ranks)

    same = [
        key(),
        key(shape=(6, 3, 8, 8)),
        key(ranks=Ranks(0, 1)),
        key(lambda model: setattr(model[3], "p", 0.4)),
        key(lambda model: nn.init.zeros_(model[0].weight)),
    ]
    assert len(set(same)) == 1
    others = [
        key(shape=(5, 3, 8, 9)),
        key(dtype=torch.uint8),
        key(precision="bf16"),
        key(memory=Memory(CPU, 1_000)),
        key(memory=Memory(CPU, PLENTY, 5)),
        key(ranks=Ranks(0, 2)),
        key(lambda model: model[0].requires_grad_(False)),
        key(lambda model: setattr(model[3], "p", 0.0)),
        key(lambda model: setattr(model[0], "stride", (2, 2))),
        key(lambda model: model.__setitem__(2, nn.Tanh())),
        key(lambda model: model.to(torch.bfloat16)),
        key(lambda model: model.eval()),
    ]
    assert len({*others, *same}) == len(others) + 1
    assert key(ranks=Ranks(0, 2)) == key(ranks=Ranks(1, 2))


def one_of_two(rank: int, folder: Path) -> None:
    """Probe where memory is short on one rank and not on the other."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    tight, loose = need_bytes(4), need_bytes(8)
    done: dict[str, Any] = {}

    def both(name: str, share: int, limit_bytes: int, tried: dict[int, Tried], ran_out_from: int = PLENTY) -> None:
        model = normed()
        step = Step(model, ran_out_from=ran_out_from)
        try:
            answer: Any = fitting_micro_batch(model, step, share, Memory(CPU, limit_bytes), ranks, tried)
        except torch.OutOfMemoryError as error:
            answer = str(error)
        done[name] = (answer, step.asked)

    tried: dict[int, Tried] = {}
    both("tight on 1", 24, tight if rank == 1 else PLENTY, tried)
    done["tried"] = dict(tried)
    both("again", 24, tight if rank == 1 else PLENTY, tried)
    both("tight on 0", 24, tight if rank == 0 else loose, {})
    both("ran out on 0", 12, PLENTY, {}, ran_out_from=4 if rank == 0 else PLENTY)
    both("ran out on 1", 12, PLENTY, {}, ran_out_from=3 if rank == 1 else PLENTY)
    both("one sample on 1", 2, 10_000 if rank == 1 else PLENTY, {})
    both("one sample ran out on 0", 1, loose, {}, ran_out_from=1 if rank == 0 else PLENTY)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


def test_cudnn_that_finds_no_engine_is_tried_with_fewer_samples_and_believed_with_one() -> None:
    """It says the same where its workspace does not fit and where it cannot do at all."""

    class NoEngine(RuntimeError):
        def __init__(self, _: str) -> None:
            super().__init__("FIND was unable to find an engine to execute this computation")

    model, tried = normed(), dict[int, Tried]()
    memory = Memory(CPU, PLENTY)
    assert fitting_micro_batch(model, Step(model, ran_out_from=3, error=NoEngine), 8, memory, ALONE, tried) == 2
    with pytest.raises(NoEngine, match="unable to find an engine"):
        fitting_micro_batch(model, Step(model, ran_out_from=1, error=NoEngine), 8, memory, ALONE, {})


@pytest.mark.parametrize("text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None])
def test_an_allocation_that_fails_outside_pytorchs_own_allocator_is_no_bug(text: str | None) -> None:
    """A library's handle, for which there is no room beside a batch that nearly fills the GPU; or a CPU's own."""
    model = normed()
    step = Step(model)

    def short_of_memory(samples: int) -> None:
        step(samples)
        if samples > 2 and text is None:
            torch.empty(2**59)
        elif samples > 2:
            raise RuntimeError(text)

    assert fitting_micro_batch(model, short_of_memory, 8, MEMORY, ALONE, {}) == 2
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        try_step(model, raising(RuntimeError("a bug")), 1, MEMORY)


def raising(error: Exception) -> Callable[[int], object]:
    def step(samples: int) -> None:
        raise error

    return step


@pytest.mark.slow
def test_two_ranks_agree_when_memory_is_short_on_one_of_them(tmp_path: Path) -> None:
    spawn(one_of_two, args=(tmp_path,), nprocs=2)
    rank0, rank1 = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1))
    assert rank0 == rank1
    assert rank0["tight on 1"] == (4, [24, 16, 8, 4])
    assert rank0["again"] == (4, [])
    assert rank0["tight on 0"] == (4, [24, 16, 8, 4])
    assert rank0["ran out on 0"] == (2, [12, 8, 4, 2])
    assert rank0["ran out on 1"] == (2, [12, 8, 4, 2])
    message, asked = rank0["one sample on 1"]
    assert asked == [2, 1]
    assert f"needs at least {need_bytes(1) / 2**20:.2f} MiB, the limit is {10_000 / 2**20:.2f} MiB" in message
    assert rank0["one sample ran out on 0"][1] == [1]
    assert "a single sample does not fit" in rank0["one sample ran out on 0"][0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_allocator_decides() -> None:
    device = torch.device("cuda")
    model = normed().to(device)
    step = Step(model, device)
    state = torch.cuda.get_rng_state()
    memory = Memory(device, PLENTY)
    assert fitting_micro_batch(model, step, 512, Memory(device), ALONE, {}) == 512
    need = try_step(model, step, 64, memory).need_bytes
    assert fitting_micro_batch(model, step, 512, replace(memory, limit_bytes=need), ALONE, {}) == 64
    assert try_step(model, step, 64, replace(memory, reserve_bytes=2**24)).need_bytes >= need + 2**24
    with pytest.raises(torch.OutOfMemoryError, match="a single sample does not fit"):
        fitting_micro_batch(model, step, 4, replace(memory, limit_bytes=None, reserve_bytes=PLENTY), ALONE, {})
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
