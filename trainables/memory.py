"""Finds the micro-batch that fits into memory, by probe steps before the first training step; all ranks agree on it.

On CUDA the peak is the allocator's. On a CPU the configured limit is compared with an exact count of the bytes in live
tensors, so that a limit is meaningful on any machine.
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
USABLE = 0.95  # share of a GPU's free memory: training allocates in another order than the probe, and leaves gaps
NO_ENGINE = "unable to find an engine to execute this computation"  # cuDNN, also when its workspace does not fit


@dataclass(frozen=True)
class Memory:
    """How much of its device's memory a rank may use.

    limit_bytes: most bytes in use at once; None: all of the GPU's free memory, and no limit on a CPU. Must be set on
        every rank or on none.
    reserve_bytes: memory that training will hold but that is not yet allocated, such as the optimizer's state.
        Gradients are not included: they are allocated for every probe step.
    """

    device: torch.device
    limit_bytes: int | None = None
    reserve_bytes: int = 0


@dataclass(frozen=True)
class Tried:
    """The outcome of a probe step on some number of samples; with several ranks, the worst outcome."""

    fits: bool
    need_bytes: int  # peak; if memory really ran out, the peak until then
    limit_bytes: int


def fitting_micro_batch(
    model: nn.Module, step: Callable[[int], object], share: int, memory: Memory, ranks: Ranks, tried: dict[int, Tried]
) -> int:
    """Return how many samples each rank may pass through the model at once: `share`, or a smaller power of two.

    step: runs forward and backward on that many samples through the plain `model`, and keeps the gradients. It must
        call no collective: a rank that runs out of memory would leave the others waiting in it.
    share: the most samples a rank would ever pass at once, at least 1, the same on every rank.
    tried: outcomes of earlier probes with the same `shape_key`, by number of samples; extended in place. Must be equal
        on all ranks: together they run exactly the steps whose outcome it does not imply.

    On a CPU without a limit no step is run. Steps leave no trace: see `leaving_no_trace`.
    Raises torch.OutOfMemoryError on all ranks if a single sample does not fit. Any other exception from `step`
    propagates, on its rank only.
    """
    if memory.limit_bytes is None and memory.device.type != "cuda":
        return share
    if ranks.size > 1 and not tried:
        # NCCL allocates its buffers in the first collective: they must be in place before the first probe.
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
    """Return whether `samples` fit, if as many or more fitted or as many or fewer did not; None if unknown."""
    if any(outcome.fits and samples <= other for other, outcome in tried.items()):
        return True
    return False if any(not outcome.fits and samples >= other for other, outcome in tried.items()) else None


def agreed(mine: Tried, ranks: Ranks, device: torch.device) -> Tried:
    """Return the outcome for all ranks together: the step fits only if it fits on every rank."""
    if ranks.size == 1:
        return mine
    worst_3 = torch.tensor([mine.fits, -mine.need_bytes, mine.limit_bytes], dtype=torch.int64, device=device)
    dist.all_reduce(worst_3, op=dist.ReduceOp.MIN)
    fits, negative_need, limit = worst_3.tolist()
    return Tried(bool(fits), -negative_need, limit)


def try_step(model: nn.Module, step: Callable[[int], object], samples: int, memory: Memory) -> Tried:
    """Run a step on this rank with gradients and the reserve allocated; leave no trace, and return the outcome."""
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
    """Free unused GPU memory, so that no probe depends on what ran before it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors: the model's own, and those that operators create while the mode is active.

    peak: the most bytes at once, backward passes included; the same on every run, except for reference cycles that
    hold tensors. Operators' workspaces are not counted, nor are earlier tensors that are not the model's.
    """

    # torch.distributed._tools.mem_tracker counts the same, but is private, takes a second to import and patches
    # PyTorch's methods while it counts.

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = sum(storage.nbytes() for storage in storages([*model.parameters(), *model.buffers()]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        # A result that shares an operand's storage is a view or was written in place: no new memory.
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
    """On exit, restore the global random generators and the model's buffers, and clear its gradients."""
    drawn = generators(device)
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().to("cpu", copy=True)) for buffer in model.buffers()]
    try:
        yield
    finally:
        set_generators(drawn, device)
        for current, kept in buffers:  # a module may also have assigned a new tensor
            current.update(kept)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None


def shape_key(model: nn.Module, batch: Batch, precision: str, memory: Memory, ranks: Ranks) -> Hashable:
    """Return a key that is equal for trials whose training steps take the same memory, as far as the model shows it.

    It consists of the modules with their plain attributes, the parameters and buffers, the batch's shapes except its
    size, and the other arguments. Settings that a loss or forward method reads elsewhere must be added by the caller
    (`switches`).
    """
    modules = tuple((name, type(module).__qualname__, attributes(module)) for name, module in model.named_modules())
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    )
    samples = tuple((name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in sorted(batch.items()))
    return modules, tensors, samples, precision, memory, ranks.size


def attributes(module: nn.Module) -> Hashable:
    """Return a module's plain attributes, such as a stride; a float is reduced to whether it is non-zero.

    A dropout rate affects memory only by whether there is a mask, and is often searched: rates need no probe each.
    """
    plain = (int, float, str)
    kept = {
        name: value
        for name, value in sorted(vars(module).items())
        if all(isinstance(each, plain) for each in (value if isinstance(value, tuple) else [value]))
    }
    return tuple((name, bool(value) if isinstance(value, float) else repr(value)) for name, value in kept.items())


def switches(settings: Any) -> Hashable:
    """Return the settings in a dataclass that may affect a step's memory; a float is reduced to whether it is non-zero.

    Floats such as loss weights and dropout rates are searched, and only zero may switch a part of the step off.
    """
    if is_dataclass(settings):
        return tuple((item.name, switches(getattr(settings, item.name))) for item in fields(settings))
    return bool(settings) if isinstance(settings, float) else repr(settings)
