"""The process state in which a trial begins: as the trainable's import left it, whatever ran there before."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.multiprocessing


def settle(seed: int, threads: int) -> None:
    """Seed the random number generators and set torch's number of threads."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)


class Surroundings:
    """A snapshot of the working directory, the environment, the standard streams, the import path, and switches.

    The switches are torch's, and those of Python and NumPy for warnings, errors, processes and garbage.
    """

    def __init__(self) -> None:
        self._folder, self._environment = _folder(), dict(os.environ)
        self._streams = sys.stdout, sys.stderr
        self._modes = {name: read() for name, (read, _) in _MODES.items()}
        self._precision = _Precision()

    def restore(self) -> None:
        sys.stdout, sys.stderr = self._streams
        if self._folder is not None and _folder() != self._folder:
            os.chdir(self._folder)
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in self._environment.items() if os.environ.get(name) != value})
        for name, (read, put) in _MODES.items():
            if read() != self._modes[name]:  # compared first: setting some of them imports a compiler
                put(self._modes[name])
        self._precision.restore()


def _folder() -> str | None:
    """Return the working directory; None if it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


_CPU = torch.device("cpu")
_BACKENDS: Any = torch.backends  # Any: its types do not know all parts
_CUDNN, _CUDA, _MKLDNN = _BACKENDS.cudnn, _BACKENDS.cuda, _BACKENDS.mkldnn


def _attribute(of: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(of, name), lambda value: setattr(of, name, value)


def _list(of: Callable[[], list[Any]]) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return how a list is read, and set in place, because others may hold it too."""

    def put(items: list[Any]) -> None:
        of()[:] = items

    return lambda: list(of()), put


def _flushes_denormals() -> bool:
    """Return whether torch rounds denormal numbers to 0, which it can be told and does not tell."""
    return bool(torch.full((), 1e-310, dtype=torch.float64, device=_CPU).mul(1.0) == 0)


def _fatal() -> list[Any]:
    """Return the filters that turn warnings into errors. Others may be those of a library that a trial imports."""
    return [each for each in warnings.filters if each[0] == "error"]


def _put_fatal(fatal: list[Any]) -> None:
    with warnings.catch_warnings():  # whose end makes Python forget what it has decided for each warning
        kept = [each for each in warnings.filters if each[0] != "error" or each in fatal]
    warnings.filters[:] = [*(each for each in fatal if each not in kept), *kept]  # type: ignore[index]


def _start_method() -> str | None:
    """Return how Python starts processes; None as long as it may still be chosen, which it may be once."""
    return multiprocessing.get_start_method(allow_none=True)


def _autocast(kind: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def put(mode: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(kind, mode[0])
        torch.set_autocast_dtype(kind, mode[1])

    return lambda: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)), put


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


# By name, how each is read and set.
_MODES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad": (torch.is_grad_enabled, torch.set_grad_enabled),
    "dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "device": (torch.get_default_device, lambda device: torch.set_default_device(None if device == _CPU else device)),
    "deterministic": (_deterministic, lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1])),
    **{f"autocast.{kind}": _autocast(kind) for kind in ("cpu", "cuda")},
    "autocast.cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "denormals": (_flushes_denormals, torch.set_flush_denormal),
    "mkldnn": _attribute(_MKLDNN, "enabled"),
    "mha": (_BACKENDS.mha.get_fastpath_enabled, _BACKENDS.mha.set_fastpath_enabled),
    "opt_einsum": _attribute(_BACKENDS.opt_einsum, "enabled"),
    "fill": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    "numpy": (np.geterr, lambda how: np.seterr(**how)),
    "warnings": (_fatal, _put_fatal),
    "logging": (lambda: logging.root.manager.disable, logging.disable),
    "path": _list(lambda: sys.path),
    "gc": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "start": (_start_method, lambda method: multiprocessing.set_start_method(method, force=True)),
    "sharing": (torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy),
    "anomaly": (_anomaly, lambda on: torch.autograd.set_detect_anomaly(*on)),
    **{f"cudnn.{name}": _attribute(_CUDNN, name) for name in ("enabled", "benchmark", "deterministic")},
    **{
        f"matmul.{name}": _attribute(_CUDA.matmul, name)
        for name in (
            "allow_fp16_accumulation",
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
        )
    },
    "reduced_attention": (_CUDA.fp16_bf16_reduction_math_sdp_allowed, _CUDA.allow_fp16_bf16_reduction_math_sdp),
    "flash": (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    "mem_efficient": (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    "math": (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
    "cudnn_attention": (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
    # Each of these two reads without an argument, and sets with one.
    **{name: (getattr(_CUDA, name),) * 2 for name in ("preferred_blas_library", "preferred_linalg_library")},
}


class _Precision:
    """The precision with which torch multiplies float32, which is set as a whole, by part, or in an older way."""

    # A whole comes before its parts: a part on which nothing is set follows the whole.
    PARTS = (
        _BACKENDS,
        *(_CUDNN, _CUDNN.conv, _CUDNN.rnn, _CUDA.matmul),
        *(_MKLDNN, _MKLDNN.conv, _MKLDNN.matmul, _MKLDNN.rnn),
    )

    def __init__(self) -> None:
        self._parts = [part.fp32_precision for part in self.PARTS]
        self._matmul = _readable(torch.get_float32_matmul_precision)
        self._tf32 = _readable(lambda: _CUDNN.allow_tf32)

    def restore(self) -> None:
        torch.set_float32_matmul_precision("highest")
        for part in self.PARTS:
            part.fp32_precision = "none"
        _CUDNN.allow_tf32 = True if self._tf32 is None else self._tf32
        if self._matmul is not None:
            torch.set_float32_matmul_precision(self._matmul)
        for part, then in zip(self.PARTS, self._parts, strict=True):
            if part.fp32_precision != then:
                part.fp32_precision = then


def _readable(read: Callable[[], Any]) -> Any:
    """Return what `read` gives; None if the newer API was used, after which torch refuses to report the older one."""
    try:
        return read()
    except RuntimeError:
        return None
