"""mamba-ssm's own reference implementation, which runs anywhere; of the package only Python files are needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

HOW_TO_GET_IT = "mamba-ssm's Python files are not there: `make .venv/mamba-ssm` installs them, without its kernels"
NOT_ON_A_CPU = ("causal_conv1d", "mamba_ssm.ops.triton.selective_state_update")  # theirs to do without


@dataclass(frozen=True)
class Reference:
    """selective_scan_ref(u, delta, A, B, C, D), and the layer mamba_simple.Mamba, which calls it for its scan."""

    scan: Callable[..., Tensor]
    layer: Callable[..., nn.Module]


def load_reference() -> Reference | None:
    """None where the package is not installed; HOW_TO_GET_IT then says what to do.

    It is imported past its __init__, which wants every one of its models, and with nothing in the place of the compiled
    parts: the reference calls none of them. Afterwards the imported modules are as they were, so that nobody takes
    this for the kernels.
    """
    folder = _folder()
    if folder is None:
        return None
    package = ModuleType("mamba_ssm")
    package.__path__ = [str(folder / "mamba_ssm")]
    layer_norm = ModuleType("mamba_ssm.ops.triton.layer_norm")
    vars(layer_norm).update(dict.fromkeys(("_layer_norm_fwd", "RMSNorm", "layer_norm_fn", "rms_norm_fn")))
    before, path = {name: module for name, module in sys.modules.items() if _theirs(name)}, list(sys.path)
    _replace_theirs(
        {module.__name__: module for module in (package, layer_norm, ModuleType("selective_scan_cuda"))}
        | dict.fromkeys(NOT_ON_A_CPU)
    )
    sys.path.append(str(folder))  # for einops
    try:
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
    finally:
        sys.path[:] = path
        _replace_theirs(before)
    vars(simple)["selective_scan_fn"] = interface.selective_scan_ref
    return Reference(interface.selective_scan_ref, simple.Mamba)


def _theirs(name: str) -> bool:
    return name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda", "causal_conv1d")


def _replace_theirs(modules: Mapping[str, ModuleType | None]) -> None:
    """Make these the imported modules of mamba-ssm; the import of one that is None fails."""
    for name in [name for name in sys.modules if _theirs(name)]:
        del sys.modules[name]
    sys.modules.update(modules)  # type: ignore[arg-type]  # None is documented, and typed as if it were not


def _folder() -> Path | None:
    """Where mamba_ssm lies: among the packages (the extra `gpu`), or where the Makefile puts its files."""
    found = importlib.util.find_spec("mamba_ssm")
    if found is not None and found.origin is not None:
        return Path(found.origin).parents[1]
    beside = Path(sys.prefix) / "mamba-ssm"
    return beside if beside.is_dir() else None
