"""What a trial finds in its process: as the import of its trainable has left it, and not as the trial before it did."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from search.workers.surroundings import Surroundings

# Of torch.backends: where a switch is read, and a statement that turns it.
SWITCHES = {
    **{
        f"{part}fp32_precision": f"{part}fp32_precision = '{value}'"
        for part, value in {
            "": "tf32",
            "cudnn.": "ieee",
            "cudnn.conv.": "ieee",
            "cudnn.rnn.": "ieee",
            "cuda.matmul.": "tf32",
            "mkldnn.": "bf16",
            "mkldnn.conv.": "bf16",
            "mkldnn.matmul.": "bf16",
            "mkldnn.rnn.": "bf16",
        }.items()
    },
    "cudnn.enabled": "cudnn.enabled = False",
    "cudnn.benchmark": "cudnn.benchmark = True",
    "cudnn.deterministic": "cudnn.deterministic = True",
    "cuda.matmul.allow_fp16_accumulation": "cuda.matmul.allow_fp16_accumulation = True",
    **{
        f"cuda.matmul.{name}": f"cuda.matmul.{name} = False"
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    },
    "cuda.fp16_bf16_reduction_math_sdp_allowed()": "cuda.allow_fp16_bf16_reduction_math_sdp(True)",
    **{
        f"cuda.{name}_sdp_enabled()": f"cuda.enable_{name}_sdp(False)"
        for name in ("flash", "mem_efficient", "math", "cudnn")
    },
}
READ = f"repr({{name: eval('torch.backends.' + name) for name in {list(SWITCHES)!r}}})"
SCOPE = {"gc": gc, "torch": torch, "np": np, "warnings": warnings, "logging": logging, "sys": sys}
LEGACY = (
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
)
MODES = (
    "torch.set_grad_enabled(False)",
    "torch.set_default_dtype(torch.float64)",
    "torch.set_default_device('meta')",
    "torch.use_deterministic_algorithms(True, warn_only=True)",
    "torch.autograd.set_detect_anomaly(True, check_nan=False)",
    "torch.set_autocast_enabled('cpu', True)",
    "torch.set_autocast_enabled('cuda', True)",
    "torch.set_autocast_dtype('cpu', torch.float16)",
    "torch.set_autocast_dtype('cuda', torch.bfloat16)",
    "torch.set_autocast_cache_enabled(False)",
    "torch.backends.mha.set_fastpath_enabled(False)",
    # What can be turned depends on the build of torch: a library that it lacks is refused.
    f"torch.backends.cuda.preferred_blas_library('{'cublaslt' if torch.version.cuda else 'ck'}')",
    *(("torch.backends.cuda.preferred_linalg_library('cusolver')",) if torch.version.cuda else ()),
    "torch.set_flush_denormal(True)",
    "torch.backends.mkldnn.enabled = False",
    "torch.utils.deterministic.fill_uninitialized_memory = False",
    "np.seterr(all='raise')",
    "warnings.filterwarnings('error', 'of a trial')",
    "logging.disable(logging.ERROR)",
    "sys.path.insert(0, 'elsewhere')",
    "gc.disable()",
    "torch.multiprocessing.set_start_method('spawn', force=True)",
    "torch.multiprocessing.set_sharing_strategy('file_system')",
)
TURNS = [*(f"torch.backends.{turn}" for turn in SWITCHES.values()), *LEGACY]
READ_MODES = """(
    torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(),
    torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
    torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled(),
    torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
    torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled(),
    torch.backends.mha.get_fastpath_enabled(),
    torch.backends.cuda.preferred_blas_library(), torch.backends.cuda.preferred_linalg_library(),
    bool(torch.full((), 1e-310, dtype=torch.float64, device="cpu") * 1.0 == 0),
    torch.backends.mkldnn.enabled,
    torch.utils.deterministic.fill_uninitialized_memory,
    np.geterr(), [each for each in warnings.filters if each[0] == "error"],
    logging.root.manager.disable, list(sys.path), gc.isenabled(),
    torch.multiprocessing.get_start_method(allow_none=True), torch.multiprocessing.get_sharing_strategy(),
)"""


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    fresh = Surroundings()
    yield
    fresh.restore()


def test_the_switches_of_torch_are_a_fresh_process_s_before_anything_turned_them() -> None:
    command = [sys.executable, "-c", f"import torch\nprint({READ})"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()
    assert eval(READ, SCOPE) == told


@pytest.mark.parametrize("turn", TURNS)
def test_a_trial_finds_a_switch_as_it_was_whatever_the_trial_before_has_turned(turn: str) -> None:
    before, surroundings = eval(READ, SCOPE), Surroundings()
    exec(turn, SCOPE)
    if "cudnn.allow_tf32" not in turn:  # which has an effect where there is cuDNN
        assert eval(READ, SCOPE) != before
    surroundings.restore()
    assert eval(READ, SCOPE) == before


@pytest.mark.parametrize("turn", TURNS)
def test_what_a_module_turns_when_it_is_imported_holds_in_every_trial(turn: str) -> None:
    exec(turn, SCOPE)
    of_the_module, surroundings = eval(READ, SCOPE), Surroundings()
    for other in TURNS:
        exec(other, SCOPE)
        surroundings.restore()
        assert eval(READ, SCOPE) == of_the_module, other


@pytest.mark.parametrize("turn", TURNS)
def test_what_is_part_of_a_whole_still_follows_it_after_a_trial(turn: str) -> None:
    whole, fresh = "torch.backends.fp32_precision = 'ieee'", Surroundings()
    exec(whole, SCOPE)
    as_in_a_fresh_process = eval(READ, SCOPE)
    fresh.restore()
    exec(turn, SCOPE)
    fresh.restore()
    exec(whole, SCOPE)
    assert eval(READ, SCOPE) == as_in_a_fresh_process


@pytest.mark.parametrize("turn", MODES)
def test_a_mode_of_torch_is_put_back(turn: str) -> None:
    before, surroundings = eval(READ_MODES, SCOPE), Surroundings()
    exec(turn, SCOPE)
    assert eval(READ_MODES, SCOPE) != before
    surroundings.restore()
    assert eval(READ_MODES, SCOPE) == before


def test_what_a_library_wants_ignored_stays_so_when_a_trial_has_imported_it() -> None:
    surroundings = Surroundings()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "of a trial")
        warnings.filterwarnings("ignore", "of a library")
        mine = warnings.filters[:2]
        surroundings.restore()
        assert mine[0] in warnings.filters
        assert mine[1] not in warnings.filters
        warnings.warn("of a library", stacklevel=1)
