"""How one rank of a group handles a command: begin a trial, advance it by a report, end it cleanly."""

from __future__ import annotations

import gc
import math
import os
import pickle
import traceback
import types
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from search.space.loading import Trainable, load
from search.text import LONGEST_REASON, encodable, one_line, plain, said, short_line
from search.workers.messages import Answer, Begin, Blew, Broke, Command, Ended, GroupSpec, Leave, RanOut, Reported
from search.workers.states import Watch, load_state, save_state
from search.workers.surroundings import Surroundings, settle
from trainables.contract import Diverged, Report, Trial, UserError, default_device, memory_error

# GPU memory that PyTorch's allocator may hold, as a ratio of `memory_limit_mb`: it rounds up, and keeps blocks that lie
# between others. Beyond that, this process runs out of memory instead of its neighbour on the same GPU.
ALLOCATOR_ROOM = 1.1
LEFT_GROUPS = 16  # process groups that trials may leave: a few may be meant to stay, in trial.cache
LEAK_BYTES = 256 * 2**20  # GPU memory that an ended trial may leave behind: allocator rounding, cuDNN, cuBLASLt


class RankLoop:
    """One rank: keeps the trainable's module and cache from one trial to the next, and nothing else."""

    def __init__(self, spec: GroupSpec, rank: int, world_size: int, device: torch.device | None = None) -> None:
        self.rank = rank
        self._spec = spec
        self._world_size = world_size
        # Ray does not hide GPUs from a worker that was given none.
        self._device = (device or default_device()) if spec.gpus_per_worker else torch.device("cpu")
        self._cache: dict[Any, Any] = {}
        self._loaded: tuple[Trainable, Surroundings] | None = None  # with what its import left to put back
        self._reports: Generator[Any, None, None] | None = None
        self._knot: _Knot  # as old as the trial that gives them
        self._watch = Watch()
        self._joined, self._groups = torch.distributed.is_initialized(), _process_groups()
        if self._device.type == "cuda" and spec.memory_limit_mb is not None:
            bound(self._device, spec.memory_limit_mb)

    def handle(self, command: Command) -> Answer:
        """Carry out a command; whatever a trainable raises becomes an answer."""
        answer = self._attempt(lambda: self._carry_out(command))
        if not answer.ends:
            return answer
        if self._world_size > 1 and self._is_suspended() and not isinstance(command, Leave):
            return answer  # closing may wait for the other ranks, which do not know of this verdict: see Leave
        # Only here is the exception released, and with it the frames that held the model.
        closed = self._attempt(self._close)
        return replace(answer, clean=answer.clean and closed.clean and self._is_clean())

    def _attempt(self, act: Callable[[], Answer]) -> Answer:
        try:
            return act()
        except Diverged as error:
            return _blew(error)
        except UserError as error:
            return Broke(reason=short_line(said(error), type(error).__name__, LONGEST_REASON), final=True)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return RanOut(reason=one_line(said(error).strip().split("\n")[0], type(error).__name__))
        except BaseException as error:  # SystemExit, for one; Ctrl-C does not reach the thread of a rank
            if isinstance(error, RuntimeError) and (told := memory_error(said(error))):
                return RanOut(reason=told)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            told = short_line(f"{type(error).__name__}: {said(error)}", "")
            reason = f"{told} ({os.path.basename(frame.filename)}:{frame.lineno})"
            return Broke(clean=False, reason=reason, trace=traceback.format_exc())

    def _carry_out(self, command: Command) -> Answer:
        if isinstance(command, Leave):
            return Ended()
        if isinstance(command, Begin):
            self._begin(command)
        return self._advance()

    def _is_suspended(self) -> bool:
        """Return whether the trainable waits at a yield, rather than having ended by itself."""
        return getattr(self._reports, "gi_frame", None) is not None

    def _begin(self, begin: Begin) -> None:
        if self._loaded is None:
            trainable = load(self._spec.trainable, self._spec.paths)
            gc.freeze()  # imports stay; scanning them after every trial would take a fifth of a second
            self._loaded = trainable, Surroundings()
        trainable, surroundings = self._loaded
        surroundings.restore()
        settle(begin.seed, self._spec.cpus_per_worker)
        knot = _Knot()  # before the trial can freeze anything
        reports = trainable.train(
            Trial(
                config=trainable.config(begin.config),
                seed=begin.seed,
                rank=self.rank,
                world_size=self._world_size,
                device=self._device,
                resume=None if begin.resume is None else load_state(begin.resume),
                cache=self._cache,
                memory_limit_mb=self._spec.memory_limit_mb,
                number=begin.number,
            )
        )
        if not isinstance(reports, Generator):
            raise UserError(
                f"{self._spec.trainable} returned {type(reports).__name__}; a trainable is a generator: "
                "yield a report after every epoch"
            )
        self._reports, self._watch, self._knot = reports, Watch(), knot

    def _advance(self) -> Answer:
        assert self._reports is not None, "a trial is begun before it is advanced"
        try:
            report = next(self._reports)
        except StopIteration:
            return Ended()
        if self.rank != 0:
            return Reported()
        if not isinstance(report, Report):
            report = Report(report)
        metrics = numbers(report.metrics)
        for name in self._spec.required:
            if name not in metrics:
                raise UserError(f"the report has no metric `{name}`; it has {', '.join(metrics) or 'none'}")
            if not math.isfinite(metrics[name]):
                raise Diverged(f"{name} is {metrics[name]}")
        if report.state is None:
            return Reported(metrics=metrics)
        if not callable(report.state):
            told = f"the state of a report is a {type(report.state).__name__}"
            raise UserError(f"{told}; it must be a function that returns the state: state=lambda: {{...}}")
        state = report.state()
        if state is None:  # it would be read as having nothing to resume from
            raise UserError("the state of a report is None; its function must return what trial.resume is to be")
        if (found := self._watch.look(state)) is not None:
            raise Diverged(f"{found.where} of the state is {found.value}")
        try:
            return Reported(metrics=metrics, state=save_state(state))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            told = short_line(said(error), type(error).__name__)
            raise UserError(f"the state of a report cannot be saved: {told}; leave that out of it") from None

    def _close(self) -> Answer:
        """Let go of the trial: its generator, and through it model, optimizer and gradients."""
        reports, self._reports = self._reports, None
        if reports is None:
            return Ended()
        reports.close()
        del reports
        knot = weakref.ref(self._knot)
        del self._knot
        gc.collect()
        if knot() is not None:  # the trial has frozen what there was, and its model may be a knot, too
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        if self._device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each thread that computed, on an H100
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        return Ended()

    def _is_clean(self) -> bool:
        """Return whether the process is as before, and print why not: starting another takes long, and is not seen."""
        left = self._left_behind()
        if left is not None:
            print(f"the trial {left}: the processes of its group are replaced")
        return left is None

    def _left_behind(self) -> str | None:
        """Return what the trial did to the process group, or on the GPU beyond what the cache accounts for."""
        if torch.distributed.is_initialized() != self._joined:
            return f"{'destroyed its' if self._joined else 'left a'} process group"
        if (more := _process_groups() - self._groups) > LEFT_GROUPS:
            return f"is the latest of those that left {more} process groups, each with memory and sockets of its own"
        if self._device.type != "cuda":
            return None
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:  # an earlier kernel failed
            return "lost the CUDA context"
        left = torch.cuda.memory_allocated(self._device) - _cached_bytes(self._cache)
        if left <= LEAK_BYTES:
            return None
        return f"left {left / 2**20:.0f} MiB on the GPU, and what stays there has to be in trial.cache"


