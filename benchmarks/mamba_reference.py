"""Loads mamba-ssm's own reference implementation, which runs anywhere and needs only the package's Python files."""

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
NOT_ON_A_CPU = ("causal_conv1d", "mamba_ssm.ops.triton.selective_state_update")  # optional imports of mamba-ssm


@dataclass(frozen=True)
class Reference:
    """selective_scan_ref(u, delta, A, B, C, D), and the layer mamba_simple.Mamba, which uses it as its scan."""

    scan: Callable[..., Tensor]
    layer: Callable[..., nn.Module]


def load_reference() -> Reference | None:
    """Import the reference; return None if the package is not installed (HOW_TO_GET_IT says what to do then).

    Its __init__, which imports every model, is bypassed, and the compiled parts, which the reference does not call, are
    replaced by empty modules. Afterwards sys.modules is restored, so that nothing mistakes these for the kernels.
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
    """Replace all imported modules of mamba-ssm by these; importing one that is None fails."""
    for name in [name for name in sys.modules if _theirs(name)]:
        del sys.modules[name]
    sys.modules.update(modules)  # type: ignore[arg-type]  # None is documented, and typed as if it were not


def _folder() -> Path | None:
    """Return mamba_ssm's parent folder: site-packages (the extra `gpu`), or where the Makefile puts it; else None."""
    found = importlib.util.find_spec("mamba_ssm")
    if found is not None and found.origin is not None:
        return Path(found.origin).parents[1]
    beside = Path(sys.prefix) / "mamba-ssm"
    return beside if beside.is_dir() else None
