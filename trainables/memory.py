"""Which micro-batch fits into memory: tried before the first training step, and agreed by all ranks.

On CUDA the peak is the allocator's. On a CPU an artificial limit is held against an exact count of the bytes in live
tensors, so that a limit means something on any machine.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainables.contract import memory_error
from trainables.resume import generators, set_generators
from trainables.samples import Batch, Ranks

MIB = 2**20
USABLE = 0.95  # of what a GPU has free: training allocates in another order than a try, and leaves gaps
NO_ENGINE = "unable to find an engine to execute this computation"  # cuDNN, also where its workspace does not fit


@dataclass(frozen=True)
class Memory:
    """What a rank may use of its device's memory.

    limit_bytes: most bytes in use at once; None: what the GPU has, and no limit at all on a CPU. Set on every rank or
        on none.
    reserve_bytes: what training will hold and is not there yet, such as the optimizer's state. The gradients are no
        part of it: they are in place whenever a step is tried.
    """

    device: torch.device
    limit_bytes: int | None = None
    reserve_bytes: int = 0


@dataclass(frozen=True)
class Tried:
    """What came of a training step on some number of samples; on several ranks, on the worst of them."""

    fits: bool
    need_bytes: int  # the peak; where memory ran out for real, as far as it came
    limit_bytes: int


def fitting_micro_batch(
    model: nn.Module, step: Callable[[int], object], share: int, memory: Memory, ranks: Ranks, tried: dict[int, Tried]
) -> int:
    """Return how many samples each rank may pass through the model at once: `share`, or a smaller power of two.

    step: runs forward and backward of that many samples through the plain `model`, and drops no gradient. It calls no
        collective: a rank that runs out of memory would leave the others waiting in it.
    share: the most samples a rank would ever pass at once, at least 1, the same on every rank.
    tried: what earlier probes of the same `shape_key` found, by the number of samples; extended in place. The same on
        every rank, because only steps whose outcome it does not imply are run, by all ranks together.

    On a CPU without a limit no step is run. Every step leaves no trace: see `leaving_no_trace`.
    Raises torch.OutOfMemoryError, on all ranks alike, where a single sample does not fit. Whatever else `step` raises
    passes through, on its rank alone.
    """
    if memory.limit_bytes is None and memory.device.type != "cuda":
        return share
    if ranks.size > 1 and not tried:
        # NCCL takes its buffers with the first collective: they must be there before the first try.
        dist.all_reduce(torch.zeros(1, device=memory.device))
    powers_below = [2**exponent for exponent in reversed(range((share - 1).bit_length()))]
    for samples in [share, *powers_below]:
        if implied(samples, tried) is None:
            tried[samples] = agreed(try_step(model, step, samples, memory), ranks, memory.device)
        if implied(samples, tried):
            return samples
    single = tried[1]
    raise torch.OutOfMemoryError(
        "a single sample does not fit into memory: a training step on it needs at least "
        f"{single.need_bytes / MIB:.2f} MiB, the limit is {single.limit_bytes / MIB:.2f} MiB"
    )


def implied(samples: int, tried: dict[int, Tried]) -> bool | None:
    """Return whether so many samples fit, as more of them did or fewer did not; None where neither is known."""
    if any(outcome.fits and samples <= other for other, outcome in tried.items()):
        return True
    return False if any(not outcome.fits and samples >= other for other, outcome in tried.items()) else None


def agreed(mine: Tried, ranks: Ranks, device: torch.device) -> Tried:
    """Return the outcome for all ranks together: it fits where it fits on every one of them."""
    if ranks.size == 1:
        return mine
    worst_3 = torch.tensor([mine.fits, -mine.need_bytes, mine.limit_bytes], dtype=torch.int64, device=device)
    dist.all_reduce(worst_3, op=dist.ReduceOp.MIN)
    fits, negative_need, limit = worst_3.tolist()
    return Tried(bool(fits), -negative_need, limit)


def try_step(model: nn.Module, step: Callable[[int], object], samples: int, memory: Memory) -> Tried:
    """Run a step on this rank, with gradients and the reserve in place, and leave no trace of it."""
    device, on_cuda = memory.device, memory.device.type == "cuda"
    release(device)
    limit_bytes = memory.limit_bytes
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        if limit_bytes is None:
            free_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            limit_bytes = int(USABLE * free_bytes)
    assert limit_bytes is not None
    live, ran_out, reserve = LiveBytes(model), False, None
    with leaving_no_trace(model, device):
        try:
            with contextlib.nullcontext() if on_cuda else live:
                reserve = torch.empty(memory.reserve_bytes, dtype=torch.uint8, device=device)
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
                step(samples)
        except (torch.OutOfMemoryError, MemoryError):
            ran_out = True
        except RuntimeError as error:
            if memory_error(str(error)) is None and (samples == 1 or NO_ENGINE not in str(error)):
                raise
            ran_out = True
    need_bytes = torch.cuda.max_memory_allocated(device) if on_cuda else live.peak
    del reserve
    release(device)
    return Tried(not ran_out and need_bytes <= limit_bytes, need_bytes, limit_bytes)


def release(device: torch.device) -> None:
    """Give back the GPU memory no longer used, so that no try depends on what was before it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, for as long as they live, on top of the model's own.

    peak: the most bytes at once, backward passes included; the same on every run, but for reference cycles that hold
    tensors. Not seen are an operator's own workspace, and tensors that were there before and are not the model's.
    """

    # torch.distributed._tools.mem_tracker, which counts the same, is private, takes a second to import and replaces
    # methods of PyTorch while it counts.

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = sum(storage.nbytes() for storage in storages([*model.parameters(), *model.buffers()]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        # A result in an operand's storage is a view of it or written in place: no new memory.
        for storage in storages(results) - storages((args, kwargs)):
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        self.peak = max(self.peak, self.now)
        return results

    def _add(self, size_bytes: int) -> None:
        self.now += size_bytes


def storages(tree: Any) -> set[torch.UntypedStorage]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {leaf.untyped_storage() for leaf in leaves if leaf.layout == torch.strided}  # a sparse tensor has none


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the global random generators and the model's buffers back afterwards, and drop its gradients."""
    drawn = generators(device)
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().to("cpu", copy=True)) for buffer in model.buffers()]
    try:
        yield
    finally:
        set_generators(drawn, device)
        for current, kept in buffers:  # a module may also assign a new tensor
            current.update(kept)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None