def _process_groups() -> int:
    """Return how many process groups there are; torch has no public count of those that have not been destroyed."""
    return len(torch.distributed.distributed_c10d._world.pg_map) if torch.distributed.is_available() else 0


class _Knot:
    """Something that, let go of, only the garbage collector finds, unless it was frozen (`gc.freeze`) by then."""

    def __init__(self) -> None:
        self.itself = self


def _blew(error: Diverged) -> Blew:
    """Convert an exception to text and plain values for the driver; a subclass may lack attributes of `Diverged`."""
    has = {name: getattr(error, name, None) for name in ("reason", "step", "details")}
    told = said(next(iter(error.args), "") if has["reason"] is None else has["reason"])
    reason = short_line(told, "diverged without giving a reason", LONGEST_REASON)
    step, details = plain(has["step"]), plain({} if has["details"] is None else has["details"])
    return Blew(
        reason=reason,
        step=step if isinstance(step, int) else None,
        details=details if isinstance(details, dict) else {"details": details},
    )


def bound(device: torch.device, limit_mb: float) -> None:
    """Limit this process's allocator on a GPU to `ALLOCATOR_ROOM` times `limit_mb`."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, ALLOCATOR_ROOM * limit_mb * 2**20 / total_bytes), device)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as floats; raises UserError for a value that is not a number."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"a trainable yields a Report or a dict of metrics, not {type(metrics).__name__}")
    found = {}
    for name, value in metrics.items():
        try:
            # Of tensors and arrays; fails with more than one element.
            item = value.item() if isinstance(value, (torch.Tensor, np.ndarray)) else value
            if isinstance(item, (str, bytes)):  # float() reads numbers from text, and "nan" is one of them
                raise TypeError
            found[encodable(str(name))] = math.nan if np.ma.is_masked(value) else float(item)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            told = short_line(repr(value), "")
            raise UserError(f"the metric `{name}` is {told}; a metric is a number, leave out what is none") from None
    return found


# Code refers to every global there is, and none of them belongs to the cache.
_DEAD_ENDS = (str, bytes, int, float, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


# The parts that hold a sparse tensor's memory; the tensor has no storage of its own.
_COMPRESSED = {"row": ("crow_indices", "col_indices", "values"), "column": ("ccol_indices", "row_indices", "values")}
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _COMPRESSED["row"],
    torch.sparse_bsr: _COMPRESSED["row"],
    torch.sparse_csc: _COMPRESSED["column"],
    torch.sparse_bsc: _COMPRESSED["column"],
}


def storages_of(tensor: torch.Tensor) -> set[torch.UntypedStorage]:
    """Return the storages that hold a tensor's numbers; other tensors may share them."""
    parts = [getattr(tensor, name)() for name in _PARTS.get(tensor.layout, ())] or [tensor]
    return {part.untyped_storage() for part in parts}


def _cached_bytes(cache: Mapping[Any, Any]) -> int:
    """Return the GPU memory, in bytes, of the tensors reachable from a trainable's cache."""
    seen: set[int] = set()
    stack: list[Any] = [cache]
    held: set[torch.UntypedStorage] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, _DEAD_ENDS):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            held |= storages_of(item) if item.is_cuda else set()
        else:
            stack += gc.get_referents(item)
    return sum(storage.nbytes() for storage in held)