def shape_key(model: nn.Module, batch: Batch, precision: str, memory: Memory, ranks: Ranks) -> Hashable:
    """Return what is equal for trials whose training steps take the same memory, as far as the model shows it.

    That is its modules with their plain attributes, its parameters and buffers, the batch but for its size, and what is
    passed beside them. What a loss or a forward method reads from elsewhere is the caller's to add (`switches`).
    """
    modules = tuple((name, type(module).__qualname__, attributes(module)) for name, module in model.named_modules())
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    )
    samples = tuple((name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in sorted(batch.items()))
    return modules, tensors, samples, precision, memory, ranks.size


def attributes(module: nn.Module) -> Hashable:
    """Return a module's plain attributes, such as a stride; of a float, only whether it is zero.

    A rate of dropout decides whether there is a mask, and is searched: not every rate is worth a probe.
    """
    plain = (int, float, str)
    kept = {
        name: value
        for name, value in sorted(vars(module).items())
        if all(isinstance(each, plain) for each in (value if isinstance(value, tuple) else [value]))
    }
    return tuple((name, bool(value) if isinstance(value, float) else repr(value)) for name, value in kept.items())


def switches(settings: Any) -> Hashable:
    """Return what a dataclass of settings may change about a step's memory; of a float, only whether it is zero.

    A weight of zero may leave a part of the loss out, and is searched, as a rate of dropout is.
    """
    if is_dataclass(settings):
        return tuple((item.name, switches(getattr(settings, item.name))) for item in fields(settings))
    return bool(settings) if isinstance(settings, float) else repr(settings)
